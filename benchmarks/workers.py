"""Samples a second of one peer's training: one worker, two threads of torch, and two workers that share each batch.

    python benchmarks/workers.py [--model mnist-wide-mse] [--seconds 20]

These three take the same steps: same batches, same gradient of the whole batch, same optimiser, so that what is learnt
a step is equal. This is the strict reading of "two workers": a step takes less time.

The last line is the other one, which data-parallel systems usually publish: two workers with a batch of 128 each,
whose gradients are averaged. That is a step on 256 samples: an epoch has half as many steps, and what is learnt in one
is another thing.

All take turns of half a second, so that they meet the same machine; the medians of the turns are compared. The first
steps of a turn do not count: others have had the caches, and helpers have gone to sleep, as between rounds of a peer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from common import data_folder

from gossipml.models.data import load_source, prepare, take_part
from gossipml.models.kernels_split import Split
from gossipml.models.partition import Part, Rule
from gossipml.models.registry import load_spec
from gossipml.models.training import LocalTrainer
from gossipml.models.tuning import Tuning

TURN = 0.5  # seconds
FIRST = 5  # steps that do not count; two workers take 5 to 10 ms longer for the first two together


@dataclass(frozen=True)
class Way:
    split: Split
    batches: int = 1
    """Of the model's own size, in one step."""

    def __str__(self) -> str:
        return f"{self.split}, {'one batch shared' if self.batches == 1 else 'a batch each'}"


ONE = Way(Split(1, 1))
SHARED = (ONE, Way(Split(1, 2)), Way(Split(2, 1)))
WAYS = (*SHARED, Way(Split(2, 1), 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mnist-wide-mse")
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    speeds = measure(arguments.model, arguments.seconds)
    one = statistics.median(speeds[ONE])
    print(f"{arguments.model}, median of {len(speeds[ONE])} turns each")
    for way, found in speeds.items():
        middle = statistics.median(found)
        print(f"{way!s:38} {middle:8.0f} samples/s (best {max(found):.0f})   {middle / one:.2f} times one worker")


def measure(model: str, seconds: float) -> dict[Way, list[float]]:
    """Samples a second of each turn; one worker comes first."""
    torch.set_flush_denormal(True)
    spec, data = prepare(load_spec(model), load_source(f"mnist:{data_folder() / 'mnist'}"))
    part = take_part(data, Rule("iid"), Part(1, 1), 0)
    trainers: dict[Way, LocalTrainer] = {}
    for way in WAYS:
        trainer = LocalTrainer(spec, part, network_id=b"", seed=0, tuning=Tuning(batch=way.batches * spec.batch))
        trainer.use_cores(way.split.workers * way.split.threads, way.split.workers)
        trainer.step()  # processes start
        trainers[way] = trainer
    speeds: dict[Way, list[float]] = {way: [] for way in trainers}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for way, trainer in trainers.items():
            torch.set_num_threads(way.split.threads)
            speeds[way].append(turn(trainer))
    return speeds


def turn(trainer: LocalTrainer) -> float:
    """Samples a second."""
    for _ in range(FIRST):
        trainer.step()  # threads wake up, caches fill
    start, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < TURN:
        trainer.step()
        steps += 1
    return steps * trainer.batch / seconds


if __name__ == "__main__":
    main()
