"""Which samples of the train part belong to which peer: `--split RULE --part I/N`.

- `iid`: a random N-th.
- `dirichlet:ALPHA`: each class is divided by proportions drawn from Dirichlet(ALPHA) (Hsu, Qi, Brown 2019);
  drawn again while a part is too small, and after REDRAWS tries filled up from the largest part.
- `labels:K`: at most K classes a peer, dealt in turn from one shuffled order, so that all classes are covered
  when N * K reaches their number (samples of a class that nobody holds belong to nobody).
- `shards:K`: the samples in the order of their class, cut into N * K shards of equal size, K random ones a peer
  (McMahan et al. 2017, section 3): mostly K classes a peer, and parts of equal size. Of values in their order, too.

Every part is computed by every peer from the seed alone and is the same everywhere: parts never overlap, and
under `iid` and `dirichlet` they cover everything. Randomness is numpy's `RandomState` over PCG64, because its
algorithms are frozen, while those of `Generator` may change with a release of numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.registry import nearest

MIN_PART = 10  # samples: one for validation, the others to learn from
REDRAWS = 20  # enough for 100 parts of MNIST at ALPHA 0.5; smaller ALPHA is filled up
MAX_PARTS = 100_000
ALPHA_BOUNDS = (0.01, 1e6)  # below: float64 gamma draws underflow; above: it is `iid`
VALIDATION_SHARE = 0.1
RULES = ("iid", "dirichlet:ALPHA", "labels:K", "shards:K")

Indices = NDArray[np.int64]
Targets: TypeAlias = "NDArray[np.int64] | NDArray[np.float32]"


@dataclass(frozen=True)
class Rule:
    """A parsed RULE; `value` is ALPHA or K."""

    kind: Literal["iid", "dirichlet", "labels", "shards"]
    value: float = 0.0


@dataclass(frozen=True)
class Part:
    """The `index`-th (from 1) of `count` parts."""

    index: int
    count: int


def parse_rule(text: str) -> Rule:
    """UserError names the value and its bound."""
    name, colon, argument = text.partition(":")
    if name == "iid" and not colon:
        return Rule("iid")
    if name == "dirichlet":
        low, high = ALPHA_BOUNDS
        try:
            alpha = float(argument)
        except ValueError:
            alpha = math.nan
        if not low <= alpha <= high:
            raise UserError(f"dirichlet takes a number from {low:g} to {high:g}, not {argument!r}; try dirichlet:0.5")
        return Rule("dirichlet", alpha)
    if name == "labels":
        if not argument.isascii() or not argument.isdigit() or len(argument) > 6 or int(argument) < 1:
            raise UserError(f"labels takes a number of classes from 1, not {argument!r}; try labels:4")
        return Rule("labels", int(argument))
    if name == "shards":
        if not argument.isascii() or not argument.isdigit() or len(argument) > 4 or int(argument) < 1:
            raise UserError(f"shards takes a number of shards a peer from 1 to 9999, not {argument!r}; try shards:2")
        return Rule("shards", int(argument))
    raise UserError(f"there is no split rule {text!r}; {nearest(name, RULES)}")


def parse_part(text: str) -> Part:
    """`I/N`, I from 1 to N. UserError names the value and its bound."""
    index, _, count = text.partition("/")
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in (index, count)):
        raise UserError(f"part {text!r} is not I/N; write for example 1/4 for the first of four parts")
    part = Part(int(index), int(count))
    if not 1 <= part.count <= MAX_PARTS:
        raise UserError(f"part {text!r}: there can be 1 to {MAX_PARTS} parts, not {part.count}")
    if not 1 <= part.index <= part.count:
        raise UserError(f"part {text!r}: the part is from 1 to {part.count}, not {part.index}")
    return part


def part_indices(targets: Targets, classes: int, rule: Rule, part: Part, seed: int) -> Indices:
    """The samples of one part, in ascending order."""
    return split_indices(targets, classes, rule, part.count, seed)[part.index - 1]


def split_indices(targets: Targets, classes: int, rule: Rule, count: int, seed: int) -> list[Indices]:
    """The samples of all parts, each in ascending order and none empty. UserError when that is impossible."""
    smallest = min(MIN_PART, len(targets))
    if count * smallest > len(targets):
        raise UserError(
            f"{len(targets)} samples cannot be divided into {count} parts of at least {smallest}; "
            f"at most {len(targets) // smallest} parts"
        )
    if targets.dtype.kind == "f" and rule.kind in ("dirichlet", "labels"):
        raise UserError(f"{rule.kind} divides by class, and these targets are values; use iid, or shards:K")
    rng = _random(seed, "split")
    match rule.kind:
        case "iid":
            parts = np.array_split(rng.permutation(len(targets)), count)
        case "dirichlet":
            parts = _split_dirichlet(targets, classes, rule.value, count, smallest, rng)
        case "labels":
            parts = _split_labels(targets, classes, int(rule.value), count, rng)
        case "shards":
            parts = _split_shards(targets, int(rule.value), count, rng)
    return [np.sort(indices).astype(np.int64) for indices in parts]


def hold_out(indices: Indices, part: Part, seed: int) -> tuple[Indices, Indices]:
    """A part as (for training, for validation); a tenth, at least one sample, is held out. A part of one
    sample validates on it."""
    shuffled = _random(seed, "validation", part.index, part.count).permutation(indices)
    held = max(1, int(len(indices) * VALIDATION_SHARE))
    if len(indices) == 1:
        return indices, indices
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def _random(seed: int, purpose: str, *numbers: int) -> np.random.RandomState:
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, *purpose.encode(), *numbers]
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence(words)))


def _split_dirichlet(
    targets: Targets,
    classes: int,
    alpha: float,
    count: int,
    smallest: int,
    rng: np.random.RandomState,
) -> list[Indices]:
    parts: list[Indices] = []
    for _ in range(REDRAWS):
        pieces: list[list[Indices]] = [[] for _ in range(count)]
        for label in range(classes):
            members = rng.permutation(np.flatnonzero(targets == label))
            weights = rng.standard_gamma(alpha, size=count)
            total = weights.sum()
            shares = weights / total if total > 0 else np.eye(count)[rng.randint(count)]
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for piece, cut in zip(pieces, np.split(members, cuts), strict=True):
                piece.append(cut)
        parts = [np.concatenate(piece) for piece in pieces]
        if min(map(len, parts)) >= smallest:
            return parts
    return _fill_up(parts, smallest)


def _fill_up(parts: list[Indices], smallest: int) -> list[Indices]:
    """Moves samples from the largest part into those that are too small; there are enough (checked before)."""
    for number, part in enumerate(parts):
        while len(part) < smallest:
            largest = max(range(len(parts)), key=lambda other: len(parts[other]))
            take = min(smallest - len(part), len(parts[largest]) - smallest)
            part = np.concatenate([part, parts[largest][:take]])
            parts[largest] = parts[largest][take:]
        parts[number] = part
    return parts


def _split_labels(
    targets: Targets, classes: int, per_part: int, count: int, rng: np.random.RandomState
) -> list[Indices]:
    present = np.flatnonzero(np.bincount(targets.astype(np.int64), minlength=classes))  # a source may lack some
    if per_part > len(present):
        raise UserError(f"labels:{per_part}: there are {len(present)} classes; use labels:1 to labels:{len(present)}")
    order = present[rng.permutation(len(present))]
    holders: list[list[int]] = [[] for _ in range(classes)]
    for number in range(count):
        for place in range(per_part):
            holders[order[(number * per_part + place) % len(present)]].append(number)
    pieces: list[list[Indices]] = [[] for _ in range(count)]
    for label, held_by in enumerate(holders):
        members = rng.permutation(np.flatnonzero(targets == label))
        for number, cut in zip(held_by, np.array_split(members, max(1, len(held_by))), strict=False):
            pieces[number].append(cut)
    parts = [np.concatenate(piece) for piece in pieces]
    if min(map(len, parts)) == 0:
        raise UserError(f"labels:{per_part}: some class has too few samples for {count} parts; use fewer parts")
    return parts


def _split_shards(targets: Targets, per_part: int, count: int, rng: np.random.RandomState) -> list[Indices]:
    if count * per_part > len(targets):
        most = max(1, len(targets) // count)
        raise UserError(
            f"shards:{per_part}: {len(targets)} samples cannot be cut into {count * per_part} shards; use shards:1 to "
            f"shards:{most}"
        )
    shuffled = rng.permutation(len(targets))  # which samples of a class share a shard is random, too
    ordered = shuffled[np.argsort(targets[shuffled], kind="stable")]
    dealt = rng.permutation(count * per_part).reshape(count, per_part)
    least, left = divmod(len(targets), dealt.size)
    sizes = np.full(dealt.size, least)
    sizes[dealt.T.ravel()[:left]] += 1  # the larger shards go round, so that parts differ by one sample at most
    shards = np.split(ordered, np.cumsum(sizes)[:-1])
    return [np.concatenate([shards[shard] for shard in own]) for own in dealt]
