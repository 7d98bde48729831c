"""`gossipml predict`: ask the peer of this home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from gossipml.cli.common import fetch_json, is_terminal, print_json
from gossipml.errors import UserError

MAX_FILE = 1 << 24  # the endpoint takes no more
PICTURES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".bmp": "image/bmp", ".gif": "image/gif",
    ".webp": "image/webp",
}  # fmt: skip
TEXTS = (".json", ".csv", ".txt")
BAR = 24  # characters
MOST = 10  # labels shown


def predict(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name, or NAME@VERSION.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Named values (a=0 b=1), a row of numbers (0,0,5 or 0 0 5), JSON, or @FILE: .json, .csv, .png, .jpg.",
        ),
    ],
    as_csv: Annotated[bool, typer.Option("--csv", help="The input is one row of CSV, text and all.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data for a program.")] = False,
) -> None:
    """Ask the peer of this home for a prediction."""
    api = context.obj.home.require_run_info().api
    answer = ask_for(api, name, inputs, as_csv=as_csv)
    if as_json:
        print_json(answer)
        return
    show(answer, _labels(api, answer))


def ask_for(api: str, name: str, inputs: list[str], *, as_csv: bool = False) -> Any:  # Any: JSON
    """The endpoint's answer. UserError when the input is no input, or is refused."""
    name, _, version = name.partition("@")
    path = f"/predict/{quote(name, safe='')}"
    wanted = {"version": version} if version else {}
    query = f"?{urlencode(wanted)}" if wanted else ""
    file = _file(inputs[0]) if len(inputs) == 1 else None
    if file is not None and file.suffix.lower() in PICTURES:
        return fetch_json(api, "POST", path + query, _read(file), media=PICTURES[file.suffix.lower()])
    text = _text(file) if file is not None else None
    if as_csv or (file is not None and file.suffix.lower() == ".csv"):
        row = (text if text is not None else ",".join(inputs)).strip()
        return fetch_json(api, "POST", path + query, row.encode(), media="text/csv")
    if text is None and all("=" in item and not item.lstrip().startswith(("{", "[")) for item in inputs):
        pairs = [(field, value) for field, _, value in (item.partition("=") for item in inputs)]
        return fetch_json(api, "GET", f"{path}?{urlencode([*pairs, *wanted.items()])}")
    return fetch_json(api, "POST", path + query, _value(text if text is not None else ",".join(inputs)))


def show(answer: dict[str, Any], labels: list[str]) -> None:  # Any: JSON
    """What the model says; the probability of each label as a bar."""
    from rich.console import Console
    from rich.text import Text

    from gossipml.cli.status_view import bar

    console = Console(highlight=False, width=None if is_terminal() else 200)
    rest = {key: value for key, value in answer.items() if key not in ("model", "version", "peer")}
    probabilities = rest.get("probabilities")
    if isinstance(probabilities, list) and len(probabilities) == len(labels):
        del rest["probabilities"]
    for key, value in rest.items():
        console.print(
            Text.assemble(f"{_plain(key):<12} ", (_plain(value), "bold" if key in ("label", "result") else ""))
        )
    if "probabilities" not in rest and labels and probabilities:
        rows = sorted(zip(labels, probabilities, strict=True), key=lambda row: -row[1]) if len(labels) > MOST else [
            *zip(labels, probabilities, strict=True)
        ]  # fmt: skip
        width = max(len(label) for label, _ in rows[:MOST])
        for label, share in rows[:MOST]:
            style = "green" if share == max(probabilities) else "dim"
            console.print(Text.assemble(f"{label:>{width}} ", (bar(share, BAR), style), f" {100 * share:5.1f} %"))
        if len(rows) > MOST:
            console.print(Text(f"and {len(rows) - MOST} more, each with less", "dim"))
    console.print(Text(f"{answer['model']}@{answer['version']} on peer {answer['peer'][:8]}", "dim"))


def _labels(api: str, answer: dict[str, Any]) -> list[str]:  # Any: JSON
    """What the classes are called; none for another kind of model, and none when that cannot be had."""
    if not isinstance(answer.get("probabilities"), list):
        return []
    try:
        card = fetch_json(api, "GET", f"/v2/models/{quote(answer['model'], safe='')}")
        return [_plain(label) for label in card.get("parameters", {}).get("labels", [])]
    except UserError:
        return []


def _plain(value: object) -> str:
    """As text that moves no cursor: it may be another peer's."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _file(text: str) -> Path | None:
    """The file that is named: by @FILE, or by a name that ends as one of ours does."""
    path = Path(text.removeprefix("@")).expanduser()
    known = path.suffix.lower() in (*PICTURES, *TEXTS)
    if text.startswith("@") and not known:
        raise UserError(f"{path} is of no kind that is understood; give {', '.join((*TEXTS, *PICTURES))}")
    return path if known and not text.lstrip().startswith(("{", "[")) else None


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UserError(f"{path} has {size} bytes; at most {MAX_FILE} are taken")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _text(path: Path) -> str:
    try:
        return _read(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; give a .json or .csv file in UTF-8") from None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        try:
            return [float(cell) for cell in text.strip().split(",")]
        except ValueError:
            raise UserError(
                f"{text[:60]!r} is no input; write a=0 b=1, or 0,0,5, or JSON, or name a .json, .csv or picture file"
            ) from None
