"""Several cores for one batch: each worker thread takes a share of the samples, and their gradients are averaged.

The result is that of the whole batch, to rounding. Torch spreads single operations over its own threads instead, which
pays for large products only; `choose_split` measures both ways on the machine at hand.

Left out: models that draw numbers as they train (dropout), which threads would draw in another order each time, and
modules that need autograd, whose threads wait for Python.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch

from gossipml.errors import UserError
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import Kernel, ModuleKernel, kernel_for
from gossipml.models.spec import Spec

TRIALS = 5  # of each way; the fastest counts, since other programs can only slow one down
TRIAL_STEPS = 8
MAX_TRIAL_SECONDS = 1.0  # of each way: 20 steps of a network of 2 million parameters
GAIN = 0.9  # more than one thread must take at most this share of the time of one; else it is not worth the power


@dataclass(frozen=True)
class Split:
    """Worker threads, each with so many threads of torch."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} x {self.threads} thread{'s' * (self.threads > 1)}"


class SplitKernel:
    """See `Kernel`; for N = 1. One kernel a worker, since a kernel is not thread-safe."""

    def __init__(self, kernels: list[Kernel], threads: int) -> None:
        self._kernels = kernels
        self._others: list[torch.Tensor] = []  # gradients of all but the first
        # The caller is a worker, too. A thread of torch's has its own idea of how many it may use.
        self._pool = ThreadPoolExecutor(
            len(kernels) - 1, "gossipml-train", initializer=_begin_thread, initargs=(threads,)
        )

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        batch = inputs.shape[1]
        workers = min(len(self._kernels), batch)
        if len(self._others) < workers - 1:
            self._others = [torch.zeros_like(gradients) for _ in self._kernels[1:]]
        cuts = [batch * index // workers for index in range(workers + 1)]
        shares = [slice(start, stop) for start, stop in pairwise(cuts)]
        waiting = [
            self._pool.submit(kernel.accumulate, vectors, inputs[:, share], targets[:, share], gradient)
            for kernel, share, gradient in zip(self._kernels[1:], shares[1:], self._others, strict=False)
        ]
        # All is scaled by the first share in the end, also what is kept.
        losses = self._kernels[0].accumulate(
            vectors, inputs[:, shares[0]], targets[:, shares[0]], gradients, keep * batch / cuts[1]
        )
        for job, gradient, share in zip(waiting, self._others, shares[1:], strict=False):
            weight = (share.stop - share.start) / share.stop
            losses = losses.lerp(job.result(), weight)
            gradients.lerp_(gradient, weight)
        return losses


def make_kernel(spec: Spec, flat: FlatModule, split: Split) -> Kernel:
    """What trains the module of `flat`. UserError when several workers cannot."""
    kernel = kernel_for(spec, flat.module)
    if split.workers == 1:
        return kernel or ModuleKernel(spec, flat)
    if kernel is None or _draws(flat.module):
        raise UserError(
            f"the model {spec.name!r} is not a plain dense network, which several workers could share; use --workers 1 "
            f"(and --threads {split.workers} for as many threads)"
        )
    kernels = [kernel_for(spec, flat.module) for _ in range(split.workers)]
    return SplitKernel([kernel for kernel in kernels if kernel is not None], split.threads)


def choose_split(spec: Spec, flat: FlatModule, inputs: torch.Tensor, targets: torch.Tensor, threads: int) -> Split:
    """The fastest way to train on batches like this one with so many threads, found by trying on a copy."""
    ways = [Split(1, 1)]
    if threads > 1:
        ways += [Split(1, threads)]
        if kernel_for(spec, flat.module) is not None and not _draws(flat.module):
            ways += [Split(threads, 1)]
    best, least = ways[0], math.inf
    for way in ways[: len(ways) if threads > 1 else 0]:
        torch.set_num_threads(way.threads)
        with torch.random.fork_rng(devices=[]):
            seconds = _seconds(_trial(spec, flat, way, inputs, targets))
        if seconds < least * (GAIN if best == ways[0] else 1.0):
            best, least = way, seconds
    return best


def _trial(
    spec: Spec, flat: FlatModule, split: Split, inputs: torch.Tensor, targets: torch.Tensor
) -> Callable[[], object]:
    """What takes one step of a copy."""
    twin = FlatModule(copy.deepcopy(flat.module), inputs.device)
    kernel = make_kernel(spec, twin, split)
    vectors, gradients = twin.vector.unsqueeze(0), twin.gradient.unsqueeze(0)

    def step() -> None:
        kernel.accumulate(vectors, inputs.unsqueeze(0), targets.unsqueeze(0), gradients, 0.5)
        vectors[:, : twin.parameter_count].add_(gradients, alpha=-1e-6)

    return step


def _seconds(step: Callable[[], object]) -> float:
    """Of one step, the least of some trials."""
    step()
    least, until = float("inf"), time.perf_counter() + MAX_TRIAL_SECONDS
    for _ in range(TRIALS):
        start = time.perf_counter()
        for _ in range(TRIAL_STEPS):
            step()
        now = time.perf_counter()
        least = min(least, (now - start) / TRIAL_STEPS)
        if now > until:
            break
    return least


def _begin_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # holds for one thread; see `worker_main`


def _draws(module: torch.nn.Module) -> bool:
    return any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in module.modules())
