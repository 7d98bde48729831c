"""Beacons: what peers of one network shout on a local network, so that they find each other without an address.

    version(1) | nonce(12) | ChaCha20(body) | HMAC-SHA256(32) over all before

    body = time(8, wall clock in milliseconds) | canonical msgpack {a, m, n, p, q}:
        a  addresses, at most 4, each [IP literal, port]; none for one that only asks
        m  name of the model that the peer trains     n  what its owner calls it
        p  peer id                                    q  whether it wants to hear the others now

Both keys are HMACs of the beacon key, which comes from the cookie. An outsider learns that somebody here runs
gossipml, at which address and how often it shouts: no network id, peer id, name or model. The order is: length,
version, nonce, HMAC, time, then the rest; whoever fails is dropped without a word.

A replay has no effect where the beacon was heard: its nonce is remembered for as long as its time is accepted, and
what was sent before our start is refused. Another network, replayed within the two minutes, hears a contact that
is not there: one dial, refused by mutual TLS, for the beacon proves nothing but that a member once made it. A member
may write any peer id and address into its own beacon; the dial proves the id, and only addresses on a network of
ours are dialled.

Clocks: a beacon more than 120 s off is not accepted, as with sealed datagrams. That its maker is a member and how
much its clock differs is known all the same, so that a person can be told.

Several keys may open (old and new while a token is rotated); a beacon is sealed under one.

Left out: IPv6 link-local addresses, which an `Address` cannot hold, for they mean nothing without an interface.
Hosts that have no other address are rare: without router and DHCP they give themselves IPv4 addresses (RFC 3927),
which are announced.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_address

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from gossipml import codec
from gossipml.errors import RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, PEER_ID_SIZE, Address, PeerId, checked_address

VERSION = 1
NONCE_SIZE = 12
TAG_SIZE = 32
HEADER_SIZE = 1 + NONCE_SIZE
TIME_SIZE = 8
MIN_BEACON = HEADER_SIZE + TIME_SIZE + TAG_SIZE
MAX_BEACON = 1232  # one unfragmented datagram, as in the DHT; with the longest names about 800 bytes
MAX_TEXT = 64
MAX_SKEW_MS = 120_000  # as for the sealed datagrams of the DHT
MAX_NONCES = 4096  # about 0.5 MB; four minutes of 17 beacons a second, more than a large LAN sends

LocalNetwork = IPv4Interface | IPv6Interface


@dataclass(frozen=True)
class Beacon:
    peer: PeerId
    addresses: tuple[Address, ...]
    model: str
    name: str
    asks: bool
    """It has just come, or hears nobody: answer at once."""


class Drop(enum.StrEnum):
    """Why a beacon was dropped."""

    SIZE = "size"
    VERSION = "version"
    FOREIGN = "foreign"
    """From a source on none of our networks."""
    REPEATED = "repeated"
    """Heard before: the same by another way, or a replay."""
    UNAUTHENTIC = "unauthentic"
    """Garbage, or of another network of peers."""
    MALFORMED = "malformed"
    OWN = "own"
    SKEWED = "skewed"
    BEFORE_START = "before-start"


@dataclass(frozen=True)
class Opened:
    beacon: Beacon
    skew: float
    """Seconds by which its sender's clock is ahead of ours."""


@dataclass(frozen=True)
class Dropped:
    reason: Drop
    peer: PeerId | None = None
    """Who made it; set when the reason is SKEWED or OWN."""
    skew: float = 0.0


def _subkeys(key: bytes) -> tuple[bytes, bytes]:
    """For the cipher and for the HMAC."""
    return (
        hmac.digest(key, b"gossipml/v1/beacon/cipher", "sha256"),
        hmac.digest(key, b"gossipml/v1/beacon/authenticate", "sha256"),
    )


def _cipher(key: bytes, nonce: bytes, data: bytes) -> bytes:
    """ChaCha20 (RFC 8439, counter from 0) over the data: the same call hides and shows."""
    return Cipher(ChaCha20(key, b"\0\0\0\0" + nonce), mode=None).encryptor().update(data)


def seal(beacon: Beacon, key: bytes, nonce: bytes, wall: float) -> bytes:
    """The datagram of a beacon. `nonce`: 12 random bytes, fresh for each call."""
    if len(nonce) != NONCE_SIZE:
        raise ValueError(f"a nonce has {NONCE_SIZE} bytes")
    fields = codec.pack(
        {
            "a": [[host, port] for host, port in beacon.addresses[:MAX_CONTACT_ADDRESSES]],
            "m": beacon.model[:MAX_TEXT],
            "n": beacon.name[:MAX_TEXT],
            "p": beacon.peer,
            "q": beacon.asks,
        }
    )
    encryption, authentication = _subkeys(key)
    body = max(0, int(wall * 1000)).to_bytes(TIME_SIZE, "big") + fields
    told = bytes((VERSION,)) + nonce + _cipher(encryption, nonce, body)
    return told + hmac.digest(authentication, told, hashlib.sha256)


class Opener:
    """Opens what is heard, each beacon once."""

    def __init__(self, keys: Iterable[bytes], own: PeerId, started: float) -> None:
        self._own = own
        self._nonces: OrderedDict[bytes, int] = OrderedDict()  # nonce -> time, in milliseconds
        self._floor = int(started * 1000) - 1  # not newer: from before our start, or maybe forgotten since
        self._given: tuple[bytes, ...] = ()
        self._keys: tuple[tuple[bytes, bytes], ...] = ()
        self.set_keys(keys)

    def set_keys(self, keys: Iterable[bytes]) -> None:
        """From here on accept beacons under these keys alone."""
        keys = tuple(keys)
        if keys != self._given:
            self._given = keys
            self._keys = tuple(_subkeys(key) for key in keys)

    def open(self, datagram: bytes, wall: float) -> Opened | Dropped:
        if not MIN_BEACON <= len(datagram) <= MAX_BEACON:
            return Dropped(Drop.SIZE)
        if datagram[0] != VERSION:
            return Dropped(Drop.VERSION)
        nonce = datagram[1:HEADER_SIZE]
        if nonce in self._nonces:
            return Dropped(Drop.REPEATED)
        body = self._authentic(datagram, nonce)
        if body is None:
            return Dropped(Drop.UNAUTHENTIC)
        time, now = int.from_bytes(body[:TIME_SIZE], "big"), int(wall * 1000)
        try:
            beacon = _read(body[TIME_SIZE:])
        except (RemoteError, ValueError):
            return Dropped(Drop.MALFORMED)
        skew = (time - now) / 1000
        if beacon.peer == self._own:
            return Dropped(Drop.OWN, beacon.peer, skew)
        if abs(time - now) > MAX_SKEW_MS:
            return Dropped(Drop.SKEWED, beacon.peer, skew)
        self._floor = min(self._floor, now)  # our clock was set back: what was newest then says nothing now
        if time <= self._floor:
            return Dropped(Drop.BEFORE_START)
        self._remember(nonce, time, now)
        return Opened(beacon, skew)

    def _authentic(self, datagram: bytes, nonce: bytes) -> bytes | None:
        told, tag = datagram[:-TAG_SIZE], datagram[-TAG_SIZE:]
        for encryption, authentication in self._keys:
            if hmac.compare_digest(hmac.digest(authentication, told, hashlib.sha256), tag):
                return _cipher(encryption, nonce, told[HEADER_SIZE:])
        return None

    def _remember(self, nonce: bytes, time: int, now: int) -> None:
        while self._nonces:
            first = next(iter(self._nonces))
            oldest = self._nonces[first]
            if oldest >= now - MAX_SKEW_MS and len(self._nonces) < MAX_NONCES:
                break
            del self._nonces[first]
            # It could be replayed now, so beacons must be newer. By our clock at most: a member with a fast
            # clock must not make us deaf to the others.
            self._floor = max(self._floor, min(oldest, now))
        self._nonces[nonce] = time


def _read(body: bytes) -> Beacon:
    fields = codec.as_map(codec.unpack(body, limit=MAX_BEACON))
    if len(fields) != 5:
        raise RemoteError("a beacon has five fields")
    addresses = []
    for item in codec.get_list(fields, "a", limit=MAX_CONTACT_ADDRESSES):
        if not isinstance(item, list) or len(item) != 2:
            raise RemoteError("an address is a pair")
        addresses.append(checked_address(item[0], item[1]))
    return Beacon(
        peer=PeerId(codec.get_bytes(fields, "p", size=PEER_ID_SIZE)),
        addresses=tuple(addresses),
        model=codec.get_str(fields, "m", limit=MAX_TEXT),
        name=codec.get_str(fields, "n", limit=MAX_TEXT),
        asks=codec.get_bool(fields, "q"),
    )


# Which addresses belong where.


def is_near(host: str, networks: Iterable[LocalNetwork]) -> bool:
    """Whether an IP literal is on one of our links; IPv6 link-local ones are, for no router passes them on."""
    ip = ip_address(host)
    if ip.version == 6 and ip.is_link_local:
        return True
    return any(ip in network.network for network in networks)


def addresses_to_dial(beacon: Beacon, source: str, networks: Iterable[LocalNetwork]) -> tuple[Address, ...]:
    """Those of a beacon's addresses that are on our networks; loopback ones only when it came from this machine."""
    local = ip_address(source).is_loopback
    networks = [network for network in networks if network.version == 4 or not network.is_link_local]
    return tuple(
        address
        for address in beacon.addresses
        if address.is_loopback == local and any(ip_address(address.host) in network.network for network in networks)
    )


def addresses_to_announce(
    bound: Address, here: Iterable[LocalNetwork], everywhere: Iterable[LocalNetwork]
) -> tuple[Address, ...]:
    """Where those on one link reach a socket bound to `bound`, best first, at most 4.

    Only addresses of this interface, so that nobody dials the bridge of our containers, which each machine has.
    Loopback ones only when the peer listens there alone, or has no other address (a machine without a network).
    """
    own = [interface.ip for interface in here]
    listening = ip_address(bound.host)
    if not listening.is_unspecified:
        return (bound,) if listening in own else ()
    offline = all(interface.ip.is_loopback or interface.ip.is_link_local for interface in everywhere)
    fit = [
        ip
        for ip in own
        if (ip.version == 4 or not ip.is_link_local)
        and (ip.version == 4 or listening.version == 6)
        and (offline or not ip.is_loopback)
    ]
    fit.sort(key=lambda ip: (ip.is_link_local, ip.version))  # stable: else as the system lists them
    return tuple(Address(str(ip), bound.port) for ip in fit[:MAX_CONTACT_ADDRESSES])
