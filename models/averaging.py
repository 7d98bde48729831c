"""Means of models, and which coordinates of a model are averaged how.

`models` is a stack (..., K, P): K models of P parameters, or (N, K, P) for all N peers of a simulation at once.

- `mean`: uniform (McMahan et al. 2017, federated averaging; Boyd et al. 2006, gossip averaging).
- `age_weighted_mean`: by the number of samples behind each model (Ormandi, Hegedus, Jelasity 2013; Hegedus, Danner,
  Jelasity 2021). An age is a claim of its sender: bound it before (`gossipml.peer.ages`).

| coordinates | how |
|---|---|
| parameters | by the chosen rule |
| running means and variances of batch norm | the same weighted mean, also where parameters go by SLERP, which is no convex combination and would inflate them; a convex combination of variances is a variance |
| other floating-point buffers | like those |
| counters (integer buffers) | the maximum; they are not in the vector |

A mean of running variances leaves out that the means differ, too: the variance of the pooled data is larger by the
spread of the means. Local steps put that right within some batches, for the data that the peer has.
A negative variance is refused on receipt (`check_variances`); that keeps all merged ones non-negative, and above
(1 - weight) times our own. Left out: layers whose statistics stay local (FedBN: Li et al. 2021).
"""  # noqa: E501 a table row is one line

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossipml.errors import LocalError, RemoteError
from gossipml.models.arrays import A, Few, few, is_numpy, like

MAX_COUNTER = 2**53  # a liar's count must leave room for ours to grow, and a float counts no further


@dataclass(frozen=True)
class Coordinates:
    """What lies where in a flat vector (see `flat`): `parameters` of them, then buffers."""

    size: int
    parameters: int
    variances: tuple[tuple[int, int], ...] = ()
    """Begin and end of each stretch that holds running variances."""

    @property
    def buffers(self) -> int:
        """How many of the last coordinates are no parameters: sent exactly, averaged plainly."""
        return self.size - self.parameters


def coordinates_of(module: A) -> Coordinates:
    """Of a torch module, in the order of its flat vector: parameters, then floating-point buffers."""
    place = parameters = sum(parameter.numel() for parameter in module.parameters())
    variances = []
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            if name.rpartition(".")[2] == "running_var":
                variances.append((place, place + buffer.numel()))
            place += buffer.numel()
    return Coordinates(place, parameters, tuple(variances))


def check_variances(model: A, coordinates: Coordinates) -> None:
    """RemoteError when a running variance in `model` (..., P) is negative. The values are finite (checked before)."""
    for start, stop in coordinates.variances:
        lowest = float(model[..., start:stop].min())
        if lowest < 0:
            raise RemoteError(f"update holds a running variance of {lowest:g}; a variance is at least 0")


def merge_counters(counters: A) -> A:
    """(..., K) integers -> (...): the largest, because work that one has seen is not seen twice.

    RemoteError when one is negative or beyond MAX_COUNTER.
    """
    highest, lowest = (few(counters).max(initial=0), few(counters).min(initial=0))
    if lowest < 0 or highest > MAX_COUNTER:
        raise RemoteError(f"a counter is {lowest if lowest < 0 else highest:g}; it is from 0 to 2^53")
    return counters.max(-1) if is_numpy(counters) else counters.amax(-1)


def shares(weights: A) -> Few:
    """Weights (..., K), at least 0, as shares that add up to 1; equal shares where all are 0.

    LocalError for other weights: what a peer claims was checked before.
    """
    given = few(weights)
    if not (given >= 0).all() or not np.isfinite(total := given.sum(-1, keepdims=True)).all():  # NaN compares false
        raise LocalError("weights of a mean must be finite and at least 0")
    result: Few = np.where(total > 0, given, 1.0) / np.where(total > 0, total, given.shape[-1])
    return result


def mean(models: A, weights: A | None = None) -> A:
    """(..., K, P) -> (..., P), weighted by `weights` (..., K) where given. One pass over the models."""
    if weights is None:
        return models.mean(-2)
    return (like(models, shares(weights))[..., None, :] @ models)[..., 0, :]


def age_weighted_mean(models: A, ages: A) -> A:
    """`mean` weighted by ages (..., K) in samples; models that have seen nothing count equally among themselves."""
    return mean(models, ages)
