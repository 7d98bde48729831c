"""Predictions over HTTP: python benchmarks/serving.py [rivals] [health] [crowd]   (all of them without a name)

- rivals: predictions a second at concurrency 32 for `mnist-wide` with 784 floats of JSON: a peer, LitServe with
  batching on, and FastAPI under uvicorn, one after the other, three turns, one load driver (`load.py`); medians.
- health: `GET /healthz` of a peer that trains and gossips with another, both on this machine.
- crowd: 1,000 connections, each with a prediction under way, for 30 s: statuses and memory.

Rivals that are not installed are left out, saying so: `pip install -e '.[bench]'`. Needs the MNIST files.
"""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import trio
from common import data_folder, running_peers, status
from http_latency import measure
from load import Load, post, run_load

from gossipml.daemon.home import Home
from gossipml.ids import parse_address

CONNECTIONS = 32
SECONDS = 5.0
TURNS = 3
CROWD, CROWD_SECONDS = 1000, 30.0


def floats(number: int) -> list[float]:
    """784 values of 0 to 255 with four digits behind the point."""
    chance = random.Random(number)
    return [round(255 * chance.random(), 4) for _ in range(784)]


def main() -> None:
    wanted = sys.argv[1:] or ["rivals", "health", "crowd"]
    failed = [name for name in wanted if not {"rivals": rivals, "health": health, "crowd": crowd}[name]()]
    if failed:
        sys.exit(f"not as promised: {', '.join(failed)}")


# Predictions a second


@contextmanager
def peer(folder: Path) -> Iterator[str]:
    """The address of a peer whose mnist-wide is trained."""
    extra = {
        "model": "mnist-wide",
        "data": f"mnist:{data_folder() / 'mnist'}",
        "max_rounds": 5,
        "lan": False,
    }
    with running_peers(folder, [extra]) as (api,):
        while status(api)["state"] != "averaging":
            time.sleep(0.1)
        yield api


@contextmanager
def rival(name: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("serving_rivals.py")), name, str(port)])
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{name} does not start") from None
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *children] if children else [], timeout=5)
        for child in alive:
            child.kill()
        process.wait(5)


def load_of(api: str, path: str, key: str, connections: int = CONNECTIONS, seconds: float = SECONDS) -> Load:
    """Loads a server; `key` names the list in the body, empty for the list alone."""
    address = parse_address(api)
    bodies = [floats(number) for number in range(CONNECTIONS)]
    requests = [post(path, json.dumps({key: body} if key else body).encode()) for body in bodies]
    return run_load(
        address.host, address.port, lambda n: requests[n % len(requests)], connections=connections, seconds=seconds,
        warm=3.0,
    )  # fmt: skip


def rivals() -> bool:
    seen: dict[str, list[Load]] = {}
    installed = all(importlib.util.find_spec(name) for name in ("litserve", "fastapi", "uvicorn"))
    if not installed:
        print("LitServe and FastAPI are left out: they are not installed")
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as folder, peer(Path(folder)) as api:
            seen.setdefault("gossipml", []).append(load_of(api, "/predict/mnist-wide", ""))
        for name in ("litserve", "fastapi") if installed else ():
            with rival(name) as api:
                seen.setdefault(name, []).append(load_of(api, "/predict", "input"))
    print(f"{f'{CONNECTIONS} connections, {SECONDS:g} s x {TURNS}':36}{'per s':>8}{'p50 ms':>8}{'p99 ms':>8}  statuses")
    medians: dict[str, tuple[float, float]] = {}
    for name, loads in seen.items():
        rate = statistics.median(load.rate for load in loads)
        p50, p99 = (statistics.median(load.quantile(share) for load in loads) for share in (0.5, 0.99))
        statuses = dict(sum((load.statuses for load in loads), start=loads[0].statuses.__class__()))
        print(f"{name:36}{rate:8.0f}{p50:8.1f}{p99:8.1f}  {statuses}", flush=True)
        medians[name] = rate, p99
    if "litserve" not in medians:
        return True
    (rate, p99), (their_rate, their_p99) = medians["gossipml"], medians["litserve"]
    print(f"gossipml answers {rate / their_rate:.1f} times as many as LitServe")
    return rate >= 2 * their_rate and p99 < their_p99


# Health


def health() -> bool:
    extra = {"model": "mnist-mlp", "data": f"mnist:{data_folder() / 'mnist'}", "lan": False}
    with tempfile.TemporaryDirectory() as folder:
        parts = [{**extra, "part": "1/2"}, {**extra, "part": "2/2"}]
        with running_peers(Path(folder), parts) as apis:
            while not all(status(api)["round"] > 2 and status(api)["neighbours"] for api in apis):
                time.sleep(0.2)
            print("while this peer and another train on two cores and gossip:")
            held = trio.run(measure, parse_address(apis[0]))
            print(f"rounds at the end: {[status(api)['round'] for api in apis]}", flush=True)
            return held


# Many connections


def crowd() -> bool:
    with tempfile.TemporaryDirectory() as folder, peer(Path(folder)) as api:
        info = Home(Path(folder) / "peer0").run_info()
        assert info is not None
        process = psutil.Process(info.pid)
        before = memory(process)
        load = load_of(api, "/predict/mnist-wide", "", CROWD, CROWD_SECONDS)
        after = memory(process)
        print(
            f"{CROWD} connections, {CROWD_SECONDS:g} s: {load.rate:.0f} predictions/s, "
            f"p99 {load.quantile(0.99):.0f} ms, statuses {dict(load.statuses)}, connections lost {load.broken}\n"
            f"RSS in MB, daemon and workers: {before} before, {after} after",
            flush=True,
        )
        return set(load.statuses) == {200} and not load.broken


def memory(process: psutil.Process) -> list[int]:
    return [round(one.memory_info().rss / 1e6) for one in (process, *process.children())]


if __name__ == "__main__":
    main()
