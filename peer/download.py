"""One content from many sources: what to ask of whom, and what to make of what they send. No I/O.

Rarest first from all; so many requests at each source that its line stays busy (bandwidth times delay), and no
more, because a piece asked for is lost to quicker sources. A source that has nothing free any more asks for what
another was asked for a good while ago (endgame, and the way around those that stall); the first copy that comes
whole wins, the others are cancelled. A wrong piece, and a piece that was not asked for, are faults of the sender;
slowness never is.
Leaves out: the bytes, deadlines of a stream, who to dial (`gossipml.peer.fetching`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TypeAlias

from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.peer.picker import Picker
from gossipml.peer.swarm_wire import MAX_ASKED

FIRST_RATE = 8e6  # bytes a second believed of a new source (guess: a good home line); the first pieces correct it
FIRST_DELAY = 0.1  # seconds believed from asking to the first byte
DELAY_MOST = 1.0  # the queue of a busy source is no line that more requests would fill
AHEAD_SECONDS = 0.02  # that much is under way beyond the delay, so that a busy event loop at either end is no gap
SMOOTHING = 0.3  # weight of the newest measurement
COPIES = 2  # of one piece under way at once: a second one saves waiting, a third only costs,
COPY_SECONDS = 10.0  # unless both seem to hang: one more for each so many seconds
OVERDUE_LEAST = 0.25  # seconds before a second copy is asked for, however fast the line
OVERDUE_FACTOR = 2.0  # and twice the time that the second source would take itself


@dataclass(frozen=True)
class Joined:
    """A source is there with these pieces (bit i for piece i)."""

    peer: PeerId
    bits: int


@dataclass(frozen=True)
class Had:
    """A source got more pieces."""

    peer: PeerId
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A source will not send these: cancelled, or lost."""

    peer: PeerId
    indexes: tuple[int, ...]
    lost: bool


@dataclass(frozen=True)
class Arriving:
    """The header of a piece is there. Answered by `Receive` or `Skip` as the first action."""

    peer: PeerId
    index: int
    length: int


@dataclass(frozen=True)
class Arrived:
    """The body is there. Answered by `Check` as the first action when it is to be verified and written."""

    peer: PeerId
    index: int


@dataclass(frozen=True)
class Kept:
    """The piece was right and is written."""

    index: int


@dataclass(frozen=True)
class Bad:
    """The piece that this source sent was wrong."""

    peer: PeerId
    index: int


@dataclass(frozen=True)
class Left:
    """The session with a source is over, for whatever reason."""

    peer: PeerId


@dataclass(frozen=True)
class Tick:
    """Some time has gone by."""


Event: TypeAlias = Joined | Had | Refused | Arriving | Arrived | Kept | Bad | Left | Tick


@dataclass(frozen=True)
class AskPieces:
    peer: PeerId
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class CancelPieces:
    peer: PeerId
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Receive:
    """Take the body."""


@dataclass(frozen=True)
class Skip:
    """Read the body away: somebody else was quicker."""


@dataclass(frozen=True)
class Check:
    """Verify and write the piece, then say `Kept` or `Bad`."""


@dataclass(frozen=True)
class Misbehaved:
    """End the session with this source, and say why to whom it concerns."""

    peer: PeerId
    reason: str


Action: TypeAlias = AskPieces | CancelPieces | Receive | Skip | Check | Misbehaved


@dataclass
class Source:
    """What is known of one peer that we fetch from."""

    bits: int
    asked: dict[int, float] = field(default_factory=dict)
    """Unanswered requests, oldest first, and when they were made."""
    cancelled: set[int] = field(default_factory=set)
    """Those of `asked` that are no longer wanted."""
    receiving: int | None = None
    rate: float = FIRST_RATE
    """Bytes a second while it sends."""
    delay: float = FIRST_DELAY
    """Seconds from asking an idle source to its first byte."""
    idle_since: float = 0.0
    """When it last had nothing of ours to do, sent a byte, or joined."""
    last: float = 0.0
    """When its last piece was whole."""
    lone: int | None = None
    """A request that found the source idle: measures the delay."""
    measured: bool = False
    """Whether `delay` is more than a guess."""
    pieces: int = 0

    @property
    def under_way(self) -> int:
        return len(self.asked) - len(self.cancelled)


class Download:
    """The pieces that are missing and those who may give them."""

    def __init__(self, count: int, have: int, size: int, piece_length: int, rng: random.Random) -> None:
        self.count = count
        self.size = size
        self.sources: dict[PeerId, Source] = {}
        self.wasted = 0
        """Whole pieces that came twice."""
        self._piece_length = piece_length
        self._picker = Picker(count, have, rng)
        self._checking: set[int] = set()  # whole, being verified and written

    @property
    def complete(self) -> bool:
        return not self._picker.missing

    @property
    def left(self) -> int:
        """How many pieces are missing."""
        return self._picker.missing.bit_count()

    def length(self, index: int) -> int:
        """Bytes of a piece: all alike but the last."""
        return min(self._piece_length, self.size - index * self._piece_length)

    def useless(self, now: float, seconds: float) -> list[PeerId]:
        """Sources that have not sent a byte for so long, for whatever reason: others may have their place."""
        return [peer for peer, source in self.sources.items() if now - source.idle_since > seconds]

    def progressed(self, peer: PeerId, now: float) -> None:
        """Bytes of a piece came from this source."""
        source = self.sources.get(peer)
        if source is not None:
            source.idle_since = now

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about an event. RemoteError when the other side broke the rules."""
        match event:
            case Arriving(peer, index, length):
                return self._arriving(self.sources[peer], index, length, now)
            case Arrived(peer, index):
                return self._arrived(peer, index, now)
            case Kept(index):
                return self._kept(index)
            case Had(peer, indexes):
                return self._had(peer, indexes, now)
            case Joined(peer, bits):
                self.sources[peer] = Source(bits, idle_since=now)
                self._picker.add(bits)
                return self._fill(peer, now)
            case Refused(peer, indexes, lost):
                return self._refused(peer, indexes, lost, now)
            case Bad(peer, index):
                self._checking.discard(index)
                self._free(index)
                actions: list[Action] = [Misbehaved(peer, f"piece {index} of {self.count} does not match its hash")]
                return actions + self._fill_all(now)
            case Left(peer):
                return self._left(peer, now)
            case Tick():
                return self._fill_all(now)

    # What sources say.

    def _had(self, peer: PeerId, indexes: tuple[int, ...], now: float) -> list[Action]:
        source, new = self.sources[peer], 0
        for index in indexes:
            self._check(index)
            new |= 1 << index
        new &= ~source.bits  # said twice counts once
        source.bits |= new
        self._picker.add(new)
        return self._fill(peer, now)

    def _refused(self, peer: PeerId, indexes: tuple[int, ...], lost: bool, now: float) -> list[Action]:
        source, gone = self.sources[peer], 0
        for index in indexes:
            self._check(index)
            if index not in source.asked:
                raise RemoteError(f"an answer about piece {index}, which was not asked for")
            if not lost and index not in source.cancelled:
                raise RemoteError(f"piece {index} is refused without a reason")
            self._answered(source, index)
            self._free(index)
            if lost:
                gone |= source.bits & 1 << index
        source.bits ^= gone
        self._picker.remove(gone)
        return self._fill_all(now) if lost else self._fill(peer, now)

    def _arriving(self, source: Source, index: int, length: int, now: float) -> list[Action]:
        self._check(index)
        asked_at = source.asked.get(index)
        if asked_at is None:
            raise RemoteError(f"piece {index} came without being asked for")
        if length != self.length(index):
            raise RemoteError(f"piece {index} of {length} bytes; it has {self.length(index)}")
        source.receiving = index
        source.idle_since = now
        if source.lone == index:
            # The first measurement counts alone, later ones with what was known.
            source.delay += (SMOOTHING if source.measured else 1.0) * (now - asked_at - source.delay)
            source.measured = True
            source.last = now
        source.lone = None
        if index in source.cancelled or index in self._checking or not self._picker.missing >> index & 1:
            return [Skip()]
        return [Receive()]

    def _arrived(self, peer: PeerId, index: int, now: float) -> list[Action]:
        source = self.sources[peer]
        wanted = index not in self._checking and bool(self._picker.missing >> index & 1)
        begun = max(source.last, source.asked[index])
        self._answered(source, index)
        source.receiving = None
        source.last = source.idle_since = now
        source.pieces += 1
        if now > begun:
            # Two pieces that lay in a buffer together measure nothing: no sample counts as more than a few times.
            sample = min(self.length(index) / (now - begun), 4 * source.rate)
            source.rate += SMOOTHING * (sample - source.rate)
        actions: list[Action] = []
        if wanted:
            self._checking.add(index)
            actions.append(Check())
        else:
            self.wasted += 1
        # Asked for anew when half of it is used up: one message for several pieces.
        return actions + self._fill(peer, now) if source.under_way <= self._depth(source) // 2 else actions

    def _kept(self, index: int) -> list[Action]:
        self._checking.discard(index)
        self._picker.done(index)
        actions: list[Action] = []
        for peer, source in self.sources.items():
            if index in source.asked and index not in source.cancelled:
                source.cancelled.add(index)
                if source.receiving != index:  # what is on its way comes anyway
                    actions.append(CancelPieces(peer, (index,)))
        return actions

    def _left(self, peer: PeerId, now: float) -> list[Action]:
        source = self.sources.pop(peer, None)
        if source is None:
            return []
        self._picker.remove(source.bits)
        for index in source.asked:
            self._free(index)
        return self._fill_all(now)

    # Asking.

    def _fill_all(self, now: float) -> list[Action]:
        actions: list[Action] = []
        # The fastest first: what is left over goes to whom it costs least.
        for peer in sorted(self.sources, key=lambda peer: -self.sources[peer].rate):
            actions += self._fill(peer, now)
        return actions

    def _fill(self, peer: PeerId, now: float) -> list[Action]:
        source = self.sources[peer]
        room = min(self._depth(source) - source.under_way, MAX_ASKED - len(source.asked))
        if room <= 0:
            return []
        picked = self._picker.pick(source.bits, room)
        # A request that was cancelled and is not answered yet cannot be made again: the answer would be ambiguous.
        for index in [index for index in picked if index in source.asked]:
            picked.remove(index)
            self._picker.release(index)
        if not picked and not source.under_way:
            picked = self._overdue(source, now)
        if not picked:
            return []
        if not source.asked:
            source.lone = picked[0]
            source.idle_since = now
        source.asked.update((index, now) for index in picked)
        return [AskPieces(peer, tuple(picked))]

    def _depth(self, source: Source) -> int:
        """How many requests keep this source busy."""
        seconds = min(source.delay, DELAY_MOST) + AHEAD_SECONDS
        return max(2, min(MAX_ASKED, 1 + math.ceil(source.rate * seconds / self._piece_length)))

    def _overdue(self, source: Source, now: float) -> list[int]:
        """One piece that another source was asked for too long ago, the one waited for longest."""
        patience = OVERDUE_FACTOR * (source.delay + self._piece_length / max(source.rate, 1.0))
        latest = now - max(OVERDUE_LEAST, patience)
        best: tuple[float, int] | None = None
        copies: dict[int, int] = {}
        for other in self.sources.values():
            for index in other.asked:
                if index not in other.cancelled:
                    copies[index] = copies.get(index, 0) + 1
        for other in self.sources.values():
            for index, asked_at in other.asked.items():
                if (
                    asked_at <= latest
                    and index not in other.cancelled
                    and source.bits >> index & 1
                    and index not in source.asked
                    and copies[index] < COPIES + (now - asked_at) // COPY_SECONDS
                    and index not in self._checking
                    and (best is None or (asked_at, index) < best)
                ):
                    best = (asked_at, index)
        return [] if best is None else [best[1]]

    # Small steps.

    def _check(self, index: int) -> None:
        if index >= self.count:
            raise RemoteError(f"piece {index} of a content of {self.count}")

    def _answered(self, source: Source, index: int) -> None:
        del source.asked[index]
        source.cancelled.discard(index)

    def _free(self, index: int) -> None:
        """Nobody is to send it any more, unless another was asked too or it is here already."""
        if index not in self._checking and not any(
            index in source.asked and index not in source.cancelled for source in self.sources.values()
        ):
            self._picker.release(index)
