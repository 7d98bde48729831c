"""The events of a population: N gossip state machines of the daemon, one tensor of models, and a calendar of ticks.

Every peer is a `gossipml.peer.gossip.Gossip`; what it decides (receivers, parts, weights, refusals, quarantine) is not
decided here. Its numbers are done for many peers at once: training, copies for sending, merges.

Time goes in ticks, TICKS to a round of a peer of speed 1. What falls into one tick happens in this order:

1. partitions open and heal; then peers come and go, by time and number; then a time-varying graph is drawn anew;
2. sends that took longer than a tick end;
3. messages arrive: at each peer by the time of arrival, and at the same time in the order in which they were sent. A
   peer is done with one message (answer, merge, what the merge calls for) before it sees the next; the first messages
   of all peers come before the second ones, which orders what they send;
4. rounds end, by time and number: the local steps, then the state machine: sends and merges of what waited;
5. messages that were sent in this tick and arrive in it, as in 3, until there are none.

6. peers whose training is over average, and send as in 4.

The local steps of a round are taken at its end, on what the merges of the round made of the model. Draws of peer i come
from its own generator, those of the network from one, in the order of the sends: the same seed gives the same run.
Leaves out: contacts and sessions (see `population_view`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Protocol

import torch

from gossipml.ids import PeerId
from gossipml.models.compression import packed_size
from gossipml.models.trainer import Layout, MergeReport
from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    Asked,
    AskUpdate,
    Forget,
    LearnerReady,
    Merge,
    MergeDone,
    MergeTogether,
    ModelFacts,
    Refuse,
    ReplyUpdate,
    RoundFinished,
    Send,
    SendDone,
    SendRefused,
    SendUpdate,
    Settle,
    Tick,
    TrainingFinished,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.wire import Update
from gossipml.simulations.churn import Change, Presence
from gossipml.simulations.population_merging import Merging, Mixer, form_of, has_state
from gossipml.simulations.population_view import PeerView, World
from gossipml.simulations.topology import Graph

TICKS = 20  # guess: a delay is known to a twentieth of a round, and peers that are not in step still train in batches
EXACT = 1e-6  # of a tick: rounds add up to whole ticks but for rounding


class Learners(Protocol):
    """What trains: `population_training.Trainees`, or vectors that nobody trains."""

    x: torch.Tensor

    @property
    def layout(self) -> Layout: ...

    def batch(self, peer: int) -> int: ...

    def train(self, peers: Sequence[int], steps: Sequence[int]) -> list[int]: ...


@dataclass(frozen=True)
class Pace:
    """Of the peers: seconds a round takes, steps in it, and when the first begins."""

    seconds: Sequence[float]
    steps: Sequence[int]
    start: Sequence[float]
    misses: float = 0.0
    """Chance that a peer is away for a round."""
    ends: float = math.inf
    """Second after which no round ends any more: peers only average."""


@dataclass(frozen=True)
class _Message:
    sender: int
    to: int
    update: Update
    row: int
    """Of the pool; -1 for a question."""


@dataclass
class _Tick:
    changes: list[Change] = field(default_factory=list)
    finished: list[tuple[int, SendDone]] = field(default_factory=list)
    arrivals: list[tuple[float, int, _Message]] = field(default_factory=list)
    rounds: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, peer, its life then
    averaging: list[tuple[int, int]] = field(default_factory=list)  # peer, its life then


@dataclass
class Counts:
    """Since the beginning, of all peers."""

    updates: int = 0
    messages: int = 0
    bytes: int = 0
    merges: int = 0
    refused: int = 0
    lost: int = 0
    diverged: int = 0


class PopulationEngine:
    def __init__(
        self,
        learners: Learners,
        mixer: Mixer,
        world: World,
        pace: Pace,
        config: GossipConfig,
        *,
        seed: int,
        tick: float,
        presence: Presence,
        redraw: Callable[[int], Graph] | None = None,
        redraw_seconds: float = 0.0,
        lies: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> None:
        """`lies(peer, model)` is what that peer sends in place of its model; None: the truth. It may return an empty
        tensor: then nothing is sent."""
        self.counts = Counts()
        self._learners, self._mixer, self._world, self._pace = learners, mixer, world, pace
        self._config, self._tick, self._lies = config, tick, lies
        self._present = list(presence.first)
        self._missing = [False] * len(world.up)
        self._lives = [0] * len(world.up)  # counts comings and goings: ends of rounds of an earlier life do not count
        self._chance = Random(f"misses {seed}")
        self._redraw, self._redraw_seconds = redraw, redraw_seconds
        self._redrawn = 0
        self._now = 0.0
        self._at = 0
        self._order = 0
        self._calendar: dict[int, _Tick] = {}
        self._ticks: list[int] = []
        self._copies: dict[int, tuple[int, dict[str, tuple[int, float, int]]]] = {}  # peer: version, rows, age, round
        self._bodies: dict[tuple[int, PeerId], _Message] = {}
        self._model, self._digest = learners.layout.model, learners.layout.digest
        self._sizes: dict[str, int] = {}
        facts = ModelFacts(self._model, self._digest, learners.layout.size, self._body_length)
        self.peers: list[Gossip] = []
        for number in range(len(world.up)):
            rng = Random(f"gossip {seed} {number}")
            gossip = Gossip(PeerView(world, number, rng), rng, config)
            gossip.handle(LearnerReady(facts), 0.0)
            self.peers.append(gossip)
        for change in presence.changes:
            self._tick_of(change.seconds).changes.append(change)
        for peer, here in enumerate(self._present):
            world.up[peer] = here
            if here:
                self._begin_round(peer, pace.start[peer])

    # The calendar.

    def run(self, until: float) -> Iterator[float]:
        """Everything up to that second; the virtual time, after each tick in which something happened."""
        last = int(until / self._tick + EXACT)
        while self._ticks and self._ticks[0] <= last:
            self._at = heapq.heappop(self._ticks)
            self._now = self._at * self._tick
            self._do(self._calendar[self._at])
            del self._calendar[self._at]
            yield self._now
        self._now = max(self._now, until)

    def _tick_of(self, seconds: float) -> _Tick:
        at = max(self._at, int(seconds / self._tick + EXACT))
        tick = self._calendar.get(at)
        if tick is None:
            tick = self._calendar[at] = _Tick()
            heapq.heappush(self._ticks, at)
        return tick

    def _do(self, tick: _Tick) -> None:
        world = self._world
        world.links.at(self._now)
        for change in sorted(tick.changes):
            self._change(change)
        if self._redraw is not None and self._now >= (self._redrawn + 1) * self._redraw_seconds:
            self._redrawn = int(self._now / self._redraw_seconds + EXACT)
            world.graph = self._redraw(self._redrawn)
        for peer, done in tick.finished:
            self.peers[peer].handle(done, self._now)
        self._arrive(tick)
        self._end_rounds(tick)
        self._average(tick)
        self._arrive(tick)

    def _change(self, change: Change) -> None:
        peer = change.peer
        if self._present[peer] == change.up:
            return
        self._present[peer] = change.up
        self._lives[peer] += 1
        self._missing[peer] = False
        self._world.up[peer] = change.up
        if change.up:
            self._begin_round(peer, self._now)

    # Rounds.

    def _begin_round(self, peer: int, begin: float) -> None:
        if self._pace.misses:
            self._missing[peer] = self._chance.random() < self._pace.misses
            self._world.up[peer] = not self._missing[peer]
        end = begin + self._pace.seconds[peer]
        if end > self._pace.ends + EXACT * self._tick:
            self._missing[peer], self._world.up[peer] = False, True
            self._perform([(peer, self.peers[peer].handle(TrainingFinished(), self._now))])
            self._await_average(peer)
        else:
            self._tick_of(end).rounds.append((end, peer, self._lives[peer]))

    def _end_rounds(self, tick: _Tick) -> None:
        ended = [(end, peer) for end, peer, life in sorted(tick.rounds) if life == self._lives[peer]]
        tick.rounds = []
        peers = [peer for _, peer in ended if not self._missing[peer]]
        if peers:
            steps = [self._pace.steps[peer] for peer in peers]
            self.counts.diverged += len(self._learners.train(peers, steps))
            self._mixer.trained(peers)
            self.counts.updates += len(peers)
            actions: list[tuple[int, list[Action]]] = []
            for peer, count in zip(peers, steps, strict=True):
                gossip = self.peers[peer]
                # A round is the neighbourhood's, where that is ahead: docs/decisions/0004.
                number = max(gossip.round, gossip.neighbourhood_round) + 1
                finished = RoundFinished(count * self._learners.batch(peer), number)
                actions.append((peer, gossip.handle(finished, self._now)))
            self._perform(actions)
        for end, peer in ended:
            self._begin_round(peer, end)

    # After the last one.

    def _await_average(self, peer: int) -> None:
        """In the tick after the deadline, when it has certainly passed. A deadline that comes nearer meanwhile, because
        somebody disturbed the agreement, counts from then on."""
        deadline = self.peers[peer].next_deadline()
        if deadline is not None:
            self._tick_of(deadline + self._tick).averaging.append((peer, self._lives[peer]))

    def _average(self, tick: _Tick) -> None:
        peers = sorted(peer for peer, life in tick.averaging if life == self._lives[peer])
        tick.averaging = []
        self._perform([(peer, self.peers[peer].handle(Tick(), self._now)) for peer in peers])
        for peer in peers:
            self._await_average(peer)

    # Messages.

    def _arrive(self, tick: _Tick) -> None:
        """Level by level: the first message of each receiver, then the second, so that merges are done together."""
        while tick.arrivals:
            tick.arrivals.sort(key=lambda each: each[:2])
            arrivals, tick.arrivals = tick.arrivals, []
            queues: dict[int, list[_Message]] = {}
            for _, _, message in arrivals:
                queues.setdefault(message.to, []).append(message)
            level = 0
            while queues:
                self._perform([(to, self._received(queue[level])) for to, queue in queues.items()])
                level += 1
                queues = {to: queue for to, queue in queues.items() if len(queue) > level}

    def _received(self, message: _Message) -> list[Action]:
        """What the receiver does about a message."""
        if not self._world.reaches(message.sender, message.to):
            self._lose(message)
            return []
        gossip, sender = self.peers[message.to], self._world.ids[message.sender]
        if message.row < 0:
            return gossip.handle(Asked(sender, message.update), self._now)
        verdict, *rest = gossip.handle(UpdateOffered(sender, message.update), self._now)
        if isinstance(verdict, Accept):
            older = self._bodies.get((message.to, sender))
            if older is not None:  # a newer model takes the place of one that waits for a merge of several
                self._mixer.pool.drop(older.row)
            self._bodies[message.to, sender] = message
            return [*rest, *gossip.handle(UpdateReceived(sender), self._now)]
        assert isinstance(verdict, Refuse)
        self.counts.refused += 1
        if message.update.mass is not None:
            refused = SendRefused(self._world.ids[message.to], message.update.mass.total)
            self.peers[message.sender].handle(refused, self._now)
        self._mixer.pool.drop(message.row)
        return rest

    def _lose(self, message: _Message) -> None:
        self.counts.lost += 1
        if message.row >= 0:
            self._mixer.pool.drop(message.row)

    def _perform(self, actions: Sequence[tuple[int, list[Action]]]) -> None:
        """Sends and merges, until nothing more follows from them. Sends come first: they are of the model before."""
        while actions:
            sends: list[tuple[int, Send]] = []
            merges: list[tuple[int, Merge]] = []
            together: list[tuple[int, MergeTogether]] = []
            settled: list[int] = []
            for peer, wanted in actions:
                for action in wanted:
                    if isinstance(action, Merge):
                        merges.append((peer, action))
                    elif isinstance(action, MergeTogether):
                        together.append((peer, action))
                    elif isinstance(action, Settle):
                        settled.append(peer)
                    elif isinstance(action, Forget):
                        self._mixer.pool.drop(self._bodies.pop((peer, action.sender)).row)
                    elif isinstance(action, SendUpdate | AskUpdate | ReplyUpdate):
                        sends.append((peer, action))
            self._send(sends)
            if settled:
                self._mixer.settle(settled)
            actions = [*self._merge(merges), *self._merge_together(together)]

    def _merge(self, merges: Sequence[tuple[int, Merge]]) -> list[tuple[int, list[Action]]]:
        messages = [self._bodies.pop((peer, merge.sender)) for peer, merge in merges]
        found = self._mixer.merge(
            [
                Merging(peer, message.row, message.update.encoding, merge.weight)
                for (peer, merge), message in zip(merges, messages, strict=True)
            ]
        )
        return [
            (peer, self._merged(peer, merge.sender, message, report))
            for (peer, merge), message, report in zip(merges, messages, found, strict=True)
        ]

    def _merge_together(self, merges: Sequence[tuple[int, MergeTogether]]) -> list[tuple[int, list[Action]]]:
        bodies = [[self._bodies.pop((peer, sender)) for sender in merge.senders] for peer, merge in merges]
        found = self._mixer.merge_together(
            [
                (peer, [(message.row, message.update.encoding) for message in messages])
                for (peer, _), messages in zip(merges, bodies, strict=True)
            ]
        )
        return [
            (peer, self._merged(peer, sender, message, report))
            for (peer, merge), messages, reports in zip(merges, bodies, found, strict=True)
            for sender, message, report in zip(merge.senders, messages, reports, strict=True)
        ]

    def _merged(self, peer: int, sender: PeerId, message: _Message, report: MergeReport) -> list[Action]:
        self._mixer.pool.drop(message.row)
        self.counts.merges += report.applied
        done = MergeDone(sender, report.applied, report.reason, report.distance, report.fault)
        return self.peers[peer].handle(done, self._now)

    def _send(self, sends: Sequence[tuple[int, Send]]) -> None:
        self._copy(sends)
        for peer, action in sends:
            gossip, to = self.peers[peer], self._world.number[action.to]
            if isinstance(action, AskUpdate):
                update = Update(
                    self._model, self._digest, self._config.encoding, self._learners.layout.size, 0, gossip.age,
                    gossip.round, True, False, rests=gossip.rests, settled=gossip.has_settled,
                )  # fmt: skip
                self._transmit(_Message(peer, to, update, -1))
                continue
            encoding = self._config.encoding + action.part
            row, age, round_ = self._copies[peer][1][_kept_as(encoding)]
            wanted, mass = (action.reply_wanted, action.mass) if isinstance(action, SendUpdate) else (False, None)
            size = self._body_length(encoding)
            update = Update(
                self._model, self._digest, encoding, self._learners.layout.size, size, age, round_, wanted,
                isinstance(action, ReplyUpdate), mass=mass, rests=gossip.rests, settled=gossip.has_settled,
            )  # fmt: skip
            if row < 0:  # a silent liar
                gossip.handle(SendDone(action.to, True, ""), self._now)
                continue
            self._mixer.pool.use(row)
            self._transmit(_Message(peer, to, update, row))

    def _copy(self, sends: Sequence[tuple[int, Send]]) -> None:
        """Rows with the models that these sends need, once for each version of a model, as `peer.exchange` does it."""
        needed: dict[str, dict[int, None]] = {}
        for peer, action in sends:
            if isinstance(action, AskUpdate):
                continue
            version = self.peers[peer].version
            known = self._copies.get(peer)
            if known is None or known[0] != version:
                self._drop_copies(peer)
                known = self._copies[peer] = version, {}
            kind = _kept_as(self._config.encoding + action.part)
            if kind not in known[1]:
                needed.setdefault(kind, {})[peer] = None
        for kind, peers in needed.items():
            for peer, row in zip(peers, self._mixer.copy(list(peers), kind), strict=True):
                said = self._lies(peer, self._mixer.pool.row(row)) if self._lies is not None else None
                if said is not None and said.numel():
                    self._mixer.overwrite(row, said)
                elif said is not None:
                    self._mixer.pool.drop(row)
                    row = -1
                self._copies[peer][1][kind] = row, self.peers[peer].age, self.peers[peer].round

    def _drop_copies(self, peer: int) -> None:
        _, copies = self._copies.pop(peer, (0, {}))
        for row, _, _ in copies.values():
            if row >= 0:
                self._mixer.pool.drop(row)

    def _transmit(self, message: _Message) -> None:
        links, to = self._world.links, self._world.ids[message.to]
        self.counts.messages += message.row >= 0
        self.counts.bytes += message.update.body_length
        leaving = links.sending(message.sender, message.to, message.update.body_length)
        delay = links.delay()
        done = SendDone(to, delay is not None, "" if delay is not None else "lost", in_doubt=delay is None)
        if leaving < self._tick:
            self.peers[message.sender].handle(done, self._now)
        else:
            self._tick_of(self._now + leaving).finished.append((message.sender, done))
        if delay is None:
            self._lose(message)
            return
        arrival = self._now + leaving + delay
        self._order += 1
        self._tick_of(arrival).arrivals.append((arrival, self._order, message))

    def _body_length(self, encoding: str) -> int:
        size = self._sizes.get(encoding)
        if size is None:
            layout = self._learners.layout
            size = packed_size(form_of(encoding), layout.size, layout.buffers)
            if len(self._sizes) < 4096:
                self._sizes[encoding] = size
        return size


@lru_cache(4096)
def _kept_as(encoding: str) -> str:
    """The form of the copy that is kept: one that leaves parameters out is made of the whole model by its receiver."""
    form = form_of(encoding)
    return encoding if form.share == 1.0 or has_state(form) else "float32"
