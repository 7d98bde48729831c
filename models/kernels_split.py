"""How many cores work at one batch, and how: workers that share it, or torch's own threads.

Torch spreads single operations over its threads, which pays for large products only; workers share the whole step (see
`steps`). `choose_split` measures both ways on the machine at hand.

Left out of sharing: models that draw numbers as they train (dropout), which threads would draw in another order each
time, and modules that need autograd, whose threads wait for Python.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from gossipml.errors import UserError
from gossipml.models.batches import Samples
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import ModuleKernel, kernel_for
from gossipml.models.kernels_dense import dense_kernel
from gossipml.models.optimise import FlatSgd, TorchOptimiser
from gossipml.models.spec import Sgd, Spec
from gossipml.models.steps import LoneSteps, SharedSteps, Steps

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


def make_steps(
    spec: Spec, flat: FlatModule, split: Split, optimiser: FlatSgd | TorchOptimiser, samples: Samples
) -> Steps:
    """What trains the module of `flat`. UserError when several workers cannot."""
    if split.workers == 1:
        return LoneSteps(flat, kernel_for(spec, flat.module) or ModuleKernel(spec, flat), optimiser, samples)
    kernels = [dense_kernel(spec, flat.module) for _ in range(split.workers)]
    dense = [kernel for kernel in kernels if kernel is not None]
    if not dense or _draws(flat.module):
        raise UserError(
            f"the model {spec.name!r} is not a plain dense network, which several workers could share; use --workers 1 "
            f"(and --threads {split.workers} for as many threads)"
        )
    return SharedSteps(flat, dense, optimiser, samples, split.threads)


def choose_split(
    spec: Spec, flat: FlatModule, samples: Samples, batch: int, threads: int
) -> tuple[Split, dict[Split, float]]:
    """The fastest way to train on batches of that size with so many threads, found by trying on a copy; and the seconds
    of a step for each way that was tried."""
    ways = [Split(1, 1)]
    if threads > 1:
        ways += [Split(1, threads)]
        if dense_kernel(spec, flat.module) is not None and not _draws(flat.module):
            ways += [Split(threads, 1)]
    measured: dict[Split, float] = {}
    for way in ways[: len(ways) if threads > 1 else 0]:
        torch.set_num_threads(way.threads)
        with torch.random.fork_rng(devices=[]):
            measured[way] = _seconds_of_step(spec, flat, way, samples, batch)
    best = min(measured, key=measured.__getitem__, default=ways[0])
    return (best if measured and measured[best] < GAIN * measured[ways[0]] else ways[0]), measured


def _seconds_of_step(spec: Spec, flat: FlatModule, split: Split, samples: Samples, batch: int) -> float:
    """Of a copy, the least of some trials."""
    twin = FlatModule(copy.deepcopy(flat.module), flat.vector.device)
    steps = make_steps(spec, twin, split, FlatSgd(twin, Sgd(1e-6, 0.5)), samples)
    indices = torch.arange(batch)
    steps.take(indices)
    least, until = float("inf"), time.perf_counter() + MAX_TRIAL_SECONDS
    for _ in range(TRIALS):
        start = time.perf_counter()
        for _ in range(TRIAL_STEPS):
            steps.take(indices)
        now = time.perf_counter()
        least = min(least, (now - start) / TRIAL_STEPS)
        if now > until:
            break
    return least


def _draws(module: torch.nn.Module) -> bool:
    return any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in module.modules())
