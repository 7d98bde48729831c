"""How a simulated network treats what is sent: delay, loss, duplication, reordering, bandwidth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

Delay = Callable[[random.Random], float]
"""Draws the seconds that one message is under way."""


def fixed(seconds: float) -> Delay:
    return lambda rng: seconds


def uniform(low: float, high: float) -> Delay:
    return lambda rng: low + (high - low) * rng.random()


def heavy_tailed(median: float, sigma: float = 1.0) -> Delay:
    """Log-normal: with sigma 1 one message in a hundred takes ten times the median."""
    mu = math.log(median)
    return lambda rng: rng.lognormvariate(mu, sigma)


@dataclass(frozen=True)
class Link:
    """One direction between two machines. The default is a good connection between cities."""

    delay: Delay = field(default_factory=lambda: uniform(0.01, 0.03))
    loss: float = 0.0
    """Share of datagrams that vanish; on a stream a loss costs a retransmission instead."""
    duplicate: float = 0.0
    """Share of datagrams that arrive twice."""
    reorder: float = 0.0
    """Share of datagrams held back for up to `REORDER_SECONDS`. A varying delay reorders by itself, too."""
    bandwidth: float = math.inf
    """Bytes a second, shared by everything between the two machines in this direction."""


LOCAL = Link(delay=fixed(0.00005))
"""A machine to itself."""

REORDER_SECONDS = 0.5
RETRANSMISSION_SECONDS = 0.2  # RFC 6298 as Linux does it: the first timeout; doubled each time
MAX_RETRANSMISSIONS = 8


def stream_delay(link: Link, rng: random.Random) -> float:
    """Seconds until a piece of a stream has arrived, losses and retransmissions included."""
    seconds = link.delay(rng)
    if link.loss:
        wait = RETRANSMISSION_SECONDS
        for _ in range(MAX_RETRANSMISSIONS):
            if rng.random() >= link.loss:
                break
            seconds += wait
            wait *= 2
    return seconds
