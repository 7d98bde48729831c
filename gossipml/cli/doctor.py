"""`gossipml peer doctor`: what the peer of this home needs, whether it has it, and how to mend what is missing."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gossipml.cli.common import ask, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from gossipml.daemon.doctor_patient import Check

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "fix": "bold"}


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print data for a program.")] = False,
) -> None:
    """Check port, clock, reachability, local network, disk and home, and print how to mend each.

    Works while the peer runs and while it does not; changes nothing. Exit status 1 when something is wrong.
    """
    import logging

    import trio
    from rich.console import Console

    from gossipml.daemon.doctor import examine
    from gossipml.env.real import real_env

    logging.getLogger("gossipml").addHandler(logging.NullHandler())  # what it says of a dial is in the checks
    home, console = context.obj.home, Console(highlight=False, quiet=as_json)

    def show(check: Check) -> None:
        if not as_json:
            _print(check, console)

    with console.status("looking at this machine and its networks"):
        checks = trio.run(examine, home, real_env(home.path), os.environ, ask, show)
    wrong = list(dict.fromkeys(check.name for check in checks if check.state == "failed"))
    warnings = list(dict.fromkeys(check.name for check in checks if check.state == "warning"))
    if as_json:
        print_json({"ok": not wrong, "checks": [asdict(check) for check in checks]})
    elif wrong:
        print(f"\nwrong: {', '.join(wrong)}")
    else:
        print("\nnothing is wrong" + (f"; look at: {', '.join(warnings)}" if warnings else ""))
    if wrong:
        raise typer.Exit(1)


def _print(check: Check, console: Console) -> None:
    """A line for a program or a file, wrapped in columns on a terminal."""
    lines: list[tuple[str, str, str]] = [(check.name, check.state, check.seen)]
    if check.fix:
        lines.append(("", "fix", check.fix))
    if not console.is_terminal:
        for name, label, text in lines:
            print(f"{name:<10} {label:<8} {text}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=10)
    table.add_column(width=8)
    table.add_column(overflow="fold")
    for name, label, text in lines:
        table.add_row(Text(name), Text(label, style=COLOURS[label]), Text(text))
    console.print(table)
