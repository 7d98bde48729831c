"""`gossipml peer pause`, `resume`, `open`: the training of the peer of this home, and its page."""

from __future__ import annotations

from typing import Annotated

import typer

from gossipml.cli.common import change, print_json

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]


def pause(context: typer.Context, as_json: Json = False) -> None:
    """Let the peer of this home train no more, over restarts too, until `peer resume`.

    It goes on to average with its neighbours, to answer predictions and to hold models for others.
    """
    _say(change(context.obj.home, "POST", "/v1/training/pause"), as_json)


def resume(context: typer.Context, as_json: Json = False) -> None:
    """Let the peer of this home train again."""
    _say(change(context.obj.home, "POST", "/v1/training/resume"), as_json)


def open_page(context: typer.Context, as_json: Json = False) -> None:
    """Print a link that opens the peer's page in a browser, with leave to pause, resume and publish.

    The link works once and for two minutes; the page stays open to its browser for twelve hours. Without it, the page
    at the peer's address shows everything and changes nothing.
    """
    home = context.obj.home
    answer = change(home, "POST", "/v1/page-link")
    link = f"http://{home.require_run_info().api}{answer['path']}"
    if as_json:
        print_json({"link": link, "seconds": answer["seconds"]})
    else:
        print(link)


def _say(answer: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        print(answer["detail"])
