"""Ages of models: how much an incoming model counts against ours.

The age of a model is the number of samples behind it: it grows by training, and a merge takes the greater of
two (Ormandi et al. 2013). A neighbour's age is only a claim, and three things follow from that. A claim counts
up to a multiple of what other neighbours claim, so that a liar with a huge age does not outweigh everybody.
What is far behind the neighbourhood is stale. And claims, like our own age after long isolation, lose force with
the rounds that have passed since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

from gossipml.ids import PeerId
from gossipml.peer.wire import MAX_AGE

FADED: Final = 32  # half-lives after which a claim gets no weaker: next to a new one it is nothing


@dataclass(frozen=True)
class AgeConfig:
    lead: float = 4.0
    """How far a claim may run ahead of ours and of what the others claim, as a multiple. Merging levels the ages
    of honest peers to within a few rounds; a claim at the limit gets weight 0.8 (guess)."""
    stale: float = 0.5
    """Updates younger than this share of the neighbourhood are refused (guess) ..."""
    stale_rounds: float = 8.0
    """... unless they are behind by fewer than this many of our rounds: at the start every ratio is large (guess)."""
    witnesses: int = 2
    """Other neighbours whose claims it takes to doubt a claim, or our own age."""
    half_life: float = 10.0
    """Rounds after which a claim, or our own age without any merge, counts half. Twice the time in which a
    rumour reaches 100 peers with 4 receivers (guess)."""
    isolated_least: float = 0.25
    """Our own model never counts less than this share of its age: its data are still in nobody else's."""
    equal: bool = False
    """Whether all models count the same in the mean of a round, whatever their ages."""
    claims: int = 256
    """Claims remembered; bounds memory and the cost of a median."""


@cache
def _forces(half_life: float) -> tuple[float, ...]:
    """What a claim of so many rounds ago counts; the last one stands for all that are older."""
    return tuple(0.5 ** (rounds / half_life) for rounds in range(math.ceil(FADED * half_life) + 1))


@dataclass(frozen=True)
class _Claim:
    age: float
    round: int


class Ages:
    """Own age, the mass of this round's mean, and what neighbours claim."""

    def __init__(self, config: AgeConfig) -> None:
        self.own = 0.0
        self.config = config
        self._claims: dict[PeerId, _Claim] = {}
        self._forces = _forces(self.config.half_life)
        self._round = 0  # counts begin_round, in training and averaging alike
        self._alone = 0  # rounds without a merge
        self._per_round = 0.0  # samples, smoothed
        self._merged: dict[PeerId, float] = {}  # models of each sender in this round, parts as what they are of one
        self._heard: frozenset[PeerId] = frozenset()  # senders merged in the round before; asked only whether in it
        self._faded = 1.0  # what our own age counts for after isolation
        self._mass = self._own_mass()  # of our own model in this round's mean ...
        self._added: dict[str, float] = {}  # ... and of what was merged: everywhere, and in each fragment

    def restore(self, age: float) -> None:
        """Our model is another one now, of this age."""
        self.own = min(max(age, 0.0), MAX_AGE)
        self._mass, self._added = self._own_mass(), {}

    def trained(self, samples: int) -> None:
        self.own = min(self.own + max(samples, 0), MAX_AGE)
        self._per_round = samples if self._per_round == 0.0 else 0.7 * self._per_round + 0.3 * samples

    def begin_round(self) -> None:
        """From here on a new mean is formed, out of our own model to begin with."""
        self._alone = 0 if self._merged else self._alone + 1
        self._heard, self._merged = frozenset(self._merged), {}
        self._round += 1
        self._faded = max(self.config.isolated_least, 0.5 ** (max(0, self._alone - 1) / self.config.half_life))
        self._mass, self._added = self._own_mass() * self._faded, {}

    def heard(self, peer: PeerId) -> bool:
        """Whether a model of the peer was merged in the round before this one."""
        return peer in self._heard

    def claimed(self, peer: PeerId, age: float) -> None:
        self._claims.pop(peer, None)  # the latest claim last: the oldest is dropped first
        self._claims[peer] = _Claim(age, self._round)
        if len(self._claims) > self.config.claims:
            del self._claims[next(iter(self._claims))]

    def claim(self, peer: PeerId) -> float | None:
        """The age that a peer last claimed."""
        known = self._claims.get(peer)
        return None if known is None else known.age

    def typical(self, *, without: PeerId) -> float | None:
        """Median of what the other neighbours claim, newer claims counting more; None without enough witnesses."""
        now, forces, last = self._round, self._forces, len(self._forces) - 1
        claims = sorted(
            [(c.age, forces[min(now - c.round, last)]) for peer, c in self._claims.items() if peer != without]
        )
        if len(claims) < self.config.witnesses:
            return None
        half = sum([force for _, force in claims]) / 2.0
        for age, force in claims:
            half -= force
            if half <= 0.0:
                return age
        return claims[-1][0]

    def stale(self, age: float, sender: PeerId) -> str:
        """Why a model of this age is too far behind what the others claim; empty when it is not."""
        if age >= self.config.stale * self.own:
            return ""  # whatever they claim
        typical = self.typical(without=sender)
        # The lesser of the two: were our own age inflated by a liar, everybody honest would seem stale.
        reference = self.own if typical is None else min(self.own, typical)
        behind = reference - age
        if age < self.config.stale * reference and behind > self.config.stale_rounds * self._per_round:
            return f"stale: age {age:.0f} is {behind:.0f} behind"
        return ""

    def credible(self, age: float, sender: PeerId) -> float:
        """As much of a claimed age as what the others claim, and our own, make likely."""
        likely = self.config.lead * max(self.own, self.config.stale_rounds * self._per_round)
        if age <= likely:
            return age  # whatever they claim
        typical = self.typical(without=sender)
        return age if typical is None else min(age, max(likely, self.config.lead * typical))

    def weight(self, sender: PeerId, age: float, fragment: str = "") -> float:
        """The share of an incoming model, or fragment, in the mean so far. Two models of age 0 count the same."""
        counted = self._counted(sender, age)
        others = self._added.get("", 0.0) + (self._added.get(fragment, 0.0) if fragment else 0.0)
        return counted / (self._mass + others + counted)

    def weight_of_two(self, sender: PeerId, age: float) -> float:
        """The share of an incoming model in the mean of it and ours, whatever else came in this round."""
        counted = self._counted(sender, age)
        return counted / (self._own_mass() * self._faded + counted)

    def merged(self, sender: PeerId, age: float, fragment: str = "", share: float = 1.0) -> None:
        """A model was taken in, or that share of its parameters: a fragment, or some here and there."""
        counted = self._counted(sender, age) * (1.0 if fragment else share)
        self._added[fragment] = self._added.get(fragment, 0.0) + counted
        self._merged[sender] = self._merged.get(sender, 0.0) + share
        self.own += share * max(0.0, min(age, MAX_AGE) - self.own)  # the mean over all parameters

    def _counted(self, sender: PeerId, age: float) -> float:
        """The n-th model of one sender within a round counts 1/n: a flood gains only the logarithm of its size."""
        return (1.0 if self.config.equal else age + 1.0) / (self._merged.get(sender, 0.0) + 1.0)

    def _own_mass(self) -> float:
        return 1.0 if self.config.equal else self.own + 1.0
