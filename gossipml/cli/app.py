"""The `gossipml` command and its groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossipml import __version__
from gossipml.cli import audit, data, demo, models, peer, predict, simulate, stats, token

app = typer.Typer(
    name="gossipml",
    help="Train models together without a centre: equal peers find each other, train on their own data, "
    "average with neighbours, and predict.",
    epilog="Begin with: gossipml demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog="Example: gossipml demo --json")(demo.demo)
app.command("predict", epilog="Example: gossipml predict xor a=0 b=1")(predict.predict)
app.add_typer(peer.app, name="peer")
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(simulate.app, name="simulate")
app.add_typer(token.app, name="token")
app.add_typer(audit.app, name="audit")
app.command("stats", epilog="Example: gossipml stats --format csv --seconds 60 > use.csv")(stats.stats)

_verbose = False


def is_verbose() -> bool:
    return _verbose


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gossipml {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder of the peer's identity, token, models and state.", envvar="GOSSIPML_HOME"),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show where an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _verbose
    from gossipml.cli.common import Context

    _verbose = verbose
    context.obj = Context(home, verbose)
