"""How a simulation looks while it runs, and what is printed at its end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gossipml.cli.common import duration
from gossipml.env.real import RealClock
from gossipml.simulations.runner import Silent
from gossipml.simulations.summary import Compared, Line, shown

if TYPE_CHECKING:
    from gossipml.simulations.result import Cell, Row
    from gossipml.simulations.sweep import SweepCell

LINE_SECONDS = 5.0  # between two lines in a pipe
VARIANT_LEAST = 20  # characters for the name of a variant, before columns are left out for it
LEFT_OUT = ("messages", "consensus", "± peers", "of\naverage", "served", "worst", "sent a\npeer")  # in this order


def _figures(row: Row) -> str:
    if not math.isnan(row.accuracy):
        return f"accuracy {shown('accuracy', row.accuracy)}"
    return f"variance {shown('variance', row.variance)}" if not math.isnan(row.variance) else ""


class LinesView(Silent):
    """For a pipe, and what all views say."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._clock = RealClock()
        self._start = self._last = self._clock.now()
        self._rounds: dict[Cell, float] = {}
        self._done: dict[Cell, float] = {}
        self._latest: Row | None = None

    def __enter__(self) -> LinesView:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", markup=False, style="yellow")

    def begin(self, cells: list[tuple[Cell, float]], skipped: int) -> None:
        self._rounds = dict(cells)
        if skipped:
            self.console.print(f"{skipped} of {skipped + len(cells)} simulations were finished before")

    def row(self, row: Row) -> None:
        self._done[row.variant, row.seed] = row.round
        self._latest = row
        now = self._clock.now()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            done = sum(self._done.values()) / (sum(self._rounds.values()) or 1)
            left = f", {duration((now - self._start) * (1 - done) / done)} left" if done else ""
            self.console.print(
                f"{row.variant}, seed {row.seed}, round {row.round:g} of {self._rounds[row.variant, row.seed]:g}: "
                f"{_figures(row)}{left}",
                markup=False,
            )

    def finish(self, cell: Cell) -> None:
        if self._latest is not None:
            self.console.print(f"{cell[0]}, seed {cell[1]}: {_figures(self._latest)}", markup=False)


class BarView(LinesView):
    """For a terminal: a bar with the time left; finished simulations above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("preparing", total=None, figures="")

    def __enter__(self) -> BarView:
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def begin(self, cells: list[tuple[Cell, float]], skipped: int) -> None:
        super().begin(cells, skipped)
        self._bar.update(self._task, total=sum(self._rounds.values()))

    def advance(self, cell: Cell, round: float) -> None:
        self._done[cell] = round
        self._bar.update(self._task, description=f"{cell[0]}, seed {cell[1]}", completed=sum(self._done.values()))

    def row(self, row: Row) -> None:
        self._latest = row
        self._bar.update(self._task, figures=_figures(row))


def summary_table(lines: list[Line], width: int) -> Table:
    """What each variant ended with, in so many columns of the terminal; what nobody measured is left out."""
    return _ends_table([], [((), line) for line in lines], width)


def sweep_table(lines: list[tuple[SweepCell, Line]], width: int) -> Table:
    """The same of every cell of a sweep."""
    paths = [path for path, _ in lines[0][0].settings] if lines else []
    return _ends_table(paths, [(tuple(str(value) for _, value in cell.settings), line) for cell, line in lines], width)


def _ends_table(paths: list[str], rows: list[tuple[tuple[str, ...], Line]], width: int) -> Table:
    lines = [line for _, line in rows]
    names = [
        ("accuracy", "accuracy"),
        ("± peers", "accuracy_std"),
        ("worst", "accuracy_min"),
        ("of\naverage", "accuracy_average"),
        ("served", "accuracy_served"),
        ("variance", "variance"),
        ("consensus", "consensus"),
        ("sent a\npeer", "bytes"),
        ("messages", "messages"),
    ]
    if any(not math.isnan(line.end.accuracy) for line in lines):
        names = [each for each in names if each[1] != "variance"]
    columns = {
        title: [shown(name, getattr(line.end, name)) for line in lines]
        for title, name in names
        if any(not math.isnan(getattr(line.end, name)) for line in lines)
    }
    columns["rounds"] = [f"{line.end.round:g}" + ("" if line.complete else " (stopped)") for line in lines]
    columns["updates\n/s"] = [shown("updates", line.updates_per_second) for line in lines]
    settings = {path: [values[place] for values, _ in rows] for place, path in enumerate(paths)}
    longest = max((len(line.variant) for line in lines), default=0)
    left = width - sum(map(_width, settings.items())) - min(longest, VARIANT_LEAST) - 3
    for title in LEFT_OUT:
        if sum(map(_width, columns.items())) > left:
            columns.pop(title, None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for path in settings:
        table.add_column(path, justify="right")
    table.add_column("variant", overflow="fold")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for place, line in enumerate(lines):
        table.add_row(
            *(cells[place] for cells in settings.values()),
            line.variant,
            *(cells[place] for cells in columns.values()),
        )
    return table


def _width(column: tuple[str, list[str]]) -> int:
    """With the space beside it."""
    title, cells = column
    return 3 + max(len(text) for text in (*title.split("\n"), *cells))


def figures_table(figures: list[Compared]) -> Table:
    """Published beside ours."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    for column in ("figure", "variant", "published", "ours", "how the setting differs"):
        table.add_column(column, overflow="fold")
    for each in figures:
        table.add_row(each.what, each.variant, each.published, each.ours, each.differs)
    return table
