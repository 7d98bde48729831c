"""Built-in models of pictures.

Batch, learning rate and momentum of `digits-mlp` and `mnist-mlp` come from `benchmarks/train_speed.py` and from
averaging over 4 and 10 peers with uneven parts: the same numbers serve one process with all the data. Those of the
others are where one process learns fast without diverging (measured; see each).

Normalisation is fixed in the specification ("agreed"), so that a sample means the same to every peer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gossipml.models.sources_cifar import CLASSES as CIFAR_CLASSES
from gossipml.models.spec import Array, Classifier, Json, standard_loss

if TYPE_CHECKING:
    import torch

DIGITS = tuple("0123456789")


class DigitsMlp(Classifier):
    """8x8 pictures of digits, 64 values from 0 to 16: 64-64-10."""

    name = "digits-mlp"
    data = "digits"
    input_shape = (64,)
    picture: tuple[int, int, int] | None = (8, 8, 1)
    white = 16.0
    labels = DIGITS
    batch = 16
    learning_rate = 0.05
    momentum = 0.9

    def build(self) -> torch.nn.Module:
        return _perceptron(64, 64, 10)

    def ingest(self, samples: Array) -> Array:
        return np.multiply(samples.reshape(len(samples), 64), np.float32(1 / 16), dtype=np.float32)


class _Mnist(Classifier):
    """28x28 pictures of digits, 784 values from 0 to 255, or of clothes (Fashion-MNIST) and the like."""

    input_shape = (784,)
    picture = (28, 28, 1)
    labels = DIGITS
    batch = 32
    momentum = 0.9

    def ingest(self, samples: Array) -> Array:
        return np.multiply(samples.reshape(len(samples), 784), np.float32(1 / 255), dtype=np.float32)


class MnistMlp(_Mnist):
    """784-100-10.

    The rate is where four peers gain most over one process (350 steps each against 800 to 95 %), at some cost under
    labels:4 (0.952 after 60 rounds of 50 steps, 0.966 with 0.07).
    """

    name = "mnist-mlp"
    learning_rate = 0.1

    def build(self) -> torch.nn.Module:
        return _perceptron(784, 100, 10)


class MnistDense(_Mnist):
    """784-128-10 with dropout of a fifth between (the first network of TensorFlow's tutorial)."""

    name = "mnist-dense"
    learning_rate = 0.03

    def build(self) -> torch.nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


class MnistWide(_Mnist):
    """784-512-256-10."""

    name = "mnist-wide"
    batch = 128
    learning_rate = 0.1

    def build(self) -> torch.nn.Module:
        return _perceptron(784, 512, 256, 10)


class MnistWideMse(MnistWide):
    """784-512-256-10, trained to the mean squared error from the one-hot class: its outputs are near 0 and 1."""

    name = "mnist-wide-mse"
    learning_rate = 0.5  # the gradient of a mean over ten outputs is a fraction of cross-entropy's

    @standard_loss("squared-error-of-classes")
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(outputs, functional.one_hot(targets, len(self.labels)).to(outputs.dtype))

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        """`probabilities` are the outputs above 0, scaled to add up to 1."""
        shares = np.maximum(outputs.astype(np.float64), 0) + 1e-9
        shares /= shares.sum(axis=1, keepdims=True)  # (n, 10)
        return [
            {"label": self.labels[int(row.argmax())], "probabilities": [round(float(p), 6) for p in row]}
            for row in shares
        ]


class CifarCnn(Classifier):
    """32x32 RGB pictures, values from 0 to 255: conv 32, batch norm, pool, conv 64, batch norm, pool, dense 64,
    dropout, 10.

    A sample is (32, 32, 3), as `cifar10:` and `images:` give it; `ingest` brings the channels to the front.
    """

    name = "cifar-cnn"
    input_shape = (32, 32, 3)
    labels = CIFAR_CLASSES
    batch = 64
    learning_rate = 0.005
    momentum = 0.9
    # Of the 50,000 training pictures, 0 to 255.
    mean = (125.3, 123.0, 113.9)
    scale = (63.0, 62.1, 66.7)

    def build(self) -> torch.nn.Module:
        from torch import nn

        return nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(64 * 8 * 8, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)),
        )

    def ingest(self, samples: Array) -> Array:
        return _channels_first(samples, self.input_shape, self.mean, self.scale)


class HorsesHumans(Classifier):
    """300x300 RGBA pictures of horses and humans: conv 16, 32, 64, 64, 64, each with a 2x2 pool, spatial dropout,
    dense 512, 2 (the network that accompanies Moroney's `horse-or-human` pictures, with its alpha channel kept)."""

    name = "horses-humans"
    input_shape = (300, 300, 4)
    labels = ("horses", "humans")
    batch = 16
    learning_rate = 0.01
    momentum = 0.9
    mean = 127.5
    scale = 127.5

    def build(self) -> torch.nn.Module:
        from torch import nn

        layers: list[nn.Module] = []
        channels = 4
        for width in (16, 32, 64, 64, 64):
            layers += [nn.Conv2d(channels, width, 3), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        # 300 -> 149 -> 73 -> 35 -> 16 -> 7
        head = (nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 2))
        return nn.Sequential(*layers, nn.Dropout2d(0.2), *head)

    def ingest(self, samples: Array) -> Array:
        return _channels_first(samples, self.input_shape, (self.mean,) * 4, (self.scale,) * 4)


def _channels_first(samples: Array, shape: tuple[int, ...], mean: tuple[float, ...], scale: tuple[float, ...]) -> Array:
    """(n, height, width, channels) as float32 (n, channels, height, width), standardised by channel."""
    height, width, channels = shape
    pictures = samples.reshape(len(samples), height, width, channels)
    out = np.empty((len(samples), channels, height, width), dtype=np.float32)
    for channel in range(channels):
        np.subtract(pictures[..., channel], np.float32(mean[channel]), out=out[:, channel], casting="unsafe")
        out[:, channel] *= np.float32(1 / scale[channel])
    return out


def _perceptron(*widths: int) -> torch.nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
