"""The frame of the learning figures: rows are listed, measured, written and drawn."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / "benchmarks" / "learning" / "run.py"
    command = [sys.executable, str(program), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


def test_without_arguments_the_rows_are_listed() -> None:
    done = run()
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("xor", "six", "iid", "uneven", "cifar", "bytes", "liars", "workers", "ddp")
    ]


def test_an_unknown_row_is_a_usage_error_that_names_the_known_ones() -> None:
    done = run("xnor")
    assert done.returncode == 2
    assert "there is no row 'xnor'" in done.stderr and "xor" in done.stderr


def test_a_row_writes_its_records_its_plot_and_its_line_of_the_table(tmp_path: Path) -> None:
    done = run("xor", "--quick", "--processes", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "xor.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    assert {record["variant"] for record in records} >= {"alone", "mean, 2 peers", "slerp, 3 peers"}
    assert {record["right"] for record in records} <= {"0", "100"}
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        [line] = csv.DictReader(file)
    assert line["row"] == "xor" and line["reached"] in ("yes", "no") and line["machine"]
    if "no plot" not in done.stdout:
        assert (tmp_path / "xor.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", ["six", "cifar"])
def test_a_row_without_its_data_is_skipped_and_says_so(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSIPML_DATASETS", str(tmp_path / "nothing"))
    done = run(row, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "skipped: no " in done.stdout and "GOSSIPML_DATASETS" in done.stdout
