"""One optimiser step on the samples at some indices, by the caller alone or by a crew that shares it.

A crew's parameters lie with its workers while it trains (see `kernels_cut`), and not in the flat vector; `settle`
brings them there. The result is that of one worker, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from gossipml.models.batches import Feed, Samples
from gossipml.models.crew import Crew
from gossipml.models.crew_work import CutNetwork
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import Kernel
from gossipml.models.kernels_dense import DenseKernel, flow_of, outputs_of
from gossipml.models.kernels_layers import Flow, Layer, Linear
from gossipml.models.losses import Loss
from gossipml.models.optimise import FlatSgd, TorchOptimiser, moves


class Steps(Protocol):
    """One way to take them. Not thread-safe."""

    def take(self, indices: torch.Tensor, coming: torch.Tensor | None = None) -> torch.Tensor:
        """One step on the samples at `indices` (b,); the mean loss (1,), detached. `coming`: those of the next step,
        as far as is known."""

    def settle(self, *, optimiser: bool = False) -> None:
        """Call before the flat vector is read or changed between two steps; `optimiser`: its state, too."""


class LoneSteps:
    """By the caller."""

    def __init__(self, flat: FlatModule, kernel: Kernel, optimiser: FlatSgd | TorchOptimiser, samples: Samples) -> None:
        self._vectors, self._gradients = flat.vector.unsqueeze(0), flat.gradient.unsqueeze(0)
        self._kernel = kernel
        self._optimiser = optimiser
        self._samples = samples
        self._feed: Feed | None = None
        if isinstance(kernel, DenseKernel):  # autograd, or the user's module, might want samples for longer
            kernel.scale(samples.scale)
            self._feed = Feed(samples, scaled=False)

    def take(self, indices: torch.Tensor, coming: torch.Tensor | None = None) -> torch.Tensor:
        if self._feed is None:
            inputs, targets = (each.unsqueeze(0) for each in self._samples.at(indices))
        else:
            inputs, targets = self._feed.fetch(indices, 1), self._samples.targets(indices).unsqueeze(0)
        losses = self._kernel.accumulate(self._vectors, inputs, targets, self._gradients, self._optimiser.keep)
        self._optimiser.step()
        return losses

    def settle(self, *, optimiser: bool = False) -> None:
        """Everything is where it belongs."""


class CrewSteps:
    """By a crew. Other optimisers than `FlatSgd` are the caller's: workers then bring the gradient after each step."""

    def __init__(
        self,
        flat: FlatModule,
        layers: Sequence[Layer],
        loss: Loss,
        crew: Crew,
        optimiser: FlatSgd | TorchOptimiser,
        samples: Samples,
    ) -> None:
        """`layers` as `dense_layers` gives them, among them at least one pair."""
        self._vector, self._gradient = flat.vector, flat.gradient
        self._vectors, self._gradients = flat.vector.unsqueeze(0), flat.gradient.unsqueeze(0)
        self._layers, self._loss = layers, loss
        first = layers[0]
        assert isinstance(first, Linear), "a dense network begins with one"
        first.factor = samples.scale
        self._crew = crew
        self._optimiser = optimiser
        self._samples = samples
        self._most = 0
        self._fetched: tuple[torch.Tensor, Flow, torch.Tensor] | None = None
        self._values_away = self._velocity_away = False

    def take(self, indices: torch.Tensor, coming: torch.Tensor | None = None) -> torch.Tensor:
        if len(indices) > self._most:
            self._begin(len(indices))
        x, prepared = self._fetched_before(indices) or self._fetch(indices)
        self._give_away()
        with self._network.first.doing(lambda: self._look_ahead(coming)):
            losses = self._kernel.accumulate_prepared(self._vectors, x, prepared, self._gradients, self._optimiser.keep)
        if isinstance(self._optimiser, FlatSgd):
            self._move()
        else:
            self._network.store(self._gradient, velocity=True)
            self._optimiser.step()
            self._values_away = False
        return losses

    def settle(self, *, optimiser: bool = False) -> None:
        if self._values_away:
            self._network.first.forget()
            self._network.store(self._vector)
            self._values_away = False
        if optimiser and self._velocity_away:
            self._network.store(self._gradient, velocity=True)
            self._velocity_away = False

    def _fetched_before(self, indices: torch.Tensor) -> tuple[Flow, torch.Tensor] | None:
        fetched, self._fetched = self._fetched, None
        if fetched is not None and torch.equal(fetched[0], indices):
            return fetched[1:]
        self._network.first.forget()
        return None

    def _fetch(self, indices: torch.Tensor) -> tuple[Flow, torch.Tensor]:
        """Inputs, where the crew can reach them if it takes them, and prepared targets."""
        first = self._network.first
        if first.first:
            x = first.room(len(indices))
            self._samples.unscaled_into(indices, x.across)
        else:
            x = flow_of(self._samples.unscaled(indices).unsqueeze(0))
        return x, self._kernel.prepare(self._samples.targets(indices).unsqueeze(0))

    def _look_ahead(self, coming: torch.Tensor | None) -> None:
        if coming is None or len(coming) > self._most:
            return
        try:
            x, prepared = self._fetch(coming)
        except Exception:
            return  # it is raised when their turn comes
        self._fetched = coming, x, prepared
        if self._network.first.first and isinstance(self._optimiser, FlatSgd):
            self._network.first.begin(len(coming))

    def _begin(self, batch: int) -> None:
        """For so many samples a step."""
        self.settle(optimiser=True)
        optimiser, size = self._optimiser, len(self._gradient)
        sgd = optimiser.sgd if isinstance(optimiser, FlatSgd) else None
        self._network = CutNetwork(self._layers, self._crew, batch, size, sgd)
        self._kernel = DenseKernel(self._network.layers, self._loss, outputs_of(self._layers))
        self._most = batch
        if isinstance(optimiser, FlatSgd):
            step_alone = optimiser.step_of(self._network.alone)
            step_shared = moves(optimiser.sgd, [(share.values, share.velocity) for share in self._network.shares])

            def move() -> None:
                step_alone()
                step_shared()

            self._move = move

    def _give_away(self) -> None:
        """The parameters to the workers, and the velocities where they move the parameters."""
        if not self._values_away:
            self._network.load(self._vector)
            self._values_away = True
        if not self._velocity_away and isinstance(self._optimiser, FlatSgd):
            self._network.load(self._gradient, velocity=True)
            self._velocity_away = True
