"""Takes what neighbours sent into our parameters by the chosen rule, with what the rule remembers of the past.

`take` merges one model at once: `clipping`, `age`, `mean`, `slerp`; gossip gives the weight; `take_rows` does it for
many peers, one model at each. `take_together` merges several at once, for the rules that compare them: trimmed mean,
median, Krum.

Clipping moves us no further than `factor` times the usual (median) distance, and leaves a model out that is STRAY
times as far away as usual and by STRAY_NORM of our own norm: no honest neighbour is, but who has been away for long.
Once all have settled SETTLED_NORM of our norm is enough: no steps lead back then from where liars draw us.
Against liars that keep below these distances only clipping helps. Measured by
benchmarks/merging.py --liars 4, which has both limits beside others; the tables are in docs/choosing.md.

Of a part of a model the same is asked as if all parameters were as far away as those, with exceptions. Parameters from
all over it may move us further; and peers at rest may agree on all parameters but one: were the parts that hold it left
out, they never would. A fragment is a layer or two, which honest neighbours may have much further away than others: it
is held to what is usual in its places, and to our own norm there.

Parameters and buffers (running statistics) have a bound each: variances are of other sizes than weights, and a liar
must not hide a long step in one behind the usual distance of the other. numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from gossipml.errors import RemoteError
from gossipml.models.arrays import A, is_numpy
from gossipml.models.averaging import Coordinates, check_variances
from gossipml.models.compression import Form
from gossipml.models.merge_rules import MergeRule, merge
from gossipml.models.merging import FLOOR, ClippingBound, PlaceDistances, check_weight, clipping_factor, pieces
from gossipml.models.slerp import slerp
from gossipml.models.trainer import MergeReport

STRAY: Final = 2.0  # medians; of honest models next to none is, and a stale one is at 2.4 (docs/learning-figures.md)
STRAY_NORM: Final = 0.5  # of our own norm: two halves of a network that were apart for a while stay within it (guess)
SETTLED_NORM: Final = 0.1  # the same once all rest and agree, when no steps lead back: docs/decisions/0017
PART_SLACK: Final = 2.0  # how far some parameters are away says little of how far all are; a part moves us less anyway
ONE: Final = 0.5  # of a squared difference: a single parameter that makes more of it is no model far away

TOO_LARGE: Final = MergeReport(False, "its values are so large that their squares overflow", 0.0, fault=True)
"""SLERP and Krum would make NaN of them."""
NOT_FINITE: Final = MergeReport(False, "our own parameters are not finite until the round ends", 0.0)


class Part(NamedTuple):
    """What came of a model: so much of its parameters; whether a single one makes most of the difference. Of a
    fragment, how far away others usually are in its places, once that is known, and our own norm there; both as if all
    parameters were so."""

    share: float = 1.0
    one: bool = False
    usual: float | None = None
    own: float = 0.0

    @property
    def slack(self) -> float:
        return min(PART_SLACK, 1.0 / math.sqrt(self.share))


ALL: Final = Form()
WHOLE: Final = Part()


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
        self._norm = STRAY_NORM
        self._bound, self._buffers_bound = (ClippingBound(self.rule.factor) for _ in range(2))
        self.places: PlaceDistances | None = None
        """From the first fragment on."""

    def settle(self) -> None:
        """All rest, and our parameters have become what all are to agree on."""
        self.forget()
        self._norm = SETTLED_NORM

    def stepped(self) -> None:
        """Our parameters have taken a step."""
        self._norm = STRAY_NORM

    def places_known(self) -> PlaceDistances:
        self.places = self.places or PlaceDistances()
        return self.places

    def take(self, x: A, m: A, weight: float, form: Form = ALL, room: A | None = None) -> MergeReport:
        """x <- (1 - weight) x + weight m by the rule; x (P,) is changed in place, m (P,) is used up, or `room` (P,)
        where that is given.

        `m` is finite; it holds what goes of a model in that form, with all its buffers, and equals x elsewhere: the
        distance is what it would be were all parameters as far away as those.
        """
        check_weight(weight)
        split = self._split
        turns = self.rule.name == "slerp"
        if turns and not math.isfinite(_length(x)):
            return NOT_FINITE
        if fault := self._fault(m, _length(m)) if turns else self._wrong_variance(m):
            return fault
        target = slerp(x[None], m[None], np.array([weight]), split)[0] if turns else None
        differences = _difference(m, x, m if room is None else room)
        distance, away = _length(differences[:split]) / math.sqrt(form.share), _length(differences[split:])
        if not math.isfinite(distance + away):
            return TOO_LARGE if math.isfinite(_length(x)) else NOT_FINITE
        if target is not None:
            x[:] = target
            return MergeReport(True, "", distance)
        clips = self.rule.name == "clipping"
        owns = (_length(x[:split]), _length(x[split:])) if clips else (0.0, 0.0)
        part = WHOLE
        if clips and (form.share < 1.0 or self.places):
            part = _parts([self], form, x[None, :split], differences[None, :split], [distance], owns[:1])[0]
        factors = self._factors(weight, owns, (distance, away), part)
        if isinstance(factors, str):
            return MergeReport(False, factors, distance)
        if clips and split < len(x):
            _move(x[split:], differences[split:], factors[1])
            _move(x[:split], differences[:split], factors[0])
        else:
            _move(x, differences, factors[0])
        return MergeReport(True, "", distance)

    def take_together(self, x: A, models: Sequence[A]) -> list[MergeReport]:
        """x <- the rule of x and all `models` (P,), which are finite; a report for each of them."""
        if not math.isfinite(_length(x)):
            return [NOT_FINITE] * len(models)
        reports: list[MergeReport] = []
        stack = [x]
        for model in models:
            fault = self._fault(model, _length(model))
            reports.append(fault or MergeReport(True, "", _length((model - x)[: self._split])))
            if fault is None:
                stack.append(model)
        if len(stack) < self.rule.needs:
            few = f"the merge {self.rule.name} needs {self.rule.needs} models, there are {len(stack)}"
            return [report if report.fault else MergeReport(False, few, report.distance) for report in reports]
        x[:] = merge(self.rule, _stacked(stack), coordinates=self._coordinates)
        return reports

    def _fault(self, m: A, length: float) -> MergeReport | None:
        """What is wrong with values, of that norm, that no honest peer sends."""
        return self._wrong_variance(m) or (None if math.isfinite(length) else TOO_LARGE)

    def _wrong_variance(self, m: A) -> MergeReport | None:
        try:
            check_variances(m, self._coordinates)
        except RemoteError as error:
            return MergeReport(False, str(error), 0.0, fault=True)
        return None

    def _factors(
        self, weight: float, owns: tuple[float, float], distances: tuple[float, float], part: Part
    ) -> tuple[float, float] | str:
        """By how much parameters, and buffers, go towards a model at these distances, our own norms being `owns`, which
        only clipping asks for; text: it is left out, for that reason."""
        if self.rule.name != "clipping":
            return weight, weight
        factor = self._clipped(weight, owns[0], distances[0], part)
        if isinstance(factor, str) or not self._coordinates.buffers:
            return factor if isinstance(factor, str) else (factor, factor)
        return factor, self._buffers_factor(weight, owns[1], distances[1])

    def _clipped(self, weight: float, own: float, distance: float, part: Part) -> float | str:
        """By how much to go towards a model at that distance, our own norm being `own`; text: it is left out, for that
        reason."""
        usual, bound = self._bound.usual, self._bound.bound(own) * part.slack
        self._bound.learn(distance)
        if part.usual is not None:
            usual, bound, own = part.usual, max(self.rule.factor * part.usual, FLOOR * own), part.own
        if usual is not None and not part.one and distance > max(self._stray * usual, self._norm * own):
            times = f"{distance / usual:.0f} times" if usual else "much"
            return f"left out: its model is {times} as far from ours as usual"
        return weight * clipping_factor(distance, bound)

    def _buffers_factor(self, weight: float, own: float, distance: float) -> float:
        bound = self._buffers_bound.bound(own)
        self._buffers_bound.learn(distance)
        return weight * clipping_factor(distance, bound)


class Places(NamedTuple):
    """Some rows of arrays (N, P): those of `x` are to take those of `models`, pair by pair."""

    x: A
    rows: Sequence[int]
    models: A
    theirs: Sequence[int]


def take_places(mergers: Sequence[Merger], places: Places, weights: Sequence[float]) -> list[MergeReport]:
    """`Merger.take` for each of these pairs of numpy's rows, whole models, no row of `x` twice; by any rule but
    `slerp`. In compiled loops (`arrays.can_compile`), which touch each number twice and need no room."""
    from gossipml.models import loops  # imports numba

    first, reports = mergers[0], []
    x, models = places.x, places.models
    rows, theirs = np.array(places.rows), np.array(places.theirs)
    split, clips = first._split, first.rule.name == "clipping"
    factors = np.zeros((len(rows), 2), dtype=np.float32)
    measured = loops.compare(x, rows, models, theirs, split, clips).tolist()
    for place, (merger, weight, found) in enumerate(zip(mergers, weights, measured, strict=True)):
        check_weight(weight)
        own, own_buffers, distance, away = map(math.sqrt, found)
        if fault := first._wrong_variance(models[theirs[place]]):
            reports.append(fault)
        elif not math.isfinite(distance + away):
            reports.append(TOO_LARGE if math.isfinite(_length(x[rows[place]])) else NOT_FINITE)
        else:
            chosen = merger._factors(weight, (own, own_buffers), (distance, away), WHOLE)
            if isinstance(chosen, str):
                reports.append(MergeReport(False, chosen, distance))
            else:
                factors[place] = chosen
                reports.append(MergeReport(True, "", distance))
    loops.approach(x, rows, models, theirs, split, factors)
    return reports


def compile_places() -> None:
    """Has the loops of `take_places` compiled, or read from numba's cache: before processes are forked that would each
    do it."""
    from gossipml.models import loops  # imports numba

    models, rows = np.empty((0, 1), dtype=np.float32), np.empty(0, dtype=np.int64)
    loops.compare(models, rows, models, rows, 0, False)
    loops.approach(models, rows, models, rows, 0, np.empty((0, 2), dtype=np.float32))


def take_rows(mergers: Sequence[Merger], x: A, m: A, weights: Sequence[float], form: Form = ALL) -> list[MergeReport]:
    """`Merger.take` of N peers at once, each with its own merger, all of one rule: x and m are (N, P).

    For a GPU, where many small operations cost more than passes over memory; on a CPU it is the other way round.
    """
    first = mergers[0]
    split, rule = first._split, first.rule.name
    for weight in weights:
        check_weight(weight)
    owns = _lengths(x[:, :split])
    refused = {place: NOT_FINITE for place, own in enumerate(owns) if not math.isfinite(own)}
    for place, length in enumerate(_lengths(m)):
        if fault := first._fault(m[place], length):
            refused[place] = fault
    if refused:
        others = [place for place in range(len(x)) if place not in refused]
        if others:
            own = x[others]
            chosen = [mergers[place] for place in others]
            found = take_rows(chosen, own, m[others], [weights[place] for place in others], form)
            x[others] = own
            refused |= zip(others, found, strict=True)
        return [refused[place] for place in range(len(x))]
    target = slerp(x, m, np.array(weights), split) if rule == "slerp" else None
    m -= x  # from here on the differences
    distances = [length / math.sqrt(form.share) for length in _lengths(m[:, :split])]
    if target is not None:
        x[:] = target
        return [MergeReport(True, "", distance) for distance in distances]
    parts = [WHOLE] * len(x)
    if rule == "clipping" and (form.share < 1.0 or any(merger.places for merger in mergers)):
        parts = _parts(mergers, form, x[:, :split], m[:, :split], distances, owns)
    moves = [
        merger._clipped(weight, own, distance, part) if rule == "clipping" else weight
        for merger, weight, own, distance, part in zip(mergers, weights, owns, distances, parts, strict=True)
    ]
    factors = [0.0 if isinstance(move, str) else move for move in moves]
    if rule == "clipping" and split < x.shape[-1]:
        lengths = zip(mergers, weights, moves, _lengths(x[:, split:]), _lengths(m[:, split:]), strict=True)
        _move_rows(
            x[:, split:],
            m[:, split:],
            [
                0.0 if isinstance(move, str) else merger._buffers_factor(weight, own, distance)
                for merger, weight, move, own, distance in lengths
            ],
        )
        _move_rows(x[:, :split], m[:, :split], factors)
    else:
        _move_rows(x, m, factors)
    return [
        MergeReport(not isinstance(move, str), move if isinstance(move, str) else "", distance)
        for move, distance in zip(moves, distances, strict=True)
    ]


def _difference(m: A, x: A, out: A) -> A:
    """m - x."""
    if is_numpy(x):
        with np.errstate(over="ignore"):  # infinite then
            return np.subtract(m, x, out=out)
    import torch  # somebody has made tensors of it

    found: A = torch.sub(m, x, out=out)
    return found


def _parts(
    mergers: Sequence[Merger], form: Form, x: A, differences: A, distances: Sequence[float], owns: Sequence[float]
) -> list[Part]:
    """What clipping wants to know of what came in that form, for each row of parameters (N, P) at these distances from
    what is of these norms; and what it learns of it."""
    if form.fragments == 1:
        rows = zip(differences, distances, owns, strict=True)
        some = form.share < 1.0
        parts = [Part(form.share, some and far > STRAY_NORM * own and _is_one(found)) for found, far, own in rows]
        if not any(merger.places for merger in mergers):
            return parts
    begin, end = form.stretch(x.shape[-1])
    where = pieces(x.shape[-1], begin, end)
    given = 1.0 if form.fragments > 1 else form.share  # of the parameters in these places
    lengths = [_lengths(differences[:, piece.begin : piece.end]) for piece in where]  # of each piece in each row
    scales = [math.sqrt(x.shape[-1] / (piece.end - piece.begin) / given) for piece in where]
    if form.fragments > 1:
        owns = [own / math.sqrt(form.share) for own in _lengths(x[:, begin:end])]
        parts = [
            Part(form.share, usual=merger.places_known().usual(where), own=own)
            for merger, own in zip(mergers, owns, strict=True)
        ]
    for row, merger in enumerate(mergers):
        if merger.places is not None:
            merger.places.learn(where, [scale * found[row] for scale, found in zip(scales, lengths, strict=True)])
    return parts


def _is_one(differences: A) -> bool:
    """Whether a single parameter makes most of these (P,)."""
    if not len(differences):
        return False
    largest = float(max(differences.max(), -differences.min()))
    return largest * largest > ONE * _length(differences) ** 2


def _move(x: A, differences: A, factor: float) -> None:
    """x (P,) += factor times the differences, which are used up."""
    if is_numpy(x):
        differences *= np.float32(factor)
        x += differences
    else:
        x.add_(differences, alpha=factor)


def _move_rows(x: A, differences: A, factors: Sequence[float]) -> None:
    """x (N, P) += each factor times its difference, which is used up."""
    if is_numpy(x):
        differences *= np.array(factors, np.float32)[:, None]
        x += differences
    else:
        x.addcmul_(differences, x.new_tensor(factors)[:, None])


def _lengths(rows: A) -> list[float]:
    """L2 norms of (N, P), without a temporary of that size; numpy: dot products take a tenth of squaring and adding."""
    if is_numpy(rows):
        return [_length(row) for row in rows]
    import torch  # somebody has made tensors of it

    lengths: list[float] = torch.linalg.vector_norm(rows, dim=-1).tolist()
    return lengths


def _length(vector: A) -> float:
    """L2 norm; as a dot product a tenth of what squaring and adding up takes."""
    if not is_numpy(vector):
        return math.sqrt(vector.dot(vector).item()) if vector.shape[0] else 0.0
    if not len(vector):
        return 0.0
    with np.errstate(over="ignore"):  # infinite then
        return math.sqrt(float(vector @ vector))


def _stacked(models: list[A]) -> A:
    """(K, P)."""
    if is_numpy(models[0]):
        return np.stack(models)
    import torch  # somebody has made tensors of it

    return torch.stack(models)
