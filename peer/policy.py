"""One peer's share in a gossip protocol: receivers, parts, and weights of merges, with the state that they need.

`gossipml.peer.gossip` asks; what is asked is decided here by the `GossipProtocol`, so that the state machine knows no
protocol by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gossipml.ids import PeerId
from gossipml.peer.ages import Ages
from gossipml.peer.fixed_graph import neighbours
from gossipml.peer.protocols import GossipProtocol, part_of
from gossipml.peer.push_sum import Mass, PushSum
from gossipml.peer.token_account import TokenAccount
from gossipml.peer.view import Rng, View
from gossipml.peer.wire import Update


@dataclass(frozen=True)
class Incoming:
    """An update that was accepted."""

    update: Update
    age: float
    """The part of the claimed age that counts."""


@dataclass(frozen=True)
class Bounds:
    """Of a weight by age."""

    least: float
    most: float


class Policy:
    def __init__(
        self, protocol: GossipProtocol, view: View, ages: Ages, rng: Rng, bounds: Bounds, *, whole: bool = False
    ) -> None:
        """`whole`: models that hold a part of the parameters cannot be merged."""
        self.protocol = protocol
        self._whole = whole
        self.push_sum = PushSum() if protocol.weighing == "mass" else None
        self.tokens = TokenAccount(protocol.tokens) if protocol.tokens else None
        self._view = view
        self._ages = ages
        self._rng = rng
        self._bounds = bounds
        # Parts sent so far; not all peers begin with the same one.
        self._parts = int(rng.random() * protocol.parts) if protocol.parts > 1 else 0
        self._graph: tuple[frozenset[PeerId], dict[PeerId, float]] = (frozenset(), {})  # our neighbours among these
        self._own_edge = 1.0  # W_ii
        self._edges: dict[PeerId, int] = {}  # models of each neighbour merged in this round
        self._mixed = 0.0  # what they counted

    def begin_round(self) -> None:
        self._edges, self._mixed = {}, 0.0

    # Sending.

    def is_time(self) -> bool:
        """Whether the end of a round, or a tick, is one at which something is sent."""
        return self.tokens is None or self.tokens.period(self._rng)

    def receivers(self, k: int, model: str, digest: str, now: float, without: Collection[PeerId]) -> list[PeerId]:
        """At most k peers; on a fixed graph all neighbours."""
        if not self.protocol.cycles:
            return self._view.sample(k, model, digest, now, without=without)
        return [peer for peer in self._neighbours(model, digest, now) if peer not in without]

    def wishes(self, receiver: PeerId) -> bool:
        """Whether the receiver's model is wished for in return."""
        if self.protocol.wish != "unheard":
            return self.protocol.wish == "always"
        # Whoever has pushed to us by itself will do so again: asking for its model, too, would double the bytes of a
        # small network, where everybody pushes to everybody, for models that we have anyway.
        return not self._ages.heard(receiver)

    def next_part(self) -> str:
        """The end of the encoding's name for the next message."""
        self._parts += 1
        return self.protocol.part_name(self._parts, self._rng)

    def masses(self, receivers: Sequence[PeerId]) -> Sequence[Mass | None]:
        """For the headers of one push."""
        return self.push_sum.split(receivers, self._rng) if self.push_sum else [None] * len(receivers)

    # Receiving.

    def objection(self, update: Update) -> str:
        """Why an update of another protocol cannot be merged; empty when it can."""
        if self._whole and part_of(update.encoding)[1] < 1.0:
            return "the merge here compares whole models: send them with --compression int8"
        if (update.mass is not None) == (self.push_sum is not None):
            return ""
        theirs = "the peer pushes sums" if update.mass is not None else "the update has no push-sum weight"
        return f"{theirs}, the protocol here is {self.protocol.name}: start both with the same --protocol"

    def weight(self, sender: PeerId, incoming: Incoming) -> float:
        """The share of an incoming model in the merge with ours."""
        mass = incoming.update.mass
        if self.push_sum is not None and mass is not None:
            credit = self.push_sum.credit(sender, mass)
            return credit / (self.push_sum.weight + credit)
        if self.protocol.weighing == "edge":
            edge = self._edge(sender)
            return edge / (self._own_edge + self._mixed + edge)
        if self.protocol.weighing == "round":
            weight = self._ages.weight(sender, incoming.age, part_of(incoming.update.encoding)[0])
        else:
            weight = self._ages.weight_of_two(sender, incoming.age)
        return min(max(weight, self._bounds.least), self._bounds.most)

    def merged(self, sender: PeerId, incoming: Incoming) -> int:
        """An update was merged; how many messages that calls for at once."""
        useful = incoming.age >= self._ages.own
        if self.push_sum is not None and incoming.update.mass is not None:
            self.push_sum.merged(sender, incoming.update.mass)
        elif self.protocol.weighing == "edge":
            self._mixed += self._edge(sender)
            self._edges[sender] = self._edges.get(sender, 0) + 1
        part, share = part_of(incoming.update.encoding)
        self._ages.merged(sender, incoming.age, part, share)
        return self.tokens.spend(useful, self._rng) if self.tokens else 0

    def _edge(self, sender: PeerId) -> float:
        """W_ij of the sender; the n-th model of a round counts 1/n. Whoever is no neighbour takes us for one."""
        weight = self._graph[1].get(sender) or 1.0 / (2 * self.protocol.cycles + 1)
        return weight / (self._edges.get(sender, 0) + 1)

    def _neighbours(self, model: str, digest: str, now: float) -> dict[PeerId, float]:
        others = frozenset(self._view.fit(model, digest, now))
        if others != self._graph[0]:
            self._graph = others, neighbours(self._view.own, others, self.protocol.cycles)
            self._own_edge = 1.0 - sum(self._graph[1].values())
        return self._graph[1]
