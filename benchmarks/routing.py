"""Predictions through a peer that has not got the model: python benchmarks/routing.py [overhead] [killed]

- overhead: the same prediction asked of a peer that has the model and of one that has not, in turns; p50 and p99.
- killed: at least 10,000 predictions through a peer without the model, while each of the two that have it is killed
  (SIGKILL) and started again in turn. Prints how many failed; none may.

`mnist-wide` with 784 floats of JSON, three peers on this machine, random parameters.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import ask
from load import Load, post, run_load
from safetensors.numpy import save_file

from gossipml.daemon.home import Home
from gossipml.ids import parse_address

LAYERS = (784, 512, 256, 10)
TURNS, SECONDS = 3, 2.0
PREDICTIONS = 10_000
ASKERS = 4
KILLS = 2  # of each holder
ALONE_SECONDS = 2.0  # the other one answers alone
START_SECONDS = 60.0
OPTIONS = ("--model", "xor", "--max-rounds", "3", "--no-lan", "--replicas", "1", "--pull-after", "0")
LOCAL = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")


class Peer:
    """`gossipml peer start` on a home of its own."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.home = Home(folder / name)
        self._log = folder / f"{name}.log"
        self._command = ["peer", "start", "--name", name, *LOCAL, *OPTIONS, *options]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._gossipml(*self._command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + START_SECONDS
        while (info := self.home.run_info()) is None or info.pid != self.process.pid:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(self._log.read_text())
            time.sleep(0.05)
        self.api = info.api
        while ask(self.api, "/v1/status")["age"] <= 0:
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, *arguments: str) -> None:
        subprocess.run(self._gossipml(*arguments), check=True, stdout=subprocess.DEVNULL, timeout=60)

    def _gossipml(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "gossipml", "--home", str(self.home.path), *arguments]


@contextmanager
def three_peers(folder: Path) -> Iterator[tuple[Peer, Peer, Peer]]:
    """Two that have mnist-wide, and one that has not."""
    peers: list[Peer] = []
    try:
        peers.append(Peer(folder, "first"))
        token = folder / "token"
        peers[0].run("token", "new", "--out", str(token))
        peers += [Peer(folder, name, "--join", str(token)) for name in ("second", "third")]
        rng = np.random.default_rng(1)
        tensors = {}
        for index, (given, taken) in enumerate(pairwise(LAYERS)):
            tensors[f"{2 * index}.weight"] = rng.normal(0, given**-0.5, (taken, given)).astype(np.float32)
            tensors[f"{2 * index}.bias"] = np.zeros(taken, np.float32)
        file = folder / "wide.safetensors"
        save_file(tensors, file)
        peers[0].run("models", "publish", "mnist-wide", "--file", str(file))
        peers[1].run("models", "pull", "mnist-wide")
        first, second, third = peers
        yield first, second, third
    finally:
        for peer in peers:
            peer.process.terminate()
        for peer in peers:
            try:
                peer.process.wait(20)
            except subprocess.TimeoutExpired:
                peer.kill()


def load_of(peer: Peer, connections: int, seconds: float, over: threading.Event | None = None) -> Load:
    address, chance = parse_address(peer.api), random.Random(1)
    bodies = [[round(255 * chance.random(), 4) for _ in range(784)] for _ in range(connections)]
    requests = [post("/predict/mnist-wide", json.dumps(body).encode()) for body in bodies]
    return run_load(
        address.host, address.port, requests.__getitem__, connections=connections, seconds=seconds, warm=1.0,
        stop=over.is_set if over is not None else lambda: False,
    )  # fmt: skip


def overhead(holder: Peer, asker: Peer) -> None:
    for peer in (holder, asker):
        load_of(peer, 4, 3.0)  # loads the model, opens streams
    print(f"{f'{SECONDS:g} s x {TURNS}, medians':32}{'per s':>8}{'p50 ms':>8}{'p99 ms':>8}")
    for connections in (1, 32):
        loads: dict[str, list[Load]] = {"local": [], "forwarded": []}
        for _ in range(TURNS):
            loads["local"].append(load_of(holder, connections, SECONDS))
            loads["forwarded"].append(load_of(asker, connections, SECONDS))
        for name, seen in loads.items():
            rate, p50, p99 = (
                statistics.median(values)
                for values in zip(*((one.rate, one.quantile(0.5), one.quantile(0.99)) for one in seen), strict=True)
            )
            print(f"{f'{name}, {connections} connections':32}{rate:8.0f}{p50:8.2f}{p99:8.2f}", flush=True)


def killed(holders: tuple[Peer, Peer], asker: Peer) -> bool:
    """Whether no prediction failed."""
    over = threading.Event()
    loads: list[Load] = []
    asking = threading.Thread(target=lambda: loads.append(load_of(asker, ASKERS, 160.0, over)))
    asking.start()
    begun = time.monotonic()
    time.sleep(3.0)
    for _ in range(KILLS):
        for holder in holders:
            holder.kill()
            time.sleep(ALONE_SECONDS)
            holder.start()
            ask(holder.api, "/predict/mnist-wide", "POST", [0] * 784)  # it can answer again
            time.sleep(ALONE_SECONDS)
    over.set()
    asking.join()
    (load,) = loads
    failed = sum(count for code, count in load.statuses.items() if code != 200)
    print(
        f"{len(load.times)} predictions in {time.monotonic() - begun:.0f} s through a peer without the model, "
        f"{KILLS * len(holders)} holders killed and started again: {failed} failed {dict(load.statuses)}; "
        f"p50 {load.quantile(0.5):.1f} ms, p99 {load.quantile(0.99):.0f} ms, longest {load.quantile(1):.0f} ms",
        flush=True,
    )
    again = [line for line in metrics(asker) if "asked_again" in line or "forwarded" in line]
    print("\n".join(again))
    return failed == 0 and not load.broken and len(load.times) >= PREDICTIONS


def metrics(peer: Peer) -> list[str]:
    with urllib.request.urlopen(f"http://{peer.api}/metrics", timeout=10) as response:
        return [line for line in response.read().decode().splitlines() if not line.startswith("#")]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so end the peers
    wanted = sys.argv[1:] or ["overhead", "killed"]
    with tempfile.TemporaryDirectory() as folder, three_peers(Path(folder)) as (first, second, third):
        if "overhead" in wanted:
            overhead(first, third)
        if "killed" in wanted and not killed((first, second), third):
            sys.exit(f"not as promised: {PREDICTIONS} predictions without a failure")


if __name__ == "__main__":
    main()
