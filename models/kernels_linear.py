"""All steps of many peers with one linear layer in one compiled loop (`loops`), on a CPU, where numba is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gossipml.models.arrays import can_compile
from gossipml.models.batches import Samples
from gossipml.models.kernels_dense import dense_layers
from gossipml.models.kernels_layers import Linear
from gossipml.models.spec import Sgd, Spec

if TYPE_CHECKING:
    from gossipml.models import loops

MOST_BYTES = 1 << 18  # of weights; larger ones leave the cache between two blocks, where torch's products are faster


class LinearLoop:
    """Made by `linear_loop`. Not thread-safe."""

    def __init__(self, linear: Linear, squared: bool, samples: Samples) -> None:
        """`squared`: the loss is the squared error of classes, else the cross-entropy."""
        from gossipml.models import loops  # imports numba, which takes half a second

        assert samples.kept is not None
        self._loops = loops
        self._linear = linear
        self._squared = squared
        self._samples = samples
        self._inputs = samples.kept.view(len(samples), -1).numpy()
        self._room: loops.Room | None = None
        # Compiled, or read from numba's cache, now: not when the first peer trains, in each process by itself.
        nothing, sgd = torch.empty(0, linear.size), Sgd(0.0)
        self.descend(nothing, None, [], [], torch.empty(0, 0, 1, dtype=torch.int64), sgd)

    def descend(
        self,
        vectors: torch.Tensor,
        velocities: torch.Tensor | None,
        rows: Sequence[int],
        steps: Sequence[int],
        places: torch.Tensor,
        sgd: Sgd,
    ) -> list[bool]:
        """So many steps (n,) of the models in these rows (n,) of `vectors` (N, size), with their velocities
        (N, parameter_count) where there are some (`Sgd.has_velocity`), on the samples at `places` (steps, n, batch);
        which of them are finite afterwards: others, but for their velocities, are as they were."""
        linear, batch = self._linear, places.shape[2]
        if self._room is None or len(self._room[0]) < batch:
            self._room = self._loops.linear_room(batch, linear.inputs, linear.outputs)
        good: list[bool] = self._loops.train_linear(
            vectors.numpy(),
            np.empty((0, 0), dtype=np.float32) if velocities is None else velocities.numpy(),
            np.array(rows, dtype=np.int64),
            np.array(steps, dtype=np.int64),
            self._inputs,
            self._samples.all_targets.numpy(),
            places.numpy(),
            self._room,
            (linear.inputs, linear.outputs, linear.has_bias, self._squared),
            (
                np.float32(self._samples.scale),
                np.float32(sgd.learning_rate),
                np.float32(sgd.momentum),
                np.float32(sgd.weight_decay),
            ),
        ).tolist()
        return good


def linear_loop(spec: Spec, module: nn.Module, samples: Samples) -> LinearLoop | None:
    """For this module, where it is one linear layer with a loss that is known here; else, or without numba, None."""
    layers = dense_layers(module)
    loss = getattr(spec.loss, "standard_loss", None)
    if len(layers) != 1 or loss not in ("cross-entropy", "squared-error-of-classes") or not can_compile():
        return None
    (linear,) = layers
    kept = samples.kept
    if not isinstance(linear, Linear) or kept is None or kept.device.type != "cpu":
        return None
    small = 4 * linear.inputs * linear.outputs <= MOST_BYTES and kept.dtype in (torch.uint8, torch.float32)
    return LinearLoop(linear, loss == "squared-error-of-classes", samples) if small else None
