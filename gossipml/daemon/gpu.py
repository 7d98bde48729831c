"""How much of the NVIDIA GPUs is used, as `nvidia-smi` tells it; nothing on a machine that has none.

It comes with the driver, so nothing has to be installed, and a driver that hangs holds up that process and not ours.
Named fields of its query are used, and the per-process table by the names of its columns. Shares are of all GPUs
together, as those of the CPU are of all cores. Leaves out: other makers, and parts of a GPU (MIG), whose use the driver
does not tell. In a container the driver may name processes by ids that mean nothing there; they are then not found.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

PROGRAM = "nvidia-smi"
SECONDS = 5.0  # for an answer: a driver that has to wake up its GPUs first takes two
MAX_OUTPUT = 1 << 20  # bytes; some kB are usual
QUERY = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
PROCESSES = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
SHARES = ("pmon", "-c", "1", "-s", "u")
MIB = 1 << 20


@dataclass(frozen=True)
class GpuUse:
    """What was seen at one look; None: not told."""

    percent: float | None = None
    vram: int | None = None
    vram_total: int | None = None
    process_percent: Mapping[int, float] = field(default_factory=dict)
    """By process id."""
    process_vram: Mapping[int, int] = field(default_factory=dict)


class Gpus:
    """The GPUs of this machine, looked at while `run` runs; a look takes up to some seconds."""

    def __init__(self, *, processes: bool) -> None:
        self.latest: GpuUse | None = None
        """None without a GPU, and when its driver does not answer."""
        self._program = shutil.which(PROGRAM)
        self._processes = processes

    async def run(self, interval: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look every `interval` seconds; started after the first look."""
        due = trio.current_time() + interval
        if self._program is not None:
            self.latest = await self._look(self._program)
        task_status.started()
        while self._program is not None:
            await trio.sleep_until(due)
            due = trio.current_time() + interval
            self.latest = await self._look(self._program)

    async def _look(self, program: str) -> GpuUse | None:
        answers: dict[tuple[str, ...], str] = {}

        async def ask(question: tuple[str, ...]) -> None:
            answers[question] = await _output([program, *question])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, QUERY)
            if self._processes:
                nursery.start_soon(ask, PROCESSES)
                nursery.start_soon(ask, SHARES)
        return read_answers(answers[QUERY], answers.get(PROCESSES, ""), answers.get(SHARES, ""))


async def _output(command: list[str]) -> str:
    """What the command prints; nothing when it fails or takes too long."""
    with trio.move_on_after(SECONDS):
        try:
            done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
        except OSError:
            return ""
        return done.stdout[:MAX_OUTPUT].decode(errors="replace") if done.returncode == 0 else ""
    return ""


def read_answers(gpus: str, processes: str, shares: str) -> GpuUse | None:
    """The three outputs of `nvidia-smi`, read; None when the first one names no GPU."""
    rows = [[_number(cell) for cell in line.split(",")] for line in gpus.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    if not rows:
        return None
    percents = [row[0] for row in rows if row[0] is not None]
    used, total = ([row[column] for row in rows] for column in (1, 2))
    vram: dict[int, int] = {}
    for line in processes.splitlines():
        pid, _, size = line.partition(",")
        if pid.strip().isdecimal() and (number := _number(size)) is not None:
            vram[int(pid)] = vram.get(int(pid), 0) + int(number * MIB)
    return GpuUse(
        percent=sum(percents) / len(percents) if percents else None,
        vram=_sum(used),
        vram_total=_sum(total),
        process_percent={pid: percent / len(rows) for pid, percent in _shares(shares).items()},
        process_vram=vram,
    )


def _shares(text: str) -> dict[int, float]:
    """Per cent of one GPU by process id, from a table whose first comment line names the columns."""
    columns: list[str] = []
    shares: dict[int, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            columns = columns or line.lstrip("# ").split()
            continue
        row = dict(zip(columns, line.split(), strict=False))  # the command at the end may have spaces
        pid, share = row.get("pid", ""), _number(row.get("sm", ""))
        if pid.isdecimal() and share is not None:
            shares[int(pid)] = shares.get(int(pid), 0.0) + share
    return shares


def _sum(values: list[float | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(sum(known) * MIB) if known else None


def _number(text: str) -> float | None:
    """None for what `nvidia-smi` writes when it does not know: -, N/A, [N/A], [Not Supported]."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return None
