"""A fixed random regular graph that every peer works out for itself, and the weights of D-PSGD on it.

D-PSGD (Lian et al., NeurIPS 2017): each peer averages with fixed neighbours by a doubly stochastic matrix W. The
graph is the union of `cycles` rings, in each of which the peers stand in another order, that of the hash of the
ring's number and their id: degree 2 * cycles, an expander nearly always (Law, Siu: Distributed construction of random
expander networks, INFOCOM 2003). Peers that know the same others come to the same graph without a word, and one that
comes or goes changes only the places next to its own.

    W_ij = (rings in which i and j are next to each other) / (2 * cycles + 1),  W_ii = 1 - the others

is symmetric, so its columns add up to 1 as its rows do: the mean of all models stays. (Metropolis weights would need
the degrees of the neighbours, too; here all are alike.) Nobody waits: a model is merged when it comes.
Leaves out: the synchronous form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from gossipml.ids import PeerId


def neighbours(own: PeerId, others: Iterable[PeerId], cycles: int) -> dict[PeerId, float]:
    """W_ij of each neighbour j of `own`, in the graph over it and the others."""
    peers = {own, *others}
    edge = 1.0 / (2 * cycles + 1)
    weights: dict[PeerId, float] = {}
    for cycle in range(cycles if len(peers) > 1 else 0):
        places = sorted((_place(cycle, peer), peer) for peer in peers)
        at = places.index((_place(cycle, own), own))
        for _, peer in {places[at - 1], places[(at + 1) % len(places)]}:  # of two peers each is next to the other once
            weights[peer] = weights.get(peer, 0.0) + edge
    return dict(sorted(weights.items()))


def _place(cycle: int, peer: PeerId) -> bytes:
    return hashlib.sha256(cycle.to_bytes(1) + peer).digest()
