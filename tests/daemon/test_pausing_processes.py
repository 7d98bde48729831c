"""A real peer outside its hours: it pauses and says so, its worker is nice, `gossipml stats` shows the two."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from gossipml.cli.stats_view import COLUMNS

from .processes import gossipml, peers_of, until

pytestmark = pytest.mark.real


def test_a_peer_outside_its_hours_pauses_says_so_and_uses_little(tmp_path: Path) -> None:
    begin, end = (datetime.now() + timedelta(hours=hours) for hours in (10, 14))
    schedule = f"{begin:%H:%M}-{end:%H:%M}"
    with peers_of(tmp_path) as make:
        peer = make("alice")
        peer.start("--model", "xor", "--no-lan", "--schedule", schedule, "--nice", "7")
        until(lambda: peer.status()["state"] == "paused", 60, "it pauses")
        status = peer.status()
        assert status["paused"] == f"outside its hours ({schedule})"
        assert (status["round"], status["training_seconds"]) == (0, 0)
        home = ("--home", str(peer.home.path))
        said = gossipml(*home, "peer", "status").stdout
        assert f"paused: outside its hours ({schedule}); nothing is trained yet" in said

        (worker,) = psutil.Process(peer.home.require_run_info().pid).children()
        assert worker.nice() == min(19, os.nice(0) + 7)

        out = gossipml(*home, "stats", "--format", "csv", "--seconds", "2").stdout
        rows = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in out.splitlines()[1:]]
        assert [row["processes"] for row in rows] == ["2", "2"], "the peer and its worker"
        assert min(float(row["process_cpu_percent"]) for row in rows) < 50.0, "a worker that trains keeps a core busy"
        assert peer.home.config_file.read_text().count(schedule) == 1, "kept for later starts"
