"""`gossipml audit`: which predictions the peer of this home was asked for, and whether the record is whole."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossipml.cli.common import print_json
from gossipml.errors import UserError

if TYPE_CHECKING:
    from gossipml.daemon.audit_log import Row

app = typer.Typer(help="The record of all predictions.", no_args_is_help=True)

ANSWER = 50  # characters of an answer in the list; the whole of it is in the export

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
Model = Annotated[str, typer.Option(help="Only those of this model.")]


@app.command("list", epilog="Example: gossipml audit list -n 100 --model xor")
def list_entries(
    context: typer.Context,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of the newest.")] = 20,
    model: Model = "",
    as_json: Json = False,
) -> None:
    """List the newest predictions, the last one at the end."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gossipml.daemon.audit_log import read

    rows = list(read(context.obj.home.path, model=model, newest=lines))
    if as_json:
        print_json([_fields(row) for row in rows])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    right = ("n", "status", "ms")
    for column in ("n", "time", "status", "model", "version", "by", "input", "ms", "answer"):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        e = row.entry
        when = datetime.fromtimestamp(e.time).strftime("%m-%d %H:%M:%S")
        given = f"{e.size} B, {e.input[:8]}"
        cells = (when, str(e.status), e.model, e.version[:12], e.peer[:8], given, f"{1000 * e.seconds:.1f}")
        table.add_row(str(row.n), *cells, e.answer[:ANSWER])
    console = Console(highlight=False, markup=False)
    Console(width=None if console.is_terminal else 200, highlight=False, markup=False).print(table)


@app.command("verify", epilog="Example: gossipml audit verify --expect 5f0c... ")
def verify(
    context: typer.Context,
    expect: Annotated[str, typer.Option(help="The last hash, as noted earlier: it must still be in the log.")] = "",
    as_json: Json = False,
) -> None:
    """Compute the chain of hashes anew; exit status 1 when an entry was changed, added or removed.

    Entries cut off at the end show only against a hash that was noted elsewhere: note the one that this prints.
    """
    from gossipml.daemon import audit_log

    home = context.obj.home.path
    verdict = audit_log.verify(home)
    problem = verdict.problem
    if expect and not problem and not any(row.hash.hex() == expect.lower() for row in audit_log.read(home)):
        problem = f"no entry has the hash {expect[:16]}...: the end of the log was cut off, or it was made anew"
    if as_json:
        print_json({**asdict(verdict), "problem": problem, "ok": not problem})
    if problem:
        raise UserError(f"the audit log is not what was written: {problem}")
    if not as_json:
        files = "1 file" if verdict.files == 1 else f"{verdict.files} files"
        print(f"{verdict.rows} entries in {files}, none changed")
        print(f"last hash {verdict.last_hash}")


@app.command("export", epilog="Example: gossipml audit export audit.csv")
def export(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="A .jsonl or .csv file, or - for JSON lines on standard output.")] = "-",
    model: Model = "",
    inputs: Annotated[bool, typer.Option("--inputs", help="With the inputs, where they were kept.")] = False,
) -> None:
    """Write all predictions, oldest first, to a file."""
    from gossipml.daemon.audit_log import input_of, read

    home = context.obj.home.path
    suffix = Path(file).suffix
    if file != "-" and suffix not in (".jsonl", ".csv"):
        raise UserError(f"{file} is neither .jsonl nor .csv; name it by what it is to hold")

    count = 0

    def rows() -> Iterable[dict[str, Any]]:  # Any: JSON values
        nonlocal count
        for row in read(home, model=model):
            count += 1
            given = input_of(home, row.n) if inputs else None
            kept = {"content": None if given is None else given.decode(errors="replace")} if inputs else {}
            yield {**_fields(row), **kept}

    try:
        with nullcontext(sys.stdout) if file == "-" else open(file, "w", newline="", encoding="utf-8") as out:
            if suffix == ".csv":
                writer: csv.DictWriter[str] | None = None
                for line in rows():
                    if writer is None:
                        writer = csv.DictWriter(out, list(line))
                        writer.writeheader()
                    writer.writerow(line)
            else:
                for line in rows():
                    out.write(json.dumps(line) + "\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    if file != "-":
        print(f"wrote {count} entries to {file}")


def _fields(row: Row) -> dict[str, Any]:  # Any: JSON values
    return {"n": row.n, **asdict(row.entry), "hash": row.hash.hex()}
