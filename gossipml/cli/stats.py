"""`gossipml stats`: what the machine and a peer use, second by second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossipml.cli.common import is_terminal

if TYPE_CHECKING:
    from gossipml.cli.stats_view import View
    from gossipml.daemon.gpu import Gpus
    from gossipml.daemon.home import Home
    from gossipml.daemon.usage import Moment
    from gossipml.env import Clock

INTERVAL = 1.0  # seconds between two lines


class Format(StrEnum):
    """How the figures are shown."""

    pretty = "pretty"
    csv = "csv"


@dataclass(frozen=True)
class Use:
    """Of the machine, or of processes. Shares are per cent of all cores, of all GPUs; None: not known."""

    cpu: float | None
    ram: int
    gpu: float | None
    vram: int | None


@dataclass(frozen=True)
class Reading:
    """What is shown in one line."""

    wall: float
    machine: Use
    ram_total: int
    vram_total: int | None
    processes: Use | None
    """None when the machine alone is looked at."""
    count: int
    """Of processes."""


@dataclass(frozen=True)
class Selection:
    """Whose use is shown beside that of the machine."""

    label: str
    roots: Sequence[Any] = ()  # psutil.Process; psutil comes without types


def stats(
    context: typer.Context,
    format: Annotated[Format, typer.Option(help="For people, or one line a second for programs.")] = Format.pretty,
    seconds: Annotated[int | None, typer.Option(min=1, help="Stop after so many lines; else Ctrl-C ends it.")] = None,
    process: Annotated[
        str | None, typer.Option(metavar="NAME|PID", help="Whose use to show, with its children; else the peer.")
    ] = None,
) -> None:
    """Show CPU, RAM, GPU and VRAM over time: of the machine, and of the peer of this home with its worker.

    CPU is in per cent of all cores, GPU of all NVIDIA GPUs. Ctrl-C ends it.
    """
    import psutil
    import trio

    from gossipml.cli.stats_view import CsvView, GraphView, LinesView
    from gossipml.daemon.gpu import Gpus
    from gossipml.env.real import RealClock

    selection = select(context.obj.home, process)
    view: View
    if format is Format.csv:
        view = CsvView()
    else:
        view = GraphView(selection.label) if is_terminal() else LinesView(selection.label)
    gpus = Gpus(processes=bool(selection.roots))
    meter = Meter(selection.roots, RealClock(), gpus, psutil.cpu_count() or 1)
    with view:
        trio.run(_until_stopped, meter, gpus, view, seconds)


def select(home: Home, process: str | None) -> Selection:
    """The processes that the user named, else the peer of the home if one runs. UserError when there is none."""
    import psutil

    from gossipml.daemon.usage import find_processes

    if process is not None:
        roots = find_processes(process)
        more = f" and {len(roots) - 1} more" if len(roots) > 1 else ""
        return Selection(f"process {roots[0].pid} ({roots[0].name()}){more} with children", roots)
    info = home.run_info()
    if info is not None:
        try:
            return Selection(f"peer {info.name} (process {info.pid}) with its worker", [psutil.Process(info.pid)])
        except psutil.Error:
            pass  # it has stopped just now
    return Selection("")


class Meter:
    """Makes a reading out of two looks, the one before and now."""

    def __init__(self, roots: Sequence[Any], clock: Clock, gpus: Gpus, cores: int) -> None:
        self._roots, self._clock, self._gpus, self._cores = roots, clock, gpus, cores
        self._before = self._look()

    def read(self) -> Reading | None:
        """None when the processes have ended."""
        from gossipml.daemon.usage import machine_percent, processes_percent

        before, now, gpus = self._before, self._look(), self._gpus.latest
        self._before = now
        if self._roots and not now.processes:
            return None
        machine = Use(
            machine_percent(before, now), now.ram, gpus.percent if gpus else None, gpus.vram if gpus else None
        )
        processes: Use | None = None
        if self._roots:
            pids = [pid for pid, _ in now.processes]
            processes = Use(
                processes_percent(before, now, self._cores),
                now.resident,
                sum(gpus.process_percent.get(pid, 0.0) for pid in pids) if gpus else None,
                sum(gpus.process_vram.get(pid, 0) for pid in pids) if gpus else None,
            )
        total = gpus.vram_total if gpus else None
        return Reading(self._clock.wall(), machine, now.ram_total, total, processes, len(now.processes))

    def _look(self) -> Moment:
        from gossipml.daemon.usage import look

        return look(self._roots, self._clock.now())


async def _until_stopped(meter: Meter, gpus: Gpus, view: View, lines: int | None) -> None:
    """Show readings until there have been so many, the processes have ended, or somebody says stop."""
    import signal

    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            await nursery.start(gpus.run, INTERVAL)
            await watch(meter, view, lines)
            nursery.cancel_scope.cancel()


async def watch(meter: Meter, view: View, lines: int | None) -> None:
    """A reading a second, without drift; a second that was missed (a machine asleep) is left out."""
    import trio

    due = trio.current_time()
    for _ in range(lines) if lines is not None else itertools.count():
        due = max(due + INTERVAL, trio.current_time())
        await trio.sleep_until(due)
        reading = await trio.to_thread.run_sync(meter.read)
        if reading is None:
            view.say("the process has ended")
            return
        view.show(reading)
