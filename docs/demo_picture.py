"""Runs the demo and draws what it shows as docs/demo.svg: python docs/demo_picture.py"""

from __future__ import annotations

import copy
import re
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from gossipml.cli.demo_run import PeerRow, Plan, Summary, run_demo
from gossipml.cli.demo_view import SilentView, live_table, predictions_line, summary_table, verdict


class Recorder(SilentView):
    """Keeps the news, and the table as it was while one peer was dead."""

    def __init__(self) -> None:
        self.news: list[str] = []
        self.table: list[PeerRow] = []

    def say(self, text: str) -> None:
        self.news.append(text)

    def update(self, rows: list[PeerRow]) -> None:
        if any(row.state == "killed" for row in rows):
            self.table = copy.deepcopy(rows)

    def draw(self, summary: Summary, file: Path) -> None:
        console = Console(record=True, width=100, highlight=False)
        until = next(i for i, line in enumerate(self.news) if "again" in line)
        console.print(Text("$ gossipml demo", "bold"))
        console.print(Group(*(Text(f"• {line}") for line in self.news[:until])), live_table(self.table))
        console.print(Group(*(Text(f"• {line}") for line in self.news[until:])), summary_table(summary))
        console.print(predictions_line(summary))
        console.print(verdict(summary))
        drawing = console.export_svg(title="gossipml demo")
        file.write_text(
            re.sub(r"@font-face {.*?}", "", drawing, flags=re.DOTALL)
        )  # fonts of this machine, no downloads


if __name__ == "__main__":
    recorder = Recorder()
    recorder.draw(run_demo(Plan(), recorder), Path(__file__).with_name("demo.svg"))
