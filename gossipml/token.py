"""The join token: what a machine needs to enter a network, in one line of text.

    gml1-  base32( msgpack {version, network, cookie, generation, expires, addresses} + checksum )

The checksum catches typing mistakes; it is no protection, for whoever holds a token holds the cookie.
`expires` (wall seconds; 0 = never) bounds how long a copied token lets a newcomer in; it does not end a
membership: a peer that has joined keeps the cookie. `generation` counts the rotations (`gossipml.orders`).
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
from dataclasses import dataclass, replace

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.ids import Address, checked_address

PREFIX = "gml1-"
VERSION = 1
COOKIE_SIZE = 32
NETWORK_ID_SIZE = 16
CHECKSUM_SIZE = 4  # one typing mistake in four thousand million goes unseen
MAX_GENERATION = 1 << 31  # rotations; a bound, not a target
MAX_ADDRESSES = 16  # enough first contacts; keeps a token under 1 kB
MAX_TEXT = 2048

REMEDY = "ask a member for a new one: `gossipml token new --out FILE`"


@dataclass(frozen=True, repr=False)
class JoinToken:
    """What the token carries. `cookie` is the secret of the network: never print or log it."""

    network_id: bytes
    cookie: bytes
    expires: int
    addresses: tuple[Address, ...]
    generation: int = 1
    """Of the cookie: one more with each rotation."""

    def __repr__(self) -> str:
        return f"JoinToken(network={self.network_id.hex()[:8]}, addresses={len(self.addresses)})"

    def encode(self) -> str:
        """The token as text; `decode` is its inverse."""
        body = codec.pack(
            {
                "v": VERSION,
                "n": self.network_id,
                "c": self.cookie,
                "e": self.expires,
                "g": self.generation,
                "a": [[host, port] for host, port in self.addresses[:MAX_ADDRESSES]],
            }
        )
        return PREFIX + base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()

    def check_expiry(self, wall: float) -> None:
        """UserError when the token is older than it may be."""
        if self.expires and wall > self.expires:
            day = datetime.datetime.fromtimestamp(self.expires, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            raise UserError(f"the token expired on {day}; {REMEDY}")

    def with_addresses(self, addresses: tuple[Address, ...]) -> JoinToken:
        """The same token with these first contacts; loopback ones only where there are no others."""
        public = tuple(a for a in dict.fromkeys(addresses) if not a.is_loopback)
        return replace(self, addresses=(public or tuple(dict.fromkeys(addresses)))[:MAX_ADDRESSES])


def decode(text: str) -> JoinToken:
    """The token in `text`. UserError says what is wrong: not a token, mistyped, or of another version."""
    text = "".join(text.split()).lower()
    if not text.startswith(PREFIX) or len(text) > MAX_TEXT:
        raise UserError(f"this is not a join token (it should start with {PREFIX!r}); {REMEDY}")
    encoded = text.removeprefix(PREFIX).upper()
    try:
        raw = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
    except binascii.Error:
        raise UserError(f"the token is mistyped: a character that no token has, or one too few; {REMEDY}") from None
    body, checksum = raw[:-CHECKSUM_SIZE], raw[-CHECKSUM_SIZE:]
    if _checksum(body) != checksum:
        raise UserError(f"the token is mistyped: its checksum does not fit; copy it again, or {REMEDY}")
    try:
        fields = codec.as_map(codec.unpack(body, limit=MAX_TEXT))
        version = codec.get_int(fields, "v")
        if version != VERSION:
            raise UserError(f"the token is of version {version}, this gossipml reads {VERSION}; install a newer one")
        addresses = []
        for item in codec.get_list(fields, "a", limit=MAX_ADDRESSES):
            if not isinstance(item, list) or len(item) != 2:
                raise RemoteError("an address is a pair")
            addresses.append(checked_address(item[0], item[1]))
        return JoinToken(
            network_id=codec.get_bytes(fields, "n", size=NETWORK_ID_SIZE),
            cookie=codec.get_bytes(fields, "c", size=COOKIE_SIZE),
            expires=codec.get_int(fields, "e"),
            addresses=tuple(addresses),
            generation=codec.get_int(fields, "g", low=1, high=MAX_GENERATION),
        )
    except (RemoteError, ValueError) as error:
        raise UserError(f"the token is damaged ({error}); {REMEDY}") from None


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"gossipml/v1/token" + body).digest()[:CHECKSUM_SIZE]
