"""The models that come with gossipml, by name. Pictures are in `builtin_pictures`, tables in `builtin_tables`.

| name | what |
|---|---|
| `xor` | exclusive or of two bits: 2-8-1 |
| `digits-mlp` | the 8x8 digits of scikit-learn: 64-64-10 |
| `mnist-mlp` | 28x28 digits: 784-100-10 |
| `mnist-dense` | the same with dropout: 784-128-10 |
| `mnist-wide`, `mnist-wide-mse` | the same, 784-512-256-10, with cross-entropy and with mean squared error |
| `cifar-cnn` | 32x32 pictures, two convolutions with batch norm |
| `horses-humans` | 300x300 pictures, five convolutions |
| `logistic`, `linear` | regression on a table of any width, to classes and to values |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from gossipml.models.builtin_pictures import (
    CifarCnn,
    DigitsMlp,
    HorsesHumans,
    MnistDense,
    MnistMlp,
    MnistWide,
    MnistWideMse,
)
from gossipml.models.builtin_tables import Linear, Logistic
from gossipml.models.spec import Array, Json, Sgd, Spec, TensorSpec, standard_loss

if TYPE_CHECKING:
    import torch

__all__ = ["BUILTIN", "DigitsMlp", "MnistMlp", "Xor"]


class Xor:
    """Exclusive or of two bits `a` and `b`: 2-8-1, tanh, sigmoid."""

    name = "xor"
    data = "xor"
    batch = 16
    inputs = (TensorSpec("input", "FP32", (-1, 2)),)
    outputs = (TensorSpec("result", "INT64", (-1, 1)), TensorSpec("probability", "FP32", (-1, 1)))
    features = ("a", "b")
    labels = ("0", "1")

    def build(self) -> torch.nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())

    def ingest(self, samples: Array) -> Array:
        return np.asarray(samples, dtype=np.float32).reshape(len(samples), 2)

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        """`probability` is that of the answer 1."""
        return [{"result": int(p > 0.5), "probability": round(float(p), 6)} for p in outputs[:, 0]]

    @standard_loss("binary-cross-entropy")
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.binary_cross_entropy(outputs[:, 0], targets.to(outputs.dtype))

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": float(((outputs[:, 0] > 0.5) == (targets > 0)).float().mean())}

    def optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> Sgd:
        return Sgd(learning_rate=0.5, momentum=0.9)


_ALL = (
    Xor,
    DigitsMlp,
    MnistMlp,
    MnistDense,
    MnistWide,
    MnistWideMse,
    CifarCnn,
    HorsesHumans,
    Logistic,
    Linear,
)
BUILTIN: dict[str, type[Spec]] = {spec.name: spec for spec in _ALL}
