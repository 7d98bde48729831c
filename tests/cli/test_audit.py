"""`gossipml audit`: what a person and a program get of the record."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gossipml.daemon import audit_log
from tests.daemon.test_audit import ENTRY

from .test_commands import Cli, cli  # noqa: F401  # a fixture


@pytest.fixture
def filled(cli: Cli) -> Cli:  # noqa: F811
    """A home with three predictions, one of another model."""
    cli.home.mkdir(mode=0o700)
    log = audit_log.AuditLog(cli.home)
    log.append([(replace(ENTRY, time=1000.0 + n, model="iris" if n == 1 else "xor"), b"a=0&b=1") for n in range(3)])
    log.close()
    return cli


def test_without_a_log_it_is_said(cli: Cli) -> None:  # noqa: F811
    cli.home.mkdir(mode=0o700)
    assert "there is no audit log" in cli.fails("audit", "list")


def test_the_newest_predictions_are_listed(filled: Cli) -> None:
    _, out, _ = filled("audit", "list", "-n", "2")
    assert "/predict" not in out and out.count("200") == 2 and '{"result":1}' in out
    _, out, _ = filled("audit", "list", "--model", "iris", "--json")
    (row,) = json.loads(out)
    assert (row["n"], row["model"], row["status"], row["peer"]) == (2, "iris", 200, "anna")


def test_all_are_exported_as_lines_or_as_a_table_and_it_says_how_many(filled: Cli, tmp_path: Path) -> None:
    _, lines, _ = filled("audit", "export")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["n"] for row in rows] == [1, 2, 3] and "content" not in rows[0]
    status, out, _ = filled("audit", "export", str(tmp_path / "all.jsonl"), "--inputs")
    assert (status, out) == (0, f"wrote 3 entries to {tmp_path / 'all.jsonl'}\n")
    assert json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])["content"] == "a=0&b=1"
    filled("audit", "export", str(tmp_path / "xor.csv"), "--model", "xor")
    with (tmp_path / "xor.csv").open(newline="") as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["1", "3"]
    assert "neither .jsonl nor .csv" in filled.fails("audit", "export", "all.xml")
    assert "cannot write" in filled.fails("audit", "export", str(tmp_path / "no" / "all.csv"))


def test_a_change_shows_and_so_does_an_end_that_was_cut_off(filled: Cli) -> None:
    _, out, _ = filled("audit", "verify")
    assert out.startswith("3 entries in 1 file, none changed\nlast hash ")
    last = out.split()[-1]
    assert filled("audit", "verify", "--expect", last)[0] == 0
    with closing(sqlite3.connect(filled.home / audit_log.NAME, isolation_level=None)) as db:
        db.executescript("DELETE FROM predictions WHERE n = 3; DELETE FROM inputs WHERE n = 3")
        assert filled("audit", "verify")[0] == 0
        assert "the end of the log was cut off" in filled.fails("audit", "verify", "--expect", last)
        db.execute("UPDATE predictions SET status = 500 WHERE n = 1")
        assert "entry 1 was changed" in filled.fails("audit", "verify")
