"""Token accounts: as few messages as a fixed rate allows, sent where news has just come in.

Danner, Jelasity: Token account algorithms: the best of the proactive and reactive worlds (ICDCS 2018). In each period
(here: a round of training, or a tick of averaging) a peer sends a message with the probability PROACTIVE(a), or else
puts a token into its account of a tokens. On a message that comes in it spends REACTIVE(a, useful) tokens, each on a
message of its own, at once. In any t periods no more than t + C messages leave, C being the capacity; a peer that
hears nothing still sends one a period when its account is full, so that loss never silences the network.

The functions of `a` work on numbers and arrays alike. Leaves out: usefulness (`gossipml.peer.gossip` decides it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gossipml.peer.view import Rng

A: TypeAlias = Any  # a number or an array: only operators that both have are used

Strategy = Literal["proactive", "simple", "generalized", "randomized"]


@dataclass(frozen=True)
class TokenConfig:
    strategy: Strategy = "randomized"
    capacity: int = 20
    """C: tokens saved at most, and so messages in a burst (20, with a reactivity of 10: among the paper's best)."""
    reactivity: int = 10
    """A: so many tokens answer useful news with one message, 1 to C."""


def proactive(config: TokenConfig, a: A) -> A:
    """The chance of a message at the end of a period with a tokens saved: 0 to 1."""
    c, r = config.capacity, config.reactivity
    match config.strategy:
        case "proactive":
            return 1.0 + 0.0 * a
        case "simple" | "generalized":
            return 1.0 * (a >= c)
        case "randomized":
            chance = (a - r + 1) / (c - r + 1)
            return chance * ((chance > 0) & (chance < 1)) + 1.0 * (chance >= 1)


def reactive(config: TokenConfig, a: A, useful: A) -> A:
    """Messages that answer one which came in: the expectation; a fraction is rounded at random."""
    r = config.reactivity
    match config.strategy:
        case "proactive":
            return 0.0 * a
        case "simple":
            return 1.0 * (a > 0)
        case "generalized":
            return 1.0 * ((r - 1 + a) // (r + r * (1 - useful)))
        case "randomized":
            return useful * a / r


class TokenAccount:
    """The account of one peer. It starts full, within the bound, so that a newcomer is heard at once."""

    def __init__(self, config: TokenConfig) -> None:
        self.config = config
        self.tokens = config.capacity

    def period(self, rng: Rng) -> bool:
        """A period has ended: whether to send a message; otherwise a token is saved."""
        if rng.random() < proactive(self.config, self.tokens):
            return True
        self.save(1)
        return False

    def spend(self, useful: bool, rng: Rng) -> int:
        """Messages to send because one came in; their tokens are gone."""
        wanted: float = reactive(self.config, self.tokens, int(useful))
        count = min(self.tokens, int(wanted) + int(rng.random() < wanted - int(wanted)))
        self.tokens -= count
        return count

    def save(self, tokens: int) -> None:
        """Put tokens in, also those of messages that found no receiver."""
        self.tokens = min(self.config.capacity, self.tokens + tokens)
