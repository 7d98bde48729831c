"""Built-in models of tables of any width: logistic regression to classes, linear regression to values.

Their numbers of inputs and outputs come from the data (`adapt`), and so does the normalisation: each peer subtracts
the means and divides by the deviations of the source it has. Peers that split one source agree on those exactly.
Where everybody has another file they differ a little, which is the price of needing no agreement: to fix one
normalisation, one order of columns and one list of classes for all, write a model file from one of the tables
(`gossipml models new my_model.py --data csv:FILE#LABEL`) and give it to every peer.

Names of classes and columns are part of what peers must have alike: two tables of equal width with other columns are
not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from gossipml.errors import UserError
from gossipml.models.spec import Array, Classifier, Facts, Json, Sgd, Spec, TensorSpec, standardise

if TYPE_CHECKING:
    import torch

SHAPELESS = "the model {!r} takes its shape from the data; name the data: --data csv:FILE#LABEL, or --data iris"


class Logistic(Classifier):
    """Softmax regression on standardised values: one layer, cross-entropy."""

    name = "logistic"
    data = "iris"
    batch = 16
    learning_rate = 0.1
    momentum = 0.9
    weight_decay = 1e-4  # classes that a line separates would otherwise push the weights to infinity
    input_shape = (1,)  # of the model before it has seen data, like the labels
    labels: tuple[str, ...] = ("0", "1")

    def __init__(self, facts: Facts | None = None) -> None:
        self._facts = facts
        if facts is not None:
            self.data = facts.source
            self.input_shape = (math.prod(facts.sample_shape),)
            self.labels = facts.labels
            self.features = facts.features
            self.mean, self.scale = facts.mean, facts.scale
            self.learning_rate = min(self.learning_rate, 20 / self.input_shape[0])  # the curvature grows with the width

    @property
    def agreed(self) -> tuple[str | float, ...]:
        """Not the normalisation: each peer has its own."""
        return (*self.labels, "|", *self.features)

    def adapt(self, facts: Facts) -> Spec:
        if not facts.labels:
            raise UserError(
                f"{facts.source!r} has values to predict and no classes; {self.name!r} tells classes apart: use linear"
            )
        if len(facts.labels) < 2:
            raise UserError(
                f"{facts.source!r} has one class only, {facts.labels[0]!r}; a model learns to tell two or more apart: "
                "add samples of another class, or use a model file that names all classes (gossipml models new)"
            )
        return type(self)(facts)

    def build(self) -> torch.nn.Module:
        from torch import nn

        if self._facts is None:
            raise UserError(SHAPELESS.format(self.name))
        layer = nn.Linear(self.input_shape[0], len(self.labels))
        nn.init.zeros_(layer.weight)  # the problem is convex: there is nothing to break the symmetry of
        nn.init.zeros_(layer.bias)
        return layer


class Linear:
    """Least squares on standardised values, to a standardised value: one layer. `accuracy` is R2, not below 0.

    Classes whose names are numbers (years, grades) are predicted as those numbers.
    """

    name = "linear"
    data = ""
    batch = 32
    outputs = (TensorSpec("value", "FP32", (-1, 1)),)
    labels: tuple[str, ...] = ()

    def __init__(self, facts: Facts | None = None) -> None:
        self._facts = facts
        width = math.prod(facts.sample_shape) if facts else 1
        self.inputs = (TensorSpec("input", "FP32", (-1, width)),)
        self.features = facts.features if facts else ()
        if facts is not None:
            self.data = facts.source
            self._mean, self._scale = facts.mean, facts.scale
            self._values = [float(label) for label in facts.labels]  # of the class numbers, where targets are those
            values = np.array(self._values or [facts.target_mean])
            self._middle = float(values.mean()) if self._values else facts.target_mean
            self._spread = (float(values.std()) if self._values else facts.target_scale) or 1.0

    @property
    def agreed(self) -> tuple[str | float, ...]:
        return (*self._values, "|", *self.features) if self._facts else ()

    def adapt(self, facts: Facts) -> Spec:
        for label in facts.labels:
            try:
                number = float(label)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise UserError(
                    f"{facts.source!r} has classes such as {label!r}, not values; {self.name!r} predicts values: use "
                    "--model logistic"
                )
        return Linear(facts)

    def build(self) -> torch.nn.Module:
        from torch import nn

        if self._facts is None:
            raise UserError(SHAPELESS.format(self.name))
        layer = nn.Linear(self.inputs[0].shape[1], 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def ingest(self, samples: Array) -> Array:
        return standardise(samples.reshape(len(samples), -1), self._mean, self._scale)

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        return [{"value": float(value)} for value in outputs[:, 0].astype(np.float64) * self._spread + self._middle]

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(outputs[:, 0], self._standard(targets, outputs))

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """R2 with the variance of the whole source, so that the mean over parts is that of all."""
        error = (outputs[:, 0] - self._standard(targets, outputs)).square().mean()
        return {"accuracy": max(0.0, 1.0 - float(error))}

    def optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> Sgd:
        # Steps diverge beyond 2 (1 + momentum) over the largest eigenvalue, which the number of columns bounds.
        width = math.prod(self.inputs[0].shape[1:])
        return Sgd(learning_rate=min(0.02, 0.5 / width), momentum=0.9)

    def _standard(self, targets: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        import torch

        if self._values:
            targets = torch.tensor(self._values, device=outputs.device, dtype=outputs.dtype)[targets]
        return (targets - self._middle) / self._spread
