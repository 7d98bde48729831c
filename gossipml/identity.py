"""Who a peer is: one Ed25519 key pair, made once, kept in HOME/identity (mode 0600).

Signatures are made and checked by libsodium, in half of OpenSSL's time: docs/decisions/0010-signatures.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign, crypto_sign_BYTES, crypto_sign_open, crypto_sign_PUBLICKEYBYTES
from nacl.exceptions import BadSignatureError

from gossipml.errors import UserError
from gossipml.ids import NodeId, PeerId, PublicKey, node_id_of, peer_id_of

SEED_SIZE = 32

Verify: TypeAlias = "Callable[[PublicKey, bytes, bytes], bool]"
"""What `verify` is."""


@dataclass(frozen=True, repr=False)
class Identity:
    """An Ed25519 key pair, from its 32-byte seed (RFC 8032)."""

    seed: bytes

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_SIZE:
            raise UserError(
                f"the identity holds {len(self.seed)} bytes instead of {SEED_SIZE}; restore the file from a copy, "
                "or delete it to become a new peer"
            )

    def __repr__(self) -> str:
        return f"Identity({self.peer_id.hex()[:8]})"  # never the seed

    @cached_property
    def private_key(self) -> Ed25519PrivateKey:
        """For certificates."""
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public_key(self) -> PublicKey:
        return PublicKey(self.private_key.public_key().public_bytes_raw())

    @cached_property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public_key)

    @cached_property
    def node_id(self) -> NodeId:
        return node_id_of(self.peer_id)

    def sign(self, data: bytes) -> bytes:
        """64 bytes of Ed25519 signature."""
        return crypto_sign(data, self.seed + self.public_key)[:crypto_sign_BYTES]


def verify(public_key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` is by `public_key`; False too for a key or signature of a wrong form."""
    if len(public_key) != crypto_sign_PUBLICKEYBYTES or len(signature) != crypto_sign_BYTES:
        return False
    try:
        crypto_sign_open(signature + data, public_key)
    except BadSignatureError:
        return False
    return True
