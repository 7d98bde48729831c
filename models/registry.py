"""Finds a model by what the user typed: a built-in name, an installed one (entry-point group
`gossipml.models`), `package.module:Spec`, or `file.py:Spec`.

`check_model_name` is what the daemon asks before it starts a worker: it imports nothing of the user's.
`load_spec` runs the user's code and belongs into the worker.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from gossipml.errors import UserError
from gossipml.models.builtin import BUILTIN
from gossipml.models.spec import Spec, check_interface

ENTRY_POINTS = "gossipml.models"


def model_names() -> list[str]:
    """Built-in and installed names, sorted."""
    return sorted({*BUILTIN, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def check_model_name(model: str) -> None:
    """UserError when `load_spec(model)` cannot succeed, as far as that shows without running any code."""
    path, _, attribute = model.rpartition(":")
    if not path:
        if model not in model_names():
            raise UserError(f"there is no model {model!r}; {nearest(model, model_names())}, or FILE.py:Spec")
    elif not attribute.isidentifier():
        raise UserError(f"model {model!r} names no object after the colon; write for example my_model.py:Spec")
    elif path.endswith(".py") and not Path(path).is_file():
        raise UserError(f"there is no file {path!r} for the model {model!r}; check the path")
    elif not path.endswith(".py") and not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"model {model!r} is no import path; write package.module:Spec or file.py:Spec")


def load_spec(model: str) -> Spec:
    """The model that `model` names, its interface checked. Runs the user's code."""
    check_model_name(model)
    path, _, attribute = model.rpartition(":")
    if not path:
        if model in BUILTIN:
            return check_interface(BUILTIN[model], model)
        (point, *_) = importlib.metadata.entry_points(group=ENTRY_POINTS, name=model)
        return check_interface(_run(model, point.load), model)
    module = _run(model, lambda: _import_file(Path(path)) if path.endswith(".py") else _import_module(path))
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"]
        raise UserError(f"{path} has no {attribute!r}; {nearest(attribute, names)}")
    return check_interface(getattr(module, attribute), model)


def nearest(wrong: str, right: Iterable[str]) -> str:
    """`did you mean X?` and what there is, for error messages."""
    names = list(right)
    close = difflib.get_close_matches(wrong, names, n=2, cutoff=0.5)
    known = f"there are {', '.join(names)}" if names else "there is none"
    return f"did you mean {' or '.join(map(repr, close))}? {known}" if close else known


def _import_file(path: Path) -> object:
    name = f"gossipml_user_{path.stem}"  # never the name of an installed package
    specification = importlib.util.spec_from_file_location(name, path.resolve())
    if specification is None or specification.loader is None:
        raise UserError(f"{path} is not a Python file; a model file ends with .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and typing look their module up
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(path: str) -> object:
    # The worker starts without the working folder on its path, so that a stray numpy.py there does no harm;
    # a package of the user's is found after everything that is installed.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(path)


def _run(model: str, load: object) -> object:
    assert callable(load)
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model {model!r} cannot be loaded: {type(error).__name__}: {error}") from error
