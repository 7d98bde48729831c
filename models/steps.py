"""One optimiser step on the samples at some indices, by the caller alone or by a crew that shares it.

A crew's parameters lie with its workers while it trains (see `kernels_cut`), and not in the flat vector; `settle`
brings them there. The result is that of one worker, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from gossipml.models.batches import Samples
from gossipml.models.crew import Crew
from gossipml.models.crew_work import CutNetwork
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import Kernel
from gossipml.models.kernels_dense import DenseKernel
from gossipml.models.kernels_layers import Layer
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

    def take(self, indices: torch.Tensor, coming: torch.Tensor | None = None) -> torch.Tensor:
        inputs, targets = self._samples.at(indices)
        losses = self._kernel.accumulate(
            self._vectors, inputs.unsqueeze(0), targets.unsqueeze(0), self._gradients, self._optimiser.keep
        )
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
        self._layers, self._loss = layers, loss
        self._crew = crew
        self._optimiser = optimiser
        self._samples = samples
        self._most = 0
        self._fetched: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._values_away = self._velocity_away = False

    def take(self, indices: torch.Tensor, coming: torch.Tensor | None = None) -> torch.Tensor:
        inputs, targets = self._fetch(indices)
        if len(indices) > self._most:
            self._begin(len(indices))
        self._give_away()
        with self._network.first.doing(lambda: self._look_ahead(coming)):
            losses = self._kernel.accumulate(
                *(self._vector.unsqueeze(0), inputs.unsqueeze(0), targets.unsqueeze(0), self._gradient.unsqueeze(0)),
                self._optimiser.keep,
            )
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

    def _fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fetched, self._fetched = self._fetched, None
        if fetched is not None and torch.equal(fetched[0], indices):
            return fetched[1:]
        if self._most:
            self._network.first.forget()
        return self._samples.at(indices)

    def _look_ahead(self, coming: torch.Tensor | None) -> None:
        if coming is None or len(coming) > self._most:
            return
        try:
            inputs, targets = self._samples.at(coming)
        except Exception:
            return  # it is raised when their turn comes
        self._fetched = coming, inputs, targets
        if self._network.first.first and isinstance(self._optimiser, FlatSgd):
            self._network.first.begin(inputs.reshape(len(inputs), -1).t())

    def _begin(self, batch: int) -> None:
        """For so many samples a step."""
        self.settle(optimiser=True)
        optimiser, size = self._optimiser, len(self._gradient)
        sgd = optimiser.sgd if isinstance(optimiser, FlatSgd) else None
        self._network = CutNetwork(self._layers, self._crew, batch, size, sgd)
        self._kernel = DenseKernel(self._network.layers, self._loss)
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
