"""One optimiser step on the samples at some indices, by one worker or by several that share it.

Several workers (threads) share a step twice. First the samples: each fetches its share of them and takes it forward
and backward through the network, up to the gradients of the layers' outputs. Then the parameters: each makes the
gradient of its share of the weights, from all samples, and moves these weights. So nothing is added up afterwards, and
a worker's weights and gradients stay in the cache of its core. The result is that of one worker, to rounding.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import torch

from gossipml.models.batches import Samples
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import Kernel
from gossipml.models.kernels_dense import DenseKernel
from gossipml.models.optimise import FlatSgd, TorchOptimiser

Job: TypeAlias = Callable[[int], "torch.Tensor | None"]
_Done: TypeAlias = "tuple[int, torch.Tensor | None, BaseException | None]"


class Steps(Protocol):
    """One way to take them. Not thread-safe."""

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """One step on the samples at `indices` (b,); the mean loss (1,), detached."""


class LoneSteps:
    """By the caller."""

    def __init__(self, flat: FlatModule, kernel: Kernel, optimiser: FlatSgd | TorchOptimiser, samples: Samples) -> None:
        self._vectors, self._gradients = flat.vector.unsqueeze(0), flat.gradient.unsqueeze(0)
        self._kernel = kernel
        self._optimiser = optimiser
        self._samples = samples

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        inputs, targets = self._samples.at(indices)
        losses = self._kernel.accumulate(
            self._vectors, inputs.unsqueeze(0), targets.unsqueeze(0), self._gradients, self._optimiser.keep
        )
        self._optimiser.step()
        return losses


class SharedSteps:
    """By a kernel for each worker, since a kernel is not thread-safe."""

    def __init__(
        self,
        flat: FlatModule,
        kernels: list[DenseKernel],
        optimiser: FlatSgd | TorchOptimiser,
        samples: Samples,
        threads: int,
    ) -> None:
        """`threads`: of torch's for each worker."""
        self._vectors, self._gradients = flat.vector.unsqueeze(0), flat.gradient.unsqueeze(0)
        self._kernels = kernels
        self._optimiser = optimiser
        self._samples = samples
        self._crew = Crew(len(kernels), threads)
        count = len(kernels)
        self._parts = [
            [layer.part(index, count, bias=place % count == index) for place, layer in enumerate(kernel.linear)]
            for index, kernel in enumerate(kernels)
        ]
        # Other optimisers than SGD on the vector need the whole gradient.
        self._moves: list[Callable[[], None]] = []
        if isinstance(optimiser, FlatSgd):
            for kernel, parts in zip(kernels, self._parts, strict=True):
                ranges = [layer.ranges(part) for layer, part in zip(kernel.linear, parts, strict=True)]
                self._moves.append(optimiser.step_of([place for places in ranges for place in places]))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        batch, count = len(indices), len(self._kernels)
        cuts = [batch * index // count for index in range(count + 1)]
        shares = [slice(start, stop) for start, stop in pairwise(cuts)]
        working = [kernel for kernel, share in zip(self._kernels, shares, strict=True) if share.start < share.stop]

        def propagate(index: int) -> torch.Tensor | None:
            share = shares[index]
            if share.start == share.stop:  # fewer samples than workers
                self._kernels[index].bind(self._vectors, self._gradients)
                return None
            inputs, targets = self._samples.at(indices[share])
            return self._kernels[index].propagate(
                self._vectors,
                inputs.unsqueeze(0),
                targets.unsqueeze(0),
                self._gradients,
                (share.stop - share.start) / batch,
            )

        def weigh(index: int) -> None:
            own = self._kernels[index].linear
            for place in reversed(range(len(own))):
                keep = self._optimiser.keep
                for kernel in working:
                    own[place].weigh(kernel.linear[place], keep, self._parts[index][place])
                    keep = 1.0
            if self._moves:
                self._moves[index]()

        losses = [loss for loss in self._crew.each(propagate) if loss is not None]
        self._crew.each(weigh)
        if not self._moves:
            self._optimiser.step()
        return torch.stack(losses).sum(0)


class Crew:
    """Threads that do a job together. The caller is the first of them."""

    def __init__(self, size: int, threads: int) -> None:
        self._boxes: list[SimpleQueue[Job | None]] = [SimpleQueue() for _ in range(size - 1)]
        self._done: SimpleQueue[_Done] = SimpleQueue()
        for index, box in enumerate(self._boxes, 1):
            arguments = (index, box, self._done, threads)
            threading.Thread(target=_work, args=arguments, daemon=True, name=f"gossipml-train-{index}").start()
        weakref.finalize(self, _dismiss, self._boxes)  # the threads know the boxes alone

    def each(self, job: Job) -> list[torch.Tensor | None]:
        """What `job` gives for each member, 0 and up. When one raises, so does this, after all have ended."""
        for box in self._boxes:
            box.put(job)
        done = [_attempt(job, 0), *[self._done.get() for _ in self._boxes]]
        for _, _, error in done:
            if error is not None:
                raise error
        return [result for _, result, _ in sorted(done, key=lambda one: one[0])]


def _work(index: int, box: SimpleQueue[Job | None], done: SimpleQueue[_Done], threads: int) -> None:
    torch.set_num_threads(threads)  # a thread of torch's has its own idea of how many it may use
    torch.set_flush_denormal(True)  # holds for one thread; see `worker_main`
    while (job := box.get()) is not None:
        done.put(_attempt(job, index))
        del job  # it holds what waits to be collected


def _attempt(job: Job, index: int) -> _Done:
    try:
        return index, job(index), None
    except BaseException as error:
        return index, None, error


def _dismiss(boxes: list[SimpleQueue[Job | None]]) -> None:
    for box in boxes:
        box.put(None)
