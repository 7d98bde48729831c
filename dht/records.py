"""Signed records: what the DHT stores, and when one replaces another.

A record is `(kind, public key, seq, expires, salt, value)` with an Ed25519 signature over the canonical msgpack of

    ["gossipml/v1/record", network id, key, kind, public key, seq, expires, salt, value]

- MUTABLE (BEP 44): one per publisher and salt; its key is SHA-256(public key | salt), shortened to 160 bits.
- ANNOUNCEMENT (BEP 5): many publishers under one key, which is the digest of a topic; no salt.

Of two records of one `(kind, public key)` under one key the greater `(seq, expires, signature)` stays. Expiry is
part of what is signed, so a record dies at the same moment everywhere and only its owner can prolong it. A
publisher never lets `seq` or `expires` fall: otherwise a copy of an older record could outlive a newer one.

Leaves out: BEP 44's immutable records (larger things travel on the stream transport) and its compare-and-swap.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import TypeAlias, cast

from gossipml import codec
from gossipml.errors import RemoteError
from gossipml.identity import Identity, Verify, verify
from gossipml.ids import PeerId, PublicKey, peer_id_of

KEY_SIZE = 20  # the key space of node ids
SIGNATURE_SIZE = 64
LEAST_SIZE = 130  # bytes on the wire of a record without salt and value, at most
MAX_VALUE = 800  # BEP 44 allows 1,000; with key, signature and seal this still fits one datagram
MAX_SALT = 64  # BEP 44
CLOCK_SLACK = 120  # seconds that two clocks may differ, as for datagrams


class Kind(enum.IntEnum):
    MUTABLE = 1
    ANNOUNCEMENT = 2


MAX_TTL = {
    Kind.MUTABLE: 24 * 3600,  # the Kademlia paper's expiry
    Kind.ANNOUNCEMENT: 2 * 3600,  # BEP 44's: an announcement says who is here now
}


class Outcome(enum.IntEnum):
    """What became of a record that was offered; the numbers travel in `stored` replies."""

    STORED = 0
    HELD = 1
    STALE = 2
    FULL = 3
    EXPIRED = 4
    FUTURE = 5
    FORGED = 6

    @property
    def held(self) -> bool:
        """Whether the one who answers has the record now."""
        return self in (Outcome.STORED, Outcome.HELD)


@dataclass(frozen=True, slots=True)
class Record:
    key: bytes
    kind: Kind
    public_key: PublicKey
    seq: int
    expires: int
    """Wall seconds."""
    salt: bytes
    value: bytes
    signature: bytes

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.public_key)

    @property
    def slot(self) -> tuple[int, bytes]:
        """One record a slot and key."""
        return (int(self.kind), bytes(self.public_key))

    @property
    def order(self) -> tuple[int, int, bytes]:
        return (self.seq, self.expires, self.signature)

    @property
    def size(self) -> int:
        """Bytes on the wire, at most."""
        return LEAST_SIZE + len(self.salt) + len(self.value)


def topic_key(topic: bytes) -> bytes:
    """The key of what everybody may announce under."""
    return hashlib.sha256(topic).digest()[:KEY_SIZE]


def mutable_key(public_key: PublicKey, salt: bytes) -> bytes:
    return hashlib.sha256(public_key + salt).digest()[:KEY_SIZE]


def signed_bytes(record: Record, network_id: bytes) -> bytes:
    return codec.pack(
        [
            "gossipml/v1/record",
            network_id,
            record.key,
            int(record.kind),
            record.public_key,
            record.seq,
            record.expires,
            record.salt,
            record.value,
        ]
    )


def sign_record(
    identity: Identity,
    network_id: bytes,
    kind: Kind,
    key: bytes,
    *,
    seq: int,
    expires: int,
    value: bytes,
    salt: bytes = b"",
) -> Record:
    """A record of our own. ValueError when it could be accepted nowhere."""
    unsigned = Record(key, kind, identity.public_key, seq, expires, salt, value, b"")
    signature = identity.sign(signed_bytes(unsigned, network_id))
    record = Record(key, kind, identity.public_key, seq, expires, salt, value, signature)
    try:
        return from_wire(key, to_wire(record))
    except RemoteError as error:
        raise ValueError(f"not a valid record: {error}") from None


def refused_by_time(record: Record, wall: float) -> Outcome | None:
    """EXPIRED or FUTURE, or None when the record may live now."""
    if record.expires <= wall:
        return Outcome.EXPIRED
    if record.expires > wall + MAX_TTL[record.kind] + CLOCK_SLACK:
        return Outcome.FUTURE
    return None


def is_signed(record: Record, network_id: bytes, verify: Verify = verify) -> bool:
    return verify(record.public_key, record.signature, signed_bytes(record, network_id))


def to_wire(record: Record) -> codec.Value:
    """The record as a list, without its key, which the message carries once."""
    return [
        int(record.kind),
        bytes(record.public_key),
        record.seq,
        record.expires,
        record.salt,
        record.value,
        record.signature,
    ]


_Fields: TypeAlias = tuple[int, bytes, int, int, bytes, bytes, bytes]
_FORM = (int, bytes, int, int, bytes, bytes, bytes)  # exactly: a bool is no int


def from_wire(key: bytes, item: codec.Value) -> Record:
    """The record in a message, of the right form; RemoteError otherwise. Time and signature are not checked."""
    if (
        not isinstance(item, list) or tuple(map(type, item)) != _FORM
    ):  # a dozen a datagram: matching takes thrice as long
        raise RemoteError(
            "a record is a list of kind, public key, seq, expires, salt, value, signature: integers and bytes"
        )
    kind, public_key, seq, expires, salt, value, signature = cast(_Fields, tuple(item))
    if kind not in (Kind.MUTABLE, Kind.ANNOUNCEMENT):
        raise RemoteError(f"no record kind {kind}")
    if len(key) != KEY_SIZE or len(public_key) != 32 or len(signature) != SIGNATURE_SIZE:
        raise RemoteError("key, public key or signature of a record has a wrong size")
    if not 0 <= seq < 1 << 63 or not 0 <= expires < 1 << 53:
        raise RemoteError("seq or expires of a record is out of range")
    if len(value) > MAX_VALUE:
        raise RemoteError(f"value of {len(value)} bytes is over {MAX_VALUE}")
    owner = PublicKey(public_key)
    if kind == Kind.MUTABLE:
        if len(salt) > MAX_SALT:
            raise RemoteError(f"salt of {len(salt)} bytes is over {MAX_SALT}")
        if key != mutable_key(owner, salt):
            raise RemoteError("the key of a mutable record is not that of its publisher and salt")
    elif salt:
        raise RemoteError("an announcement has no salt")
    return Record(key, Kind(kind), owner, seq, expires, salt, value, signature)
