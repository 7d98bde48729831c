"""`gossipml demo`: the whole thing on one machine, with a peer that dies on the way."""

from __future__ import annotations

from typing import Annotated

import typer

from gossipml.cli.common import is_terminal, print_json


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print only the summary, for a program.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the peers running at the end, until Ctrl-C.")] = False,
) -> None:
    """Train four peers together on this machine, kill one on the way, and see it come back.

    Four real processes on loopback share the digits dataset unevenly (dirichlet:0.5). Half-way one is killed with
    SIGKILL and started again on its home a little later. Every peer is asked for predictions, and the end compares
    them with one process trained on all the data.
    """
    from gossipml.cli.demo_run import Plan, run_demo
    from gossipml.cli.demo_view import LinesView, SilentView, TableView

    view = SilentView() if as_json else TableView() if is_terminal() else LinesView()
    summary = run_demo(Plan(keep=keep), view)
    if as_json:
        print_json(summary.as_json())
    else:
        view.show_summary(summary)
    if not summary.good:
        raise typer.Exit(1)
