"""`gossipml data`: the sources a peer can train on, what they hold, and their division among peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossipml.cli.common import megabytes, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from gossipml.models.data_summary import Summary

app = typer.Typer(help="Data to train on: list the sources, look into one, divide one.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="As for peer start --data; see `gossipml data list`.")]
SHOWN = 30  # classes or columns on a terminal; --json has all


@app.command("list", epilog="Example: gossipml data list")
def list_sources(as_json: Json = False) -> None:
    """List the forms of SOURCE and RULE."""
    from gossipml.models.data import sources
    from gossipml.models.partition import RULES

    if as_json:
        print_json(
            {
                "sources": [{"source": each.form, "about": each.about} for each in sources()],
                "rules": list(RULES),
            }
        )
        return
    table = _table("source", "what")
    for each in sources():
        table.add_row(each.form, each.about)
    _print(table)
    print(f"rules to divide one: {', '.join(RULES)}")


@app.command("info", epilog="Example: gossipml data info csv:houses.csv#price")
def info(source: Source, as_json: Json = False) -> None:
    """Show what a source holds: samples, classes, columns, and the built-in models that train on it."""
    from dataclasses import asdict

    from gossipml.models.data import load_source
    from gossipml.models.data_summary import summarise

    summary = summarise(load_source(source))
    if as_json:
        print_json(asdict(summary))
    else:
        _print_summary(summary)


@app.command("split", epilog="Example: gossipml data split digits --rule dirichlet:0.5 --parts 4 --out parts")
def split(
    source: Source,
    rule: Annotated[str, typer.Option(help="iid, dirichlet:ALPHA, labels:K or shards:K.")],
    parts: Annotated[int, typer.Option(help="How many parts.")],
    out: Annotated[Path, typer.Option(help="The folder to write them into; empty, or not there yet.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same parts everywhere.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Divide a source into files that peers can train on, as peer start --split RULE --part I/N would."""
    from gossipml.models.data import load_source
    from gossipml.models.data_split import write_parts
    from gossipml.models.partition import parse_part, parse_rule

    parsed, count = parse_rule(rule), parse_part(f"1/{parts}").count
    data = load_source(source)
    written = write_parts(data, parsed, count, seed, out.expanduser())
    if as_json:
        print_json(
            [
                {
                    "source": part.source,
                    "samples": part.samples,
                    "classes": dict(zip(data.labels, part.counts, strict=True)),
                }
                for part in written
            ]
        )
        return
    table = _table("give as --data", "samples", "classes", numbers=("samples",))
    for part in written:
        held = [f"{name}: {count}" for name, count in zip(data.labels, part.counts, strict=True) if count]
        table.add_row(part.source, str(part.samples), ", ".join(held[:SHOWN]) + (", ..." if len(held) > SHOWN else ""))
    _print(table)


def _print_summary(summary: Summary) -> None:
    shape = " x ".join(map(str, summary.shape))
    where = "read as they are needed" if summary.streamed else "in memory"
    print(f"{summary.source}: {summary.train} samples to train on, {summary.test} for testing")
    print(f"a sample: {shape} values ({summary.dtype}); {megabytes(summary.bytes)} in all, {where}")
    if summary.target_mean is not None and summary.target_deviation is not None:
        print(f"values to predict: mean {summary.target_mean:g}, deviation {summary.target_deviation:g}")
    if summary.classes:
        table = _table("class", "train", "test", numbers=("train", "test"))
        for each in summary.classes[:SHOWN]:
            table.add_row(each.name, str(each.train), str(each.test))
        _print_shortened(table, len(summary.classes), "classes")
    if summary.features:
        table = _table("column", "mean", "deviation", numbers=("mean", "deviation"))
        for column in summary.features[:SHOWN]:
            table.add_row(column.name, f"{column.mean:.6g}", f"{column.deviation:.6g}")
        _print_shortened(table, len(summary.features), "columns")
    if summary.models:
        print(f"models that train on it: {', '.join(summary.models)}")
    else:
        print(
            "no built-in model trains on it as it is; begin one of your own: gossipml models new my_model.py --data ..."
        )


def _print_shortened(table: Table, count: int, what: str) -> None:
    _print(table)
    if count > SHOWN:
        print(f"... {count} {what} in all; --json shows them")


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 200, markup=False).print(table)
