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
from typing import Any, TypeAlias

from gossipml.errors import UserError

A: TypeAlias = Any  # a numpy array or a torch tensor: only operators that both have are used

FACTOR = 1.5  # medians that a neighbour may be away to be merged whole; measured: see `merger`
WINDOW = 31  # exchanges remembered: some ten rounds of three neighbours; half of them must lie to move the median
LEARNT = 5  # before so many exchanges the bound is our own norm
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
