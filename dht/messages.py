"""The RPC of the DHT. This docstring is the wire specification.

A message is the body of one sealed datagram (see `seal`): canonical msgpack of a map, at most 1,183 bytes. Keys
are one letter. A request has `q`, a reply has `a`, with the same number; unknown keys are ignored.

    every message   r  8 bytes    the requester's number for the call, copied into the reply
    every request   i  20 bytes   node id of the sender (a claim: whoever wants to keep it asks for proof)
                    c  16 bytes   a challenge; then also
                    t  6 or 18    the address that was dialled
    every reply     p  96 bytes   when challenged: public key (32), signature (64), see `proof_bytes`

    0 ping          -                                           -
    1 find          k target                                    n, o contacts
    2 get           k key, w contacts wanted (0 to 20),         k key, v records, m how many are held,
                    maybe j, d: only the part j of d            n, o contacts
    3 store         k key, s record, w contacts wanted          e what became of it (`records.Outcome`),
                                                                n, o contacts

Contacts are in compact form, as in BEP 5 and BEP 32: `n` holds 26 bytes each (node id, IPv4 address, port),
`o` holds 38 (IPv6), nearest first. A record is a list, see `records.to_wire`; `v` is a random sample that fits, of all
that are held or of one of `d` parts (1 to 64) of about the same length, cut from their list by ascending public key.

Nobody answers an error: what is not understood is dropped and counted.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from gossipml import codec
from gossipml.dht import records
from gossipml.dht.records import KEY_SIZE, Outcome, Record
from gossipml.dht.seal import MAX_BODY
from gossipml.errors import RemoteError
from gossipml.ids import NODE_ID_SIZE, Address, NodeId, PublicKey, checked_address

CALL_SIZE = 8
NONCE_SIZE = 16
PROOF_SIZE = 96
MAX_CONTACTS = 20  # k; 20 IPv6 contacts are 760 bytes
MAX_PARTS = 64  # of what is held under one key: that are no more records
GET_ROOM = MAX_BODY - 175  # everything in a `get` reply beside records and contacts takes that
RECORD_BUDGET = 760  # bytes of records beside contacts in a `get` reply; the rest is for the nearest contacts
MAX_MEMO = 128  # contacts: what one lookup is told, over and over; 40 kB
FOUR, SIX = NODE_ID_SIZE + 6, NODE_ID_SIZE + 18  # bytes of a contact with an IPv4 and with an IPv6 address


class NodeContact(NamedTuple):
    """A node id and where that node is said to be."""

    node: NodeId
    address: Address


@dataclass(frozen=True)
class Challenge:
    nonce: bytes
    dialled: Address


@dataclass(frozen=True)
class Proof:
    public_key: PublicKey
    signature: bytes


@dataclass(frozen=True)
class Ping:
    pass


@dataclass(frozen=True)
class Find:
    target: bytes


@dataclass(frozen=True)
class Get:
    key: bytes
    wanted: int = MAX_CONTACTS
    part: tuple[int, int] | None = None
    """Which of how many; None for all."""


@dataclass(frozen=True)
class Store:
    record: Record
    wanted: int = 0


@dataclass(frozen=True)
class Pong:
    pass


@dataclass(frozen=True)
class Found:
    contacts: tuple[NodeContact, ...] = ()
    packed: tuple[bytes, ...] = ()
    """More contacts, as they travel: what is sent many times is packed once. Empty in what was received."""


@dataclass(frozen=True)
class Got:
    key: bytes
    records: tuple[Record, ...]
    held: int
    contacts: tuple[NodeContact, ...] = ()
    packed: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Stored:
    outcome: Outcome
    contacts: tuple[NodeContact, ...] = ()
    packed: tuple[bytes, ...] = ()


Question: TypeAlias = Ping | Find | Get | Store
Answer: TypeAlias = Pong | Found | Got | Stored

ANSWER_TO: dict[type[Question], type[Answer]] = {Ping: Pong, Find: Found, Get: Got, Store: Stored}


@dataclass(frozen=True)
class Request:
    call: bytes
    sender: NodeId
    challenge: Challenge | None
    question: Question


@dataclass(frozen=True)
class Reply:
    call: bytes
    proof: Proof | None
    answer: Answer


def proof_bytes(nonce: bytes, requester_sid: bytes, responder_sid: bytes, dialled: Address) -> bytes:
    """What a challenged node signs: the challenge, both ends of the sealed channel, and where it was found."""
    return b"gossipml/v1/node" + nonce + requester_sid + responder_sid + str(dialled).encode()


# 4,096 contacts: every address that a busy node meets; parsing an IP literal costs more than sealing a datagram
@functools.lru_cache(4096)
def pack_address(address: Address) -> bytes:
    return ipaddress.ip_address(address.host).packed + address.port.to_bytes(2, "big")


@functools.lru_cache(4096)
def unpack_address(data: bytes) -> Address:
    """The address in 6 or 18 bytes; RemoteError when nobody can be reached there."""
    if len(data) not in (6, 18):
        raise RemoteError(f"an address of {len(data)} bytes")
    try:
        return checked_address(str(ipaddress.ip_address(data[:-2])), int.from_bytes(data[-2:], "big"))
    except ValueError as error:
        raise RemoteError(str(error)) from None


def encode(message: Request | Reply) -> bytes:
    fields: dict[str, codec.Value] = {"r": message.call}
    if isinstance(message, Request):
        fields["i"] = bytes(message.sender)
        if message.challenge is not None:
            fields["c"] = message.challenge.nonce
            fields["t"] = pack_address(message.challenge.dialled)
        match message.question:
            case Ping():
                fields["q"] = 0
            case Find(target):
                fields |= {"q": 1, "k": target}
            case Get(key, wanted, part):
                fields |= {"q": 2, "k": key, "w": wanted}
                if part is not None:
                    fields["j"], fields["d"] = part
            case Store(record, wanted):
                fields |= {"q": 3, "k": record.key, "s": records.to_wire(record), "w": wanted}
    else:
        if message.proof is not None:
            fields["p"] = message.proof.public_key + message.proof.signature
        match message.answer:
            case Pong():
                fields["a"] = 0
            case Found(contacts, packed):
                fields |= {"a": 1} | _contact_fields(contacts, packed)
            case Got(key, found, held, contacts, packed):
                fields |= {"a": 2, "k": key, "v": [records.to_wire(record) for record in found], "m": held}
                fields |= _contact_fields(contacts, packed)
            case Stored(outcome, contacts, packed):
                fields |= {"a": 3, "e": int(outcome)} | _contact_fields(contacts, packed)
    return codec.pack(dict(sorted(fields.items())))  # in order it is packed faster


Memo: TypeAlias = dict[bytes, NodeContact]


def decode(body: bytes, memo: Memo | None = None) -> Request | Reply:
    """The message in a body; RemoteError when it is of a wrong form. Signatures are not checked.

    `memo` is the receiver's, for contacts that it is told again and again.
    """
    fields = codec.as_map(codec.unpack(body, limit=MAX_BODY))
    call = codec.get_bytes(fields, "r", size=CALL_SIZE)
    if "q" in fields:
        challenge = None
        if "c" in fields:
            nonce = codec.get_bytes(fields, "c", size=NONCE_SIZE)
            challenge = Challenge(nonce, unpack_address(codec.get_bytes(fields, "t", limit=18)))
        sender = NodeId(codec.get_bytes(fields, "i", size=NODE_ID_SIZE))
        return Request(call, sender, challenge, _question(fields))
    proof = None
    if "p" in fields:
        raw = codec.get_bytes(fields, "p", size=PROOF_SIZE)
        proof = Proof(PublicKey(raw[:32]), raw[32:])
    return Reply(call, proof, _answer(fields, {} if memo is None else memo))


def pack_contact(contact: NodeContact) -> bytes:
    return contact.node + pack_address(contact.address)


def fit(packed: Sequence[bytes], budget: int) -> tuple[bytes, ...]:
    """The first contacts that take at most `budget` bytes."""
    chosen = []
    for item in packed:
        budget -= len(item)
        if budget < 0:
            break
        chosen.append(item)
    return tuple(chosen)


def _question(fields: dict[str, codec.Value]) -> Question:
    match codec.get_int(fields, "q"):
        case 0:
            return Ping()
        case 1:
            return Find(codec.get_bytes(fields, "k", size=KEY_SIZE))
        case 2:
            key = codec.get_bytes(fields, "k", size=KEY_SIZE)
            part = None
            if "d" in fields:
                parts = codec.get_int(fields, "d", low=1, high=MAX_PARTS)
                part = (codec.get_int(fields, "j", high=parts - 1), parts)
            return Get(key, codec.get_int(fields, "w", high=MAX_CONTACTS), part)
        case 3:
            key = codec.get_bytes(fields, "k", size=KEY_SIZE)
            return Store(records.from_wire(key, fields.get("s")), codec.get_int(fields, "w", high=MAX_CONTACTS))
        case other:
            raise RemoteError(f"no request {other}")


def _answer(fields: dict[str, codec.Value], memo: Memo) -> Answer:
    match codec.get_int(fields, "a"):
        case 0:
            return Pong()
        case 1:
            return Found(_unpack_contacts(fields, memo))
        case 2:
            key = codec.get_bytes(fields, "k", size=KEY_SIZE)
            items = codec.get_list(fields, "v", limit=MAX_CONTACTS)
            found = tuple(records.from_wire(key, item) for item in items)
            return Got(key, found, codec.get_int(fields, "m"), _unpack_contacts(fields, memo))
        case 3:
            return Stored(Outcome(codec.get_int(fields, "e", high=max(Outcome))), _unpack_contacts(fields, memo))
        case other:
            raise RemoteError(f"no reply {other}")


def _contact_fields(contacts: Sequence[NodeContact], packed: Sequence[bytes]) -> dict[str, codec.Value]:
    if contacts:
        packed = [*map(pack_contact, contacts), *packed]
    fields: dict[str, codec.Value] = {}
    four = b"".join([item for item in packed if len(item) == FOUR])
    six = b"".join([item for item in packed if len(item) == SIX])
    if four:
        fields["n"] = four
    if six:
        fields["o"] = six
    return fields


def _unpack_contacts(fields: dict[str, codec.Value], memo: Memo) -> tuple[NodeContact, ...]:
    contacts: list[NodeContact] = []
    for name, size in (("n", FOUR), ("o", SIX)):
        if name not in fields:
            continue
        data = codec.get_bytes(fields, name, limit=size * MAX_CONTACTS)
        if len(data) % size:
            raise RemoteError(f"contacts of {len(data)} bytes are no multiple of {size}")
        for start in range(0, len(data), size):
            item = data[start : start + size]
            contact = memo.get(item)
            if contact is None:
                if len(memo) >= MAX_MEMO:
                    memo.clear()
                contact = memo[item] = NodeContact(NodeId(item[:NODE_ID_SIZE]), unpack_address(item[NODE_ID_SIZE:]))
            contacts.append(contact)
    return tuple(contacts[:MAX_CONTACTS])
