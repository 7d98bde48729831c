"""How `gossipml peer status` looks: a page that stays where it is with `--watch`, plain lines without."""

from __future__ import annotations

from collections import deque
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gossipml.cli.common import duration, megabytes

Answer = Any  # JSON of the endpoint

BLOCKS = "▁▂▃▄▅▆▇█"
HISTORY = 120  # readings, a second each
WIDE = 60  # characters of the graph of accuracy, at most
BAR = 10
NARROW = 80  # characters of a terminal that has room for all columns
MAX_PEERS = 30  # rows; more do not fit a screen
COLOURS = {
    "training": "green", "averaging": "green", "serving": "green", "connected": "green", "paused": "yellow",
    "starting": "yellow", "suspect": "yellow", "lost": "dim", "known": "dim", "refused": "red", "quarantined": "red",
    "stopped": "red",
}  # fmt: skip


def print_status(status: Answer) -> None:
    """Label and text, line by line."""
    for label, text in rows(status):
        print(f"{label:<9} {text}")


def rows(status: Answer) -> list[tuple[str, str]]:
    found = [
        ("peer", f"{status['name']} ({status['peer'][:8]}), up {duration(status['uptime'])}"),
        ("state", _state(status["state"], status["sentence"])),
        ("network", f"{status['network'][:8]}, {status['neighbours']} neighbours, {status['members']} members known"),
    ]
    if status["trains"]:
        found += [
            ("model", f"{status['model']} on {status['data']} ({status['split']}, part {status['part']})"),
            (
                "training",
                f"round {status['round']}, age {status['age']:,.0f} samples, loss {number(status['loss'], '.4f')}",
            ),
            (
                "accuracy",
                f"{percent(status['accuracy'])} on the test data, serving the {status['served'] or '-'} model",
            ),
        ]
    else:
        found.append(("model", f"{status['model']}, served without training"))
    lan = status["lan"]
    found += [
        ("gossip", f"{megabytes(status['bytes_sent'])} sent, {megabytes(status['bytes_received'])} received"),
        ("store", f"{status['versions']} versions, {megabytes(status['stored'])}"),
        ("lan", "off (--no-lan)" if lan is None else lan["problem"] or f"{lan['peers']} peers heard"),
        ("listen", ", ".join(status["addresses"])),
        ("api", f"http://{status['api']}"),
    ]
    return found + [("problem", problem) for problem in status["problems"]]


class LinesWatch:
    """For a pipe: a line for each reading."""

    def show(self, status: Answer, peers: list[Answer]) -> None:
        print(
            f"{status['state']}  round {status['round']}  accuracy {percent(status['accuracy'])}  "
            f"loss {number(status['loss'], '.4f')}  {status['neighbours']} neighbours  "
            f"{megabytes(status['bytes_sent'])} sent  {megabytes(status['bytes_received'])} received",
            flush=True,
        )

    def __enter__(self) -> LinesWatch:
        return self

    def __exit__(self, *details: object) -> None:
        pass


class LiveWatch:
    """For a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._accuracy: deque[float | None] = deque(maxlen=HISTORY)
        self._before: Answer | None = None
        self._shown: RenderableType = Text("asking the peer ...")
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=lambda: self._shown)

    def show(self, status: Answer, peers: list[Answer]) -> None:
        self._accuracy.append(status["accuracy"])
        self._shown = Group(self._head(status), Columns(self._panels(status), expand=True), self._peers(peers))
        self._before = status
        self._live.refresh()

    def __enter__(self) -> LiveWatch:
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def _head(self, status: Answer) -> Text:
        head = Text.assemble((status["name"], "bold"), f"  {status['peer'][:8]}  up {duration(status['uptime'])}  ")
        head.append(status["state"], COLOURS.get(status["state"], ""))
        head.append(f"  http://{status['api']}", "dim")
        for problem in [f"paused: {status['paused']}"] if status["paused"] else []:
            head.append(f"\n{problem}", "yellow")
        for problem in status["problems"]:
            head.append(f"\n{problem}", "red")
        return head

    def _panels(self, status: Answer) -> list[Panel]:
        before = self._before
        seconds = status["uptime"] - before["uptime"] if before else 0.0

        def rate(name: str) -> str:
            more = f", {megabytes((status[name] - before[name]) / seconds)}/s" if before and seconds > 0 else ""
            return megabytes(status[name]) + more

        learning = Table.grid(padding=(0, 2))
        learning.add_row("accuracy", Text(percent(status["accuracy"]), "bold green"))
        learning.add_row("loss", number(status["loss"], ".4f"))
        learning.add_row("round", f"{status['round']:,}, age {status['age']:,.0f}")
        learning.add_row("model", status["model"])
        talking = Table.grid(padding=(0, 2))
        talking.add_row("neighbours", f"{status['neighbours']} of {status['members']} members")
        talking.add_row("sent", rate("bytes_sent"))
        talking.add_row("received", rate("bytes_received"))
        talking.add_row("store", f"{status['versions']} versions, {megabytes(status['stored'])}")
        graph = Text(spark(list(self._accuracy)[-min(WIDE, self._console.width - 6) :]), "green")
        return [
            Panel(Group(learning, graph), title="learning", title_align="left", box=box.ROUNDED, border_style="dim"),
            Panel(Group(talking, ""), title="network", title_align="left", box=box.ROUNDED, border_style="dim"),
        ]

    def _peers(self, peers: list[Answer]) -> RenderableType:
        if not peers:
            return Text("no other peer is known yet; let one join with the token: gossipml token new", "dim")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("peer", "state", "accuracy"):
            table.add_column(column, no_wrap=True)
        figures = ("loss", "age", "sent", "received", "heard") if self._console.width >= NARROW else ("loss",)
        for column in figures:
            table.add_column(column, justify="right", no_wrap=True)
        for peer in peers[:MAX_PEERS]:
            state = peer["learning"] if peer["learning"] and peer["state"] == "connected" else peer["state"]
            seen = peer["last_seen"]
            cells = (
                number(peer["loss"], ".4f"),
                number(peer["age"], ",.0f"),
                megabytes(peer["bytes_sent"]),
                megabytes(peer["bytes_received"]),
                "-" if seen is None else "now" if seen < 5 else f"{duration(seen)} ago",
            )
            table.add_row(
                peer["name"] or peer["peer"][:8],
                Text(state, COLOURS.get(state, "")),
                Text.assemble((bar(peer["accuracy"], BAR), "green"), f" {percent(peer['accuracy'])}"),
                *cells[: len(figures)],
            )
        if len(peers) > MAX_PEERS:
            table.caption = f"and {len(peers) - MAX_PEERS} more: gossipml peer list"
        return table


def spark(shares: list[float | None]) -> str:
    """A character for each share from 0 to 1."""
    return "".join(" " if s is None else BLOCKS[min(len(BLOCKS) - 1, int(s * len(BLOCKS)))] for s in shares)


def bar(share: float | None, width: int) -> str:
    """A share from 0 to 1 as a bar, in eighths of a character."""
    if share is None:
        return " " * width
    whole, rest = divmod(round(max(0.0, min(1.0, share)) * width * 8), 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


def number(value: Any, form: str) -> str:  # Any: a JSON number or null
    return "-" if value is None else format(value, form)


def percent(value: Any) -> str:  # Any: a JSON number or null
    return "-" if value is None else f"{100 * value:.1f} %"


def _state(state: str, sentence: str) -> str:
    return sentence if sentence.startswith(state) else f"{state}: {sentence}"
