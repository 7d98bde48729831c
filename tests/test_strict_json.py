"""JSON from strangers: what is a value, and what is refused."""

from __future__ import annotations

import json
import math
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import strict_json
from gossipml.api.ports import JSON
from gossipml.errors import UserError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab[{"\\', max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_every_value_survives_the_way_out_and_in(value: JSON) -> None:
    assert strict_json.parse(strict_json.dump(value)) == value


@given(st.binary(max_size=200) | st.text('[]{}",:\\ue0159-tn', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_users_error(data: bytes) -> None:
    try:
        value = strict_json.parse(data)
    except UserError:
        return
    assert value == json.loads(data)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),  # a byte order mark
        (b"[1] 2", "not JSON"),
        (b"'a'", "not JSON"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"\x00[\x00]", "not JSON"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "1e999"),
        (b"-1e400", "too large"),
        (b"9" * 400 + b".0", "too large"),
        (b"18446744073709551616", "64 bits"),
        (b"9" * 5000, "64 bits"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b'[{"x": {"k": 1, "k": 1}}]', "'k' twice"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b"[" * 1_000_000, "deeper than 32|over 50000"),
        (b'{"a":' * 40, "deeper than 32"),
        (b"[" + b"[]," * 60_000 + b"1]", "over 50000"),
    ],
)
def test_what_no_model_can_use_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        strict_json.parse(body)


def test_brackets_and_quotes_inside_strings_are_text() -> None:
    text = '["[[[[' + "[" * 60 + '", "\\"{{{{", "\\\\"]'
    assert strict_json.parse(text.encode()) == ["[[[[" + "[" * 60, '"{{{{', "\\"]


def test_nesting_up_to_the_limit_is_read() -> None:
    value: JSON = 1
    for _ in range(strict_json.MAX_DEPTH):
        value = [value]
    assert strict_json.parse(strict_json.dump(value)) == value


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert strict_json.parse(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("piece", [b'"\\', b'"', b'\\"', b'["', b"\\\\"])
def test_a_string_without_an_end_costs_linear_time(piece: bytes) -> None:
    body = b'"' + piece * ((1 << 20) // len(piece))
    started = perf_counter()
    with pytest.raises(UserError):
        strict_json.parse(body)
    assert perf_counter() - started < 5  # a quadratic scan takes minutes


def test_numbers_that_are_not_finite_leave_as_null() -> None:
    assert strict_json.dump({"a": [math.nan, 1.5], "b": (math.inf,)}) == b'{"a":[null,1.5],"b":[null]}'


def test_text_that_is_no_text_does_not_break_an_answer() -> None:
    assert strict_json.dump("\ud800") == b'"?"'
