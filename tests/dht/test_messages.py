"""The wire format: round trips, sizes, and every wrong form refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.dht import messages, records
from gossipml.dht.messages import (
    Challenge,
    Find,
    Found,
    Get,
    Got,
    NodeContact,
    Ping,
    Pong,
    Proof,
    Reply,
    Request,
    Store,
    Stored,
    decode,
    encode,
)
from gossipml.dht.records import Kind, Outcome, Record
from gossipml.dht.seal import MAX_BODY
from gossipml.errors import RemoteError
from gossipml.ids import Address, NodeId, PublicKey

CALL = b"c" * 8
SENDER = NodeId(b"s" * 20)
KEY = b"k" * 20
V4, V6 = Address("203.0.113.7", 65535), Address("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
BIG = 2**63 - 1


def record(*, value: bytes = b"v", salt: bytes = b"") -> Record:
    owner = PublicKey(b"o" * 32)
    if salt:
        key = records.mutable_key(owner, salt)
        return Record(key, Kind.MUTABLE, owner, BIG, 2**53 - 1, salt, value, b"g" * 64)
    return Record(KEY, Kind.ANNOUNCEMENT, owner, BIG, 2**53 - 1, b"", value, b"g" * 64)


def contacts(count: int, address: Address = V4) -> tuple[NodeContact, ...]:
    return tuple(NodeContact(NodeId(bytes((i,)) * 20), address) for i in range(count))


PROOF = Proof(PublicKey(b"p" * 32), b"g" * 64)
LARGEST = records.MAX_VALUE
MESSAGES: list[Request | Reply] = [
    Request(CALL, SENDER, None, Ping()),
    Request(CALL, SENDER, Challenge(b"n" * 16, V4), Ping()),
    Request(CALL, SENDER, Challenge(b"n" * 16, V6), Find(KEY)),
    Request(CALL, SENDER, None, Get(KEY, 0)),
    Request(CALL, SENDER, Challenge(b"n" * 16, V6), Store(record(value=bytes(LARGEST), salt=bytes(records.MAX_SALT)))),
    Reply(CALL, None, Pong()),
    Reply(CALL, PROOF, Pong()),
    Reply(CALL, PROOF, Found(contacts(20, V6))),
    Reply(CALL, PROOF, Found(())),
    Reply(CALL, PROOF, Got(KEY, (record(), record(value=b"w")), 64, contacts(4) + contacts(2, V6))),
    *(Reply(CALL, None, Stored(outcome)) for outcome in Outcome),
    Request(CALL, SENDER, Challenge(b"n" * 16, V6), Store(record(value=bytes(LARGEST)), 20)),
    Reply(CALL, PROOF, Stored(Outcome.STORED, contacts(20, V6))),
    Request(CALL, SENDER, None, Get(KEY, 0, (12, 13))),
]


def packed(told: tuple[NodeContact, ...]) -> tuple[bytes, ...]:
    return tuple(map(messages.pack_contact, told))


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_a_message_survives_the_wire_and_fits_one_datagram(message: Request | Reply) -> None:
    body = encode(message)
    assert len(body) <= MAX_BODY
    assert decode(body) == message


@pytest.mark.parametrize("part", [{"d": 0, "j": 0}, {"d": 13, "j": 13}, {"d": 65, "j": 0}, {"d": 13}])
def test_a_part_that_cannot_be_is_refused(part: dict[str, int]) -> None:
    with pytest.raises(RemoteError):
        decode(codec.pack({"r": CALL, "i": SENDER, "q": 2, "k": KEY, "w": 0} | part))


@pytest.mark.parametrize("address", [V4, V6])
@pytest.mark.parametrize("size", [0, 60, 200, LARGEST])
def test_the_fullest_get_reply_fits_one_datagram(address: Address, size: int) -> None:
    one = record(value=bytes(size))
    room = messages.GET_ROOM
    many = tuple(one for _ in range(min(messages.MAX_CONTACTS, room // one.size)))
    fitting = messages.fit(packed(contacts(20, address)), room - sum(r.size for r in many))
    assert len(encode(Reply(CALL, PROOF, Got(KEY, many, BIG, packed=fitting)))) <= MAX_BODY


def test_a_list_of_mixed_contacts_is_cut_where_it_no_longer_fits() -> None:
    mixed = packed(contacts(3) + contacts(3, V6))
    assert messages.fit(mixed, 26 * 3 + 38) == mixed[:4]
    assert messages.fit(mixed, 25) == ()


def test_packed_contacts_travel_as_contacts_do_and_are_remembered_by_who_is_told_often() -> None:
    told = contacts(3) + contacts(2, V6)
    body = encode(Reply(CALL, None, Found(packed=packed(told))))
    assert body == encode(Reply(CALL, None, Found(told)))
    memo: messages.Memo = {}
    assert decode(body, memo) == decode(body, memo) == decode(body) == Reply(CALL, None, Found(told))
    assert sorted(memo.values()) == sorted(told)


def test_the_memory_of_contacts_is_bounded() -> None:
    memo: messages.Memo = {}
    for number in range(200):
        told = NodeContact(NodeId(number.to_bytes(20, "big")), V4)
        assert decode(encode(Reply(CALL, None, Found((told,)))), memo) == Reply(CALL, None, Found((told,)))
        assert len(memo) <= messages.MAX_MEMO


def fields_of(message: Request | Reply) -> dict[str, codec.Value]:
    return codec.as_map(codec.unpack(encode(message), limit=MAX_BODY))


WRONG: list[tuple[int, dict[str, codec.Value]]] = [
    (0, {"r": b"short"}),
    (0, {"r": "text" * 2}),
    (0, {"i": b"short"}),
    (0, {"q": 4}),
    (0, {"q": -1}),
    (0, {"q": None}),
    (0, {"q": True}),
    (1, {"c": b"short"}),
    (1, {"t": b"12345"}),
    (1, {"t": bytes(6)}),  # 0.0.0.0:0
    (1, {"t": b"\x7f\0\0\1\0\0"}),  # port 0
    (1, {"t": b"\xe0\0\0\1\0\1"}),  # multicast
    (2, {"k": bytes(19)}),
    (2, {"k": []}),
    (3, {"w": 21}),
    (3, {"w": -1}),
    (4, {"s": None}),
    (4, {"s": [1, 2]}),
    (4, {"k": KEY}),  # not the key of that mutable record
    (5, {"a": 9}),
    (6, {"p": bytes(95)}),
    (7, {"o": bytes(37)}),
    (7, {"o": bytes(38)}),  # :: is nobody
    (7, {"o": bytes(38 * 21)}),
    (7, {"n": "text"}),
    (9, {"v": None}),
    (9, {"v": [None] * 21}),
    (9, {"m": -1}),
    (9, {"k": b""}),
    (11, {"e": 7}),
    (11, {"e": "0"}),
]


@pytest.mark.parametrize(("index", "change"), WRONG, ids=str)
def test_a_message_of_a_wrong_form_is_refused(index: int, change: dict[str, codec.Value]) -> None:
    body = codec.pack(fields_of(MESSAGES[index]) | change)
    with pytest.raises(RemoteError):
        decode(body)


@pytest.mark.parametrize("message", MESSAGES[:10], ids=repr)
def test_a_message_without_one_of_its_fields_is_refused_or_is_another_message(message: Request | Reply) -> None:
    for name in fields_of(message):
        rest = {key: value for key, value in fields_of(message).items() if key != name}
        try:
            assert decode(codec.pack(rest)) != message
        except RemoteError:
            continue
        assert name in ("c", "t", "p", "n", "o", "d")  # the optional ones


def test_unknown_fields_are_ignored_so_that_newer_peers_may_add_some() -> None:
    body = codec.pack(fields_of(MESSAGES[2]) | {"z": [1, 2, 3]})
    assert decode(body) == MESSAGES[2]


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_remote_error(body: bytes) -> None:
    try:
        decode(body)
    except RemoteError:
        pass


def test_no_mutation_of_a_message_raises_anything_but_a_remote_error() -> None:
    rng = random.Random(1)
    for message in MESSAGES:
        body = encode(message)
        for _ in range(300):
            mutant = bytearray(body)
            for _ in range(rng.randint(1, 4)):
                mutant[rng.randrange(len(mutant))] = rng.randrange(256)
            try:
                decode(bytes(mutant[: rng.randint(0, len(mutant))] if rng.random() < 0.3 else mutant))
            except RemoteError:
                pass
