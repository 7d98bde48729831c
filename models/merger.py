"""Takes what neighbours sent into our parameters by the chosen rule, with what the rule remembers of the past.

`take` merges one model at once: `clipping`, `age`, `mean`, `slerp`; gossip gives the weight. `take_together` merges
several at once, for the rules that compare them: trimmed mean, median, Krum.

Clipping moves us no further than `factor` times the usual (median) distance, and leaves a model out that is STRAY
times as far away as usual and by STRAY_NORM of our own norm: no honest neighbour is, but who has been away for long.
Against liars that keep below these distances only clipping helps. Measured by
benchmarks/merging.py --liars 4, which has both limits beside others; the tables are in docs/choosing.md.

Parameters and buffers (running statistics) have a bound each: variances are of other sizes than weights, and a liar
must not hide a long step in one behind the usual distance of the other. numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from gossipml.errors import RemoteError
from gossipml.models.arrays import A, is_numpy
from gossipml.models.averaging import Coordinates, check_variances
from gossipml.models.merge_rules import MergeRule, merge
from gossipml.models.merging import ClippingBound, check_weight, clipping_factor
from gossipml.models.slerp import slerp
from gossipml.models.trainer import MergeReport

STRAY: Final = 2.0  # medians; of honest models next to none is, and a stale one is at 2.4 (docs/learning-figures.md)
STRAY_NORM: Final = 0.5  # of our own norm: two halves of a network that were apart for a while stay within it (guess)
PART_SLACK: Final = 2.0  # how far a few parameters are away says little of how far all are; a part moves us less anyway

NOT_FINITE: Final = MergeReport(False, "our own parameters are not finite until the round ends", 0.0)


class Merger:
    """The merges of one model. Not thread-safe."""

    def __init__(self, rule: MergeRule, coordinates: Coordinates, *, stray: float = STRAY) -> None:
        self.rule = rule
        self._stray = stray
        self._coordinates = coordinates
        self._split = coordinates.parameters
        self.forget()

    def forget(self) -> None:
        """Our parameters are others now: how far neighbours were from the former ones says nothing of these."""
        self._bound, self._buffers_bound = (ClippingBound(self.rule.factor) for _ in range(2))

    def take(self, x: A, m: A, weight: float, share: float = 1.0) -> MergeReport:
        """x <- (1 - weight) x + weight m by the rule; x (P,) is changed in place, m (P,) is used up.

        `m` is finite; it holds that share of a model's parameters and all its buffers, and equals x elsewhere: the
        distance is what it would be were all parameters as far away as those.
        """
        check_weight(weight)
        if fault := self._fault(m):
            return fault
        own = _length(x[: self._split])
        if not math.isfinite(own):
            return NOT_FINITE
        target = slerp(x, m, weight, self._split) if self.rule.name == "slerp" else None
        m -= x  # from here on the difference
        distance = _length(m[: self._split]) / math.sqrt(share)
        if target is not None:
            x[:] = target
        elif self.rule.name == "clipping":
            usual = self._bound.usual
            slack = min(PART_SLACK, share**-0.5)
            bound = self._bound.bound(own) * slack
            self._bound.learn(distance)
            if usual is not None and distance > max(self._stray * slack * usual, STRAY_NORM * own):
                times = f"{distance / usual:.0f} times" if usual else "much"
                return MergeReport(False, f"left out: its model is {times} as far from ours as usual", distance)
            self._move(x[: self._split], m[: self._split], weight * clipping_factor(distance, bound))
            self._merge_buffers(x[self._split :], m[self._split :], weight)
        else:
            self._move(x, m, weight)
        return MergeReport(True, "", distance)

    def take_together(self, x: A, models: Sequence[A]) -> list[MergeReport]:
        """x <- the rule of x and all `models` (P,), which are finite; a report for each of them."""
        if not math.isfinite(_length(x)):
            return [NOT_FINITE] * len(models)
        reports: list[MergeReport] = []
        stack = [x]
        for model in models:
            fault = self._fault(model)
            reports.append(fault or MergeReport(True, "", _length((model - x)[: self._split])))
            if fault is None:
                stack.append(model)
        if len(stack) < self.rule.needs:
            few = f"the merge {self.rule.name} needs {self.rule.needs} models, there are {len(stack)}"
            return [report if report.fault else MergeReport(False, few, report.distance) for report in reports]
        x[:] = merge(self.rule, _stacked(stack), coordinates=self._coordinates)
        return reports

    def _fault(self, m: A) -> MergeReport | None:
        """What is wrong with values that no honest peer sends."""
        try:
            check_variances(m, self._coordinates)
        except RemoteError as error:
            return MergeReport(False, str(error), 0.0, fault=True)
        if not math.isfinite(_length(m)):  # SLERP and Krum would make NaN of it
            return MergeReport(False, "its values are so large that their squares overflow", 0.0, fault=True)
        return None

    def _merge_buffers(self, x: A, difference: A, weight: float) -> None:
        if len(x):
            length = _length(difference)
            self._move(x, difference, weight * clipping_factor(length, self._buffers_bound.bound(_length(x))))
            self._buffers_bound.learn(length)

    def _move(self, x: A, difference: A, weight: float) -> None:
        if is_numpy(x):
            difference *= np.float32(weight)
            x += difference
        else:
            x.add_(difference, alpha=weight)


def _length(vector: A) -> float:
    """L2 norm; as a dot product a tenth of what squaring and adding up takes."""
    with np.errstate(over="ignore"):  # infinite then
        return math.sqrt(float(vector @ vector)) if len(vector) else 0.0


def _stacked(models: list[A]) -> A:
    """(K, P)."""
    if is_numpy(models[0]):
        return np.stack(models)
    import torch  # somebody has made tensors of it

    return torch.stack(models)
