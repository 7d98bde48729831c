"""Canonical msgpack: one encoding of each value, and nothing else is read."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.errors import RemoteError

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def depth(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


@given(VALUES.filter(lambda value: depth(value) <= codec.MAX_DEPTH))
def test_unpack_undoes_pack(value: codec.Value) -> None:
    assert codec.unpack(codec.pack(value), limit=1 << 20) == value


@given(
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=6).filter(
        lambda d: all(abs(v) < 2**63 for v in d.values())
    )
)
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert codec.pack(value) == codec.pack(dict(reversed(list(value.items()))))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_canonical_value_or_a_remote_error(data: bytes) -> None:
    try:
        value = codec.unpack(data, limit=200)
    except RemoteError:
        return
    assert codec.pack(value) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        msgpack.packb({"b": 1, "a": 2}),  # keys out of order
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\xcd\x00\x01",  # 1 in two bytes
        b"\x81\x01\x02",  # a key that is no text
        msgpack.packb(math.nan),
        msgpack.packb(math.inf),
        msgpack.packb(msgpack.ExtType(1, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\xc7\x00\x05",  # an extension without content
        b"\x91\xc7\x00\x05",
        b"\x91" * 60 + b"\xc0",  # nested sixty deep
        msgpack.packb(1) + b"\x00",  # something after the end
        b"\xa1\xff",  # text that is no UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map said to be huge
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteError):
        codec.unpack(data, limit=1000)


def test_a_long_message_and_one_that_cannot_be_packed_leave_nothing_behind() -> None:
    assert len(codec.pack(bytes(1 << 20))) == (1 << 20) + 5
    for wrong in (1 << 64, [b"begun", 1 << 64]):
        with pytest.raises(OverflowError):
            codec.pack(wrong)
    assert codec.pack([1]) == b"\x91\x01"


def test_length_is_checked_before_parsing() -> None:
    with pytest.raises(RemoteError, match="1001 bytes is over the limit of 1000"):
        codec.unpack(bytes(1001), limit=1000)


def test_field_readers_refuse_the_wrong_type_or_range() -> None:
    fields: dict[str, codec.Value] = {"n": 5, "t": True, "f": 1.5, "b": b"abc", "s": "abc", "l": [1]}
    assert codec.get_int(fields, "n") == 5
    assert codec.get_float(fields, "f") == 1.5
    assert codec.get_bytes(fields, "b", size=3) == b"abc"
    for read in (
        lambda: codec.get_int(fields, "t"),  # a truth value is no number
        lambda: codec.get_int(fields, "n", high=4),
        lambda: codec.get_int(fields, "missing"),
        lambda: codec.get_float(fields, "t"),
        lambda: codec.get_bool(fields, "n"),
        lambda: codec.get_bytes(fields, "b", size=4),
        lambda: codec.get_bytes(fields, "b", limit=2),
        lambda: codec.get_str(fields, "s", limit=2),
        lambda: codec.get_list(fields, "l", limit=0),
        lambda: codec.as_map([1]),
    ):
        with pytest.raises(RemoteError):
            read()
