"""Softmax regression on the pixels of MNIST as numbers from 0 to 1: 784-10, all weights 0 at the start."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from gossipml.models.spec import Array, Classifier, Sgd


class PixelLogistic(Classifier):
    name = "pixel-logistic"
    input_shape = (784,)
    labels = tuple("0123456789")

    def build(self) -> nn.Module:
        layer = nn.Linear(784, 10)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def ingest(self, samples: Array) -> Array:
        return np.multiply(samples.reshape(len(samples), 784), np.float32(1 / 255), dtype=np.float32)

    def optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> Sgd:
        return Sgd(0.1)
