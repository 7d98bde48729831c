"""Whom to ask for a prediction, and when to ask another one: the asker of `gossipml.peer.asking_wire`, without I/O.

- **Choice of two**: of two peers drawn at random the one that should answer first (Mitzenmacher, "The Power of Two
  Choices in Randomized Load Balancing", 2001), by what its answers said of its queue, what is under way to it from
  here, and how fast it was.
- **Hedging**: an answer that has not come when 95 % of the earlier ones had is asked of another peer, too, and the
  first one counts (Dean and Barroso, "The Tail at Scale", 2013). At most 10 % more is asked for that, whatever happens.
- **Trying again**: who fails is left out for a while, and the next one is asked at once. When nobody is left it is
  asked who else there is, and everybody once more, until `PATIENCE` or the client's time is over.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from gossipml.ids import PeerId

QUANTILE = 0.95
REMEMBERED = 128  # answers of a model by which its delay is learnt
LEAST_REMEMBERED = 16  # fewer say nothing of the tail
FIRST_DELAY = 0.5  # before there are so many: the first answer may have to wait for torch (guess)
LEAST_DELAY = 0.01  # below that the delay is noise of the event loop
EXTRA_SHARE = 0.1
EXTRA_BURST = 10.0
LATE_SECONDS = 1.0  # and more than four times the delay: as good as dead, and another is asked without counting
PATIENCE = 10.0  # with everybody failing; a peer that starts again is back in five seconds (guess)
PAUSES = (0.05, 1.0)  # before all are asked once more: the first, the longest
BACKOFF = (0.5, 30.0)  # for which a peer that failed is left out where there is another: the first, the longest
UNKNOWN_SECONDS = 0.01  # for a prediction of a peer that has not answered yet: worth trying, not with everything
HALF_LIFE = 5.0  # seconds in which an old answer counts half: who was slow once is tried again (guess)
MEMORY = 0.8  # of how fast a peer was, at each answer: some five answers (guess)
MAX_KNOWN = 1024  # peers, and models


@dataclass
class _Known:
    seconds: float = 0.0
    """For one prediction in the queue, smoothed; 0 before the first answer."""
    load: int = 0
    heard: float = 0.0
    """When it answered last."""
    under_way: int = 0
    failures: int = 0
    not_before: float = -math.inf


class Answerers:
    """What is known of the peers that answer."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._known: OrderedDict[PeerId, _Known] = OrderedDict()

    def choose(self, candidates: Sequence[PeerId], now: float) -> PeerId | None:
        """The better of two; one that failed lately only when all have."""
        well = self.well(candidates, now) or candidates
        if len(well) < 2:
            return well[0] if well else None
        return min(self._rng.sample(well, 2), key=lambda peer: self.expected(peer, now))

    def well(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """Those that have not failed lately."""
        return [peer for peer in peers if self._of(peer).not_before <= now]

    def expected(self, peer: PeerId, now: float) -> float:
        """Seconds until one more prediction would be answered, as far as can be said."""
        known = self._of(peer)
        old = 0.5 ** ((now - known.heard) / HALF_LIFE) if known.seconds else 1.0
        return (1 + max(old * known.load, known.under_way)) * (old * known.seconds or UNKNOWN_SECONDS)

    def asked(self, peer: PeerId) -> None:
        self._of(peer).under_way += 1

    def left(self, peer: PeerId) -> None:
        """Of what was asked nothing is expected any more: answered, failed, or given up."""
        self._of(peer).under_way -= 1

    def answered(self, peer: PeerId, seconds: float, load: int, now: float) -> None:
        """`load`: predictions under way there, as it says."""
        known = self._of(peer)
        each = seconds / (1 + load)
        known.seconds = each if not known.seconds else MEMORY * known.seconds + (1 - MEMORY) * each
        known.load, known.heard, known.failures, known.not_before = load, now, 0, -math.inf

    def failed(self, peer: PeerId, now: float) -> None:
        known = self._of(peer)
        if known.not_before <= now:  # what was under way when it died fails together, and counts once
            known.not_before = now + min(BACKOFF[1], BACKOFF[0] * 2.0 ** min(known.failures, 10))
            known.failures += 1

    def _of(self, peer: PeerId) -> _Known:
        known = self._known.setdefault(peer, _Known())
        self._known.move_to_end(peer)
        if len(self._known) > MAX_KNOWN:
            oldest = next(iter(self._known))
            if not self._known[oldest].under_way:
                del self._known[oldest]
        return known


class Hedging:
    """How long answers take, by model, and how much more may be asked because of slow ones."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, deque[float]] = OrderedDict()
        self._extra = EXTRA_BURST

    def delay(self, model: str) -> float:
        """Seconds after which another peer is asked."""
        seen = self._seconds.get(model, ())
        if len(seen) < LEAST_REMEMBERED:
            return FIRST_DELAY
        return max(LEAST_DELAY, sorted(seen)[math.ceil(QUANTILE * len(seen)) - 1])

    def learn(self, model: str, seconds: float) -> None:
        """An answer took so long, or so long at least."""
        self._seconds.setdefault(model, deque(maxlen=REMEMBERED)).append(seconds)
        self._seconds.move_to_end(model)
        if len(self._seconds) > MAX_KNOWN:
            self._seconds.popitem(last=False)

    def count(self) -> None:
        """A prediction is asked for: it earns its share of another one."""
        self._extra = min(EXTRA_BURST, self._extra + EXTRA_SHARE)

    def take(self) -> bool:
        """Whether one more may be asked."""
        if self._extra < 1:
            return False
        self._extra -= 1
        return True


# What happens to one prediction.


@dataclass(frozen=True)
class Answered:
    peer: PeerId
    load: int


@dataclass(frozen=True)
class Failed:
    peer: PeerId
    kind: Literal["broken", "busy", "unknown"]


@dataclass(frozen=True)
class Found:
    """Who has the model, as asked for by `Look`."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True)
class Tick:
    pass


Event: TypeAlias = Answered | Failed | Found | Tick


# What is to be done.


@dataclass(frozen=True)
class AskPeer:
    peer: PeerId


@dataclass(frozen=True)
class Look:
    """Find out anew who has the model."""


@dataclass(frozen=True)
class GiveUp:
    unknown: bool
    """Nobody has the model; else those who have it do not answer."""


Action: TypeAlias = AskPeer | Look | GiveUp


@dataclass
class _Asked:
    at: float
    late: bool = False


@dataclass
class Asking:
    """One prediction. Drive it with `handle`, at the latest at `next_deadline`; an answer ends it, and so does GiveUp.
    `end` is to be called once in any case."""

    model: str
    answerers: Answerers
    hedging: Hedging
    begun: float
    until: float
    """When nobody waits for the answer any more."""
    _peers: list[PeerId] = field(default_factory=list)
    _tried: set[PeerId] = field(default_factory=set)  # in this round
    _unknown: set[PeerId] = field(default_factory=set)  # who said that they have not got it
    _asked: dict[PeerId, _Asked] = field(default_factory=dict)
    _hedge_at: float = math.inf
    _again_at: float = math.inf
    _pause: float = PAUSES[0]
    _delay: float = FIRST_DELAY
    _late_after: float = LATE_SECONDS
    _looking: bool = False
    _looked: bool = False
    extra: int = 0
    """Peers asked because another was slow."""
    again: int = 0
    """Peers asked because another failed."""

    def begin(self, peers: Iterable[PeerId]) -> list[Action]:
        """Ask the first peer; `peers` are those that were found before, perhaps long ago."""
        self.hedging.count()
        self._delay = self.hedging.delay(self.model)
        self._late_after = max(LATE_SECONDS, 4 * self._delay)
        self._peers = list(peers)
        return self._next(self.begun)

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Answered(peer, load):
                seconds = now - self._asked[peer].at
                self.answerers.answered(peer, seconds, load, now)
                self.hedging.learn(self.model, seconds)
                self._leave(peer)
                return []
            case Failed(peer, kind):
                late = self._asked[peer].late
                self._leave(peer)
                if kind == "unknown":
                    self._unknown.add(peer)
                elif not late:
                    self.answerers.failed(peer, now)
                self.again += 1
                return [] if late and self._asked else self._next(now)
            case Found(peers):
                self._looking, self._looked = False, True
                self._peers = list(peers)
                return self._next(now) if self._left() or self._again_at == math.inf else []
            case Tick():
                return self._tick(now)

    def next_deadline(self) -> float:
        late = (asked.at + self._late_after for asked in self._asked.values() if not asked.late)
        return min(self._hedge_at, self._again_at, *late, self.until, math.inf)

    def end(self, now: float) -> None:
        """What is still under way is given up."""
        for peer, asked in list(self._asked.items()):
            self.hedging.learn(self.model, now - asked.at)
            self._leave(peer)

    def _tick(self, now: float) -> list[Action]:
        if now >= self.until:
            return [GiveUp(False)]
        actions: list[Action] = []
        if now >= self._again_at:
            self._again_at = math.inf
            self._tried.clear()
            actions += self._next(now)
        for peer, asked in list(self._asked.items()):
            if not asked.late and now >= asked.at + self._late_after:
                asked.late = True
                self.answerers.failed(peer, now)
                self.again += 1
                actions += self._next(now)
        if now >= self._hedge_at:
            self._hedge_at = math.inf
            if self.answerers.well(self._left(), now) and self.hedging.take():
                self.extra += 1
                actions += self._next(now)
        return actions

    def _next(self, now: float) -> list[Action]:
        """Ask whoever is left. When nobody is: wait for those that are asked, or for those who are looked for."""
        peer = self.answerers.choose(self._left(), now)
        if peer is not None:
            self._tried.add(peer)
            self._asked[peer] = _Asked(now)
            self.answerers.asked(peer)
            self._hedge_at = now + self._delay
            return [AskPeer(peer)]
        if self._looking or any(not asked.late for asked in self._asked.values()):
            return []
        if not self._asked and self._looked and self._unknown.issuperset(self._peers):
            return [GiveUp(True)]
        if not self._asked and now - self.begun >= PATIENCE:
            return [GiveUp(False)]
        self._looking = True
        if self._looked or self._peers:
            self._again_at = now + self._pause
            self._pause = min(PAUSES[1], 2 * self._pause)
        return [Look()]

    def _left(self) -> list[PeerId]:
        out = self._tried | self._unknown | self._asked.keys()
        return [peer for peer in self._peers if peer not in out]

    def _leave(self, peer: PeerId) -> None:
        del self._asked[peer]
        self.answerers.left(peer)
        if not self._asked:
            self._hedge_at = math.inf
