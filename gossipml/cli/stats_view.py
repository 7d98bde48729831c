"""How `gossipml stats` looks: a live table with graphs on a terminal, plain lines in a pipe, CSV for a program."""

from __future__ import annotations

import sys
from collections import deque
from datetime import datetime
from typing import Protocol

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gossipml.cli.common import megabytes
from gossipml.cli.stats import Reading, Use

GRAPH = 60  # seconds in a graph
FIGURES = 60  # characters of the columns before the graph
LEAST_GRAPH = 10
BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = (
    "time", "cpu_percent", "ram_bytes", "ram_total_bytes", "gpu_percent", "vram_bytes", "vram_total_bytes",
    "process_cpu_percent", "process_ram_bytes", "process_gpu_percent", "process_vram_bytes", "processes",
)  # fmt: skip


class View(Protocol):
    def show(self, reading: Reading) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> object: ...

    def __exit__(self, *details: object) -> None: ...


class CsvView:
    """A header, then a line for each reading, whole and at once; a cell is empty when there is no figure."""

    def show(self, reading: Reading) -> None:
        machine, ours = reading.machine, reading.processes or Use(None, 0, None, None)
        count = reading.count if reading.processes else None
        cells = (
            datetime.fromtimestamp(reading.wall).astimezone().isoformat(timespec="milliseconds"),
            *(machine.cpu, machine.ram, reading.ram_total, machine.gpu, machine.vram, reading.vram_total),
            *(ours.cpu, ours.ram if reading.processes else None, ours.gpu, ours.vram, count),
        )
        self._write(",".join(_cell(cell) for cell in cells))

    def say(self, text: str) -> None:
        print(f"gossipml: {text}", file=sys.stderr)

    def __enter__(self) -> CsvView:
        self._write(",".join(COLUMNS))
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def _write(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class LinesView:
    """For a pipe: a line for each reading."""

    def __init__(self, label: str) -> None:
        self._label = label

    def show(self, reading: Reading) -> None:
        line = f"{_time(reading)}  machine {describe(reading.machine, reading.ram_total, reading.vram_total)}"
        if reading.processes is not None:
            line += f"  processes {reading.count}: {describe(reading.processes)}"
        print(line, flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def __enter__(self) -> LinesView:
        print(_title(self._label), flush=True)
        return self

    def __exit__(self, *details: object) -> None:
        pass


class GraphView:
    """For a terminal: a table that stays where it is; now, mean and most since the start, the last minute."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self._label = label
        self._console = console or Console(highlight=False)
        self._said = ""
        self._reading: Reading | None = None
        self._series: dict[str, _Series] = {}
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self.table)

    def show(self, reading: Reading) -> None:
        self._reading = reading
        totals = (100.0, reading.ram_total, 100.0, reading.vram_total)
        for whose, use in (("machine", reading.machine), ("process", reading.processes)):
            if use is None:
                continue
            for name, value, total in zip(
                ("CPU", "RAM", "GPU", "VRAM"), (use.cpu, use.ram, use.gpu, use.vram), totals, strict=True
            ):
                series = self._series.setdefault(f"{whose} {name}", _Series(name))
                series.add(value, total)
        self._live.refresh()

    def say(self, text: str) -> None:
        self._said = text
        self._live.refresh()

    def __enter__(self) -> GraphView:
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def table(self) -> Table:
        title = _title(self._label) + (f"\n{_time(self._reading)}" if self._reading else "")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
        table.caption, table.caption_justify = self._said or None, "left"
        table.add_column("", no_wrap=True)
        for column in ("now", "mean", "most"):
            table.add_column(column, justify="right", no_wrap=True)
        width = min(GRAPH, self._console.width - FIGURES)
        if width >= LEAST_GRAPH:
            table.add_column(f"last {width} s", no_wrap=True, width=width)
        for name, series in self._series.items():
            graph = (series.graph(width),) if width >= LEAST_GRAPH else ()
            table.add_row(name, *series.cells(), *graph)
        return table


class _Series:
    """One figure over time."""

    def __init__(self, name: str) -> None:
        self._bytes = name.endswith("RAM")
        self._recent: deque[tuple[float | None, float]] = deque(maxlen=GRAPH)  # value and the whole of it
        self._sum, self._number, self._most = 0.0, 0, 0.0

    def add(self, value: float | None, whole: float | None) -> None:
        self._recent.append((value, whole or 0.0))
        if value is not None:
            self._sum, self._number, self._most = self._sum + value, self._number + 1, max(self._most, value)

    def cells(self) -> tuple[str, str, str]:
        now, whole = self._recent[-1]
        form = megabytes if self._bytes else percent
        if not self._number or now is None:
            return "-", "-", "-"
        of = f" of {megabytes(whole)}" if self._bytes and whole else ""
        return form(now) + of, form(self._sum / self._number), form(self._most)

    def graph(self, width: int) -> Text:
        text = Text()
        for value, whole in list(self._recent)[-width:]:
            share = value / whole if value is not None and whole else 0.0
            block = BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))] if value is not None else " "
            text.append(block, "red" if share > 0.9 else "yellow" if share > 0.6 else "green")
        return text


def describe(use: Use, ram_total: int = 0, vram_total: int | None = None) -> str:
    """A line of text; without the totals for processes."""
    ram = megabytes(use.ram) + (f" of {megabytes(ram_total)}" if ram_total else "")
    vram = "-" if use.vram is None else megabytes(use.vram) + (f" of {megabytes(vram_total)}" if vram_total else "")
    return f"CPU {percent(use.cpu)}, RAM {ram}, GPU {percent(use.gpu)}, VRAM {vram}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _time(reading: Reading) -> str:
    return datetime.fromtimestamp(reading.wall).strftime("%H:%M:%S")


def _title(label: str) -> str:
    return f"the machine, and {label}" if label else "the machine; no peer of this home is running"
