"""`gossipml stats`: whose use it shows, the figures of a program, the lines of a pipe, the table of a terminal."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from gossipml.cli.stats import Meter, Reading, Selection, Use, select, watch
from gossipml.cli.stats_view import COLUMNS, CsvView, GraphView, LinesView
from gossipml.daemon.gpu import Gpus, GpuUse
from gossipml.daemon.home import Home, RunInfo
from gossipml.errors import UserError

GB = 10**9
WHOLE = Reading(1_800_000_000.5, Use(41.25, 3 * GB, None, None), 8 * GB, None, None, 0)
PEER = Reading(1_800_000_001.5, Use(90.0, 4 * GB, 55.0, 2 * GB), 8 * GB, 24 * GB, Use(12.5, GB, 50.0, GB), 2)


class Recorder:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.shown: list[Reading] = []
        self.said: list[str] = []

    def show(self, reading: Reading) -> None:
        self.shown.append(reading)

    def say(self, text: str) -> None:
        self.said.append(text)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *details: object) -> None:
        pass


class FakeMeter(Meter):
    """Reads what it is given."""

    def __init__(self, readings: Sequence[Reading | None]) -> None:
        self.left = list(readings)

    def read(self) -> Reading | None:
        return self.left.pop(0)


class FakeClock:
    def now(self) -> float:
        return 1.0

    def wall(self) -> float:
        return 2.0


def stats(*options: str, home: Path, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "gossipml", "--home", str(home), "stats", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environ or {})},
    )


# The figures.


async def test_there_is_a_line_a_second_and_no_more_than_wanted(autojump_clock: object) -> None:
    import trio

    view = Recorder()
    begun = trio.current_time()
    await watch(FakeMeter([WHOLE] * 9), view, 5)
    assert len(view.shown) == 5
    assert trio.current_time() - begun == pytest.approx(5.0, abs=0.2)


async def test_when_the_process_ends_so_do_the_lines(autojump_clock: object) -> None:
    view = Recorder()
    await watch(FakeMeter([PEER, PEER, None]), view, None)
    assert len(view.shown) == 2
    assert view.said == ["the process has ended"]


def test_a_meter_adds_up_the_processes_and_knows_when_they_have_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        gpus = Gpus(processes=True)
        gpus.latest = GpuUse(40.0, 5 * GB, 24 * GB, {process.pid: 30.0, 1: 10.0}, {process.pid: GB})
        meter = Meter(select(Home(Path("/nowhere")), str(process.pid)).roots, FakeClock(), gpus, 2)
        reading = meter.read()
        assert reading is not None and reading.processes is not None
        assert (reading.wall, reading.count, reading.vram_total) == (2.0, 1, 24 * GB)
        assert (reading.machine.gpu, reading.machine.vram) == (40.0, 5 * GB)
        assert (reading.processes.gpu, reading.processes.vram) == (30.0, GB)
        assert 0 < reading.processes.ram < reading.machine.ram < reading.ram_total
        gpus.latest = None
        reading = meter.read()
        assert reading is not None and reading.processes is not None
        assert (reading.machine.gpu, reading.processes.vram) == (None, None)
        process.kill()
    assert meter.read() is None


# Whose use.


def test_without_a_peer_the_machine_alone_is_shown(tmp_path: Path) -> None:
    assert select(Home(tmp_path / "home"), None) == Selection("")


def test_the_peer_of_the_home_is_shown_while_it_runs(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with home.lock():
        assert select(home, None) == Selection(""), "it is starting"
        home.write_run_info(RunInfo(os.getpid(), "alice", "p" * 64, [], "127.0.0.1:1", 0.0))
        selection = select(home, None)
        assert selection.label == f"peer alice (process {os.getpid()}) with its worker"
        assert [root.pid for root in selection.roots] == [os.getpid()]
    assert select(home, None) == Selection(""), "it has stopped"


def test_who_is_named_is_shown_in_place_of_the_peer(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with home.lock():
        home.write_run_info(RunInfo(os.getpid(), "alice", "p" * 64, [], "127.0.0.1:1", 0.0))
        selection = select(home, str(os.getppid()))
        assert [root.pid for root in selection.roots] == [os.getppid()]
        assert selection.label.startswith(f"process {os.getppid()} (")
        with pytest.raises(UserError, match="there is no process named 'no such program'"):
            select(home, "no such program")


# How it looks.


def test_csv_has_a_cell_for_each_column_and_none_for_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with CsvView() as view:
        view.show(WHOLE)
        view.show(PEER)
        view.say("over")
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert tuple(rows[0]) == COLUMNS
    assert datetime.fromisoformat(rows[0]["time"]).timestamp() == 1_800_000_000.5
    assert list(rows[0].values())[1:] == ["41.2", str(3 * GB), str(8 * GB), "", "", "", "", "", "", "", ""]
    assert list(rows[1].values())[1:] == [
        *("90.0", str(4 * GB), str(8 * GB), "55.0", str(2 * GB), str(24 * GB)),
        *("12.5", str(GB), "50.0", str(GB), "2"),
    ]
    assert err == "gossipml: over\n", "not among the figures"


def test_a_pipe_gets_plain_lines_and_a_dash_without_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with LinesView("") as view:
        view.show(WHOLE)
    title, line = capsys.readouterr().out.splitlines()
    assert title == "the machine; no peer of this home is running"
    assert line.endswith("  machine CPU 41.2 %, RAM 3.0 GB of 8.0 GB, GPU -, VRAM -")
    with LinesView("peer alice") as view:
        view.show(PEER)
    title, line = capsys.readouterr().out.splitlines()
    assert title == "the machine, and peer alice"
    assert "GPU 55.0 %, VRAM 2.0 GB of 24.0 GB  processes 2: CPU 12.5 %, RAM 1.0 GB, GPU 50.0 %, VRAM 1.0 GB" in line


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_terminal_gets_a_table_with_the_last_minute(width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, _environ={"TERM": "xterm"})
    with GraphView("peer alice", console) as view:
        for _ in range(70):
            view.show(PEER)
        view.say("the process has ended")
    output.seek(0)
    output.truncate()
    console.print(view.table())
    assert max(map(len, Text.from_ansi(output.getvalue()).plain.splitlines())) <= width
    text = output.getvalue()
    assert "peer alice" in text
    assert "the process has ended" in text
    if width >= 80:
        cpu = next(line for line in text.splitlines() if "machine CPU" in line)
        assert cpu.count("90.0 %") == 3, "now, mean and most"
        assert "█" in cpu and "…" not in text
        vram = next(line for line in text.splitlines() if "machine VRAM" in line)
        assert "2.0 GB of 24.0 GB" in vram


def test_a_table_without_gpu_shows_dashes() -> None:
    output = io.StringIO()
    view = GraphView("", Console(file=output, force_terminal=True, width=100))
    with view:
        view.show(WHOLE)
        output.seek(0)
        output.truncate()
        view.show(WHOLE)
    gpu = next(line for line in output.getvalue().splitlines() if "machine GPU" in line)
    assert gpu.count("-") == 3
    assert "process" not in output.getvalue()


# As a command.


@pytest.mark.real
def test_csv_comes_line_by_line_and_ends_cleanly_at_ctrl_c(tmp_path: Path) -> None:
    with stats("--format", "csv", home=tmp_path / "home") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == ",".join(COLUMNS) + "\n"
        row = dict(zip(COLUMNS, process.stdout.readline().rstrip("\n").split(","), strict=True))
        assert 0.0 <= float(row["cpu_percent"]) <= 100.0
        assert 0 < int(row["ram_bytes"]) < int(row["ram_total_bytes"])
        assert row["processes"] == ""
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert err == ""
        assert all(line.count(",") == len(COLUMNS) - 1 for line in rest.splitlines()), "no half lines"
    assert not (tmp_path / "home").exists(), "looking makes no home"


@pytest.mark.real
def test_seconds_end_it_and_processes_are_measured(tmp_path: Path) -> None:
    with stats("--seconds", "1", "--process", str(os.getpid()), home=tmp_path / "home") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    title, line = out.splitlines()
    assert title.startswith(f"the machine, and process {os.getpid()} (")
    assert "processes " in line


@pytest.mark.real
def test_a_reader_that_goes_away_ends_it_without_complaint(tmp_path: Path) -> None:
    with stats("--format", "csv", home=tmp_path / "home") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


@pytest.mark.real
@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--seconds", "0"], 2, "--seconds"),
        (["--format", "xml"], 2, "--format"),
        (["--process", "no-such-program"], 1, "gossipml: there is no process named 'no-such-program'"),
    ],
)
def test_wrong_usage_is_said(tmp_path: Path, options: list[str], status: int, said: str) -> None:
    with stats(*options, home=tmp_path / "home") as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == ""
    assert said in err
    assert "Traceback" not in err
