"""What the maker of a network may order: a new cookie for everybody, or that one peer is out.

    order      = public key(32) | signature(64) | body
    body       = canonical msgpack map: "t" is "rotate" or "revoke", the rest are its fields
    signature  = Ed25519 by the network key over "gossipml/v1/order" | body
    network id = the first 16 bytes of SHA-256("gossipml/v1/network" | public key)

The network id vouches for the key, so every member can check an order and no member can make one. The network key
is needed for nothing else; it lies in HOME/network-key of whoever made the network, and may be copied.

A rotation holds the new cookie: it travels between members over TLS alone, never through the DHT, never into a log.
Leaves out: what a member does about an order (`gossipml.membership`), taking back a revocation (there is no way: who
should come back starts with a new identity).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.identity import verify
from gossipml.ids import PEER_ID_SIZE, PeerId, PublicKey
from gossipml.token import COOKIE_SIZE, MAX_GENERATION, NETWORK_ID_SIZE

NETWORK_SEED_SIZE = 32
SIGNATURE_SIZE = 64
HEAD_SIZE = 32 + SIGNATURE_SIZE
MAX_ORDER = 256  # a rotation is about 190 bytes
MAX_TIME = 1 << 40  # wall seconds; a bound, not a date
MAX_WINDOW = 366 * 86400  # longer is no rotation

_SIGNED = b"gossipml/v1/order"


@dataclass(frozen=True)
class Rotation:
    """A new cookie; those before it hold until `old_until`."""

    generation: int
    cookie: bytes
    made: int
    """Wall seconds of whoever made it, as `old_until`."""
    old_until: int
    raw: bytes
    """The order as it travels."""

    def __repr__(self) -> str:
        return f"Rotation(generation={self.generation}, old_until={self.old_until})"  # never the cookie


@dataclass(frozen=True)
class Revocation:
    """This peer is no member any more."""

    peer: PeerId
    made: int
    raw: bytes


Order: TypeAlias = Rotation | Revocation


def network_id_of(public_key: PublicKey) -> bytes:
    return hashlib.sha256(b"gossipml/v1/network" + public_key).digest()[:NETWORK_ID_SIZE]


@dataclass(frozen=True, repr=False)
class NetworkKey:
    """The key pair behind a network id, from its 32-byte seed."""

    seed: bytes

    def __post_init__(self) -> None:
        if len(self.seed) != NETWORK_SEED_SIZE:
            raise UserError(
                f"the network key holds {len(self.seed)} bytes instead of {NETWORK_SEED_SIZE}; restore the file "
                "from a copy"
            )

    def __repr__(self) -> str:
        return f"NetworkKey({self.network_id.hex()[:8]})"  # never the seed

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public_key(self) -> PublicKey:
        return PublicKey(self._private.public_key().public_bytes_raw())

    @cached_property
    def network_id(self) -> bytes:
        return network_id_of(self.public_key)

    def rotation(self, generation: int, cookie: bytes, *, made: int, old_until: int) -> Rotation:
        """An order that `cookie` is the network's secret from now on."""
        order = self._sign(
            {"t": "rotate", "generation": generation, "cookie": cookie, "made": made, "old_until": old_until}
        )
        assert isinstance(order, Rotation)
        return order

    def revocation(self, peer: PeerId, *, made: int) -> Revocation:
        """An order that `peer` is out."""
        order = self._sign({"t": "revoke", "peer": peer, "made": made})
        assert isinstance(order, Revocation)
        return order

    def _sign(self, fields: dict[str, object]) -> Order:
        body = codec.pack(fields)
        return read_order(self.public_key + self._private.sign(_SIGNED + body) + body, self.network_id)


def read_order(data: bytes, network_id: bytes) -> Order:
    """The order in `data`; RemoteError when it is malformed, or not by the key of this network."""
    if not HEAD_SIZE < len(data) <= MAX_ORDER:
        raise RemoteError(f"an order of {len(data)} bytes; allowed are {HEAD_SIZE + 1} to {MAX_ORDER}")
    public_key, signature, body = PublicKey(data[:32]), data[32:HEAD_SIZE], data[HEAD_SIZE:]
    if network_id_of(public_key) != network_id:
        raise RemoteError("an order by a key that is not this network's")
    fields = codec.as_map(codec.unpack(body, limit=MAX_ORDER))
    order = _order(fields, data)
    if not verify(public_key, signature, _SIGNED + body):
        raise RemoteError("an order with a forged signature")
    return order


def _order(fields: dict[str, codec.Value], raw: bytes) -> Order:
    kind = codec.get_str(fields, "t", limit=8)
    made = codec.get_int(fields, "made", high=MAX_TIME)
    match kind:
        case "rotate" if len(fields) == 5:
            return Rotation(
                generation=codec.get_int(fields, "generation", low=2, high=MAX_GENERATION),
                cookie=codec.get_bytes(fields, "cookie", size=COOKIE_SIZE),
                made=made,
                old_until=codec.get_int(fields, "old_until", low=made, high=made + MAX_WINDOW),
                raw=raw,
            )
        case "revoke" if len(fields) == 3:
            return Revocation(PeerId(codec.get_bytes(fields, "peer", size=PEER_ID_SIZE)), made, raw)
    raise RemoteError("an order of unknown kind or with other fields")
