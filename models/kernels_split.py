"""How many cores work at one batch, and how: workers that share the network, or torch's own threads.

Torch spreads single operations over its threads, which pays for large products only; workers share the whole step (see
`steps`). `choose_split` measures both ways on the machine at hand.

Left out of sharing: networks without two dense layers in a row, and modules that need autograd.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from gossipml.errors import UserError
from gossipml.models.batches import Samples
from gossipml.models.crew import Crew, hire
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import ModuleKernel, kernel_for
from gossipml.models.kernels_cut import find_pairs
from gossipml.models.kernels_dense import dense_layers
from gossipml.models.losses import loss_of
from gossipml.models.optimise import FlatSgd, TorchOptimiser, make_optimiser
from gossipml.models.spec import Spec
from gossipml.models.steps import CrewSteps, LoneSteps, Steps
from gossipml.models.tuning import Tuning

TRIALS = 5  # of each way; the fastest counts, since other programs can only slow one down
TRIAL_STEPS = 8
MAX_TRIAL_SECONDS = 1.0  # of each way: 20 steps of a network of 2 million parameters
GAIN = 0.9  # more than one thread must take at most this share of the time of one; else it is not worth the power


@dataclass(frozen=True)
class Split:
    """Workers, each with so many threads of torch."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} x {self.threads} thread{'s' * (self.threads > 1)}"


def make_steps(
    spec: Spec,
    flat: FlatModule,
    optimiser: FlatSgd | TorchOptimiser,
    samples: Samples,
    crew: Crew | None = None,
) -> Steps:
    """What trains the module of `flat`, with a crew or alone. UserError when a crew cannot."""
    if crew is None:
        return LoneSteps(flat, kernel_for(spec, flat.module) or ModuleKernel(spec, flat), optimiser, samples)
    if flat.vector.device.type != "cpu":
        raise UserError(f"several workers share a CPU, not a {flat.vector.device.type} device; use --workers 1")
    layers = dense_layers(flat.module)
    if not find_pairs(layers):
        raise UserError(
            f"the model {spec.name!r} has no two dense layers in a row, which several workers could share; use "
            f"--workers 1 (and --threads {crew.size} for as many threads)"
        )
    return CrewSteps(flat, layers, loss_of(spec), crew, optimiser, samples)


@dataclass(frozen=True)
class Choice:
    """The fastest way to train."""

    split: Split
    crew: Crew | None
    seconds: dict[Split, float]
    """Of a step, for each way that was tried."""


def choose_split(
    spec: Spec, flat: FlatModule, samples: Samples, batch: int, threads: int, tuning: Tuning | None = None
) -> Choice:
    """How to train on batches of that size with so many threads, found by trying on a copy."""
    alone = Split(1, 1)
    if threads == 1:
        return Choice(alone, None, {})
    crews: dict[Split, Crew | None] = {alone: None, Split(1, threads): None}
    if find_pairs(dense_layers(flat.module)):
        crews[Split(threads, 1)] = hire(threads - 1, 1)
    seconds: dict[Split, float] = {}
    for split, crew in crews.items():
        torch.set_num_threads(split.threads)
        with torch.random.fork_rng(devices=[]):
            seconds[split] = _seconds_of_step(spec, flat, crew, samples, batch, tuning or Tuning())
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] >= GAIN * seconds[alone]:
        best = alone
    return Choice(best, crews[best], seconds)


def _seconds_of_step(
    spec: Spec, flat: FlatModule, crew: Crew | None, samples: Samples, batch: int, tuning: Tuning
) -> float:
    """Of a copy, the least of some trials."""
    twin = FlatModule(copy.deepcopy(flat.module), flat.vector.device)
    optimiser = make_optimiser(twin, spec, tuning)
    steps = make_steps(spec, twin, optimiser, samples, crew)
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
