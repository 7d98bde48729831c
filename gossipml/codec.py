"""Canonical, bounded msgpack: the one encoding of tokens, records, wire headers and worker messages.

Canonical means that a value has one encoding, so that bytes can be signed and hashed: map keys are text in
ascending order, integers and text take their shortest form, no extension types. `unpack` accepts nothing
else. A message is capped before it is parsed, because the limits of each container do not bound memory
(64 KiB of empty maps became 4.7 MB).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from typing import TypeAlias, cast

import msgpack

from gossipml.errors import RemoteError

Value: TypeAlias = "bool | int | float | str | bytes | list[Value] | dict[str, Value] | None"

MAX_DEPTH = 6  # the deepest message (a view of contacts inside an update) needs 5


def pack(value: object) -> bytes:
    """The canonical bytes of a value; dictionaries are written in the order of their keys."""
    return _packed(value if _is_canonical(value, MAX_DEPTH) else _canonical(value, MAX_DEPTH))


def unpack(data: bytes | bytearray | memoryview, *, limit: int) -> Value:
    """The value in `data`, or RemoteError when it is longer than `limit` bytes or not canonical."""
    if len(data) > limit:
        raise RemoteError(f"message of {len(data)} bytes is over the limit of {limit}")
    data = bytes(data)
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limit,
            max_map_len=limit,
            max_ext_len=0,
        )
        _check_form(value, MAX_DEPTH)
        canonical = _packed(value)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteError(f"message is not canonical msgpack: {error or type(error).__name__}") from None
    if canonical != data:  # duplicate keys, unordered keys, long forms
        raise RemoteError("message is not canonical msgpack: another encoding of the same value")
    checked: Value = value
    return checked


_LOCAL = threading.local()
KEPT = 1 << 16  # bytes; a packer keeps as much memory as its longest message took


def _packed(value: object) -> bytes:
    """A packer used again takes half the time of a new one for a small message."""
    packer = getattr(_LOCAL, "packer", None)
    if packer is None:
        packer = _LOCAL.packer = msgpack.Packer(use_bin_type=True)
    data: bytes = packer.pack(value)
    if len(data) > KEPT:
        del _LOCAL.packer
    return data


_PLAIN = frozenset((type(None), bool, int, str, bytes))
_TEXT = frozenset((str,))


def _is_canonical(value: object, depth: int) -> bool:
    """Whether it is plain and its keys are in order already, as those of most messages are."""
    kind = type(value)
    if kind is list:
        items: Collection[object] = cast("list[object]", value)
    elif kind is dict:
        fields = cast("dict[object, object]", value)
        if not _TEXT.issuperset(map(type, fields)):
            return False
        keys = cast("list[str]", list(fields))
        if keys != sorted(keys):
            return False
        items = fields.values()
    else:
        return kind in _PLAIN or (kind is float and math.isfinite(cast(float, value)))
    if depth == 0:
        return False
    if not _PLAIN.issuperset(map(type, items)):
        for item in items:
            if type(item) not in _PLAIN and not _is_canonical(item, depth - 1):
                return False
    return True


def _canonical(value: object, depth: int) -> object:
    """The value itself, or with its keys in order; ValueError or TypeError when it has no canonical form."""
    # The quick ways first, and no call for a plain item: headers are packed and unpacked for every message.
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("numbers must be finite")
        return value
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    depth -= 1
    if isinstance(value, dict):
        if not _TEXT.issuperset(map(type, value)):
            raise ValueError("map keys must be text")
        ordered = sorted(value)
        if _PLAIN.issuperset(map(type, value.values())):
            return value if ordered == list(value) else {key: value[key] for key in ordered}
        nested = {key: _canonical(item, depth) for key, item in value.items() if type(item) not in _PLAIN}
        if ordered == list(value) and all(item is value[key] for key, item in nested.items()):
            return value
        return {key: nested[key] if key in nested else value[key] for key in ordered}
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):
            return value if kind is list else list(value)
        return [item if type(item) in _PLAIN else _canonical(item, depth) for item in value]
    if isinstance(value, int | str | bytes):
        return value
    raise TypeError(f"cannot encode {kind.__name__}")


def _check_form(value: object, depth: int) -> None:
    """What the canonical bytes of a value just unpacked do not show: ValueError or TypeError unless keys are text in
    order, numbers are finite and nothing is nested too deeply."""
    kind = type(value)
    if kind is float:
        if not math.isfinite(cast(float, value)):
            raise ValueError("numbers must be finite")
        return
    if kind is list:
        items: Collection[object] = cast("list[object]", value)
    elif kind is dict:
        fields = cast("dict[object, object]", value)
        if not _TEXT.issuperset(map(type, fields)):
            raise ValueError("map keys must be text")
        keys = cast("list[str]", list(fields))
        if keys != sorted(keys):
            raise ValueError("map keys must be in order")
        items = fields.values()
    elif kind in _PLAIN:
        return
    else:
        raise TypeError(f"cannot decode {kind.__name__}")
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if not _PLAIN.issuperset(map(type, items)):
        for item in items:
            if type(item) not in _PLAIN:
                _check_form(item, depth - 1)


# Reading a field of a hostile map: the right type or RemoteError, never a KeyError.


def as_map(value: Value) -> dict[str, Value]:
    if not isinstance(value, dict):
        raise RemoteError("message is not a map")
    return value


def get_int(fields: dict[str, Value], name: str, *, low: int = 0, high: int = 2**63 - 1) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RemoteError(f"field {name!r} must be an integer from {low} to {high}")
    return value


def get_float(fields: dict[str, Value], name: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RemoteError(f"field {name!r} must be a number from {low} to {high}")
    return float(value)


def get_bool(fields: dict[str, Value], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise RemoteError(f"field {name!r} must be true or false")
    return value


def get_bytes(fields: dict[str, Value], name: str, *, size: int | None = None, limit: int = 65536) -> bytes:
    value = fields.get(name)
    if not isinstance(value, bytes) or len(value) > limit or (size is not None and len(value) != size):
        raise RemoteError(f"field {name!r} must be {f'{size}' if size is not None else f'at most {limit}'} bytes")
    return value


def get_str(fields: dict[str, Value], name: str, *, limit: int = 256) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > limit:
        raise RemoteError(f"field {name!r} must be text of at most {limit} characters")
    return value


def get_list(fields: dict[str, Value], name: str, *, limit: int) -> list[Value]:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > limit:
        raise RemoteError(f"field {name!r} must be a list of at most {limit}")
    return value
