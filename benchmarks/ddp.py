"""Four peers against torch DistributedDataParallel (gloo, four ranks): wall time to 97 % MNIST test accuracy.

    python benchmarks/ddp.py [--model mnist-mlp] [--target 0.97] [--runs 3] [--seconds 15]

The same network, a quarter of the data and the same batch for each peer and each rank, one torch thread each, on this
machine, in turns. For DDP the learning rate that is fastest of a few: four ranks take one step of a batch four times
as large. Its ranks hold their samples as float32 tensors from the beginning; the peers are whole ones (see
`four_peers`). Time runs from when all are loaded and connected; measuring the accuracy is in neither figure.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

from common import data_folder
from four_peers import PEERS, peers

RATES = (0.1, 0.2)
LOOK = 20  # steps between two measurements of DDP
LIMIT = 120.0  # seconds of a run of DDP, with its import of torch


def rank(model_name: str, source: str, target: float, rate: float, limit: float) -> None:
    """One rank of DDP; the first prints its result as JSON. Where torch.distributed finds the others is in the
    environment."""
    import torch
    from torch import distributed, nn

    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    distributed.init_process_group("gloo")
    me, ranks = distributed.get_rank(), distributed.get_world_size()
    spec, data = load_spec(model_name), load_source(source)
    inputs, targets = torch.from_numpy(spec.ingest(data.train.inputs[me::ranks])), data.train.targets[me::ranks]
    labels, shown = torch.from_numpy(targets), torch.from_numpy(spec.ingest(data.test.inputs[:]))
    expected = torch.from_numpy(data.test.targets)
    torch.manual_seed(0)
    module = spec.build()
    parallel = nn.parallel.DistributedDataParallel(module)
    optimiser = torch.optim.SGD(parallel.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(me)
    result = torch.zeros(3)  # whether to go on, seconds, accuracy: as the first rank sees them
    result[0] = 1
    seconds, steps = 0.0, 0
    while result[0]:
        order = torch.randperm(len(inputs), generator=generator)
        for first in range(0, len(order) - spec.batch * LOOK, spec.batch * LOOK):
            distributed.barrier()
            start = time.perf_counter()
            for batch in order[first : first + spec.batch * LOOK].split(spec.batch):  # type: ignore[no-untyped-call]
                optimiser.zero_grad()
                spec.loss(parallel(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            seconds += time.perf_counter() - start
            steps += LOOK
            if me == 0:
                with torch.no_grad():
                    accuracy = float((module(shown).argmax(1) == expected).float().mean())
                result = torch.tensor([float(accuracy < target and seconds < limit), seconds, accuracy])
            distributed.broadcast(result, 0)
            if not result[0]:
                break
    if me == 0:
        print(json.dumps({"seconds": seconds, "steps": steps, "accuracy": accuracy, "rate": rate}))
    distributed.destroy_process_group()


def ddp(model: str, source: str, target: float) -> dict[str, float]:
    """The faster of the learning rates; `seconds` is infinite where none came to the target in time."""
    best = {"seconds": float("inf"), "steps": 0.0, "rate": 0.0}
    for rate in RATES:
        limit = min(LIMIT / 4, best["seconds"])
        found = _ddp(model, source, target, rate, limit)
        if found["accuracy"] >= target and found["seconds"] < best["seconds"]:
            best = found
    return best


def _ddp(model: str, source: str, target: float, rate: float, limit: float) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(PEERS):
        place = {"RANK": str(index), "WORLD_SIZE": str(PEERS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, "--rank", model, source, str(target), str(rate), str(limit)],
                env={**os.environ, **place, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        output, _ = processes[0].communicate(timeout=LIMIT)
        for process in processes[1:]:
            process.wait(10)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    result: dict[str, float] = json.loads(output)
    return result


def row(model: str, target: float, seconds: float) -> dict[str, float]:
    """One race of both: wall seconds and steps of each, and the ratio."""
    source = f"mnist:{data_folder() / 'mnist'}"
    four = peers(source, target, seconds, model)
    other = ddp(model, source, target)
    return {
        "peers_seconds": four["seconds"],
        "peers_steps": four["steps"],
        "ddp_seconds": other["seconds"],
        "ddp_steps": other["steps"],
        "ddp_rate": other["rate"],
        "ratio": four["seconds"] / other["seconds"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        model, source, *numbers = sys.argv[2:]
        rank(model, source, *map(float, numbers))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mnist-mlp")
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a race of the peers")
    arguments = parser.parse_args()
    ratios = []
    for run in range(arguments.runs):
        found = row(arguments.model, arguments.target, arguments.seconds)
        ratios.append(found["ratio"])
        print(
            f"run {run + 1}: four peers {found['peers_seconds']:.2f} s ({found['peers_steps']:.0f} steps each), DDP "
            f"{found['ddp_seconds']:.2f} s ({found['ddp_steps']:.0f} steps, learning rate {found['ddp_rate']}), ratio "
            f"{found['ratio']:.2f}",
            flush=True,
        )
    print(f"median ratio of wall time to {arguments.target:.0%}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
