"""`gossipml predict`: ask the peer of this home."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossipml.cli.common import fetch_json, print_json
from gossipml.errors import UserError

MAX_FILE = 1 << 20  # the endpoint takes no more


def predict(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Named values (a=0 b=1), a row of numbers (0,0,5 or 0 0 5), JSON, or a .json or .csv file with one.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print data for a program.")] = False,
) -> None:
    """Ask the peer of this home for a prediction."""
    answer = ask_for(context.obj.home.require_run_info().api, name, inputs)
    if as_json:
        print_json(answer)
        return
    result = {key: value for key, value in answer.items() if key not in ("model", "version", "peer")}
    for key, value in result.items():
        print(f"{key:<14} {value}")
    print(f"{'by':<14} {answer['model']}@{answer['version']} on {answer['peer'][:8]}")


def ask_for(api: str, name: str, inputs: list[str]) -> Any:  # Any: JSON
    """The endpoint's answer. UserError when the input is no input, or is refused."""
    import json
    from urllib.parse import quote, urlencode

    path = f"/predict/{quote(name, safe='')}"
    if all("=" in text and not text.lstrip().startswith(("{", "[")) for text in inputs):
        pairs = [(field, value) for field, _, value in (text.partition("=") for text in inputs)]
        return fetch_json(api, "GET", f"{path}?{urlencode(pairs)}")
    text = _file(inputs[0]) if len(inputs) == 1 else ",".join(inputs)
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [float(cell) for cell in text.strip().split(",")]
        except ValueError:
            raise UserError(
                f"{text[:60]!r} is no input; write a=0 b=1, or 0,0,5, or JSON, or name a .json or .csv file"
            ) from None
    return fetch_json(api, "POST", path, value)


def _file(text: str) -> str:
    """The content of the file that is named, or the text itself."""
    path = Path(text).expanduser()
    if path.suffix not in (".json", ".csv"):
        return text
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MAX_FILE} are taken")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; give a .json or .csv file in UTF-8") from None
