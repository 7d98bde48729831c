"""How `gossipml peer status` looks."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gossipml.cli.status_view import LinesWatch, LiveWatch, bar, print_status, spark

STATUS: dict[str, Any] = {
    "name": "ada", "peer": "j3wulngjxyz", "uptime": 75.0, "state": "training", "sentence": "training, round 12",
    "paused": None, "network": "0123456789abcdef", "neighbours": 2, "members": 3, "trains": True,
    "model": "digits-mlp", "data": "digits", "split": "iid", "part": "1/4", "round": 12, "age": 3456.0,
    "loss": 0.1234, "accuracy": 0.9512, "served": "average", "lan": None, "bytes_sent": 3_000_000,
    "bytes_received": 1_000_000, "versions": 2, "stored": 40_000, "addresses": ["127.0.0.1:8711"],
    "api": "127.0.0.1:8710", "problems": [],
}  # fmt: skip
PEER: dict[str, Any] = {
    "name": "bela", "peer": "abcdefghij", "state": "connected", "learning": "averaging", "accuracy": 0.5,
    "loss": None, "age": 100.0, "bytes_sent": 10, "bytes_received": 20, "last_seen": 1.0,
}  # fmt: skip


def shown(width: int, *readings: dict[str, Any], peers: int = 1) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=60, no_color=True)
    with LiveWatch(console) as view:
        for reading in readings:
            view.show(reading, [{**PEER, "name": f"bela{n}"} for n in range(peers)])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_live_view_shows_this_peer_and_the_others(width: int) -> None:
    later = {**STATUS, "uptime": 76.0, "bytes_sent": 3_500_000, "paused": "by its user", "problems": ["swarm: broken"]}
    text = shown(width, STATUS, later)
    for part in ("ada", "95.1 %", "0.1234", "500 kB/s", "paused: by its user", "swarm: broken", "averaging", "█████"):
        assert part in text


def test_the_live_view_tells_who_is_alone_and_who_is_too_many() -> None:
    assert "gossipml token new" in shown(100, STATUS, peers=0)
    assert "and 5 more" in shown(100, STATUS, peers=35)


def test_a_pipe_gets_a_line_for_each_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with LinesWatch() as view:
        view.show(STATUS, [])
    assert capsys.readouterr().out == (
        "training  round 12  accuracy 95.1 %  loss 0.1234  2 neighbours  3.0 MB sent  1.0 MB received\n"
    )


def test_plain_lines_for_a_peer_that_only_serves(capsys: pytest.CaptureFixture[str]) -> None:
    print_status({**STATUS, "trains": False, "problems": ["no room"]})
    out = capsys.readouterr().out
    assert "digits-mlp, served without training" in out and "problem   no room" in out


def test_bars_and_sparks() -> None:
    assert [bar(share, 4) for share in (None, 0.0, 0.5, 0.53, 1.0, 7.0)] == [
        "    ",
        "    ",
        "██  ",
        "██▏ ",
        "████",
        "████",
    ]
    assert spark([None, 0.0, 0.5, 1.0]) == " ▁▅█"
