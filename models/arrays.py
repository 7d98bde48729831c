"""The few operations that numpy arrays and torch tensors spell differently, so that merging and compression are
written once for both. No torch is imported: what is not a numpy array is taken for a tensor.

The last axis holds the P parameters of a model. Work on it goes in slices that stay in the cache, and never needs
more than a slice beside its arguments and its result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("gossipml.models")

A: TypeAlias = Any  # a numpy array or a torch tensor
Few: TypeAlias = NDArray[np.float64]  # a number or some for each model, never for each parameter

IN_CACHE: Final = 1 << 17  # values of all models in a slice: 512 KiB, in the second-level cache with their scratch
ON_DEVICE: Final = 1 << 26  # the same on a GPU, where each slice costs a launch: 256 MiB


@cache
def can_compile() -> bool:
    """Whether there is numba (the extra `simulate`), and with it `loops`. It is imported, which takes half a second:
    one that is too old for its numpy is there and is of no use."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError as error:
        log.warning("numba cannot be used (%s); small networks are trained without it, more slowly", error)
        return False
    return True


def is_numpy(values: A) -> bool:
    return isinstance(values, np.ndarray | np.generic)


def slices(values: A) -> Iterator[slice]:
    """Covers the last axis."""
    size = values.shape[-1]
    models = max(1, int(np.prod(values.shape[:-1])))
    at_once = IN_CACHE if is_numpy(values) or values.device.type == "cpu" else ON_DEVICE
    width = max(256, at_once // models)
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def empty(like: A, shape: tuple[int, ...]) -> A:
    """Of the same kind, type and device, without values."""
    return np.empty(shape, dtype=like.dtype) if is_numpy(like) else like.new_empty(shape)


def few(values: A) -> Few:
    """A number for each model, as float64 in numpy whatever it came as."""
    if not is_numpy(values) and hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def like(values: A, numbers: NDArray[np.floating]) -> A:
    """Numbers of `few` in the kind and type of `values`."""
    return numbers.astype(values.dtype) if is_numpy(values) else values.new_tensor(numbers)


def minimum(a: A, b: A) -> A:
    return np.minimum(a, b) if is_numpy(a) else a.minimum(b)


def maximum(a: A, b: A) -> A:
    return np.maximum(a, b) if is_numpy(a) else a.maximum(b)


def largest(values: A) -> A:
    """Along the last axis."""
    return values.max(-1) if is_numpy(values) else values.amax(-1)


def take(values: A, indices: A) -> A:
    """values[..., indices] with other indices for each model: (..., P), (..., k) -> (..., k)."""
    return np.take_along_axis(values, indices, -1) if is_numpy(values) else values.gather(-1, indices)


def put(values: A, indices: A, new: A) -> None:
    """Undoes `take`, in place."""
    if is_numpy(values):
        np.put_along_axis(values, indices, new, -1)
    else:
        values.scatter_(-1, indices, new)


def take_models(models: A, indices: NDArray[np.intp]) -> A:
    """(..., K, P), (..., m) -> (..., m, P)."""
    if is_numpy(models):
        return np.take_along_axis(models, indices[..., None], -2)
    chosen = models.new_tensor(indices).long()[..., None]
    return models.gather(-2, chosen.expand(*indices.shape, models.shape[-1]))


def top(values: A, k: int) -> A:
    """Ascending indices of the k largest along the last axis; which of equal ones is not said."""
    if is_numpy(values):
        size = values.shape[-1]
        indices: A = np.argpartition(values, size - k, axis=-1)[..., size - k :] if k < size else np.argsort(values, -1)
        indices.sort(axis=-1)
        return indices
    return values.topk(k, dim=-1, sorted=False).indices.sort(-1).values
