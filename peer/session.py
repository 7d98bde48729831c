"""One session between two peers, from hello to goodbye: a state machine without I/O.

The dialler says Hello, the other answers HelloReply or Refusal; then either side may send everything else,
until a Goodbye or the end of the stream. TLS lets a dialler finish its handshake before the other side has
judged its certificate, so a peer counts as connected only after that answer. Whether to take a peer in that
introduces itself (a duplicate, no room, in quarantine) is the caller's decision: `Introduced` is answered with
`Admit` or `Decline`. Leaves out: bytes (`gossipml.peer.wire`), liveness (`gossipml.peer.failure`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from gossipml.errors import LocalError, RemoteError
from gossipml.ids import PeerId, short_peer_id
from gossipml.membership import NO_ORDERS
from gossipml.peer.wire import (
    OLDEST_VERSION,
    VERSION,
    Goodbye,
    Hello,
    HelloReply,
    Message,
    NewProfile,
    News,
    Orders,
    Ping,
    Pong,
    Profile,
    Refusal,
    Update,
    UpdateAck,
)

HELLO_SECONDS = 5.0  # the same as for a TLS handshake: a slow stranger holds a place no longer


class State(Enum):
    DIALLING = "dialling"
    """We dialled and said hello; the answer is due."""
    ACCEPTING = "accepting"
    """We were dialled; the hello is due."""
    JUDGING = "judging"
    """The hello came and the caller is deciding."""
    OPEN = "open"
    CLOSED = "closed"


# Which message may arrive in which state, and the state after it. Everything else is the other side's error.
TRANSITIONS: dict[tuple[State, type[Message]], State] = {
    (State.ACCEPTING, Hello): State.JUDGING,
    (State.DIALLING, HelloReply): State.OPEN,
    (State.DIALLING, Refusal): State.CLOSED,
    (State.OPEN, NewProfile): State.OPEN,
    (State.OPEN, Update): State.OPEN,
    (State.OPEN, UpdateAck): State.OPEN,
    (State.OPEN, Orders): State.OPEN,
    (State.OPEN, News): State.OPEN,
    (State.OPEN, Ping): State.OPEN,
    (State.OPEN, Pong): State.OPEN,
    (State.OPEN, Goodbye): State.CLOSED,
    (State.DIALLING, Goodbye): State.CLOSED,
    (State.ACCEPTING, Goodbye): State.CLOSED,
}


@dataclass(frozen=True)
class Started:
    """The stream is there."""


@dataclass(frozen=True)
class Received:
    message: Message


@dataclass(frozen=True)
class Admit:
    """The caller takes in the peer that introduced itself."""


@dataclass(frozen=True)
class Decline:
    code: str
    reason: str


@dataclass(frozen=True)
class ProfileChanged:
    """We ourselves have something new to say (the model has been loaded, say)."""

    profile: Profile


@dataclass(frozen=True)
class End:
    """We end the session on purpose."""

    reason: str


@dataclass(frozen=True)
class Deadline:
    """The time that `next_deadline` named may have come."""


Event: TypeAlias = Started | Received | Admit | Decline | ProfileChanged | End | Deadline


@dataclass(frozen=True)
class Send:
    message: Message


@dataclass(frozen=True)
class Introduced:
    """A peer that we can talk to asks to come in."""

    hello: Hello


@dataclass(frozen=True)
class Opened:
    profile: Profile


@dataclass(frozen=True)
class PeerProfile:
    """The other side has changed its profile."""

    profile: Profile


@dataclass(frozen=True)
class Deliver:
    """A message of the open session, for whoever it concerns."""

    message: Message


@dataclass(frozen=True)
class Closed:
    """The session is over; what was asked to be sent before may still be sent."""

    code: str
    """A refusal's code, or: goodbye, timeout, local."""
    reason: str


Action: TypeAlias = Send | Introduced | Opened | PeerProfile | Deliver | Closed


def incompatible(ours: Profile, theirs: Profile) -> str:
    """Why two peers must not be in one session: one name for two models. Empty when they may be.

    A peer that trains another model, or none, is welcome; and a digest that is not known yet says nothing.
    """
    if ours.model and ours.model == theirs.model and ours.digest and theirs.digest and ours.digest != theirs.digest:
        return (
            f"both train a model named {ours.model!r} but with different specifications: {ours.name or 'ours'} has "
            f"digest {ours.digest}, {theirs.name or 'theirs'} has {theirs.digest}; "
            "give one of them another name, or use the same file on both"
        )
    return ""


class Session:
    """The state of one session; `peer` is the id that the stream proved and never changes."""

    def __init__(
        self,
        own: PeerId,
        peer: PeerId,
        profile: Profile,
        boot: bytes,
        *,
        dialled: bool,
        now: float,
        orders: bytes = NO_ORDERS,
    ) -> None:
        self.peer = peer
        self.dialled = dialled
        self.state = State.DIALLING if dialled else State.ACCEPTING
        self.theirs: Profile | None = None
        self.their_boot = b""
        self.their_orders = NO_ORDERS
        """Digest of the orders that the other side knew when it last said so."""
        self.version = 0
        """The protocol version spoken, once open."""
        self._own = own
        self._profile = profile
        self._told = profile
        self._boot = boot
        self._orders = orders
        self._deadline: float | None = now + HELLO_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether updates may come: that is no event for this machine, as it changes nothing."""
        return self.state is State.OPEN

    def next_deadline(self) -> float | None:
        """When the hello must have been exchanged; None afterwards."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about an event. RemoteError when a message may not come in this state."""
        match event:
            case Started():
                return (
                    [Send(Hello(VERSION, OLDEST_VERSION, self._boot, self._profile, self._orders))]
                    if self.dialled
                    else []
                )
            case Received(message):
                return self._received(message)
            case Admit():
                if self.state is not State.JUDGING or self.theirs is None:
                    raise LocalError(f"nobody to admit while {self.state.value}")
                self._open()
                reply = HelloReply(VERSION, OLDEST_VERSION, self._boot, self._profile, self._orders)
                return [Send(reply), Opened(self.theirs)]
            case Decline(code, reason):
                if self.state is not State.JUDGING:
                    raise LocalError(f"nobody to decline while {self.state.value}")
                return self._refuse(code, reason)
            case ProfileChanged(profile):
                return self._own_profile(profile)
            case End(reason):
                if self.state is State.CLOSED:
                    return []
                self._close()
                return [Send(Goodbye(reason)), Closed("local", reason)]
            case Deadline():
                if self._deadline is None or now < self._deadline or self.state is State.CLOSED:
                    return []
                self._close()
                return [Closed("timeout", f"no hello within {HELLO_SECONDS:.0f} s")]

    def _received(self, message: Message) -> list[Action]:
        before = self.state
        after = TRANSITIONS.get((before, type(message)))
        if after is None:
            raise RemoteError(f"{type(message).__name__} from {short_peer_id(self.peer)} while {before.value}")
        self.state = after
        match message:
            case Hello():
                return self._judge(message)
            case HelloReply():
                return self._welcomed(message)
            case Refusal(code, reason):
                self._close()
                return [Closed(code, reason)]
            case Orders(_, digest):
                self.their_orders = digest
                return [Deliver(message)]
            case Goodbye(reason):
                self._close()
                return [Closed("goodbye", reason)]
            case NewProfile(profile):
                self.theirs = profile
                conflict = incompatible(self._profile, profile)
                return self._leave("digest", conflict) if conflict else [PeerProfile(profile)]
            case _:
                return [Deliver(message)]

    def _judge(self, hello: Hello) -> list[Action]:
        self._remember(hello)
        if self.peer == self._own:
            return self._refuse("self", "this is the peer itself")
        if not self.version:
            return self._refuse("version", _version_reason(hello))
        conflict = incompatible(self._profile, hello.profile)
        if conflict:
            return self._refuse("digest", conflict)
        return [Introduced(hello)]

    def _welcomed(self, reply: HelloReply) -> list[Action]:
        self._remember(reply)
        if not self.version:
            return self._leave("version", _version_reason(reply))
        conflict = incompatible(self._profile, reply.profile)
        if conflict:
            return self._leave("digest", conflict)
        self._open()
        opened: list[Action] = [Opened(reply.profile)]
        if self._profile != self._told:  # it changed while our hello was under way
            opened.append(Send(NewProfile(self._profile)))
        return opened

    def _remember(self, hello: Hello | HelloReply) -> None:
        self.theirs = hello.profile
        self.their_boot = hello.boot
        self.their_orders = hello.orders
        spoken = min(hello.version, VERSION)
        self.version = spoken if spoken >= max(hello.oldest, OLDEST_VERSION) else 0

    def _own_profile(self, profile: Profile) -> list[Action]:
        self._profile = profile
        if self.state is not State.OPEN or self.theirs is None:
            return []  # it goes out with the hello's answer, or after it
        conflict = incompatible(profile, self.theirs)
        return self._leave("digest", conflict) if conflict else [Send(NewProfile(profile))]

    def _open(self) -> None:
        self.state = State.OPEN
        self._deadline = None

    def _close(self) -> None:
        self.state = State.CLOSED
        self._deadline = None

    def _refuse(self, code: str, reason: str) -> list[Action]:
        self._close()
        return [Send(Refusal(code, reason)), Closed(code, reason)]

    def _leave(self, code: str, reason: str) -> list[Action]:
        self._close()
        return [Send(Goodbye(reason)), Closed(code, reason)]


def _version_reason(hello: Hello | HelloReply) -> str:
    return (
        f"no common protocol version: one speaks {hello.oldest} to {hello.version}, the other {OLDEST_VERSION} to "
        f"{VERSION}; install the newer gossipml on both"
    )
