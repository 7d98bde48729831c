"""Distinct types for the ids and addresses that travel between the parts."""

from __future__ import annotations

import base64
import functools
import hashlib
import ipaddress
from typing import NamedTuple, NewType

from gossipml.errors import UserError

PeerId = NewType("PeerId", bytes)
"""SHA-256 of the Ed25519 public key: 32 bytes."""

NodeId = NewType("NodeId", bytes)
"""The first 20 bytes of the peer id: the place of a peer in the DHT's key space."""

PublicKey = NewType("PublicKey", bytes)
"""A raw Ed25519 public key: 32 bytes."""

PEER_ID_SIZE = 32
NODE_ID_SIZE = 20


def peer_id_of(public_key: PublicKey) -> PeerId:
    return PeerId(hashlib.sha256(public_key).digest())


def node_id_of(peer: PeerId) -> NodeId:
    return NodeId(peer[:NODE_ID_SIZE])


def format_peer_id(peer: PeerId) -> str:
    """The peer id as 52 lower-case base32 characters."""
    return base64.b32encode(peer).decode().rstrip("=").lower()


def parse_peer_id(text: str) -> PeerId:
    """The inverse of `format_peer_id`. UserError when the text is no whole peer id."""
    try:
        peer = PeerId(base64.b32decode(text.strip().upper() + "===="))
    except ValueError:
        peer = PeerId(b"")
    if len(peer) != PEER_ID_SIZE or format_peer_id(peer) != text.strip().lower():
        raise UserError(f"{text!r} is not a peer id (52 letters and digits, as in `gossipml peer list --json`)")
    return peer


def short_peer_id(peer: PeerId) -> str:
    """The first eight characters of the id, for people."""
    return format_peer_id(peer)[:8]


class Address(NamedTuple):
    """An IP literal and a port. Never a host name: a name from the network would mean a blocking DNS query."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(self.host)


def checked_address(host: object, port: object) -> Address:
    """An address out of untrusted values; ValueError unless an IP literal and a port from 1 to 65,535."""
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
        raise ValueError("an address is an IP literal and a port")
    if not 0 < port < 65536:
        raise ValueError(f"port {port} is not between 1 and 65535")
    if len(host) > 45:  # the longest IPv6 literal
        raise ValueError("host is too long for an IP literal")
    return Address(_reachable(host), port)


# What peers tell over and over; parsing a literal costs as much as opening a datagram.
@functools.lru_cache(4096)
def _reachable(host: str) -> str:
    """The IP literal in its shortest form."""
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified or ip.is_multicast:
        raise ValueError(f"nobody can be reached at {host}")
    return str(ip)


@functools.lru_cache(4096)
def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def parse_address(text: str, *, what: str = "address") -> Address:
    """`HOST:PORT` or `[V6]:PORT` as a user types it; port 0 means any free one. UserError if it is not that."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if not separator:
            raise ValueError
        if host == "localhost":
            host = "127.0.0.1"
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError
        return Address(str(ipaddress.ip_address(host)), number)
    except ValueError:
        raise UserError(f"{what} {text!r} is not IP:PORT; write for example 127.0.0.1:8711 or [::1]:8711") from None


class Contact(NamedTuple):
    """Where a peer says it can be reached and what it trains. A hint: the dial proves the peer id."""

    peer: PeerId
    addresses: tuple[Address, ...]
    model: str
    """Name of the model that the peer trains; empty for none."""
    name: str
    """What its owner calls the peer; for people only."""


MAX_CONTACT_ADDRESSES = 4  # IPv4 and IPv6, seen from inside and outside
