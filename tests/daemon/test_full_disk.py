"""A disk that is really full under a real peer: a small file system of its own as its home."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gossipml.daemon import audit_log

from .processes import Peer, peers_of, until
from .test_serving import ask

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

SIZE = "16m"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of `SIZE`; skips the test where none may be mounted."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mounting, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return ballast


def health(peer: Peer) -> tuple[bool, str]:
    answer = peer.ask("/healthz")
    return answer["ok"], answer["detail"]


def entries(peer: Peer) -> tuple[float, float]:
    """Of the audit log: written, lost."""
    written, lost = (
        peer.metric(f'gossipml_audit_entries_total{{result="{result}"}}') for result in ("written", "lost")
    )
    assert written is not None and lost is not None
    return written, lost


def test_a_full_disk_stops_no_answer_is_said_and_forgotten_when_it_is_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, peers_of(disk) as make:
        peer = make("peer")
        peer.output = tmp_path / "peer.out"
        peer.start("--model", "xor", "--max-rounds", "20", "--no-lan")
        until(lambda: peer.status()["state"] == "averaging", 60, "xor is trained")
        assert ask(peer, "/predict/xor", [0, 1])[0] == 200
        until(lambda: entries(peer) == (1, 0), 10, "it is recorded")

        ballast = fill(disk)
        statuses = []
        until(
            lambda: statuses.append(ask(peer, "/predict/xor", [0, 1])[0]) or "takes nothing" in health(peer)[1],  # type: ignore[func-returns-value]
            60,
            "the disk is full, and the peer says so",
        )
        fill(disk)
        statuses += [ask(peer, "/predict/xor", [0, 1])[0] for _ in range(300)]
        assert set(statuses) == {200} and len(statuses) > 300
        ok, sentence = health(peer)
        assert ok and "answering goes on without; make room on its disk" in sentence
        assert [problem for problem in peer.status()["problems"] if "audit log takes nothing" in problem]
        with urllib.request.urlopen(f"http://{peer.home.require_run_info().api}/v2/health/ready") as ready:
            assert json.load(ready) == {"ready": True}
        assert entries(peer)[1] > 0

        ballast.unlink()
        until(lambda: health(peer) == (True, "all parts of the peer are running"), 30, "it is well again by itself")
        assert ask(peer, "/predict/xor", [1, 1])[0] == 200
        asked = len(statuses) + 2
        until(lambda: sum(entries(peer)) == asked, 10, "what was asked is recorded, or counted as lost")
        assert audit_log.verify(peer.home.path).problem == ""
        rows = [row.entry for row in audit_log.read(peer.home.path)]
        written, lost = entries(peer)
        assert len([entry for entry in rows if entry.route != "lost"]) == written
        assert sum(entry.size for entry in rows if entry.route == "lost") == lost, "the gap is in the log"
        assert "predictions are not in the audit log" in peer.output.read_text()
        assert "the audit log is written again" in (peer.home.path / "log" / "peer.log").read_text(), "so is the log"
        assert "Traceback" not in peer.output.read_text()
