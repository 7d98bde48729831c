"""A peer for benchmarks: python peer_process.py HOME CONFIG_JSON LEARNER_JSON [GATE [looks]]

`gossipml peer start` with another pace of the learner. With a GATE it makes the file HOME/loaded when its model and
data are loaded, and trains only when the file GATE is there, so that several peers begin together. With `looks` it
keeps its state after each round as HOME/looks/SECONDS, so that its accuracy over time can be measured when the race is
over. What the keeping takes is left out of those SECONDS.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from gossipml.config import PeerConfig, load_config
from gossipml.daemon import run
from gossipml.daemon.home import Home
from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.worker import WorkerTrainer, open_worker
from gossipml.models.trainer import RoundReport


async def wait_at(gate: Path, home: Home) -> None:
    (home.path / "loaded").touch()
    while not gate.exists():  # noqa: ASYNC240  # a local file
        await trio.sleep(0.002)


def keep_looks(home: Home, worker: WorkerTrainer) -> None:
    looks = home.path / "looks"
    looks.mkdir()
    train, keeping = worker.train, 0.0

    async def train_and_keep(steps: int, encoding: str = "") -> RoundReport:
        nonlocal keeping
        report = await train(steps, encoding)
        begun = time.time()
        state = await worker.save()
        (looks / f"{begun - keeping:.4f}").write_bytes(state)
        keeping += time.time() - begun
        return report

    worker.train = train_and_keep  # type: ignore[method-assign]


def main() -> None:
    home = Home(Path(sys.argv[1]))
    gate = Path(sys.argv[4]) if len(sys.argv) > 4 else None

    @asynccontextmanager
    async def gated(config: PeerConfig, network_id: bytes) -> AsyncIterator[WorkerTrainer]:
        async with open_worker(config, network_id) as worker:
            if gate is not None:
                if "looks" in sys.argv[5:]:
                    keep_looks(home, worker)
                await wait_at(gate, home)
            yield worker

    run.open_worker = gated  # type: ignore[attr-defined]  # the one place where a benchmark reaches in
    config = load_config(home.path, json.loads(sys.argv[2]), {})
    run.run_peer(home, config, None, learner=LearnerConfig(**json.loads(sys.argv[3])))


if __name__ == "__main__":
    main()
