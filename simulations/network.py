"""The simulated network between peers: how long a message takes, whether it is lost, who is cut off from whom.

Seconds are virtual. A message of b bytes over a link with bandwidth w takes b / w to leave and then a delay of its own;
the bandwidth of a link is the lesser of its ends'. All draws come from one generator, in the order of the sends.

| delay | seconds |
|---|---|
| `fixed` | a |
| `uniform` | from a to b |
| `heavy-tailed` | log-normal with median a and shape b (sigma of the logarithm): most are near a, a few far beyond, as measured between hosts on the internet |
| `trace` | one of the measured ones in a file, a number a line, at random |

Leaves out: queues (several messages at once over one link each take what they would take alone).
"""  # noqa: E501 a table row is one line

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from gossipml.errors import UserError

Draw = Callable[[Random], float]


def fixed(seconds: float) -> Draw:
    return lambda rng: seconds


def uniform(least: float, most: float) -> Draw:
    if not 0 <= least <= most:
        raise UserError(f"a delay from {least} to {most} seconds is none; the first must be 0 or more, and the lesser")
    return lambda rng: least + (most - least) * rng.random()


def heavy_tailed(median: float, sigma: float) -> Draw:
    if not (median > 0 and 0 < sigma <= 5):
        raise UserError(f"a heavy-tailed delay has a median above 0 and a shape from 0 to 5, not {median} and {sigma}")
    return lambda rng: median * math.exp(rng.gauss(0.0, sigma))


def from_trace(seconds: Sequence[float]) -> Draw:
    return lambda rng: seconds[int(rng.random() * len(seconds))]


@dataclass(frozen=True)
class Cut:
    """From `start` to `stop` the peers of different groups do not reach each other; then it heals."""

    start: float
    stop: float
    group: Sequence[int]
    """The group of each peer."""


class Links:
    """`bandwidth` is bytes a second of each peer; empty: without bound."""

    def __init__(
        self,
        rng: Random,
        *,
        delay: Draw,
        loss: float = 0.0,
        bandwidth: Sequence[float] = (),
        cuts: Sequence[Cut] = (),
    ) -> None:
        if not 0 <= loss <= 1:
            raise UserError(f"loss is the share of messages that vanish, from 0 to 1, not {loss}")
        self._rng = rng
        self._delay = delay
        self._loss = loss
        self._bandwidth = bandwidth
        self._cuts = cuts
        self._now: list[Cut] = []

    def at(self, now: float) -> None:
        """The cuts of this moment."""
        self._now = [cut for cut in self._cuts if cut.start <= now < cut.stop]

    @property
    def whole(self) -> bool:
        """Whether no cut is open."""
        return not self._now

    def reaches(self, sender: int, receiver: int) -> bool:
        return all(cut.group[sender] == cut.group[receiver] for cut in self._now)

    def sending(self, sender: int, receiver: int, size: int) -> float:
        """Seconds until the last byte has left."""
        return size / min(self._bandwidth[sender], self._bandwidth[receiver]) if self._bandwidth else 0.0

    def delay(self) -> float | None:
        """Seconds from then until it has arrived; None when it is lost."""
        lost = self._loss > 0 and self._rng.random() < self._loss
        seconds = self._delay(self._rng)
        return None if lost else seconds
