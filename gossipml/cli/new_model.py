"""`gossipml models new`: a model file to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossipml.errors import UserError


def new_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write.")],
    data: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="The data it is for: shape, classes, columns and normalisation go in."),
    ] = "digits",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a model file that trains as it is, for you to change."""
    from gossipml.models.data import load_source
    from gossipml.models.template import model_name, write_template

    file = file.expanduser()
    if file.suffix != ".py":
        raise UserError(f"{str(file)!r} is no Python file; give it a name that ends with .py")
    if file.exists() and not force:
        raise UserError(f"{file} is there already; choose another name, or write over it with --force")
    text = write_template(load_source(data), model_name(file.stem), str(file))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    print(f"wrote {file}; train it: gossipml peer start --model {file}:Spec")
