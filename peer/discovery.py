"""When to shout on the local network and what to make of what is heard. Pure: beacons are sealed elsewhere.

A newcomer shouts at once, then after 1, 2, 4 ... seconds, and at last at a steady pace that falls with the number of
peers heard, so that a LAN of any size carries about the same number of beacons. The first ones ask for an answer: one
shout answers all who asked, after a random pause, and in a large LAN only a part of the peers answers, since a few
contacts lead to all others by gossip. (SSDP and mDNS do alike.)
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from gossipml.ids import Contact, PeerId, short_peer_id
from gossipml.peer.beacon import Drop, Dropped, LocalNetwork, Opened, addresses_to_dial
from gossipml.peer.view import Rng


@dataclass(frozen=True)
class DiscoveryConfig:
    spread: float = 0.3
    """Seconds within which the first beacon and answers are sent at random: a class starts at the same moment."""
    first: float = 1.0
    """Seconds between the first and the second beacon; doubles each time."""
    steady: float = 30.0
    """Seconds between beacons later on (as Syncthing does)."""
    per_second: float = 5.0
    """Beacons a second of all peers together, about; more peers shout less often (guess)."""
    asking: int = 3
    """So many of the first beacons ask for an answer, in case one is lost; later only while nobody is heard."""
    answers: int = 16
    """Peers that answer a newcomer, about: one contact would do (guess)."""
    quiet: float = 1.0
    """Seconds after a beacon within which it serves as an answer, too."""
    forget: float = 600.0
    """Seconds after which a peer no longer counts as heard."""
    peers: int = 1024
    """Peers remembered; a member that invents peers pushes out others and does no more harm than that."""
    warn_every: float = 60.0
    """Seconds between warnings of wrong clocks, each peer's told once: the log is bounded, too."""


@dataclass(frozen=True)
class Found:
    """Somebody is there."""

    contact: Contact


@dataclass(frozen=True)
class Warn:
    """A person should know."""

    text: str


Action = Found | Warn


@dataclass
class _Heard:
    at: float
    skew: float
    deaf: bool
    """We accept nothing from it, because of its clock."""


class Discovery:
    """The beacons of one peer on its local networks."""

    def __init__(self, rng: Rng, now: float, config: DiscoveryConfig | None = None) -> None:
        self.config = config or DiscoveryConfig()
        self._rng = rng
        self._heard: OrderedDict[PeerId, _Heard] = OrderedDict()
        self._next_warning = -math.inf
        self._sent = 0
        self._last = -math.inf
        self._next = now
        self._answer_at = math.inf
        self.restart(now)

    # When to shout.

    def restart(self, now: float) -> None:
        """We are new here: at the start, and when the machine has come to another network."""
        self._sent = 0
        self._next = now + self._within(self.config.spread)

    def next_deadline(self) -> float:
        return min(self._next, self._answer_at)

    def due(self, now: float) -> bool:
        """Whether to send a beacon now; if so, the next one is scheduled."""
        if now < self.next_deadline():
            return False
        regular = now >= self._next
        self.asks = regular and (self._sent < self.config.asking or self.peers(now) == 0)
        self._answer_at = math.inf
        self._last = now
        if regular:
            pause = min(self.config.first * 2.0 ** min(self._sent, 30), self._pace(now))
            self._next = now + pause * (0.8 + self._within(0.4))
            self._sent += 1
        return True

    def _pace(self, now: float) -> float:
        return max(self.config.steady, self.peers(now) / self.config.per_second)

    def _within(self, seconds: float) -> float:
        return seconds * self._rng.random()

    # What is heard.

    def hear(self, heard: Opened | Dropped, source: str, networks: Iterable[LocalNetwork], now: float) -> list[Action]:
        """What a beacon from `source` means."""
        if isinstance(heard, Dropped):
            if heard.reason is Drop.SKEWED and heard.peer is not None:
                return self._hear_skewed(heard.peer, heard.skew, source, now)
            return []
        beacon = heard.beacon
        self._note(beacon.peer, _Heard(now, heard.skew, False))
        if beacon.asks:
            self._answer(now)
        addresses = addresses_to_dial(beacon, source, networks)
        if not addresses:
            return []
        return [Found(Contact(beacon.peer, addresses, beacon.model, beacon.name))]

    def _hear_skewed(self, peer: PeerId, skew: float, source: str, now: float) -> list[Action]:
        known = self._heard.get(peer)
        if known is not None and not known.deaf and now - known.at < self.config.forget:
            return []  # a replay: the same peer is heard well
        self._note(peer, _Heard(now, skew, True))
        if known is not None or now < self._next_warning:
            return []
        self._next_warning = now + self.config.warn_every
        direction = "ahead of" if skew > 0 else "behind"
        return [
            Warn(
                f"the clock of peer {short_peer_id(peer)} at {source} is {abs(skew):.0f} s {direction} ours, more than "
                "120 s; its beacons are not accepted. Set both clocks (for example with NTP)"
            )
        ]

    def _note(self, peer: PeerId, heard: _Heard) -> None:
        self._heard[peer] = heard
        self._heard.move_to_end(peer)
        if len(self._heard) > self.config.peers:
            self._heard.popitem(last=False)

    def _answer(self, now: float) -> None:
        if now - self._last < self.config.quiet or self._answer_at < math.inf:
            return  # the last one has been an answer, or one is under way
        if self._rng.random() * self.peers(now) < self.config.answers:
            self._answer_at = now + self._within(self.config.spread)

    # What is told.

    def peers(self, now: float) -> int:
        """Peers heard on the local networks, ourselves not counted."""
        return sum(not heard.deaf and now - heard.at < self.config.forget for heard in self._heard.values())

    def deaf(self, now: float) -> int:
        """Members on the local networks of whom we accept nothing, because of a wrong clock."""
        return sum(heard.deaf and now - heard.at < self.config.forget for heard in self._heard.values())

    def clock_difference(self, now: float) -> float | None:
        """Seconds by which the clocks of those heard are ahead of ours (median); None when nobody is heard."""
        skews = [heard.skew for heard in self._heard.values() if now - heard.at < self.config.forget]
        return statistics.median(skews) if skews else None
