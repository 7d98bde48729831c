"""Loops over the parameters of models, compiled by numba where it is installed (the extra `simulate`): how far models
are from each other, and merges, which so touch each number twice. Training is in `loops_dense`.

Everything is float32. What numba has compiled it keeps in `__pycache__`, or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, ParamSpec, TypeVar

import numba
import numpy as np
from llvmlite import binding
from numpy.typing import NDArray

# Registers of 512 bits where there are any; LLVM by itself leaves them unused, and products take a third longer.
_config: Any = numba.config  # Any: its settings are made at run time
_config.CPU_NAME = binding.get_host_cpu_name()
_config.CPU_FEATURES = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"

P = ParamSpec("P")
T = TypeVar("T")

ZERO: Final = np.float32(0)


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Sums may be taken in any order, as in a matrix product; NaN and infinity are what they are."""
    made: Callable[P, T] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})(
        function
    )
    with suppress(RuntimeError):  # no folder for it can be written: it is compiled each time
        made.enable_caching()  # type: ignore[attr-defined]  # numba's
        cache = made._cache  # type: ignore[attr-defined]  # the same
        cache.save_overload = _if_there_is_room(cache.save_overload)
    return made


def _if_there_is_room(save: Callable[P, None]) -> Callable[P, None]:
    """On a full disk, too, it is compiled each time."""

    def saved(*args: P.args, **kwargs: P.kwargs) -> None:
        with suppress(OSError):
            save(*args, **kwargs)

    return saved


@compiled
def compare(
    x: NDArray[np.float32],
    rows: NDArray[np.int64],
    models: NDArray[np.float32],
    theirs: NDArray[np.int64],
    split: int,
    norms: bool,
) -> NDArray[np.float64]:
    """Sums of squares (n, 4): of each of these rows of x (N, P), where `norms` are wanted, up to `split` and from there
    on, and of its difference from that row of `models`."""
    found = np.zeros((len(rows), 4))
    for place in range(len(rows)):
        own, model = x[rows[place]], models[theirs[place]]
        parts = ((own[:split], model[:split]), (own[split:], model[split:]))
        for part in range(2):
            ours, other = parts[part]
            apart = length = ZERO
            for k in range(len(ours)):
                difference = other[k] - ours[k]
                apart += difference * difference
            if norms:
                for k in range(len(ours)):
                    length += ours[k] * ours[k]
            found[place, part], found[place, 2 + part] = length, apart
    return found


@compiled
def approach(
    x: NDArray[np.float32],
    rows: NDArray[np.int64],
    models: NDArray[np.float32],
    theirs: NDArray[np.int64],
    split: int,
    factors: NDArray[np.float32],
) -> None:
    """Moves each of these rows by its `factors` (n, 2) of the way to that row of `models`, up to `split` and from there
    on; by 0 of it not at all, whatever is there."""
    for place in range(len(rows)):
        own, model = x[rows[place]], models[theirs[place]]
        parts = ((own[:split], model[:split]), (own[split:], model[split:]))
        for part in range(2):
            ours, other = parts[part]
            factor = factors[place, part]
            if factor != 0:
                for k in range(len(ours)):
                    ours[k] += factor * (other[k] - ours[k])
