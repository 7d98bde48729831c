"""Peers in one process, round by round: the daemon's trainer and gossip state machine, without processes and sockets.

Every peer is a `LocalTrainer` and a `Gossip`, as in a daemon, on bodies as they would go over the wire. In a round all
peers train the same number of steps; then every message arrives, in random order. So nothing is lost or late, and the
same seed gives the same figures on the same machine. Bytes are those of the bodies; heads of messages, TLS and DHT
are not in them (real processes count all of that).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from gossipml.config import PeerConfig
from gossipml.daemon.exchange_rules import gossip_config, tuning
from gossipml.daemon.learner import model_facts
from gossipml.errors import LocalError, UserError
from gossipml.ids import Address, Contact, PeerId
from gossipml.models.data import Dataset, prepare, take_part
from gossipml.models.partition import Part, parse_rule
from gossipml.models.spec import Spec
from gossipml.models.trainer import MergeReport
from gossipml.models.training import LocalTrainer
from gossipml.models.tuning import parse_local_steps
from gossipml.peer.gossip import Gossip
from gossipml.peer.gossip_events import (
    Action,
    Asked,
    AskUpdate,
    Forget,
    LearnerReady,
    Merge,
    MergeDone,
    MergeTogether,
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
from gossipml.peer.view import View
from gossipml.peer.wire import Update

Lie = Callable[[LocalTrainer, bytes, str], bytes]
"""What a liar sends in place of the body, which is in the encoding of that name."""


@dataclass(frozen=True)
class Setting:
    """What the peers of one network have in common."""

    spec: Spec
    data: Dataset
    peers: int
    options: PeerConfig
    """As `gossipml peer start` has them; what is about data, training and exchange counts."""


@dataclass
class Message:
    sender: int
    to: int
    update: Update
    body: bytes


@dataclass
class Peer:
    trainer: LocalTrainer
    gossip: Gossip
    steps: int
    """Of the optimiser, in a round."""
    lie: Lie | None = None
    sent: int = 0
    """Bytes of bodies."""
    refused: int = 0
    """Of the updates that came: by their head, or by their values."""
    waiting: dict[PeerId, Message] = field(default_factory=dict)
    """Accepted, by sender."""
    _snapshot: tuple[int, str, bytes] = (-1, "", b"")

    def body(self, encoding: str) -> bytes:
        """The model as it is, encoded once for each version of it."""
        version = self.gossip.version
        if self._snapshot[:2] != (version, encoding):
            self._snapshot = version, encoding, self.trainer.snapshot(encoding)
        return self._snapshot[2]


class Network:
    def __init__(self, setting: Setting, lies: Sequence[Lie | None] = ()) -> None:
        """`lies`: what the first peers send; None, and all others, are honest."""
        spec, data = prepare(setting.spec, setting.data)
        steps = parse_local_steps(setting.options.local_steps)
        if steps is None:
            raise UserError("rounds that fit this machine's speed are no two times alike; say how many local steps")
        self.setting = setting
        self._rng = random.Random(setting.options.seed)
        self.ids = [PeerId(_hash(f"peer {number}")) for number in range(setting.peers)]
        self._numbers = {peer: number for number, peer in enumerate(self.ids)}
        self.peers: list[Peer] = []
        self._messages: list[Message] = []
        rule, seed = parse_rule(setting.options.split), setting.options.seed
        for number in range(setting.peers):
            part = Part(number + 1, setting.peers)
            local = take_part(data, rule, part, seed)
            trainer = LocalTrainer(
                spec,
                local,
                network_id=_hash(f"network {seed}"),
                seed=seed * 1_000_003 + part.index,  # as the worker does
                tuning=tuning(setting.options),
            )
            lie = lies[number] if number < len(lies) else None
            epoch = max(1, trainer.sample_counts["train"] // trainer.batch)
            self.peers.append(Peer(trainer, self._gossip(number, trainer), steps.of(epoch), lie))
        self.rounds = 0
        self._now = 0.0  # virtual seconds; they pass between ticks alone

    def round(self) -> None:
        """Everybody trains, then everybody sends; ends when there is nothing under way any more."""
        self.rounds += 1
        for peer in self.peers:
            peer.trainer.begin_round()
            for _ in range(peer.steps):
                peer.trainer.step()
            with suppress(UserError):  # diverged: its parameters were put back, as a daemon says and goes on
                peer.trainer.end_round()
        for number in self._rng.sample(range(len(self.peers)), len(self.peers)):
            peer = self.peers[number]
            samples = peer.steps * peer.trainer.batch
            self._perform(number, peer.gossip.handle(RoundFinished(samples, self.rounds), self._now))
        self._deliver()

    def settle(self, ticks: int = 10) -> None:
        """Training is over; everybody sends `ticks` times more, as a daemon does then."""
        for peer in self.peers:
            peer.gossip.handle(TrainingFinished(), self._now)
        for _ in range(ticks):
            deadlines = [peer.gossip.next_deadline() or 0.0 for peer in self.peers]
            self._now = max(deadlines)
            for number in self._rng.sample(range(len(self.peers)), len(self.peers)):
                self._perform(number, self.peers[number].gossip.handle(Tick(), self._now))
            self._deliver()

    def honest(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.lie is None]

    def served(self) -> list[float]:
        """Test accuracy of what each honest peer answers predictions with."""
        return [peer.trainer.evaluate().accuracy for peer in self.honest()]

    @property
    def bytes_sent(self) -> float:
        """Of an average peer."""
        return sum(peer.sent for peer in self.peers) / len(self.peers)

    def _gossip(self, number: int, trainer: LocalTrainer) -> Gossip:
        rng = random.Random(f"{self.setting.options.seed} {number}")
        layout = trainer.layout
        view = View(self.ids[number], rng)
        for other, peer in enumerate(self.ids):
            if other != number:
                address = Address(f"10.{other >> 16}.{other >> 8 & 255}.{other & 255}", 8711)
                view.introduced(Contact(peer, (address,), layout.model, f"peer{other}"), layout.digest, 0.0)
        config = replace(gossip_config(self.setting.options), outgoing=2 * self.setting.peers)
        if not config.stack:  # a merge takes no time here: nobody is ever busy
            config = replace(config, incoming=self.setting.peers)
        gossip = Gossip(view, rng, config)
        gossip.handle(LearnerReady(model_facts(layout)), 0.0)
        return gossip

    def _deliver(self) -> None:
        while self._messages:
            self._arrive(self._messages.pop(self._rng.randrange(len(self._messages))))

    def _perform(self, number: int, actions: list[Action]) -> None:
        """Sends, and merges one after the other until there is nothing left to do."""
        peer, left = self.peers[number], list(actions)
        while left:
            action = left.pop(0)
            match action:
                case SendUpdate() | ReplyUpdate() | AskUpdate():
                    self._send(number, action)
                case Merge(sender, weight):
                    message = peer.waiting.pop(sender)
                    left += self._merged(
                        peer, sender, peer.trainer.merge(message.body, message.update.encoding, weight)
                    )
                case MergeTogether(senders):
                    messages = [peer.waiting.pop(sender) for sender in senders]
                    reports = peer.trainer.merge_together([(each.body, each.update.encoding) for each in messages])
                    for sender, report in zip(senders, reports, strict=True):
                        left += self._merged(peer, sender, report)
                case Settle():
                    peer.trainer.settle()
                case Forget(sender):
                    del peer.waiting[sender]
                case _:
                    pass  # gossip itself remembers a quarantine

    def _merged(self, peer: Peer, sender: PeerId, report: MergeReport) -> list[Action]:
        peer.refused += not report.applied
        done = MergeDone(sender, report.applied, report.reason, report.distance, report.fault)
        return peer.gossip.handle(done, self._now)

    def _send(self, number: int, action: Send) -> None:
        peer = self.peers[number]
        encoding = peer.gossip.config.encoding + ("" if isinstance(action, AskUpdate) else action.part)
        try:
            body = b"" if isinstance(action, AskUpdate) else peer.body(encoding)
        except LocalError as error:  # parameters that cannot be sent, since liars are believed here
            self._perform(number, peer.gossip.handle(SendDone(action.to, False, str(error)), self._now))
            return
        if body and peer.lie is not None:
            body = peer.lie(peer.trainer, body, encoding)
        layout = peer.trainer.layout
        update = Update(
            model=layout.model,
            digest=layout.digest,
            encoding=encoding,
            parameters=layout.size,
            body_length=len(body),
            age=peer.gossip.age,
            round=peer.gossip.round,
            reply_wanted=isinstance(action, AskUpdate) or (isinstance(action, SendUpdate) and action.reply_wanted),
            reply=isinstance(action, ReplyUpdate),
            mass=action.mass if isinstance(action, SendUpdate) else None,
            rests=peer.gossip.rests,
            settled=peer.gossip.has_settled,
        )
        peer.sent += len(body)
        self._messages.append(Message(number, self._numbers[action.to], update, body))
        self._perform(number, peer.gossip.handle(SendDone(action.to, True, ""), self._now))

    def _arrive(self, message: Message) -> None:
        peer, sender = self.peers[message.to], self.ids[message.sender]
        if not message.body:
            self._perform(message.to, peer.gossip.handle(Asked(sender, message.update), self._now))
            return
        verdict, *rest = peer.gossip.handle(UpdateOffered(sender, message.update), self._now)
        if isinstance(verdict, Refuse):
            peer.refused += 1
            if message.update.mass is not None:
                refusal = SendRefused(self.ids[message.to], message.update.mass.total)
                self.peers[message.sender].gossip.handle(refusal, self._now)
            self._perform(message.to, rest)
            return
        peer.waiting[sender] = message
        self._perform(message.to, peer.gossip.handle(UpdateReceived(sender), self._now))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
