"""Signed records: what is signed, what is refused, which one stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.dht import records
from gossipml.dht.records import Kind, Outcome, Record, is_signed, refused_by_time, sign_record
from gossipml.env import Credentials
from gossipml.errors import RemoteError
from gossipml.identity import Identity

NETWORK = b"n" * 16
OWNER = Identity(b"o" * 32)
WALL = 1_700_000_000
KEY = records.topic_key(b"topic")


def announcement(*, seq: int = 1, expires: int = WALL + 600, value: bytes = b"value") -> Record:
    return sign_record(OWNER, NETWORK, Kind.ANNOUNCEMENT, KEY, seq=seq, expires=expires, value=value)


def mutable(*, salt: bytes = b"head", seq: int = 1, expires: int = WALL + 600, value: bytes = b"value") -> Record:
    key = records.mutable_key(OWNER.public_key, salt)
    return sign_record(OWNER, NETWORK, Kind.MUTABLE, key, seq=seq, expires=expires, value=value, salt=salt)


@given(st.integers(0, 2**63 - 1), st.binary(max_size=records.MAX_VALUE), st.binary(max_size=records.MAX_SALT))
def test_a_record_survives_the_wire_with_its_signature(seq: int, value: bytes, salt: bytes) -> None:
    for record in (announcement(seq=seq, value=value), mutable(seq=seq, value=value, salt=salt)):
        wire = codec.pack(records.to_wire(record))
        assert len(wire) <= record.size
        again = records.from_wire(record.key, codec.unpack(wire, limit=2000))
        assert again == record and is_signed(again, NETWORK)


@pytest.mark.parametrize(
    "change",
    [
        {"key": records.topic_key(b"another")},
        {"kind": Kind.MUTABLE},
        {"public_key": Identity(b"x" * 32).public_key},
        {"seq": 2},
        {"expires": WALL + 601},
        {"salt": b"s"},
        {"value": b"Value"},
        {"signature": bytes(64)},
        {"signature": b"short"},
        {"public_key": b"\xff" * 32},
    ],
)
def test_every_field_is_signed(change: dict[str, object]) -> None:
    assert not is_signed(dataclasses.replace(announcement(), **change), NETWORK)  # type: ignore[arg-type]


def test_a_record_of_another_network_does_not_verify() -> None:
    assert not is_signed(announcement(), b"m" * 16)


def test_a_mutable_record_lives_under_the_key_of_its_publisher_and_salt_alone() -> None:
    record = mutable()
    for key in (KEY, records.mutable_key(OWNER.public_key, b"other"), records.mutable_key(OWNER.public_key, b"")):
        with pytest.raises(RemoteError, match="mutable"):
            records.from_wire(key, records.to_wire(record))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 3, "kind"),
        (0, True, "integers"),
        (1, b"short", "size"),
        (2, -1, "range"),
        (2, 2**63, "range"),
        (3, -1, "range"),
        (3, 2**53, "range"),
        (3, 1.5, "list of"),
        (4, b"salt", "no salt"),
        (5, bytes(records.MAX_VALUE + 1), "over"),
        (5, "text", "list of"),
        (6, bytes(63), "size"),
    ],
)
def test_a_record_of_a_wrong_form_is_refused(index: int, value: codec.Value, message: str) -> None:
    wire = records.to_wire(announcement())
    assert isinstance(wire, list)
    wire[index] = value
    with pytest.raises(RemoteError, match=message):
        records.from_wire(KEY, wire)


@pytest.mark.parametrize("item", [None, 1, b"", {}, [], [1] * 6, [1] * 8])
def test_what_is_no_record_is_refused(item: codec.Value) -> None:
    with pytest.raises(RemoteError):
        records.from_wire(KEY, item)


def test_our_own_impossible_record_is_an_error_here_not_there() -> None:
    with pytest.raises(ValueError, match="over"):
        announcement(value=bytes(records.MAX_VALUE + 1))


def test_the_time_to_live_is_bounded_from_both_sides() -> None:
    longest = records.MAX_TTL[Kind.ANNOUNCEMENT] + records.CLOCK_SLACK
    assert refused_by_time(announcement(expires=WALL), WALL) is Outcome.EXPIRED
    assert refused_by_time(announcement(expires=WALL + 1), WALL) is None
    assert refused_by_time(announcement(expires=WALL + longest), WALL) is None
    assert refused_by_time(announcement(expires=WALL + longest + 1), WALL) is Outcome.FUTURE
    assert refused_by_time(mutable(expires=WALL + longest + 1), WALL) is None
    assert refused_by_time(mutable(expires=WALL + 25 * 3600), WALL) is Outcome.FUTURE


def test_greater_seq_wins_then_later_expiry() -> None:
    old, new, later = (
        announcement(seq=1, expires=WALL + 900),
        announcement(seq=2),
        announcement(seq=2, expires=WALL + 700),
    )
    assert old.order < new.order < later.order


def test_the_peer_of_a_record_is_that_of_its_key(credentials: Callable[..., Credentials]) -> None:
    assert announcement().peer == OWNER.peer_id
