"""Real peers on loopback, looked at while they learn: processes with DHT, TLS, HTTP and all.

While they train nobody need look: at the end they are stopped, and the states that they leave on the disk are measured.
What they sent is what their sessions sent, heads and heartbeats with it; TLS and the DHT's datagrams are not counted.
"""

from __future__ import annotations

import http.client
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from common import running_peers, status
from rows import Record

from gossipml.daemon.resume import load_resume
from gossipml.env.real import real_env
from gossipml.models.data import load_source, prepare, take_part
from gossipml.models.partition import parse_part, parse_rule
from gossipml.models.registry import load_spec
from gossipml.models.training import LocalTrainer

LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Budget:
    """When a peer stops training: after so many samples or, at 0, by itself; and how long all may take."""

    samples: int = 0
    limit: float = 500.0
    settle: float = 15.0
    """Seconds of averaging when all are done."""


@dataclass(frozen=True)
class Race:
    accuracies: tuple[float, ...]
    """On the test part, of what each peer serves in the end."""
    samples: tuple[int, ...]
    """Trained on by each peer."""
    seconds: float
    """Until the last one had trained enough."""
    sent: float
    """Bytes of an average peer."""
    looks: tuple[Record, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        return statistics.pstdev(self.accuracies)


def race(options: Sequence[dict[str, object]], learner: dict[str, object], budget: Budget) -> Race:
    """Peers with these options, one each, until all have trained enough and have agreed."""
    looks: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="gossipml-bench-") as name:
        gate = Path(name) / "go"
        with running_peers(Path(name), options, learner, gate, looks=False) as apis:
            gate.touch()
            begun = time.monotonic()

            def look(until: Callable[[list[Any]], bool], limit: float) -> list[Any]:  # Any: JSON
                while True:
                    answers = [status(api) for api in apis]
                    known = [answer["accuracy"] for answer in answers if answer["accuracy"] is not None]
                    if known:
                        looks.append(
                            {
                                "seconds": round(time.monotonic() - begun, 2),
                                "samples": sum(answer["samples"] for answer in answers),
                                "accuracy": 100 * statistics.fmean(known),
                                "MB": sum(answer["bytes_sent"] for answer in answers) / len(answers) / 1e6,
                            }
                        )
                    for index, (api, answer) in enumerate(zip(apis, answers, strict=True)):
                        if budget.samples and answer["state"] == "training" and answer["samples"] >= budget.samples:
                            pause(Path(name), index, api)
                    if until(answers) or time.monotonic() - begun > limit:
                        return answers
                    time.sleep(LOOK_SECONDS)

            look(lambda answers: all(answer["state"] in ("averaging", "paused") for answer in answers), budget.limit)
            seconds = time.monotonic() - begun
            answers = look(lambda _: False, seconds + budget.settle)
        accuracies = [judge(Path(name) / f"peer{index}", mine) for index, mine in enumerate(options)]
    return Race(
        tuple(accuracies),
        tuple(answer["samples"] for answer in answers),
        seconds,
        sum(answer["bytes_sent"] for answer in answers) / len(answers),
        tuple(looks),
    )


def judge(home: Path, options: Mapping[str, object]) -> float:
    """Test accuracy of what a peer served that was stopped."""
    spec, data = prepare(load_spec(str(options["model"])), load_source(str(options["data"])))
    part = take_part(data, parse_rule(str(options.get("split", "iid"))), parse_part(str(options["part"])), 0)
    trainer = LocalTrainer(spec, part, network_id=b"", seed=0)
    resume = trio.run(load_resume, real_env(home), trainer.layout)
    if resume is None:
        raise SystemExit(f"{home.name} left no state")
    trainer.restore(resume.trainer)
    return trainer.evaluate().accuracy


def pause(folder: Path, index: int, api: str) -> None:
    """The peer trains no more, and goes on averaging."""
    token = (folder / f"peer{index}" / "api-token").read_text().strip()
    connection = http.client.HTTPConnection(api, timeout=10)
    try:
        connection.request("POST", "/v1/training/pause", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"peer{index} does not pause: {answer.status} {answer.read()[:200]!r}")
    finally:
        connection.close()
