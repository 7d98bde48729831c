"""Time to an accuracy: N peers on parts of MNIST against one process with two threads on all of it.

    python benchmarks/train_speed.py --data mnist:DIR [--peers 4] [--target 0.95] [--steps 50] [--repeat 3]

Both use the same model, settings, training loop and way to choose what is evaluated. The peers are worker
processes as the daemon starts them (one thread each, nice 10; the one process is as nice); this program does
what the network does otherwise: after each round a peer's parameters go, encoded, to the others, who merge them
between two batches. Evaluation time is in neither figure: after every `--look` rounds the peers wait for each
other, which counts, and are measured, which does not. Steps are printed too: they do not depend on what else the
machine does.

It prints seconds of both, their ratio (the aim is 1.3 at most), and the memory of a worker.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from gossipml.config import PeerConfig
from gossipml.daemon.worker import WorkerTrainer, open_worker
from gossipml.models.encoding import ENCODINGS

MAX_STEPS = 20_000  # a peer; a target that is out of reach ends the run

CENTRAL = """
import json, os, sys
os.nice(10)
import torch
from gossipml.models.central import train_central
from gossipml.models.data import load_source
from gossipml.models.registry import load_spec
model, source, target, threads, seed, look = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.set_flush_denormal(True)
result = train_central(load_spec(model), load_source(source), until=float(target), seed=int(seed), every=int(look))
print(json.dumps([result.seconds, result.steps, result.accuracy]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mnist-mlp")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="iid")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps a round")
    parser.add_argument("--look", type=int, default=1, help="rounds between two measurements of the accuracy")
    parser.add_argument("--receivers", type=int, default=3)
    parser.add_argument("--encoding", default="int8", choices=ENCODINGS)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    central, peers = [], []
    for seed in range(options.repeat):  # in turn, so that a busy minute hits both
        seconds, steps, accuracy = train_alone(options, seed)
        print(f"one process, two threads: {seconds:.2f} s, {steps} steps, accuracy {accuracy:.4f}")
        central.append(seconds)
        seconds, steps, accuracy, memory = trio.run(train_together, options, seed)
        print(f"{options.peers} peers: {seconds:.2f} s, {steps} steps each, mean accuracy {accuracy:.4f}")
        peers.append(seconds)
    ratio = statistics.median(peers) / statistics.median(central)
    print(f"median: one process {statistics.median(central):.2f} s, peers {statistics.median(peers):.2f} s")
    print(f"ratio {ratio:.2f} (aim: at most 1.30)")
    print(f"memory of a worker at the end: {memory / 1e6:.0f} MB")


def train_alone(options: argparse.Namespace, seed: int) -> tuple[float, int, float]:
    """Seconds, steps and accuracy of one process with two threads."""
    look = options.steps * options.look
    arguments = [options.model, options.data, str(options.target), "2", str(seed), str(look)]
    done = subprocess.run([sys.executable, "-c", CENTRAL, *arguments], check=True, capture_output=True, text=True)
    seconds, steps, accuracy = json.loads(done.stdout)
    return seconds, steps, accuracy


async def train_together(options: argparse.Namespace, seed: int) -> tuple[float, int, float, int]:
    """Seconds, steps and mean accuracy of the peers, and the resident bytes of one."""
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        workers = []
        for number in range(1, options.peers + 1):
            config = PeerConfig(
                model=options.model,
                data=options.data,
                split=options.split,
                part=(number, options.peers),
                device="cpu",
                seed=seed,
            )
            workers.append(await stack.enter_async_context(open_worker(config, b"benchmark")))
        seconds, rounds, accuracy = 0.0, 0, 0.0
        while accuracy < options.target:
            if rounds * options.steps >= MAX_STEPS:
                raise SystemExit(
                    f"{options.target} was not reached in {MAX_STEPS} steps; the accuracy is {accuracy:.4f}"
                )
            start = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(train_rounds, worker, workers, options, chance)
            seconds += time.perf_counter() - start
            rounds += options.look
            found = [await worker.evaluate() for worker in workers]
            accuracy = statistics.mean(evaluation.accuracy for evaluation in found if evaluation)
        return seconds, rounds * options.steps, accuracy, resident(workers[0].pid)


async def train_rounds(
    worker: WorkerTrainer, workers: list[WorkerTrainer], options: argparse.Namespace, chance: random.Random
) -> None:
    others = [other for other in workers if other is not worker]
    for _ in range(options.look):
        await worker.train(options.steps)
        update = await worker.snapshot(options.encoding)
        async with trio.open_nursery() as nursery:
            for other in chance.sample(others, min(options.receivers, len(others))):
                nursery.start_soon(other.merge, update, options.encoding, 0.5)


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
