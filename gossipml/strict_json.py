"""JSON as strangers may send it: RFC 8259, and no more than the endpoint can answer for.

Refused beyond bad syntax: bytes that are not UTF-8, nesting deeper than MAX_DEPTH, more than MAX_CONTAINERS
arrays and objects, the same key twice in one object, NaN and Infinity, numbers that overflow (1e999, integers of
more than 64 bits), lone surrogates. Depth is counted before the parser runs, because the parser recurses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TypeAlias

from gossipml.errors import UserError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | dict[str, JSON] | None"

MAX_DEPTH = 32  # a batch of images inside a tensor inside a request needs 7
MAX_CONTAINERS = 50_000  # an empty list costs 3 bytes on the wire and 64 in memory: bounds a document to 4 MB
MAX_INTEGER_DIGITS = 20  # 2**64 - 1

# Possessive, and the closing quote may be missing: linear time whatever comes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Only numbers with three digits of exponent, or of 19 digits, can be too large; without any, the parser's own fast
# reading of numbers does. A translated copy finds them in a hundredth of the time that a regular expression takes.
_DIGITS_ALIKE = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse(data: bytes) -> JSON:
    """The value in `data`, or UserError with what is wrong with it."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8 at byte {error.start}; send JSON as UTF-8") from None
    _check_nesting(_STRING.sub(b"", data) if b'"' in data else data)
    alike = data.translate(_DIGITS_ALIKE, b"+-")
    large = b"e000" in alike or b"E000" in alike or b"0" * 19 in alike
    try:
        value: JSON = json.loads(
            text,
            parse_constant=_constant,
            parse_float=_float if large else None,
            parse_int=_integer if large else None,
            object_pairs_hook=_object,
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except UnicodeEncodeError:
        raise UserError("the JSON holds half a surrogate pair; send whole characters") from None
    return value


def dump(value: JSON) -> bytes:
    """JSON in UTF-8; a number that is not finite becomes null."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")


def _check_nesting(bare: bytes) -> None:
    """Of a document without its strings."""
    brackets = bare.translate(None, _ALL_BUT_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise UserError(f"the JSON holds over {MAX_CONTAINERS} arrays and objects; send flat arrays, or less at once")
    if len(brackets) <= MAX_DEPTH:
        return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise UserError(f"the JSON is nested deeper than {MAX_DEPTH} levels; send it flatter")


def _constant(name: str) -> JSON:
    raise UserError(f"{name} is not a JSON number; send finite numbers only")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"the number {text[:24]} is too large for a 64-bit float; send finite numbers only")
    return value


def _integer(text: str) -> int:
    if len(text) <= MAX_INTEGER_DIGITS:
        value = int(text)
        if -(2**63) <= value < 2**64:
            return value
    raise UserError(f"the integer {text[:24]} needs more than 64 bits; send a smaller one, or a float")


def _object(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"the JSON has the key {twice[:64]!r} twice in one object; give it once")
    return value


def _finite(value: JSON) -> JSON:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
