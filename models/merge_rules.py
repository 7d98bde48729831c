"""Merges by name, as a configuration has them: each takes our own model and those that came in, and gives one.

| name | needs | |
|---|---|---|
| `mean` | | uniform mean |
| `age` | | mean weighted by age |
| `slerp` | | spherical, norm kept, one after the other, weighted by age |
| `trimmed-mean:F` | 2 F + 1 models | without the F lowest and highest values of each coordinate |
| `median` | 3 models | of each coordinate |
| `krum:F` | 2 F + 3 models | the one in the densest neighbourhood |
| `multi-krum:F` | 2 F + 3 models | the mean of the K - F - 2 densest |
| `clipping`, `clipping:X` | a bound | age-weighted differences, each no longer than the bound: X times the usual distance [1.5] (the daemon's default) |

F is how many of the models may lie; our own is one of the models. The daemon merges one model at a time by the rules
that need 1, and collects models for the others (`merger`). With fewer models than a rule needs there is
no merge: a plain mean instead would be what a liar who lets messages vanish wants.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from gossipml.errors import LocalError, UserError
from gossipml.models.arrays import A
from gossipml.models.averaging import Coordinates, age_weighted_mean, mean, shares
from gossipml.models.merging import FACTOR
from gossipml.models.robust import centred_clipping, krum, median, trimmed_mean
from gossipml.models.slerp import slerp

PLAIN: Final = ("mean", "age", "slerp", "median", "clipping")
WITH_F: Final = ("trimmed-mean", "krum", "multi-krum")
MOST_LIARS: Final = 1000  # bounds the models that a slip in a configuration makes a peer wait for
MOST_FACTOR: Final = 100.0  # of clipping: beyond, nothing is clipped
_RULE: Final = re.compile(r"([a-z-]+)(?::([0-9]{1,4}(?:\.[0-9]{1,4})?))?", re.ASCII)


@dataclass(frozen=True)
class MergeRule:
    name: str
    f: int = 0
    factor: float = FACTOR
    """Of clipping."""

    @property
    def text(self) -> str:
        """What `parse_merge` takes back."""
        if self.name in WITH_F:
            return f"{self.name}:{self.f}"
        return self.name if self.factor == FACTOR else f"{self.name}:{self.factor:g}"

    @property
    def needs(self) -> int:
        """Models, our own with them."""
        match self.name:
            case "trimmed-mean":
                return 2 * self.f + 1
            case "median":
                return 3
            case "krum" | "multi-krum":
                return 2 * self.f + 3
        return 1


def parse_merge(text: str) -> MergeRule:
    """UserError names what there is."""
    match = _RULE.fullmatch(text)
    name, parameter = (match[1], match[2]) if match else (text.partition(":")[0], None)
    if match and name in PLAIN and parameter is None:
        return MergeRule(name)
    if match and name == "clipping" and parameter is not None:
        if not 0 < float(parameter) <= MOST_FACTOR:
            raise UserError(
                f"merge {text!r}: clip at how many times the usual distance, up to {MOST_FACTOR:g}; for example "
                f"clipping:{FACTOR:g}"
            )
        return MergeRule(name, factor=float(parameter))
    if match and name in WITH_F:
        if parameter is None or not parameter.isdecimal() or not 1 <= int(parameter) <= MOST_LIARS:
            raise UserError(
                f"merge {text!r}: say how many models may lie, from 1 to {MOST_LIARS}, for example {name}:1"
            )
        return MergeRule(name, int(parameter))
    near = difflib.get_close_matches(name, (*PLAIN, *WITH_F), n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise UserError(f"there is no merge {text[:60]!r};{hint} choose {', '.join(PLAIN)}, {':1, '.join(WITH_F)}:1")


def merge(
    rule: MergeRule, models: A, *, ages: A | None = None, bound: A | None = None, coordinates: Coordinates | None = None
) -> A:
    """(..., K, P) -> (..., P). `models[..., 0, :]` is our own; `ages` (..., K), without them all equal; `bound` (...).

    All models are finite and have no negative variance (checked on receipt). LocalError when there are too few.
    """
    count = models.shape[-2]
    if count < rule.needs:
        raise LocalError(f"the merge {rule.name!r} needs {rule.needs} models, there are {count}; wait for more")
    match rule.name:
        case "mean":
            return mean(models)
        case "age":
            return mean(models) if ages is None else age_weighted_mean(models, ages)
        case "slerp":
            return _slerp_in_turn(models, ages, coordinates)
        case "trimmed-mean":
            return trimmed_mean(models, rule.f)
        case "median":
            return median(models)
        case "krum":
            return krum(models, rule.f)
        case "multi-krum":
            return krum(models, rule.f, count - rule.f - 2)
    if bound is None:
        raise LocalError("clipping needs the bound that was learnt from earlier exchanges")
    return centred_clipping(models, models[..., 0, :], bound, weights=ages)


def _slerp_in_turn(models: A, ages: A | None, coordinates: Coordinates | None) -> A:
    parts = shares(np.ones(models.shape[:-1]) if ages is None else ages)  # (..., K)
    result, mass = models[..., 0, :], parts[..., 0]
    for number in range(1, models.shape[-2]):
        share = parts[..., number]
        mass = mass + share
        weight = share / (mass + (mass == 0))
        result = slerp(result, models[..., number, :], weight, coordinates.parameters if coordinates else None)
    return result
