"""Who may talk to whom: graphs over N peers, numbered from 0, as neighbour lists.

| topology | source |
|---|---|
| `ring`, `torus` | neighbours in a circle; in a grid whose borders meet |
| `regular` | random, all of one degree: stubs paired at random (Bollobas 1980), conflicts mended by switching edges (McKay, Wormald 1990) |
| `small_world` | Watts, Strogatz 1998: a ring of k neighbours, each edge rewired with probability p |
| `erdos_renyi` | every edge with probability p (Gilbert 1959), by skipping (Batagelj, Brandes 2005) |
| `scale_free` | Barabasi, Albert 1999: each newcomer attaches to m peers in proportion to their degree |
| `edge_list` | from a file: two peer numbers a line |

Complete graphs and peer sampling need no lists: see `gossipml.simulations.population_view`. Randomness is numpy's
`RandomState` over PCG64, whose algorithms are frozen. Leaves out: weights and directions of edges.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

Pairs = NDArray[np.int64]  # (E, 2), each edge once, the lower number first

MAX_EDGES = 50_000_000  # 800 MB of pairs; bounds what a slip in a scenario allocates
MAX_FILE = 1 << 30


@dataclass(frozen=True)
class Graph:
    """Neighbours of peer i: `targets[starts[i] : starts[i + 1]]`, ascending."""

    starts: NDArray[np.int64]  # (N + 1,)
    targets: NDArray[np.int64]  # (2 E,)

    @property
    def peers(self) -> int:
        return len(self.starts) - 1

    def neighbours(self, peer: int) -> list[int]:
        found: list[int] = self.targets[self.starts[peer] : self.starts[peer + 1]].tolist()
        return found

    @property
    def degrees(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.diff(self.starts)
        return found

    @property
    def edges(self) -> Pairs:
        """Each edge once."""
        first = np.repeat(np.arange(self.peers), self.degrees)
        both = np.stack([first, self.targets], axis=1)
        kept: Pairs = both[both[:, 0] < both[:, 1]]
        return kept

    def parts(self) -> int:
        """Connected components: 1 when every peer can be reached from every other."""
        label = np.full(self.peers, -1, dtype=np.int64)
        count = 0
        for root in range(self.peers):
            if label[root] >= 0:
                continue
            front = np.array([root])
            label[root] = count
            while len(front):
                near = np.unique(np.concatenate([self.targets[self.starts[p] : self.starts[p + 1]] for p in front]))
                front = near[label[near] < 0]
                label[front] = count
            count += 1
        return count


def graph_of(pairs: Pairs, peers: int) -> Graph:
    """From edges in any order and direction; doubles and loops are dropped."""
    low, high = pairs.min(axis=1, initial=peers), pairs.max(axis=1, initial=0)
    keys = np.unique((low * peers + high)[low != high])
    low, high = keys // peers, keys % peers
    sources, targets = np.concatenate([low, high]), np.concatenate([high, low])
    order = np.lexsort((targets, sources))
    starts = np.zeros(peers + 1, dtype=np.int64)
    np.cumsum(np.bincount(sources, minlength=peers), out=starts[1:])
    return Graph(starts, targets[order])


def ring(peers: int, degree: int = 2) -> Graph:
    """Each peer with the degree / 2 next ones on both sides."""
    _check_degree("ring", peers, degree, even=True)
    own = np.arange(peers)
    return graph_of(
        np.concatenate([np.stack([own, (own + d) % peers], axis=1) for d in range(1, degree // 2 + 1)]), peers
    )


def torus(peers: int) -> Graph:
    """The grid of rows x columns nearest to a square; UserError for a prime number of peers."""
    rows = next(r for r in range(math.isqrt(peers), 0, -1) if peers % r == 0)
    if rows < 2:
        raise UserError(f"{peers} peers make no grid; take a product of two numbers, for example {peers + 1}")
    cells = np.arange(peers).reshape(rows, peers // rows)
    right, below = np.roll(cells, -1, axis=1), np.roll(cells, -1, axis=0)
    pairs = [np.stack([cells.ravel(), other.ravel()], axis=1) for other in (right, below)]
    return graph_of(np.concatenate(pairs), peers)


def regular(peers: int, degree: int, seed: int) -> Graph:
    """Random, every peer with `degree` neighbours."""
    _check_degree("regular", peers, degree)
    if peers * degree % 2:
        raise UserError(f"{peers} peers of degree {degree} have half an edge too many; make one of the two even")
    rng = _random(seed, "regular")
    stubs = rng.permutation(np.repeat(np.arange(peers), degree)).reshape(-1, 2)
    edges = len(stubs)
    for _ in range(1000):
        low, high = stubs.min(axis=1), stubs.max(axis=1)
        keys = low * peers + high
        order = np.argsort(keys, kind="stable")
        repeated = np.zeros(edges, dtype=np.bool_)
        repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        bad = np.flatnonzero((low == high) | repeated)
        if not len(bad):
            return graph_of(stubs, peers)
        for edge in bad:  # swap ends with a random other edge; what that breaks is mended in the next turn
            other = rng.randint(edges)
            stubs[edge, 1], stubs[other, 1] = stubs[other, 1], stubs[edge, 1]
    # Nearly complete: take away a random regular graph from the complete one instead.
    rest = regular(peers, peers - 1 - degree, seed + 1)
    everyone = np.stack(np.triu_indices(peers, 1), axis=1)
    absent = np.isin(everyone[:, 0] * peers + everyone[:, 1], rest.edges[:, 0] * peers + rest.edges[:, 1])
    return graph_of(everyone[~absent], peers)


def small_world(peers: int, degree: int, probability: float, seed: int) -> Graph:
    _check_degree("small world", peers, degree, even=True)
    _check_probability("small world", probability)
    rng = _random(seed, "small world")
    linked = [set(neighbours) for neighbours in map(ring(peers, degree).neighbours, range(peers))]
    for distance in range(1, degree // 2 + 1):
        for peer in range(peers):
            other = (peer + distance) % peers
            if rng.random_sample() >= probability or len(linked[peer]) >= peers - 1 or other not in linked[peer]:
                continue
            new = peer
            while new == peer or new in linked[peer]:
                new = int(rng.randint(peers))
            linked[peer].discard(other)
            linked[other].discard(peer)
            linked[peer].add(new)
            linked[new].add(peer)
    return graph_of(np.array([(a, b) for a in range(peers) for b in sorted(linked[a]) if a < b]), peers)


def erdos_renyi(peers: int, probability: float, seed: int) -> Graph:
    _check_probability("erdos-renyi", probability)
    pairs = peers * (peers - 1) // 2
    if pairs * probability > MAX_EDGES:
        raise UserError(
            f"about {pairs * probability:.0f} edges do not fit; take a probability of at most {MAX_EDGES / pairs:.3g}, "
            "or the complete topology"
        )
    rng = _random(seed, "erdos-renyi")
    if probability >= 1.0:
        places = np.arange(pairs)
    elif probability <= 0.0:
        places = np.empty(0, dtype=np.int64)
    else:
        gaps = rng.geometric(probability, size=int(pairs * probability + 10 * math.sqrt(pairs * probability) + 10))
        places = np.cumsum(gaps) - 1
        places = places[places < pairs]
    # Place of (low, high) with low < high in the order of high: high * (high - 1) / 2 + low.
    high = ((1 + np.sqrt(1 + 8 * places.astype(np.float64))) / 2).astype(np.int64)
    high -= high * (high - 1) // 2 > places  # the root may have been rounded up
    return graph_of(np.stack([places - high * (high - 1) // 2, high], axis=1), peers)


def scale_free(peers: int, links: int, seed: int) -> Graph:
    """Each peer after the first `links` + 1, which all know each other, attaches to `links` earlier ones."""
    if not 1 <= links < peers:
        raise UserError(f"scale-free: a newcomer attaches to 1 to {peers - 1} of {peers} peers, not {links}")
    rng = _random(seed, "scale-free")
    core = np.stack(np.triu_indices(links + 1, 1), axis=1)
    ends: list[int] = core.ravel().tolist()  # a peer stands here once for each of its edges
    pairs: list[tuple[int, int]] = [(int(a), int(b)) for a, b in core]
    for newcomer in range(links + 1, peers):
        chosen: set[int] = set()
        while len(chosen) < links:
            chosen.add(ends[int(rng.randint(len(ends)))])
        for other in sorted(chosen):
            pairs.append((other, newcomer))
            ends += (other, newcomer)
    return graph_of(np.array(pairs), peers)


def edge_list(path: Path, peers: int) -> Graph:
    """One edge a line: two numbers from 0 to peers - 1, apart by blanks or a comma; `#` begins a comment."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"the edge list {str(path)!r} is larger than {MAX_FILE >> 30} GiB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the edge list {str(path)!r} cannot be read: {error}") from None
    pairs: list[tuple[int, int]] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() and int(word) < peers for word in words):
            raise UserError(
                f"{path}, line {number}: {line.strip()[:60]!r} is no edge; write two peers from 0 to {peers - 1}"
            )
        pairs.append((int(words[0]), int(words[1])))
    if not pairs:
        raise UserError(f"the edge list {str(path)!r} holds no edge")
    return graph_of(np.array(pairs), peers)


def _check_degree(kind: str, peers: int, degree: int, *, even: bool = False) -> None:
    if not 1 <= degree < peers or (even and degree % 2) or peers * degree // 2 > MAX_EDGES:
        number = "an even number" if even else "a number"
        raise UserError(f"{kind}: {number} of neighbours from {1 + even} to {peers - 1} is possible, not {degree}")


def _check_probability(kind: str, probability: float) -> None:
    if not 0.0 <= probability <= 1.0:  # NaN compares false
        raise UserError(f"{kind}: a probability is from 0 to 1, not {probability}")


def _random(seed: int, purpose: str) -> np.random.RandomState:
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence([seed & 0xFFFFFFFF, *purpose.encode()])))
