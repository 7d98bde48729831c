"""Merging what a neighbour sent into our parameters: x <- x + weight * clip(m - x).

Clipping keeps the L2 norm of the difference m - x below a bound learnt from recent exchanges, so that one liar
moves us no further than an honest neighbour a few times as far away as usual (centred clipping with our own
parameters as the centre: Karimireddy, He, Jaggi 2021; He, Karimireddy, Jaggi 2022).

`clipped_difference` works on the last axis, for numpy arrays and torch tensors alike: a vector (P,) here, all
peers of a simulation (N, P) there. No torch is imported.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

A: TypeAlias = Any  # a numpy array or a torch tensor: only operators that both have are used

FACTOR = 1.5  # medians that a neighbour may be away to be merged whole; measured: see `merger`
WINDOW = 31  # exchanges remembered: some ten rounds of three neighbours; half of them must lie to move the median
LEARNT = 5  # before so many exchanges the bound is our own norm
PLACES = 64  # of a model, as many as there may be fragments: with fewer, a small last layer shares one with others
FLOOR = 0.01  # of our own norm: merged whole however close the neighbours were, or a network at rest stays there


class ClippingBound:
    """The learnt bound on the norm of m - x: `factor` times the median of the last WINDOW norms.

    Not kept over a restart: who comes back is further away than usual, and shall catch up at once.
    """

    def __init__(self, factor: float = FACTOR) -> None:
        self._factor = factor
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self.usual: float | None = None
        """The median distance; None before LEARNT exchanges."""

    def bound(self, own_norm: float) -> float:
        """The largest difference that is merged whole. `own_norm` serves until enough has been seen."""
        return own_norm if self.usual is None else max(self._factor * self.usual, FLOOR * own_norm)

    def learn(self, norm: float) -> None:
        """Remember the norm of a difference, as it was before clipping."""
        self._norms.append(norm)
        if len(self._norms) >= LEARNT:
            self.usual = statistics.median(self._norms)


class Piece(NamedTuple):
    """What some coordinates, `begin` to `end`, have of one of the PLACES of a model."""

    place: int
    begin: int
    end: int


def pieces(parameters: int, begin: int, end: int) -> list[Piece]:
    """These coordinates of so many, place by place."""
    if begin == end:
        return []
    size = math.ceil(parameters / PLACES)
    return [
        Piece(place, max(begin, place * size), min(end, (place + 1) * size))
        for place in range(begin // size, math.ceil(end / size))
    ]


class PlaceDistances:
    """How far away neighbours are in each place of a model: the last WINDOW distances of each, as if all parameters
    were as far away as those.

    By places and not by fragments, so that who alone cuts a model into seven is held to what others sent in eight.
    """

    def __init__(self) -> None:
        self._distances: NDArray[np.float32] = np.full((PLACES, WINDOW), np.inf, np.float32)
        self._seen = np.zeros(PLACES, np.int64)

    def learn(self, where: list[Piece], distances: Sequence[float]) -> None:
        """Remember how far away something was there, before clipping."""
        if where:
            places = np.arange(where[0].place, where[-1].place + 1)
            self._distances[places, self._seen[places] % WINDOW] = distances
            self._seen[places] += 1

    def usual(self, where: list[Piece]) -> float | None:
        """How far away it usually is, from the median of each place; None before LEARNT exchanges."""
        if not where:
            return None
        places = slice(where[0].place, where[-1].place + 1)
        known = np.minimum(self._seen[places], WINDOW)
        if known.min() < LEARNT:
            return None
        medians = np.sort(self._distances[places], axis=1)[np.arange(len(known)), (known - 1) // 2].astype(np.float64)
        sizes = np.array([piece.end - piece.begin for piece in where])
        return math.sqrt(float(sizes @ (medians * medians)) / float(sizes.sum()))


def clipping_factor(length: float, bound: float) -> float:
    """What a difference of the norm `length` is multiplied with, so that it is no longer than `bound`."""
    return bound / length if length > bound else 1.0


def check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:  # NaN compares false
        raise UserError(f"merge weight {weight} is not from 0 to 1")


def is_finite(values: A) -> bool:
    """Whether all values are finite: one pass, a sum (20 times faster than looking at each).

    A sum that overflows counts as not finite, too: such values are no parameters.
    """
    return math.isfinite(float(values.sum()))


def norm(values: A) -> A:
    """L2 norms along the last axis."""
    return (values * values).sum(-1) ** 0.5


def clipped_difference(x: A, m: A, bound: A) -> tuple[A, A]:
    """(m - x) scaled down to the norm `bound` where it is longer, and its norm before that.

    x, m: (..., P); bound: (...). Nothing is changed in place.
    """
    difference = m - x
    length = norm(difference)  # (...)
    scale = bound / (length + (length == 0))
    scale = scale * (scale < 1) + (scale >= 1)  # a float times a bool is that float's type, in numpy too
    return difference * scale[..., None], length
