"""Samples a second of one peer's training: one worker, two threads of torch, and two workers that share each batch.

    python benchmarks/workers.py [--model mnist-wide-mse] [--seconds 20]

All take the same steps: same batches, same gradient of the whole batch, same optimiser, so that what is learnt a step
is equal.
The three take turns of a tenth of a second, so that all meet the same machine; the medians of the turns are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import data_folder

from gossipml.models.data import load_source, prepare, take_part
from gossipml.models.kernels_split import Split
from gossipml.models.partition import Part, Rule
from gossipml.models.registry import load_spec
from gossipml.models.training import LocalTrainer

TURN = 0.1  # seconds
WAYS = ((1, 1), (2, 1), (2, 2))  # cores, workers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mnist-wide-mse")
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    speeds = measure(arguments.model, arguments.seconds)
    one = statistics.median(speeds[Split(1, 1)])
    print(f"{arguments.model}, median of {len(speeds[Split(1, 1)])} turns each")
    for split, found in speeds.items():
        middle = statistics.median(found)
        print(f"{split!s:22} {middle:8.0f} samples/s (best {max(found):.0f})   {middle / one:.2f} times one worker")


def measure(model: str, seconds: float) -> dict[Split, list[float]]:
    """Samples a second of each turn; one worker comes first."""
    torch.set_flush_denormal(True)
    spec, data = prepare(load_spec(model), load_source(f"mnist:{data_folder() / 'mnist'}"))
    part = take_part(data, Rule("iid"), Part(1, 1), 0)
    trainers: dict[Split, LocalTrainer] = {}
    for cores, workers in WAYS:
        trainer = LocalTrainer(spec, part, network_id=b"", seed=0)
        trainers[trainer.use_cores(cores, workers)[0]] = trainer
    speeds: dict[Split, list[float]] = {split: [] for split in trainers}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for split, trainer in trainers.items():
            torch.set_num_threads(split.threads)
            speeds[split].append(turn(trainer))
    return speeds


def turn(trainer: LocalTrainer) -> float:
    """Samples a second."""
    trainer.step()  # threads wake up, caches fill
    start, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < TURN:
        trainer.step()
        steps += 1
    return steps * trainer.batch / seconds


if __name__ == "__main__":
    main()
