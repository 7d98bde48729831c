"""Everything that the cookie gives: HKDF-SHA256(cookie, salt = network id, info = gossipml/v1/PURPOSE).

Separate keys for separate uses, so that a weakness in one tells nothing about another.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gossipml.token import JoinToken


@dataclass(frozen=True, repr=False)
class NetworkKeys:
    """The secrets of one network, 32 bytes each."""

    network_id: bytes
    authority_seed: bytes
    """Ed25519 seed of the membership certificate authority."""
    datagram_key: bytes
    """Root of the sealed datagrams of the DHT."""
    beacon_key: bytes
    """HMAC key of the LAN beacons."""

    def __repr__(self) -> str:
        return f"NetworkKeys(network={self.network_id.hex()[:8]})"

    @classmethod
    def from_token(cls, token: JoinToken) -> NetworkKeys:
        def derive(purpose: str) -> bytes:
            kdf = HKDF(hashes.SHA256(), length=32, salt=token.network_id, info=f"gossipml/v1/{purpose}".encode())
            return kdf.derive(token.cookie)

        return cls(token.network_id, derive("authority"), derive("datagrams"), derive("beacons"))
