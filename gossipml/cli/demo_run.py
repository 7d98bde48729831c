"""The course of the demo: start four peers, kill one, start it again, ask them all, compare with one process.

The peers are ordinary `gossipml peer start` processes that know nothing of the demo; it watches them through
their HTTP endpoints, as anybody could.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from gossipml.cli.common import fetch_json
from gossipml.daemon.home import Home, join, new_network
from gossipml.env.real import real_env
from gossipml.errors import UserError
from gossipml.ids import parse_address

NAMES = ("ada", "ben", "cho", "dia")
WATCH_SECONDS = 0.25  # between looks at the peers; four looks a second are a live table
START_SECONDS = 90.0  # torch takes 3 s to import, more with four at once on a small machine
TRAIN_SECONDS = 240.0  # a bound, not a plan: on two cores training takes about 20 s
STOP_SECONDS = 20.0
DOWN_SECONDS = 3.0  # how long the killed peer stays down


@dataclass(frozen=True)
class Plan:
    """What the demo does."""

    keep: bool = False
    model: str = "digits-mlp"
    data: str = "digits"
    split: str = "dirichlet:0.5"
    rounds: int = 250
    """Enough for the four to meet the accuracy of one process, with room for the one that is killed."""
    questions: int = 8
    """Test images that each peer is asked about."""
    margin: float = 0.015
    """How far below one process trained on all the data a peer may end."""


@dataclass
class PeerRow:
    """One peer as the table shows it; None where nothing is known yet."""

    name: str
    state: str = "starting"
    round: int = 0
    age: float = 0.0
    neighbours: int = 0
    accuracy: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    api: str = ""


@dataclass
class Summary:
    peers: list[PeerRow]
    central_accuracy: float
    killed: str
    seconds: float
    predictions: list[dict[str, Any]]  # Any: JSON
    margin: float

    @property
    def good(self) -> bool:
        """Every peer within the margin of one process, and that one good itself."""
        return self.central_accuracy > 0.95 and all(
            row.accuracy is not None and row.accuracy >= self.central_accuracy - self.margin for row in self.peers
        )

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        return {
            "peers": {
                row.name: {
                    "accuracy": row.accuracy,
                    "rounds": row.round,
                    "bytes_sent": row.bytes_sent,
                    "bytes_received": row.bytes_received,
                }
                for row in self.peers
            },
            "central_accuracy": self.central_accuracy,
            "killed": self.killed,
            "seconds": self.seconds,
            "predictions": self.predictions,
        }


class View(Protocol):
    """What shows the demo to a person."""

    def say(self, text: str) -> None: ...
    def update(self, rows: list[PeerRow]) -> None: ...
    def show_summary(self, summary: Summary) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *details: object) -> None: ...


def run_demo(plan: Plan, view: View) -> Summary:
    """Run the demo in a temporary folder that is gone afterwards. Raises UserError when a peer fails."""
    with tempfile.TemporaryDirectory(prefix="gossipml-demo-") as folder:
        return trio.run(_demo, plan, view, Path(folder))


@dataclass
class _Peer:
    home: Home
    row: PeerRow
    command: list[str]
    process: trio.Process | None = None
    killed: bool = False
    """On purpose, and not started again yet."""
    log: Path = field(default_factory=Path)

    def is_down(self) -> bool:
        return self.process is None or self.killed


async def _demo(plan: Plan, view: View, folder: Path) -> Summary:
    begun = trio.current_time()
    peers = _make_homes(plan, folder)
    killed = peers[1]
    with view:
        async with _running(peers), trio.open_nursery() as nursery:
            view.say(f"Starting {len(peers)} peers: {plan.model} on {plan.data}, split {plan.split}")
            await _start_all(peers, folder)
            nursery.start_soon(_watch, peers, view)
            with _bounded(TRAIN_SECONDS):
                await _until(lambda: any(p.row.round * 2 >= plan.rounds for p in peers if p is not killed))
                view.say(f"Killing {killed.row.name} with SIGKILL at round {killed.row.round}; the others go on")
                await _kill(killed)
                await trio.sleep(DOWN_SECONDS)
                view.say(f"Starting {killed.row.name} again on its home")
                await _start(killed, folder)
                await _until(lambda: all(p.row.round >= plan.rounds and p.row.state == "averaging" for p in peers))
            view.say("All peers have finished training; asking each for predictions")
            predictions = await _ask_all(plan, peers)
            await _refresh(peers)
            rows = [peer.row for peer in peers]
            view.say("Training one process on all the data, to compare")
            central = await _central(plan)
            summary = Summary(rows, central, killed.row.name, trio.current_time() - begun, predictions, plan.margin)
            if plan.keep:
                view.show_summary(summary)
                view.say("The peers stay up until Ctrl-C: " + ", ".join(f"http://{p.row.api}" for p in peers))
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
    return summary


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise UserError(
            f"the peers have not finished training in {seconds:.0f} s; try again when the machine is less busy"
        ) from None


def _make_homes(plan: Plan, folder: Path) -> list[_Peer]:
    """A home for each peer, all of one network."""
    env = real_env(folder)
    token = new_network(env.secrets, expires=0, addresses=())
    peers = []
    for index, name in enumerate(NAMES):
        home = Home(folder / name)
        home.prepare()
        join(home, token, wall=env.clock.wall(), secrets=env.secrets, seconds=0)
        command = [
            *(sys.executable, "-P", "-m", "gossipml", "--home", str(home.path), "peer", "start"),
            *("--model", plan.model, "--data", plan.data, "--split", plan.split),
            *("--part", f"{index + 1}/{len(NAMES)}", "--max-rounds", str(plan.rounds), "--name", name),
            *("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0"),
        ]
        peers.append(_Peer(home, PeerRow(name), command, log=folder / f"{name}.out"))
    return peers


async def _start_all(peers: list[_Peer], folder: Path) -> None:
    """Start the first, so that the others have an address to meet; from then on all are equal."""
    await _start(peers[0], folder)
    info = peers[0].home.require_run_info()
    addresses = tuple(parse_address(text) for text in info.addresses)
    for peer in peers[1:]:
        token = peer.home.token()
        assert token is not None  # _make_homes wrote it
        peer.home.keep_token(token.with_addresses(addresses))
    async with trio.open_nursery() as nursery:
        for peer in peers[1:]:
            nursery.start_soon(_start, peer, folder)


async def _start(peer: _Peer, folder: Path) -> None:
    """Start the process and wait until its HTTP endpoint is there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GOSSIPML_")}
    with peer.log.open("ab") as out:
        peer.process = await trio.lowlevel.open_process(
            peer.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=folder
        )
    with trio.move_on_after(START_SECONDS):
        while peer.process.poll() is None:
            info = peer.home.run_info()
            if info is not None and info.pid == peer.process.pid:
                peer.row.api = info.api
                peer.killed = False
                return
            await trio.sleep(0.05)
    raise UserError(f"the demo's peer {peer.row.name} did not start: {_last_words(peer)}")


def _last_words(peer: _Peer) -> str:
    lines = peer.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with status {peer.process.returncode if peer.process else '?'}"


async def _kill(peer: _Peer) -> None:
    assert peer.process is not None
    peer.killed = True
    peer.row.state = "killed"
    peer.process.send_signal(signal.SIGKILL)
    await peer.process.wait()


@asynccontextmanager
async def _running(peers: list[_Peer]) -> AsyncIterator[None]:
    """End what was started, whatever happens inside the block."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            processes = [peer.process for peer in peers if peer.process is not None and peer.process.poll() is None]
            for process in processes:
                process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                for process in processes:
                    await process.wait()
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    await process.wait()


async def _watch(peers: list[_Peer], view: View) -> None:
    while True:
        await _refresh(peers)
        view.update([peer.row for peer in peers])
        await trio.sleep(WATCH_SECONDS)


async def _refresh(peers: list[_Peer]) -> None:
    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(_look, peer)


async def _look(peer: _Peer) -> None:
    """Bring the row of one peer up to date; a peer that died by itself ends the demo."""
    if peer.is_down():
        return
    if peer.process is not None and peer.process.poll() is not None:
        raise UserError(f"the demo's peer {peer.row.name} ended by itself: {_last_words(peer)}")
    try:
        status = await _get(peer.row.api, "/v1/status")
    except UserError:
        return  # being killed, or busy starting
    if peer.is_down():
        return
    row = peer.row
    row.state = status["state"]
    row.round, row.age, row.neighbours = status["round"], status["age"], status["neighbours"]
    row.accuracy = status["accuracy"]
    row.bytes_sent, row.bytes_received = status["bytes_sent"], status["bytes_received"]


async def _until(condition: Any) -> None:  # Any: () -> bool
    while not condition():
        await trio.sleep(WATCH_SECONDS / 2)


async def _get(api: str, path: str, body: object = None) -> Any:  # Any: JSON
    method = "GET" if body is None else "POST"
    return await trio.to_thread.run_sync(fetch_json, api, method, path, body, abandon_on_cancel=True)


async def _ask_all(plan: Plan, peers: list[_Peer]) -> list[dict[str, Any]]:  # Any: JSON
    """The same test images to every peer: who said what, and what is right."""
    from gossipml.models.data import load_source

    test = load_source(plan.data).test
    step = max(1, len(test.targets) // plan.questions)
    answers = []
    for peer in peers:
        for index in range(0, step * plan.questions, step):
            answer = await _get(peer.row.api, f"/predict/{plan.model}", test.inputs[index].tolist())
            answers.append(
                {
                    "peer": peer.row.name,
                    "image": index,
                    "expected": int(test.targets[index]),
                    "label": int(answer["label"]),
                    "probability": max(answer["probabilities"]),
                    "version": answer["version"],
                }
            )
    return answers


async def _central(plan: Plan) -> float:
    """Test accuracy of one process trained on all the data, with the same model and hyperparameters."""
    command = [*(sys.executable, "-P", "-m", "gossipml.models.central"), plan.model, plan.data]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode:
        raise UserError(f"the central training failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return float(json.loads(done.stdout)["accuracy"])
