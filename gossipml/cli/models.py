"""`gossipml models`: the models that the network keeps. Asks the peer of this home; export reads its store itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossipml.cli.common import ask, change, is_terminal, megabytes, print_json
from gossipml.cli.new_model import new_model
from gossipml.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from gossipml.daemon.home import Home

app = typer.Typer(help="The models that the network keeps: list, publish, fetch, export.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
Which = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A model; without @VERSION its latest version.")]
Name = Annotated[str, typer.Argument(help="A model's name.")]
SHORT = 12  # digits of a version that people see; any beginning that is not ambiguous will do
POLL_SECONDS = 0.2
QUIET_SECONDS = 60.0  # a download about which nothing is known any more

Line = dict[str, Any]  # Any: a JSON object of the endpoint


app.command("new", epilog="Example: gossipml models new my_model.py --data iris")(new_model)


@app.command("list", epilog="Example: gossipml models list")
def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List the models of the network: latest version, live replicas, whether this peer has it."""
    info = context.obj.home.require_run_info()
    models = ask(info, "/v1/models")["models"]
    if as_json:
        print_json(models)
        return
    published = [line for line in models if line.get("version")]
    unpublished = [line["name"] for line in models if not line.get("version")]
    if published:
        _print_table(published, "name", "version", "height", "made", "size", "replicas", "here", "accuracy", "note")
    else:
        print("no model has been published yet")
    trains = bool(unpublished) and ask(info, "/v1/status")["trains"]
    for name in unpublished:
        if trains:
            print(f"{name} trains here; its first version comes by itself, or now: gossipml models publish {name}")
        else:
            print(f"{name} is to be served here and has no version yet; start a peer that trains it")


@app.command("show", epilog="Example: gossipml models show digits-mlp")
def show(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Show the versions of a model, newest first, and who holds the latest."""
    answer = ask(context.obj.home.require_run_info(), f"/v1/models/{_name(name)}")
    if as_json:
        print_json(answer)
        return
    _print_table(
        answer["versions"], "version", "height", "made", "size", "replicas", "here", "accuracy", "publisher", "note"
    )
    holders = ", ".join(holder["name"] or holder["peer"][:8] for holder in answer["holders"])
    print(f"the latest is held by: {holders or 'nobody that answers'}")


@app.command("publish", epilog="Example: gossipml models publish digits-mlp --note 'before the holidays'")
def publish(
    context: typer.Context,
    name: Name,
    file: Annotated[
        Path | None, typer.Option(help="A .safetensors file to import, instead of the model in training.")
    ] = None,
    note: Annotated[str, typer.Option(help="A few words that stay with the version, at most 80 characters.")] = "",
    as_json: Json = False,
) -> None:
    """Publish the model in training, or a .safetensors file, as a new version."""
    from gossipml.models.store_files import stage

    home: Home = context.obj.home
    home.require_run_info()
    staged = home.path / stage(file.expanduser(), home.path) if file is not None else None
    try:
        body = {"file": staged.name if staged else "", "note": note}
        answer = change(home, "POST", f"/v1/models/{_name(name)}/publish", body)
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)  # when the peer has not taken it over
    if as_json:
        print_json(answer)
    else:
        print(
            f"published {name}@{answer['version'][:SHORT]}, version {answer['height']}, {megabytes(answer['size'])}; "
            "other peers are fetching it now: gossipml models list"
        )


@app.command("pull", epilog="Example: gossipml models pull digits-mlp@3f9a12")
def pull(context: typer.Context, which: Which, as_json: Json = False) -> None:
    """Fetch a version to this peer, from all who have it at once."""
    answer = _pull(context.obj.home, which, quiet=as_json)
    if as_json:
        print_json(answer)
    else:
        print(f"{_full_name(answer)} is here, {megabytes(answer['size'])}")


@app.command("export", epilog="Example: gossipml models export digits-mlp digits.safetensors")
def export(
    context: typer.Context,
    which: Which,
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a version as a .safetensors file, fetching it first when it is not here."""
    from gossipml.models import store_files

    home: Home = context.obj.home
    if file.exists() and not force:
        raise UserError(f"{file} is there already; choose another name, or write over it with --force")
    answer = _pull(home, which, quiet=as_json)
    try:
        store_files.export(home.path, bytes.fromhex(answer["version"]), file.expanduser())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    if as_json:
        print_json({**answer, "file": str(file)})
    else:
        print(f"wrote {_full_name(answer)} to {file}, {megabytes(answer['size'])}")


@app.command("rollback", epilog="Example: gossipml models rollback digits-mlp 3f9a12")
def rollback(
    context: typer.Context,
    name: Name,
    version: Annotated[str, typer.Argument(help="The older version, or the first 6 or more digits of it.")],
    as_json: Json = False,
) -> None:
    """Make an older version the latest again: a new version with the same content, for everybody."""
    answer = change(context.obj.home, "POST", f"/v1/models/{_name(name)}/rollback", {"version": version})
    if as_json:
        print_json(answer)
    else:
        print(f"{name}@{answer['version'][:SHORT]} is the latest now, with the content of {answer['of'][:SHORT]}")


@app.command("pin", epilog="Example: gossipml models pin digits-mlp@3f9a12")
def pin(context: typer.Context, which: Which, as_json: Json = False) -> None:
    """Keep a version on this peer whatever comes after it; it is fetched when it is not here."""
    _pull(context.obj.home, which, quiet=as_json)
    name, version = _split(which)
    answer = change(context.obj.home, "POST", f"/v1/models/{name}/pin", {"version": version})
    print_json(answer) if as_json else print(f"{_full_name(answer)} is pinned here")


@app.command("unpin", epilog="Example: gossipml models unpin digits-mlp@3f9a12")
def unpin(context: typer.Context, which: Which, as_json: Json = False) -> None:
    """Let go of a pinned version: it stays while it is one of the newest."""
    name, version = _split(which)
    answer = change(context.obj.home, "POST", f"/v1/models/{name}/unpin", {"version": version})
    print_json(answer) if as_json else print(f"{_full_name(answer)} is no longer pinned here")


@app.command("rm", epilog="Example: gossipml models rm digits-mlp@3f9a12")
def remove(
    context: typer.Context,
    which: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="A version, or all versions of a model, on this peer.")
    ],
    as_json: Json = False,
) -> None:
    """Remove a version, or a whole model, from this peer. Other peers keep their replicas."""
    name, version = _split(which)
    path = f"/v1/models/{name}/versions/{version}" if version else f"/v1/models/{name}"
    answer = change(context.obj.home, "DELETE", path)
    if as_json:
        print_json(answer)
    else:
        print(f"removed {len(answer['removed'])} of {name} from this peer, {megabytes(answer['freed'])} freed")


# Fetching, with progress


def _pull(home: Home, which: str, *, quiet: bool) -> Line:
    """The version once it is here."""
    name, version = _split(which)
    answer: Line = change(home, "POST", f"/v1/models/{name}/pull", {"version": version})
    if answer["state"] != "here":
        _wait_for(home, answer, quiet=quiet or not is_terminal())
    return answer


def _wait_for(home: Home, asked: Line, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from gossipml.cli.waiting import wait_for

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("from {task.fields[peers]} peers"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(_full_name(asked), total=asked["size"], peers=0)

        def look() -> Line | None:
            transfers = ask(home.require_run_info(), "/v1/transfers")["transfers"]
            found = next((t for t in transfers if t["version"] == asked["version"]), None)
            if found is not None:
                progress.update(task, completed=found["done"], peers=found["peers"])
            return found

        _until_ended(asked, look, wait_for)


def _until_ended(asked: Line, look: Callable[[], Line | None], wait_for: Callable[..., Line | None]) -> None:
    """Return when the download is done; UserError when it failed or nobody knows of it."""
    ended = wait_for(
        look, lambda found: found is not None and found["state"] != "fetching", POLL_SECONDS, QUIET_SECONDS
    )
    if ended is None:
        raise UserError(f"the peer no longer knows of the download of {_full_name(asked)}; ask for it again")
    if ended["state"] == "failed":
        raise UserError(f"{_full_name(asked)} was not fetched: {ended['error']}")


# Small things


def _split(which: str) -> tuple[str, str]:
    name, at, version = which.partition("@")
    if at and not version:
        raise UserError(f"{which!r} ends with @; write NAME@VERSION, or NAME for the latest")
    return _name(name), version


def _name(text: str) -> str:
    import re

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", text):
        raise UserError(
            f"{text[:80]!r} is not a model's name: 1 to 64 of a-z, 0-9, - and _, beginning with a letter or digit"
        )
    return text


def _full_name(answer: Line) -> str:
    return f"{answer['name']}@{answer['version'][:SHORT]}"


def _print_table(lines: list[Line], *columns: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table: Table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in ("height", "size", "replicas", "accuracy")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "note")
    for line in lines:
        table.add_row(*(_CELLS[column](line) for column in columns))
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _made(line: Line) -> str:
    return datetime.fromtimestamp(line["created"], UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _replicas(line: Line) -> str:
    return f"{'?' if line['replicas'] is None else line['replicas']}/{line['wanted']}"


def _here(line: Line) -> str:
    if line["here"] == "part":
        return f"{100 * line['done']:.0f} %"
    return "no" if line["here"] == "no" else "pinned" if line["pinned"] else "yes"


def _accuracy(line: Line) -> str:
    accuracy = line["metrics"].get("accuracy")
    return "-" if accuracy is None else f"{100 * accuracy:.1f} %"


_CELLS: dict[str, Callable[[Line], str]] = {
    "name": lambda line: line["name"],
    "version": lambda line: line["version"][:SHORT],
    "height": lambda line: str(line["height"]),
    "made": _made,
    "size": lambda line: megabytes(line["size"]),
    "replicas": _replicas,
    "here": _here,
    "accuracy": _accuracy,
    "publisher": lambda line: line["publisher_name"] or line["publisher"][:8],
    "note": lambda line: line["note"],
}
