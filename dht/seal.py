"""Sealed datagrams: only members can make one, only the receiver it was made for accepts it, and only once.

    form(1) | sid(16) | counter(8) | ChaCha20-Poly1305(time(8) | body)

    key   = HMAC-SHA256(root, "gossipml/v1/session" | sid)
    nonce = 0000 | counter
    aad   = form | sid | counter | receiver

`root` is the datagram key of one generation of the network's keys (`gossipml.membership`); while a token is rotated a
receiver tries more than one, and answers under the one that fitted. `sid` is drawn by each sender at its start, so a
counter never meets the same key twice. `time` is the sender's wall clock in milliseconds. The receiver is inside the
authenticated data, not on the wire, in one of three forms:

- SESSION: the receiver's sid. What two nodes that know each other use; dies with the receiver's process.
- NODE: the receiver's node id, when only that is known.
- ADDRESS: the address that was dialled, when nothing else is known.

A replay has no effect: at the same node the window knows the counter, at another node the receiver differs, and
after a restart the sid is another one and the two first-contact forms are refused when they are older than the
start (so a member whose clock is behind ours reaches us that much later after our start). What is not authentic
is dropped without a word; every reason is counted by the caller.

Leaves out: secrecy between members (all derive every key), and proof of who sent it (signatures do that).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gossipml.ids import Address, NodeId

MAX_DATAGRAM = 1232  # IPv6's least MTU of 1280 less its headers: never fragmented
SID_SIZE = 16
HEADER_SIZE = 1 + SID_SIZE + 8
OVERHEAD = HEADER_SIZE + 8 + 16
MAX_BODY = MAX_DATAGRAM - OVERHEAD
MAX_SKEW_MS = 120_000  # clocks of real machines agree much better; also how long a sid must be remembered
WINDOW = 1024  # counters; more than a receive buffer of datagrams can be reordered
_ALL = (1 << WINDOW) - 1
MAX_SIDS = 4096  # about 3 MB; more senders than a node hears in two minutes
MAX_OWN_ADDRESSES = 32  # bounds the tries for one ADDRESS datagram: 60 us; a machine with many bridges has as many


class Form(enum.IntEnum):
    """How the receiver is named."""

    SESSION = 1
    NODE = 2
    ADDRESS = 3


_FORMS = {form.value: form for form in Form}


class Receiver(NamedTuple):
    form: Form
    tag: bytes


def session_receiver(sid: bytes) -> Receiver:
    return Receiver(Form.SESSION, sid)


def node_receiver(node: NodeId) -> Receiver:
    return Receiver(Form.NODE, node)


def address_receiver(address: Address) -> Receiver:
    return Receiver(Form.ADDRESS, str(address).encode())


class Drop(enum.StrEnum):
    """Why a datagram was dropped."""

    SIZE = "size"
    FORM = "form"
    REFLECTED = "reflected"
    REPLAYED = "replayed"
    UNAUTHENTIC = "unauthentic"
    SKEWED = "skewed"
    BEFORE_START = "before-start"


@dataclass(frozen=True)
class Opened:
    sid: bytes
    form: Form
    body: bytes
    root: bytes = field(default=b"", compare=False, repr=False)
    """The datagram key that it was sealed under."""


@dataclass(frozen=True)
class Dropped:
    reason: Drop
    skew: float = 0.0
    """Seconds by which the sender's clock is ahead of ours; set when the reason is SKEWED."""


def _session_key(root_key: bytes, sid: bytes) -> bytes:
    return hmac.digest(root_key, b"gossipml/v1/session" + sid, hashlib.sha256)


class Sealer:
    """Seals what this process sends."""

    def __init__(self, root_key: bytes, sid: bytes) -> None:
        self.sid = sid
        self._counter = 0
        self.set_roots((root_key,))

    def set_roots(self, roots: Sequence[bytes]) -> None:
        """The datagram keys that count now; the first is used where none is named."""
        self._ciphers = {root: ChaCha20Poly1305(_session_key(root, self.sid)) for root in roots}
        self._cipher = self._ciphers[roots[0]]

    def seal(self, body: bytes, receiver: Receiver, wall: float, root: bytes = b"") -> bytes:
        if len(body) > MAX_BODY:
            raise ValueError(f"body of {len(body)} bytes does not fit one datagram of {MAX_DATAGRAM}")
        self._counter += 1
        counter = self._counter.to_bytes(8, "big")
        header = bytes((receiver.form,)) + self.sid + counter
        inner = max(0, int(wall * 1000)).to_bytes(8, "big") + body
        cipher = self._ciphers.get(root, self._cipher)
        return header + cipher.encrypt(b"\0\0\0\0" + counter, inner, header + receiver.tag)


class _Session:
    """What is remembered of a sender: its key, the counters seen under any key, the newest time it carried.

    The key and not a cipher object: that takes 2.3 kB, and 0.8 us to make when a datagram comes.
    """

    __slots__ = ("bits", "highest", "key", "newest", "root")

    def __init__(self, root: bytes, key: bytes) -> None:
        self.root = root
        self.key = key
        self.highest = 0
        self.bits = 0  # bit i: counter `highest - i` was seen
        self.newest = 0

    def seen(self, counter: int) -> bool:
        behind = self.highest - counter
        return behind >= 0 and (behind >= WINDOW or bool(self.bits >> behind & 1))

    def mark(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            self.bits = (self.bits << ahead | 1) & _ALL if ahead < WINDOW else 1
            self.highest = counter
        else:
            self.bits |= 1 << -ahead


class Opener:
    """Opens what reaches this process: replay window first, then the seal, then the time."""

    def __init__(self, root_key: bytes, sid: bytes, node: NodeId, started: float) -> None:
        self._roots: tuple[bytes, ...] = (root_key,)
        self._sid = sid
        self._node = node
        self._addresses: tuple[bytes, ...] = ()
        self._sessions: dict[bytes, _Session] = {}
        # What is not newer than these is refused: first contacts from before our start, and from unknown
        # senders whatever one that was forgotten may have sent. In milliseconds.
        self._start_floor = int(started * 1000) - 1
        self._evicted_floor = -1

    def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """Where first contacts may believe that they reach us."""
        self._addresses = tuple(str(address).encode() for address in addresses[:MAX_OWN_ADDRESSES])

    def set_roots(self, roots: Sequence[bytes]) -> None:
        """The datagram keys that count now, the likeliest first."""
        self._roots = tuple(roots)

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, datagram: bytes, wall: float) -> Opened | Dropped:
        if not OVERHEAD <= len(datagram) <= MAX_DATAGRAM:
            return Dropped(Drop.SIZE)
        form = _FORMS.get(datagram[0])
        if form is None:
            return Dropped(Drop.FORM)
        sid = datagram[1 : 1 + SID_SIZE]
        if sid == self._sid:
            return Dropped(Drop.REFLECTED)
        counter = int.from_bytes(datagram[1 + SID_SIZE : HEADER_SIZE], "big")
        known = self._sessions.get(sid)
        if known is not None and known.seen(counter):
            return Dropped(Drop.REPLAYED)
        session = known or _Session(self._roots[0], _session_key(self._roots[0], sid))
        inner = self._authentic(session.key, datagram, form) if session.root in self._roots else None
        if inner is None:
            inner = self._under_another_root(session, sid, datagram, form)
        if inner is None:
            return Dropped(Drop.UNAUTHENTIC)
        time, now = int.from_bytes(inner[:8], "big"), int(wall * 1000)
        if abs(time - now) > MAX_SKEW_MS:
            return Dropped(Drop.SKEWED, (time - now) / 1000)
        if form is not Form.SESSION and time <= self._start_floor:
            return Dropped(Drop.BEFORE_START)
        if known is None:
            if time <= self._evicted_floor:
                return Dropped(Drop.REPLAYED)
            self._remember(sid, session, counter, now)
        session.mark(counter)
        session.newest = max(session.newest, time)
        self._sessions[sid] = self._sessions.pop(sid)  # to the end: the one heard from latest
        return Opened(sid, form, inner[8:], session.root)

    def _under_another_root(self, session: _Session, sid: bytes, datagram: bytes, form: Form) -> bytes | None:
        for root in self._roots:  # one, but while a token is rotated
            if root != session.root:
                key = _session_key(root, sid)
                inner = self._authentic(key, datagram, form)
                if inner is not None:
                    session.root, session.key = root, key
                    return inner
        return None

    def _authentic(self, key: bytes, datagram: bytes, form: Form) -> bytes | None:
        cipher = ChaCha20Poly1305(key)
        header, sealed = datagram[:HEADER_SIZE], datagram[HEADER_SIZE:]
        nonce = b"\0\0\0\0" + header[-8:]
        if form is Form.SESSION:
            tags: tuple[bytes, ...] = (self._sid,)
        elif form is Form.NODE:
            tags = (self._node,)
        else:
            tags = self._addresses
        for tag in tags:
            try:
                return cipher.decrypt(nonce, sealed, header + tag)
            except InvalidTag:
                continue
        return None

    def _remember(self, sid: bytes, session: _Session, counter: int, now: int) -> None:
        while len(self._sessions) >= MAX_SIDS:
            oldest = self._sessions.pop(next(iter(self._sessions)))
            # Its datagrams could be replayed now, so unknown senders must be newer than all of them. Bounded
            # by our own clock: a member with a fast clock must not lock others out.
            self._evicted_floor = max(self._evicted_floor, min(oldest.newest, now))
        if self._evicted_floor >= 0:  # it may be one that was forgotten: what it sent earlier may have been seen
            session.highest, session.bits = counter - 1, _ALL
        self._sessions[sid] = session
