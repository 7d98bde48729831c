"""Merges that hold against f liars among K models, and the first look at what came in.

`models` is a stack (..., K, P), with our own model in it, of finite values (`check_incoming`). `f` is how many of
them may lie, in any way, together, knowing all the others; each rule refuses fewer models than its proof needs,
instead of answering without a guarantee.

| rule | needs | what f liars can do at most |
|---|---|---|
| `trimmed_mean`, `median` (Yin et al. 2018) | K > 2 f | every coordinate stays between two honest values |
| `krum` (Blanchard et al. 2017; several: El Mhamdi et al. 2018) | K >= 2 f + 3 | each chosen model is within sqrt((K-f-2) / (K-2f-1)) times the largest distance of two honest models from an honest one |
| `centred_clipping` (Karimireddy, He, Jaggi 2021; one's own centre: He, Karimireddy, Jaggi 2022) | - | move the result by 2 f / K times the bound, each iteration |

Peers with uneven data are honestly far apart: there medians and Krum drop the rare classes that only few peers
know, and clipping costs least (docs/choosing.md). Left out: geometric median, bucketing before the
rule (Karimireddy, He, Jaggi 2022), stacks whose K differs from peer to peer.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import LocalError, RemoteError
from gossipml.models.arrays import A, Few, empty, few, like, maximum, minimum, slices, take_models
from gossipml.models.averaging import shares
from gossipml.models.merging import clipped_difference, is_finite

STRAY = 10.0  # clipping bounds: who is further away is not merely another part of the data (guess; 30 medians)


def check_incoming(model: A, own: A) -> None:
    """RemoteError unless `model` has the shape and type of our own and all its values are finite."""
    if tuple(model.shape) != tuple(own.shape):
        raise RemoteError(f"update of shape {list(model.shape)}; the model here has {list(own.shape)}")
    if model.dtype != own.dtype:
        raise RemoteError(f"update of {model.dtype}; the model here is {own.dtype}")
    if not is_finite(model):
        raise RemoteError("update holds values that are not finite")


def strays(length: float, bound: float) -> bool:
    """Whether a difference of that norm deserves a strike, `bound` being what is merged whole (`ClippingBound`)."""
    return not length <= STRAY * bound  # NaN compares false


def trimmed_mean(models: A, f: int) -> A:
    """(..., K, P) -> (..., P): in each coordinate without the f lowest and the f highest values, the mean."""
    count = models.shape[-2]
    _check_count("trimmed mean", f, count, 2 * f + 1)
    result = empty(models, (*models.shape[:-2], models.shape[-1]))
    for piece in slices(models):
        kept = _sorted_rows(models[..., piece])[f : count - f]
        lowest, total = kept[0], None
        for row in kept[1:]:  # around the lowest: equal values give that value, bit by bit
            total = row - lowest if total is None else total + (row - lowest)
        result[..., piece] = lowest if total is None else lowest + total / len(kept)
    return result


def median(models: A) -> A:
    """(..., K, P) -> (..., P): the median of each coordinate, of two middle values their mean. f is (K - 1) // 2."""
    return trimmed_mean(models, (models.shape[-2] - 1) // 2)


def krum(models: A, f: int, chosen: int = 1) -> A:
    """(..., K, P) -> (..., P): the mean of the `chosen` models (at most K - f - 2) that `krum_choice` gives."""
    indices = krum_choice(models, f, chosen)
    if chosen == 1:
        return take_models(models, indices)[..., 0, :]
    result = empty(models, (*models.shape[:-2], models.shape[-1]))
    for piece in slices(models):
        result[..., piece] = take_models(models[..., piece], indices).mean(-2)
    return result


def krum_choice(models: A, f: int, chosen: int = 1) -> NDArray[np.intp]:
    """(..., chosen): the models with the smallest sums of squared distances to their K - f - 2 nearest others."""
    count = models.shape[-2]
    _check_count("Krum", f, count, 2 * f + 3)
    if not 1 <= chosen <= count - f - 2:
        raise LocalError(f"Krum chooses 1 to {count - f - 2} of {count} models when {f} may lie, not {chosen}")
    distances = _squared_distances(models)  # (..., K, K), the diagonal is 0 and comes first
    scores = np.sort(distances, -1)[..., 1 : count - f - 1].sum(-1)
    return np.argsort(scores, -1, kind="stable")[..., :chosen]


def centred_clipping(models: A, centre: A, bound: A, *, weights: A | None = None, iterations: int = 1) -> A:
    """(..., K, P), (..., P) -> (..., P): `centre` moved by the weighted mean of the differences, each clipped to the
    norm `bound` (...); again from there, `iterations` times. One's own model is a good centre."""
    count = models.shape[-2]
    parts = like(models, shares(np.ones(count) if weights is None else weights))  # (..., K)
    reach = like(models, few(bound))
    for _ in range(iterations):
        moved = centre
        for number in range(count):
            difference, _length = clipped_difference(centre, models[..., number, :], reach)
            moved = moved + parts[..., number, None] * difference
        centre = moved
    return centre


def _check_count(rule: str, f: int, count: int, least: int) -> None:
    if f < 0 or count < least:
        raise LocalError(f"{rule} against {f} liars needs {least} models or more, there are {count}; wait for more")


def _sorted_rows(models: A) -> list[A]:
    """The K rows (..., w), in each coordinate ascending. A network of minima and maxima: contiguous, and at K = 5
    twenty times faster than sorting columns."""
    rows = [models[..., number, :] for number in range(models.shape[-2])]
    for low, high in _comparators(len(rows)):
        rows[low], rows[high] = minimum(rows[low], rows[high]), maximum(rows[low], rows[high])
    return rows


def _comparators(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange for any count (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M)."""
    if count < 2:
        return
    top = 1 << ((count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            for i in range(count - d):
                if i & p == r:
                    yield i, i + d
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1


def _squared_distances(models: A) -> Few:
    """(..., K, P) -> (..., K, K). From differences: by inner products a liar far off would cancel all the others'
    digits through a common centre."""
    count = models.shape[-2]
    result = np.zeros((*models.shape[:-2], count, count))
    for piece in slices(models):
        part = models[..., piece]
        for i in range(count):
            differences = part[..., i + 1 :, :] - part[..., i : i + 1, :]  # (..., K - i - 1, w)
            result[..., i, i + 1 :] += few((differences * differences).sum(-1))
    upper = result
    return upper + np.swapaxes(upper, -1, -2)
