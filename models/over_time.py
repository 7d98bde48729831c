"""What a peer answers with: an average over time of its parameters x, taken after each merge, before local steps pull x
towards the local data again. It takes the noise of the steps away, and on uneven data it is an estimate of what the
neighbourhood agrees on.

The average is over the last thirtieth of the merges, or so (polynomial decay: Shamir and Zhang 2013, "Stochastic
gradient descent for non-smooth optimization"): a few while all is new, and more and more as training goes on.

When nobody around trains any more (`peer.gossip`, `Settle`), x becomes its average, peers agree on these, and what is
served is then x, at once: with forms that send parts of a model an average would be hundreds of merges late.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

MERGE_SHARE: Final = 0.15  # of x, at most: two rounds of three neighbours; from 0.05 to 0.25 the first rounds are alike
ALONE_SHARE: Final = 0.3  # the same once a round in which nothing was merged: a peer alone averages its own last rounds
DECAY: Final = 32.0  # of 1 + it in so many merges the average is about the last one
LEAST_SHARE: Final = 0.002  # data may change, and a peer may train for months


class OverTime:
    """The average, in memory of the caller's: `vector` (P,), and `counts` (2,): whether x has become the average, and
    how many merges, of whole models, it has seen."""

    def __init__(self, vector: torch.Tensor, counts: NDArray[np.float32] | None = None) -> None:
        self.vector = vector
        self._counts = np.zeros(2, dtype=np.float32) if counts is None else counts

    @property
    def seen(self) -> float:
        """How many merges."""
        return float(self._counts[1])

    def begin(self, x: torch.Tensor, seen: float = 0.0) -> None:
        """From x (P,) on, as after so many merges."""
        self.vector.copy_(x)
        self._counts[:] = 0, seen

    def stepped(self) -> None:
        """x has taken a step."""
        self._counts[0] = 0

    def settle(self, x: torch.Tensor) -> None:
        """x (P,) becomes the average, and until its next step the average becomes what x does."""
        x.copy_(self.vector)
        self._counts[0] = 1

    def merged(self, x: torch.Tensor, share: float = 1.0, merges: int = 1) -> None:
        """x (P,) has taken so many models in, of each that share of the parameters, which counts as its square root: it
        moves x about so far, and were it to count as itself, the average would be late (docs/decisions/0015)."""
        if self._counts[0]:
            self.vector.copy_(x)
            return
        models = math.sqrt(share)
        stays = (1.0 - models * self._share(MERGE_SHARE)) ** merges
        self._counts[1] += models * merges
        self.vector.lerp_(x, 1.0 - stays)

    def alone(self, x: torch.Tensor) -> None:
        """A round is over in which nothing was merged."""
        self._counts[1] += 1
        self.vector.lerp_(x, self._share(ALONE_SHARE))

    def _share(self, most: float) -> float:
        return max(LEAST_SHARE, min(most, (1 + DECAY) / (self.seen + 1 + DECAY)))
