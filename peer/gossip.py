"""Gossip learning: when to send our model, to whom, and how much of an incoming one to take in. No I/O.

After each local round the model is pushed to s random peers that train the same (epidemic learning: de Vos et
al. 2023), and whoever is idle answers with its own (push-pull). Incoming models are averaged by age, the number
of samples behind them (Ormandi, Hegedus, Jelasity: Gossip learning with linear models, 2013): within one round
the merges w_k = a_k / (mass + a_k), mass += a_k, make the exact mean of own and incoming models weighted by
age, in whatever order they come. Nothing waits for an answer. When training is over the peer goes on averaging
at a slower tick, so that stragglers and restarted peers catch up and the peers come to agree. That is the default;
`gossipml.peer.protocols` has the others, which answer the same questions in other ways. Rules that compare models
(`GossipConfig.stack`) get one model of each sender at once, at the end of a round or as soon as there are enough.

An update is judged by its header alone (`UpdateOffered`) before a byte of it is stored, and by its sender's
record: see `gossipml.peer.conduct`. Ages are claims: see `gossipml.peer.ages`. Leaves out: encoding and merging the
values, which is the learner's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gossipml.ids import PeerId
from gossipml.peer.ages import AgeConfig, Ages
from gossipml.peer.conduct import Conduct, ConductConfig
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    Asked,
    AskUpdate,
    Event,
    Forget,
    LearnerGone,
    LearnerReady,
    Merge,
    MergeDone,
    MergeFailed,
    MergeTogether,
    Met,
    Misbehaved,
    ModelFacts,
    Quarantine,
    Refuse,
    ReplyUpdate,
    Restored,
    RoundFinished,
    SendDone,
    SendRefused,
    SendUpdate,
    Settle,
    Tick,
    TrainingFinished,
    TrainingResumed,
    UpdateLost,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.policy import Bounds, Incoming, Policy
from gossipml.peer.protocols import GossipProtocol, part_of
from gossipml.peer.view import Rng, View
from gossipml.peer.wire import MAX_AGE, Update

AUTO = "auto"  # the encoding that is chosen for each link
BUSY = "busy"  # the one refusal that is everyday business
ROUNDING = 1e-9  # ten tenths are one


@dataclass(frozen=True)
class GossipConfig:
    protocol: GossipProtocol = field(default_factory=GossipProtocol)
    encoding: str = "int8"
    """Of what we send; AUTO: for each link the finest that it carries (`ModelFacts.choose`). Measured: int8 loses
    nothing against float32 at a quarter of the bytes."""
    stack: int = 0
    """Models of others that the merge compares with ours, at least; 0: each is merged as it comes."""
    weight_least: float = 0.02
    """The exact mean holds for up to 49 equal models in a round; beyond, a window of about 50 models, so that a
    peer with long rounds still hears its neighbours."""
    weight_most: float = 0.9
    """A peer far behind takes nearly all of the first model it hears, and a tenth of doubt stays until a second
    one agrees: no single message replaces the parameters."""
    incoming: int = 8
    """Updates on their way in or waiting for their merge: twice the mean fan-in of a push with 4 receivers."""
    incoming_bytes: int = 256 * 2**20
    """Memory for them, whatever the model; at least one is always let in."""
    outgoing: int = 8
    """Updates being sent; a peer with more on its hands is not idle and answers nobody (fan-out twice over)."""
    refresh: int = 8
    """Merges after which a model sent as an answer is encoded anew instead of being the round's (guess)."""
    rounds_heard: int = 15
    """Peers whose round is remembered for `neighbourhood_round`; half of them must lie to move it."""
    contacts: int = 4
    """Contacts attached to an update, for peer sampling (guess; a shuffle of half the view is the paper's) ..."""
    contacts_seconds: float = 1.0
    """... to one update a neighbour in this time: rounds can be far shorter than peers take to come and go (guess)."""
    tick: float = 1.0
    """Seconds between pushes once training is over (guess: the demo's rounds are shorter, real ones longer)."""
    tick_most: float = 30.0
    """The same when the neighbourhood agrees (guess: keeps an idle network at a push per peer in 30 s)."""
    tick_growth: float = 1.5
    agreement: float = 0.9
    """The models of a tick still approach each other when their mean distance is below this share of the best."""
    disturbance: float = 2.0
    """Somebody new has come when the mean distance is above this multiple of the best; back to the first tick."""
    negligible: float = 0.01
    """A distance below this share of the largest is rounding, not disagreement (int8 rounds to 1/127, guess)."""
    settled: int = 4
    """Merges of models of peers that rest, while we do, after which the neighbourhood counts as at rest (guess) ..."""
    unsettled: float = 0.03
    """... and by what the weight of a model that is not settled is multiplied from then on: it moves ours as it would
    move an average over time."""
    ages: AgeConfig = field(default_factory=AgeConfig)
    conduct: ConductConfig = field(default_factory=ConductConfig)


class Gossip:
    """The gossip of one peer about one model, which starts at age and round 0 unless Restored says otherwise."""

    def __init__(self, view: View, rng: Rng, config: GossipConfig | None = None) -> None:
        self.config = config or GossipConfig()
        self.view = view
        self.conduct = Conduct(self.config.conduct)
        self.ages = Ages(self.config.ages)
        self.round = 0
        self.facts: ModelFacts | None = None
        bounds = Bounds(self.config.weight_least, self.config.weight_most)
        self.policy = Policy(self.config.protocol, view, self.ages, rng, bounds, whole=self.config.stack > 0)
        self.training = True
        self.version = 0
        """Grows when a model encoded before is too old to be sent again."""
        self._rng = rng
        self._reading: dict[PeerId, Incoming] = {}  # accepted, body under way
        self._waiting: dict[PeerId, Incoming] = {}  # body here, first come first merged
        self._merging: set[PeerId] = set()
        self._ripe = False  # what waits may be merged as soon as it is enough, for rules that compare
        self._sending: dict[PeerId, int] = {}
        self._answered: dict[PeerId, int] = {}  # sender -> version it was last answered with
        self._rounds: dict[PeerId, int] = {}  # what was claimed last, the latest speakers
        self._merges = 0  # since the version began
        self._released = 0  # merges to come before the push of this round, where incoming models wait for its end
        self._distances: list[float] = []  # since the last look at whether they shrink
        self._share = self.config.protocol.share * part_of(self.config.encoding)[1]  # of the parameters, in a message
        self._looked = 0.0  # what has been sent since then
        self._best: float | None = None
        self._largest = 0.0  # distance of this averaging phase
        self._interval = self.config.tick
        self._tick_at: float | None = None
        self._rested = 0  # merges of models of peers that rest, since we do

    @property
    def rests(self) -> bool:
        """Whether we train no more, or not now."""
        return not self.training

    @property
    def has_settled(self) -> bool:
        """Whether our model is an average over time, or what peers made of theirs (`Settle`)."""
        return self.rests and self._rested >= self.config.settled

    @property
    def age(self) -> float:
        """Samples behind our model."""
        return self.ages.own

    @property
    def interval(self) -> float:
        """Seconds between ticks of the averaging phase, before jitter."""
        return self._interval

    @property
    def round_encoding(self) -> str:
        """How the model is to be encoded as a round ends; "" when it is not sent whole then, or not for certain."""
        return self.config.encoding if self.policy.protocol.sends_rounds and self.config.encoding != AUTO else ""

    def expects(self, sender: PeerId) -> bool:
        """Whether the body of an accepted update of the sender is awaited."""
        return sender in self._reading

    @property
    def neighbourhood_round(self) -> int:
        """The round that at least half of the peers heard from have reached; 0 before the first.

        Rounds are a clock of the network: a slow peer, or one that was away, counts on from here instead of training
        by itself, long after the others, for the rounds that it has missed (`docs/decisions/0004`).
        """
        claims = sorted(self._rounds.values())
        return claims[(len(claims) - 1) // 2] if claims else 0

    def next_deadline(self) -> float | None:
        return None if self.training or self.facts is None else self._tick_at

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about an event; Accept or Refuse is always the first action on an UpdateOffered."""
        match event:
            case UpdateOffered(sender, update):
                return self._offered(sender, update, now)
            case Asked(sender, update):
                return self._asked(sender, update, now)
            case UpdateReceived(sender):
                return self._received(sender, now)
            case UpdateLost(sender):
                self._reading.pop(sender, None)
                return []
            case MergeDone():
                return self._merged(event, now)
            case MergeFailed(sender):
                return self._go_on(now) if self._merge_ended(sender) is not None else []
            case SendDone():
                self._sent(event)
                return []
            case SendRefused(peer, total):
                if self.policy.push_sum is not None:
                    self.policy.push_sum.put_back(peer, total)
                return []
            case Met(peer, boot):
                if self.policy.push_sum is not None:
                    self.policy.push_sum.met(peer, boot)
                return []
            case Restored(age, round_):
                self.ages.restore(age)
                self.round = round_
                self.version += 1
                return []
            case RoundFinished(samples, round_):
                self.training, self.round, self._rested = True, round_, 0
                self.ages.trained(samples)
                forgotten = self._begin_round()
                self._released = len(self._waiting) if self.policy.protocol.waits and self._is_enough() else 0
                pushed = [] if self._released else self._push(now)
                return [*forgotten, *pushed, *self._next_merge(now)]
            case TrainingFinished():
                if self.training or self._tick_at is None:
                    self.training = False
                    self._interval, self._best, self._largest, self._looked = self.config.tick, None, 0.0, 0.0
                    self._distances.clear()
                    self._schedule(now)
                return self._next_merge(now)
            case TrainingResumed():
                self.training, self._rested = True, 0
                return []
            case Tick():
                return self._tick(now)
            case LearnerReady(facts):
                self.facts = facts
                self.version += 1
                if not self.training:
                    self._schedule(now)
                return []
            case LearnerGone():
                self.facts = None
                self._reading.clear()
                self._waiting.clear()
                self._merging.clear()
                self._released = 0
                return []
            case Misbehaved(peer, reason):
                return self._strike(peer, reason, now)

    # Sending.

    def _push(self, now: float) -> list[Action]:
        """What is sent at the end of a round, or at a tick."""
        if self.facts is None or not self.policy.is_time():
            return []
        return self._send(self.policy.protocol.fanout, now)

    def _send(self, k: int, now: float) -> list[Action]:
        """Our model to k peers, or what the protocol sends in its place."""
        if self.facts is None:
            return []
        policy = self.policy
        # One still being sent is not overtaken.
        without = (*self.conduct.quarantined(now), *self._sending)
        receivers = policy.receivers(k, self.facts.model, self.facts.digest, now, without)
        if policy.tokens is not None:
            policy.tokens.save(k - len(receivers))
        for peer in receivers:
            self._sending[peer] = self._sending.get(peer, 0) + 1
        if policy.protocol.asks:
            return [AskUpdate(peer) for peer in receivers]
        return [
            SendUpdate(peer, policy.wishes(peer), policy.next_part(), mass)
            for peer, mass in zip(receivers, policy.masses(receivers), strict=True)
        ]

    def _answer(self, sender: PeerId) -> list[Action]:
        """Our model for a peer that wished for it: when we are idle, and once for each state of our model."""
        busy = sum(self._sending.values()) >= self.config.outgoing or sender in self._sending
        if busy or self._answered.get(sender) == self.version or self.facts is None:
            return []
        if self.policy.push_sum is not None:
            return []  # every model goes with a share of our weight, and that is only pushed
        self._answered.pop(sender, None)
        self._answered[sender] = self.version
        while len(self._answered) > self.view.config.capacity:
            del self._answered[next(iter(self._answered))]
        self._sending[sender] = 1
        return [ReplyUpdate(sender, self.policy.next_part())]

    def _sent(self, done: SendDone) -> None:
        left = self._sending.pop(done.peer, 0) - 1
        if left > 0:
            self._sending[done.peer] = left
        if self.policy.push_sum is not None and not done.ok and not done.in_doubt:
            self.policy.push_sum.put_back(done.peer)

    # Receiving.

    def _asked(self, sender: PeerId, update: Update, now: float) -> list[Action]:
        facts = self.facts
        if facts is None or self.conduct.is_quarantined(sender, now):
            return []
        if (update.model, update.digest) != (facts.model, facts.digest):
            return []
        self._note_round(sender, update.round)
        self.ages.claimed(sender, update.age)
        return self._answer(sender)

    def _offered(self, sender: PeerId, update: Update, now: float) -> list[Action]:
        if self.conduct.is_quarantined(sender, now):
            return [Refuse(sender, "quarantined", fault=False)]
        if self.facts is None:
            return [Refuse(sender, "not ready", fault=False)]
        fault = self._fault(update, self.facts)
        if fault:
            return [Refuse(sender, fault, fault=True), *self._strike(sender, fault, now)]
        objection = self.policy.objection(update)
        if objection:
            return [Refuse(sender, objection, fault=False)]
        self._note_round(sender, update.round)
        stale = self.ages.stale(update.age, sender)
        self.ages.claimed(sender, update.age)
        if stale:  # it needs ours more than we need its
            answer = self._answer(sender) if update.reply_wanted else []
            return [Refuse(sender, stale, fault=False), *answer]
        held = len(self._reading) + len(self._waiting) + bool(self._merging) - (sender in self._waiting)
        if held >= self._room(self.facts, update.body_length) or self._has(sender):
            return [Refuse(sender, BUSY, fault=False)]
        self._reading[sender] = Incoming(update, self.ages.credible(update.age, sender))
        return [Accept(sender)]

    def _note_round(self, sender: PeerId, round_: int) -> None:
        self._rounds.pop(sender, None)
        self._rounds[sender] = round_
        while len(self._rounds) > self.config.rounds_heard:
            del self._rounds[next(iter(self._rounds))]

    def _fault(self, update: Update, facts: ModelFacts) -> str:
        if update.model != facts.model or update.digest != facts.digest:
            return f"model {update.model!r} of layout {update.digest[:12]}; ours is {facts.digest[:12]}"
        if update.parameters != facts.parameters:
            return f"{update.parameters} parameters; the layout has {facts.parameters}"
        length = facts.body_length(update.encoding)
        if length is None:
            return f"unknown encoding {update.encoding!r}"
        if update.body_length != length:
            return f"{update.body_length} bytes; the layout has {length} as {update.encoding!r}"
        if not math.isfinite(update.age) or not 0.0 <= update.age <= MAX_AGE:
            return f"age {update.age} is not between 0 and 2^53"
        return ""

    def _room(self, facts: ModelFacts, body_length: int) -> int:
        """Updates that may be held; those that are merged together are decoded together."""
        size = 4 * facts.parameters if self.config.stack else body_length
        return max(1, self.config.stack, min(self.config.incoming, self.config.incoming_bytes // size))

    def _has(self, sender: PeerId) -> bool:
        if self.config.stack:  # a newer model takes the place of one that waits: nobody has two in one merge
            return sender in self._reading or sender in self._merging
        return sender in self._reading or sender in self._waiting

    def _received(self, sender: PeerId, now: float) -> list[Action]:
        incoming = self._reading.pop(sender, None)
        if incoming is None:
            return []  # the learner went away meanwhile
        self._waiting.pop(sender, None)
        self._waiting[sender] = incoming
        # Answered before the merge: both sides of a push-pull average the models they had before it, which
        # keeps the mean of the two (Boyd et al.: Randomized gossip algorithms, 2006).
        answer = self._answer(sender) if incoming.update.reply_wanted else []
        return [*answer, *self._next_merge(now)]

    # Merging, one at a time: each weight depends on what the merge before it came to. Or all together.

    def _next_merge(self, now: float) -> list[Action]:
        if self._merging or not self._waiting:
            return []
        if self.policy.protocol.waits and self.training and not self._released:
            return []
        if self.config.stack:
            return self._merge_together()
        sender, incoming = next(iter(self._waiting.items()))
        self._merging.add(sender)
        return [Merge(sender, self.policy.weight(sender, incoming) * self._trust(incoming))]

    def _merge_together(self) -> list[Action]:
        """At the end of a round; before it when no more can be held, after it when it was not enough then."""
        full = self.facts is not None and len(self._waiting) >= self._room(self.facts, 1)
        if not self._is_enough() or not (self._ripe or full):
            return []
        self._ripe = False
        self._merging.update(self._waiting)
        return [MergeTogether(tuple(self._waiting))]

    def _forget_stale(self) -> list[Action]:
        """Models that waited for others until they were stale: their senders left, or have sent nothing newer."""
        stale = [
            sender
            for sender, incoming in self._waiting.items()
            if sender not in self._merging and self.ages.stale(incoming.update.age, sender)
        ]
        for sender in stale:
            del self._waiting[sender]
        return [Forget(sender) for sender in stale]

    def _is_enough(self) -> bool:
        return len(self._waiting) >= self.config.stack

    def _go_on(self, now: float) -> list[Action]:
        """What comes after a merge."""
        sends: list[Action] = []
        if self._released:
            self._released -= 1
            if not self._released:
                self.version += 1
                sends = self._push(now)
        return [*sends, *self._next_merge(now)]

    def _merge_ended(self, sender: PeerId) -> Incoming | None:
        if sender not in self._merging:
            return None
        self._merging.discard(sender)
        return self._waiting.pop(sender, None)

    def _merged(self, done: MergeDone, now: float) -> list[Action]:
        incoming = self._merge_ended(done.sender)
        if incoming is None:
            return []
        if not done.applied and done.fault:
            return [*self._strike(done.sender, done.reason, now), *self._go_on(now)]
        self._note_distance(done.distance, now)
        if not done.applied:
            return self._go_on(now)
        prompted = self.policy.merged(done.sender, incoming)
        settle = self._settle(incoming)
        self._merges += 1
        if self._merges >= self.config.refresh:
            self._merges = 0
            self.version += 1
        if prompted or self.policy.protocol.wish == "always":
            self.version += 1  # what is sent next, or answered to a push, is our model as it is now
        return [*settle, *(self._send(prompted, now) if prompted else []), *self._go_on(now)]

    def _trust(self, incoming: Incoming) -> float:
        """What averages are is not to be mixed with what is still noisy. Push-sum conserves its weights."""
        noisy = self.has_settled and not incoming.update.settled and self.policy.push_sum is None
        return self.config.unsettled if noisy else 1.0

    def _settle(self, merged: Incoming) -> list[Action]:
        """After so many merges of models of peers that rest as we do."""
        if self.training or not merged.update.rests:
            return []
        self._rested += 1
        if self._rested != self.config.settled:
            return []
        self.version += 1
        return [Settle()]

    def _note_distance(self, distance: float, now: float) -> None:
        if not math.isfinite(distance):
            return
        self._distances.append(distance)
        self._largest = max(self._largest, distance)
        if not self.training and self._disturbed(distance):
            self._interval, self._best = self.config.tick, None
            self._tick_at = min(self._tick_at or math.inf, now + self._jittered())

    def _strike(self, peer: PeerId, reason: str, now: float) -> list[Action]:
        until = self.conduct.strike(peer, reason, now)
        return [] if until is None else [Quarantine(peer, until, reason)]

    # Rounds and ticks.

    def _begin_round(self) -> list[Action]:
        self.ages.begin_round()
        self.policy.begin_round()
        self.version += 1
        self._merges = 0
        self._ripe = True
        return self._forget_stale() if self.config.stack else []

    def _tick(self, now: float) -> list[Action]:
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        self._pace()
        forgotten = self._begin_round()
        self._schedule(now)
        return [*forgotten, *self._push(now), *self._next_merge(now)]

    def _pace(self) -> None:
        """Slow down unless the models were still approaching each other since the last look at that: in a tick, or in
        as many as it takes to send all of a model in parts."""
        self._looked += self._share
        if self._looked < 1.0 - ROUNDING:
            return
        self._looked = 0.0
        distances, self._distances = self._distances, []
        mean = sum(distances) / len(distances) if distances else None
        if mean is not None and (self._best is None or mean < self.config.agreement * self._best):
            self._best = mean
            if mean > self._rounding():
                return
        elif mean is None and self.policy.tokens is not None:
            return  # nothing heard is no sign of agreement where messages are saved up
        self._interval = min(self._interval * self.config.tick_growth, self.config.tick_most)

    def _disturbed(self, distance: float) -> bool:
        return self._best is not None and distance > max(self.config.disturbance * self._best, self._rounding())

    def _rounding(self) -> float:
        return self.config.negligible * self._largest

    def _schedule(self, now: float) -> None:
        self._tick_at = now + self._jittered()

    def _jittered(self) -> float:
        return self._interval * (0.75 + 0.5 * self._rng.random())  # peers must not tick in step
