"""All steps of many small dense networks in one compiled loop (`loops_dense`), on a CPU, where numba is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gossipml.models.arrays import can_compile
from gossipml.models.batches import Samples
from gossipml.models.kernels_dense import dense_layers
from gossipml.models.kernels_layers import Activation, Layer, Linear
from gossipml.models.spec import Sgd, Spec

if TYPE_CHECKING:
    from gossipml.models import loops_dense

MOST_BYTES = 1 << 20  # of weights; larger ones leave the cache from one step to the next


class DenseLoop:
    """Made by `dense_loop`. Not thread-safe."""

    def __init__(self, linear: Sequence[Linear], squared: bool, samples: Samples) -> None:
        """`squared`: the loss is the squared error of classes, else the cross-entropy."""
        from gossipml.models import loops_dense  # imports numba, which takes half a second

        assert samples.kept is not None
        self._loops = loops_dense
        self._shapes = [(layer.inputs, layer.outputs) for layer in linear]
        self._layers = np.array([(each.inputs, each.outputs, each.has_bias, each.offset) for each in linear])
        self._squared = squared
        self._samples = samples
        self._inputs = samples.kept.view(len(samples), -1).numpy()
        self._room: loops_dense.Room | None = None
        # Compiled, or read from numba's cache, now: not when the first peer trains, in each process by itself.
        nothing, sgd = torch.empty(0, linear[-1].offset + linear[-1].size), Sgd(0.0)
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
        batch = places.shape[2]
        if self._room is None or len(self._room.x[0]) < batch:
            self._room = self._loops.dense_room(batch, self._shapes)
        good: list[bool] = self._loops.train_dense(
            vectors.numpy(),
            np.empty((0, 0), dtype=np.float32) if velocities is None else velocities.numpy(),
            np.array(rows, dtype=np.int64),
            np.array(steps, dtype=np.int64),
            self._inputs,
            self._samples.all_targets.numpy(),
            places.numpy(),
            self._room,
            self._layers,
            self._squared,
            (
                np.float32(self._samples.scale),
                np.float32(sgd.learning_rate),
                np.float32(sgd.momentum),
                np.float32(sgd.weight_decay),
            ),
        ).tolist()
        return good


def dense_loop(spec: Spec, module: nn.Module, samples: Samples) -> DenseLoop | None:
    """For this module, where it is small, made of linear layers with ReLU between them, and has a loss that is known
    here; else, or without numba, None."""
    linear = _linear_layers(dense_layers(module))
    loss = getattr(spec.loss, "standard_loss", None)
    kept = samples.kept
    if not linear or kept is None or kept.device.type != "cpu" or kept.dtype not in (torch.uint8, torch.float32):
        return None
    small = 4 * sum(layer.size for layer in linear) <= MOST_BYTES
    if not small or loss not in ("cross-entropy", "squared-error-of-classes") or not can_compile():
        return None
    return DenseLoop(linear, loss == "squared-error-of-classes", samples)


def _linear_layers(layers: Sequence[Layer]) -> list[Linear]:
    """Of those that are linear and ReLU in turns, beginning and ending with a linear one; of others none."""
    linear = [layer for layer in layers[::2] if isinstance(layer, Linear)]
    between = [layer for layer in layers[1::2] if isinstance(layer, Activation) and layer.kind == "ReLU"]
    return linear if len(linear) == len(between) + 1 and len(linear) + len(between) == len(layers) else []
