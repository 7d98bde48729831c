"""How the demo looks: a live table on a terminal, plain lines in a pipe, nothing for a program."""

from __future__ import annotations

from collections import deque

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gossipml.cli.common import megabytes
from gossipml.cli.demo_run import PeerRow, Summary

STATE_STYLE = {"training": "green", "averaging": "cyan", "killed": "bold red", "starting": "yellow"}
NEWS = 6  # the last lines above the table
BAR = 20  # characters of an accuracy bar


class SilentView:
    """For `--json`."""

    def say(self, text: str) -> None:
        pass

    def update(self, rows: list[PeerRow]) -> None:
        pass

    def show_summary(self, summary: Summary) -> None:
        pass

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *details: object) -> None:
        pass


class LinesView(SilentView):
    """For a pipe: what happens as lines, the summary as a table without colours."""

    def __init__(self) -> None:
        self.console = Console(width=100, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show_summary(self, summary: Summary) -> None:
        self.console.print(summary_table(summary))
        self.console.print(predictions_line(summary))
        self.console.print(verdict(summary))


class TableView(LinesView):
    """For a terminal: news above, the live table below."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._news: deque[str] = deque(maxlen=NEWS)
        self._rows: list[PeerRow] = []
        self._live = Live(console=self.console, refresh_per_second=8, get_renderable=self._render)

    def say(self, text: str) -> None:
        self._news.append(text)

    def update(self, rows: list[PeerRow]) -> None:
        self._rows = rows

    def __enter__(self) -> TableView:
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        news = Text("\n".join(f"• {line}" for line in self._news))
        return Group(news, live_table(self._rows)) if self._rows else news


def live_table(rows: list[PeerRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("peer")
    table.add_column("state")
    for column in ("round", "age", "neighbours"):
        table.add_column(column, justify="right")
    table.add_column("local accuracy", width=BAR + 8)
    for column in ("sent", "received"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            Text(row.state, STATE_STYLE.get(row.state, "")),
            str(row.round),
            f"{row.age:,.0f}",
            str(row.neighbours),
            accuracy_bar(row.accuracy),
            megabytes(row.bytes_sent),
            megabytes(row.bytes_received),
        )
    return table


def accuracy_bar(accuracy: float | None) -> Text:
    if accuracy is None:
        return Text("-", "dim")
    filled = round(accuracy * BAR)
    return Text.assemble(("━" * filled, "green"), ("━" * (BAR - filled), "dim"), f" {100 * accuracy:5.1f} %")


def summary_table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("test accuracy", "against one process", "rounds", "sent", "received"):
        table.add_column(column, justify="right")
    for row in summary.peers:
        killed = " (killed and back)" if row.name == summary.killed else ""
        accuracy = row.accuracy or 0.0
        table.add_row(
            row.name + killed,
            f"{100 * accuracy:.1f} %",
            f"{100 * (accuracy - summary.central_accuracy):+.1f} points",
            str(row.round),
            megabytes(row.bytes_sent),
            megabytes(row.bytes_received),
        )
    table.add_section()
    table.add_row("one process, all the data", f"{100 * summary.central_accuracy:.1f} %", "", "", "", "")
    return table


def predictions_line(summary: Summary) -> str:
    right = sum(answer["label"] == answer["expected"] for answer in summary.predictions)
    return f"{len(summary.predictions)} predictions asked of all peers, {right} right."


def verdict(summary: Summary) -> Text:
    bound = f"{100 * summary.margin:.1f} points"
    if summary.good:
        return Text(
            f"Every peer is within {bound} of one process on all the data, in {summary.seconds:.0f} s.", "green"
        )
    return Text(f"Not every peer came within {bound} of one process on all the data (above 95 %).", "bold red")
