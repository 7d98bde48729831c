"""Everything that the cookie gives: HKDF-SHA256(cookie, salt = network id, info = gossipml/v1/PURPOSE).

Separate keys for separate uses, so that a weakness in one tells nothing about another. Each generation of the
cookie has its own; which of them count now says `gossipml.membership`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gossipml.token import JoinToken


@dataclass(frozen=True, repr=False)
class NetworkKeys:
    """The secrets of one generation of one network, 32 bytes each."""

    network_id: bytes
    generation: int
    cookie: bytes
    """What the others are derived from, and what the next start derives them from again."""
    authority_seed: bytes
    """Ed25519 seed of the membership certificate authority."""
    datagram_key: bytes
    """Root of the sealed datagrams of the DHT."""
    beacon_key: bytes
    """HMAC key of the LAN beacons."""
    name_key: bytes
    """HMAC key of the name by which a dialler says which generation it uses (`gossipml.env.hello`)."""

    def __repr__(self) -> str:
        return f"NetworkKeys(network={self.network_id.hex()[:8]}, generation={self.generation})"

    @cached_property
    def key_id(self) -> str:
        """Tells generations apart; says nothing about their secrets."""
        return hashlib.sha256(b"gossipml/v1/key-id" + self.cookie).hexdigest()[:16]

    @property
    def rank(self) -> tuple[int, str]:
        """The order of generations, the same everywhere, also when two were made with one number."""
        return self.generation, self.key_id

    @classmethod
    def from_token(cls, token: JoinToken) -> NetworkKeys:
        return cls.derive(token.network_id, token.generation, token.cookie)

    @classmethod
    def derive(cls, network_id: bytes, generation: int, cookie: bytes) -> NetworkKeys:
        def secret(purpose: str) -> bytes:
            kdf = HKDF(hashes.SHA256(), length=32, salt=network_id, info=f"gossipml/v1/{purpose}".encode())
            return kdf.derive(cookie)

        return cls(
            network_id,
            generation,
            cookie,
            authority_seed=secret("authority"),
            datagram_key=secret("datagrams"),
            beacon_key=secret("beacons"),
            name_key=secret("names"),
        )
