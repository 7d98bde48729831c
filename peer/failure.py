"""Whether a peer is alive, suspect or lost: by silence on its session, and by failed dials and sends.

The states are those of SWIM (Das, Gupta, Motivala: SWIM, 2002): who does not answer a probe is suspected
before it is declared lost, and any sign of life clears the suspicion. SWIM's indirect probes and its
dissemination are left out: a session is a stream whose silence both ends see, and a peer that only we cannot
reach costs others nothing. Phi accrual (Hayashibara et al. 2004) was not taken: it learns from a steady
heartbeat, and here probes are sent only on silence. Pure: `handle(event, now)`, `next_deadline()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from gossipml.ids import PeerId


@dataclass(frozen=True)
class FailureConfig:
    silence: float = 5.0
    """Seconds without a byte before a probe; a round of training is about as long (guess)."""
    answer: float = 3.0
    """Seconds that an answer may take before suspicion: an intercontinental round trip ten times over (guess)."""
    suspicion: float = 7.0
    """Seconds from suspicion to loss, with a second probe at its start: a machine that swaps or a lost WLAN
    recovers within it. Silence of 15 s in all ends a session (guess)."""
    failures: int = 3
    """Failed sessions and dials in a row after which a peer without a session counts as lost (guess)."""
    remembered: int = 512
    """Peers without a session whose failures are kept: the capacity of the view."""


class Health(Enum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"


@dataclass(frozen=True)
class SessionOpened:
    peer: PeerId


@dataclass(frozen=True)
class SessionClosed:
    """The session has ended in order; silence now means nothing."""

    peer: PeerId


@dataclass(frozen=True)
class SessionBroke:
    """The session's stream failed, or a send on it ran past its deadline."""

    peer: PeerId


@dataclass(frozen=True)
class Heard:
    """Bytes came from the peer."""

    peer: PeerId


@dataclass(frozen=True)
class DialFailed:
    peer: PeerId


@dataclass(frozen=True)
class Tick:
    pass


Event: TypeAlias = SessionOpened | SessionClosed | SessionBroke | Heard | DialFailed | Tick


@dataclass(frozen=True)
class Probe:
    """Ask the peer for a sign of life."""

    peer: PeerId


@dataclass(frozen=True)
class Suspect:
    peer: PeerId
    reason: str


@dataclass(frozen=True)
class Lost:
    """End the session, if there is one."""

    peer: PeerId
    reason: str


@dataclass(frozen=True)
class Recovered:
    """A suspect or lost peer gave a sign of life."""

    peer: PeerId


Action: TypeAlias = Probe | Suspect | Lost | Recovered


@dataclass
class _Watch:
    health: Health = Health.ALIVE
    session: bool = False
    probed: bool = False
    due: float = 0.0
    """When the next step towards loss is taken, while there is a session."""
    failures: int = 0
    heard: float = 0.0


class FailureDetector:
    """The health of the peers that we have dealings with."""

    def __init__(self, config: FailureConfig | None = None) -> None:
        self.config = config or FailureConfig()
        self._watches: dict[PeerId, _Watch] = {}

    def health(self, peer: PeerId) -> Health:
        """ALIVE also for a peer of which nothing is known."""
        watch = self._watches.get(peer)
        return watch.health if watch else Health.ALIVE

    def next_deadline(self) -> float | None:
        return min((w.due for w in self._watches.values() if w.session), default=None)

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Tick():
                return self._tick(now)
            case SessionOpened(peer):
                watch = self._watch(peer)
                watch.session = True
                return self._alive(peer, watch, now)
            case Heard(peer):
                heard = self._watches.get(peer)
                return self._alive(peer, heard, now) if heard is not None and heard.session else []
            case SessionClosed(peer):
                self._watches.pop(peer, None)
                return []
            case SessionBroke(peer) | DialFailed(peer):
                return self._failed(peer)

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for peer, watch in self._watches.items():
            if not watch.session or now < watch.due:
                continue
            quiet = f"silent for {now - watch.heard:.0f} s"
            if not watch.probed:
                watch.probed = True
                watch.due = now + self.config.answer
                actions.append(Probe(peer))
            elif watch.health is Health.ALIVE:
                watch.health = Health.SUSPECT
                watch.due = now + self.config.suspicion
                actions += [Suspect(peer, quiet), Probe(peer)]
            else:
                watch.health, watch.session = Health.LOST, False
                actions.append(Lost(peer, quiet))
        return actions

    def _alive(self, peer: PeerId, watch: _Watch, now: float) -> list[Action]:
        recovered = watch.health is not Health.ALIVE
        watch.health, watch.probed, watch.failures = Health.ALIVE, False, 0
        watch.heard, watch.due = now, now + self.config.silence
        return [Recovered(peer)] if recovered else []

    def _failed(self, peer: PeerId) -> list[Action]:
        watch = self._watch(peer)
        watch.session = False
        watch.failures += 1
        if watch.health is Health.LOST:
            return []
        if watch.failures >= self.config.failures:
            watch.health = Health.LOST
            return [Lost(peer, f"failed {watch.failures} times in a row")]
        if watch.health is Health.ALIVE:
            watch.health = Health.SUSPECT
            return [Suspect(peer, "a dial or a session failed")]
        return []

    def _watch(self, peer: PeerId) -> _Watch:
        watch = self._watches.get(peer)
        if watch is None:
            if len(self._watches) >= self.config.remembered:
                idle = next((p for p, w in self._watches.items() if not w.session), None)
                if idle is not None:
                    del self._watches[idle]
            watch = self._watches[peer] = _Watch()
        return watch
