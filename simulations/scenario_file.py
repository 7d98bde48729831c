"""Scenarios as TOML: read with strict checks, overridden field by field, written back.

An unknown field is an error that names the nearest right one; a wrong type says what it should be. What the values
may be is checked by `scenario` itself.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gossipml.errors import UserError
from gossipml.simulations.scenario import Scenario, Variant, field_names

MAX_FILE = 1 << 20  # bytes; the largest shipped one has four thousand
SUFFIX = ".toml"


def load_scenario(where: str) -> Scenario:
    """A file, or the name of a shipped scenario. UserError says what is wrong in it."""
    path = Path(where).expanduser()
    if not path.suffix and not path.is_file():
        shipped = shipped_scenarios()
        if where not in shipped:
            near = difflib.get_close_matches(where, shipped, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"there is no scenario {where!r}; {hint}write a FILE.toml, or one of those that come along: "
                f"{', '.join(shipped)}"
            )
        return parse_scenario(shipped[where], f"the scenario {where}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UserError(f"the scenario {where} cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_FILE:
        raise UserError(f"{where} is larger than {MAX_FILE} bytes: that is no scenario")
    try:
        return parse_scenario(content.decode(), where)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text, so it is no TOML") from None


def shipped_scenarios() -> dict[str, str]:
    """The text of the scenarios that come along, by name, sorted."""
    folder = importlib.resources.files("gossipml.simulations").joinpath("scenarios")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(SUFFIX): file.read_text(encoding="utf-8") for file in files if file.name.endswith(SUFFIX)
    }


def parse_scenario(text: str, where: str) -> Scenario:
    """The scenario, every variant of it checked. `where` begins the messages of errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not TOML: {error}") from None
    try:
        variants = tuple(_variant(entry, number) for number, entry in enumerate(_tables(table.pop("variant", [])), 1))
        scenario: Scenario = replace(_read(Scenario, table, ""), variant=variants)
        list(scenario.variants())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return scenario


def override(scenario: Scenario, overrides: Iterable[tuple[str, object]], where: str) -> Scenario:
    """The scenario with fields replaced, given as paths such as `topology.degree`; together, as they may depend."""
    table: dict[str, Any] = {}
    for path, value in overrides:
        *outer, last = path.split(".")
        inner = table
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    try:
        changed: Scenario = _changed(scenario, table, "")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return changed


def parse_setting(text: str) -> tuple[str, object]:
    """`field=value` of a command line, the value as in TOML, or a text without its quotes."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UserError(f"{text!r} is not field=value, for example topology.degree=8")
    return path.strip(), parse_value(value.strip())


def parse_value(text: str) -> object:
    """A value as in TOML; anything else is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def write_scenario(scenario: Scenario) -> str:
    """TOML that reads back as the same scenario, every default written out."""
    head: list[str] = []
    tables: list[str] = []
    for name in field_names(Scenario):
        value = getattr(scenario, name)
        if name == "variant":
            for variant in value:
                lines = [f"name = {_toml(variant.name)}", *(f"{path} = {_toml(v)}" for path, v in variant.overrides)]
                tables += ["", "[[variant]]", *lines]
        elif is_dataclass(value):
            tables += ["", f"[{name}]", *_lines(value)]
        elif name in ("partition", "figure"):
            for entry in value:
                tables += ["", f"[[{name}]]", *_lines(entry)]
        else:
            head.append(f"{name} = {_toml(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join([*head, *tables]) + "\n"


def _lines(value: Any) -> list[str]:  # Any: a dataclass
    return [f"{name} = {_toml(getattr(value, name))}" for name in field_names(type(value))]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml(entry)}' for name, entry in value.items())}}}"
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(char, char) for char in str(value)) + '"'


def _variant(table: Mapping[str, Any], number: int) -> Variant:
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f'the variant number {number} has no name; write name = "..." in it')
    return Variant(name, tuple(_flat({key: value for key, value in table.items() if key != "name"}, "")))


def _flat(table: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(cls: type[Any], table: Mapping[str, Any], prefix: str) -> Any:  # Any: an instance of cls
    values = _values(cls, table, prefix, None)
    for each in fields(cls):
        if each.default is MISSING and each.default_factory is MISSING and each.name not in values:
            raise UserError(f"{prefix}{each.name} is missing; it has no default")
    return cls(**values)


def _changed(instance: Any, table: Mapping[str, Any], prefix: str) -> Any:  # Any: a dataclass of any type
    return replace(instance, **_values(type(instance), table, prefix, instance))


def _values(cls: type[Any], table: Mapping[str, Any], prefix: str, old: Any) -> dict[str, Any]:
    types_of = typing.get_type_hints(cls)
    known = field_names(cls)
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"there is no field {prefix}{key}; {hint}")
        values[name] = _convert(types_of[name], value, f"{prefix}{name}", getattr(old, name, None))
    return values


def _convert(kind: Any, value: object, path: str, old: Any) -> Any:  # Any: what the type says
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise UserError(f"{path} is {value!r}, not a table; write [{path}] and its fields below")
        return _changed(old, value, f"{path}.") if old is not None else _read(kind, value, f"{path}.")
    if isinstance(kind, types.GenericAlias):  # tuple[X, ...]
        inner = kind.__args__[0]
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(inner, entry, path, None) for entry in entries)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise UserError(f"{path} is {value!r}, which is not {names[kind]}")
    return value


def _tables(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError("variant is not a list of tables; write [[variant]] above the fields of each")
    return value
