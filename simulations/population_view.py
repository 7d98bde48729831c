"""What a simulated peer knows of the others: everybody, or its neighbours in a graph.

Takes the place of a `View` full of contacts, of which ten thousand would take gigabytes. Peer sampling keeps a real
view close to a uniform sample of the network (`gossipml.peer.view`), so `sample` draws uniformly from all who are
there; the failure detector's seconds are shorter than a round, so who is gone or cut off is not drawn. On a graph it
draws from the neighbours that are there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from gossipml.ids import PEER_ID_SIZE, PeerId
from gossipml.peer.view import Rng, View
from gossipml.simulations.network import Links
from gossipml.simulations.topology import Graph

TRIES = 20  # draws from everybody before looking who there is; with half of them gone one in a million needs that


@dataclass
class World:
    """What is true for all peers at this moment."""

    up: list[bool]
    links: Links
    graph: Graph | None = None
    """None: everybody is everybody's neighbour."""
    ids: list[PeerId] = field(init=False)
    number: dict[PeerId, int] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [PeerId(peer.to_bytes(PEER_ID_SIZE, "big")) for peer in range(len(self.up))]
        self.number = {peer: number for number, peer in enumerate(self.ids)}

    def reaches(self, sender: int, receiver: int) -> bool:
        return self.up[receiver] and (self.links.whole or self.links.reaches(sender, receiver))


class PeerView(View):
    """The view of peer `own`."""

    def __init__(self, world: World, own: int, rng: Rng) -> None:
        super().__init__(world.ids[own], rng)
        self._world = world
        self._me = own

    def sample(self, k: int, model: str, digest: str, now: float, *, without: Collection[PeerId] = ()) -> list[PeerId]:
        """See `View.sample`."""
        world, chosen = self._world, dict[int, PeerId]()
        if world.graph is None:
            for _ in range(TRIES * k):
                if len(chosen) == k:
                    return list(chosen.values())
                peer = int(self._rng.random() * len(world.up))
                if peer != self._me and world.reaches(self._me, peer) and world.ids[peer] not in without:
                    chosen[peer] = world.ids[peer]
            if len(chosen) == k:
                return list(chosen.values())
        return super().sample(k, model, digest, now, without=without)

    def fit(self, model: str, digest: str, now: float, *, without: Collection[PeerId] = ()) -> list[PeerId]:
        """See `View.fit`: who is there, in the order of their numbers."""
        world = self._world
        near = range(len(world.up)) if world.graph is None else world.graph.neighbours(self._me)
        return [
            world.ids[peer]
            for peer in near
            if peer != self._me and world.reaches(self._me, peer) and world.ids[peer] not in without
        ]
