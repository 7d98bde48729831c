"""Loops over the numbers of small networks, compiled by numba where it is installed (the extra `simulate`).

Softmax regression on a batch of 32 is a million floating-point operations, 10 us; each operation of torch costs 3 us,
and 30 after a product that has pushed its code out of the cache. Here all steps of many peers are one call: the weights
of a peer stay in the fastest cache while it trains, and a sample is touched once.

Everything is float32. What numba has compiled it keeps in `__pycache__`, or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

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

SAMPLES, OUTPUTS = 4, 5  # of a block of products: its sums stay in registers
LANES: Final = 16  # numbers of the longest registers there are
LINE: Final = 64  # bytes of a cache line

ZERO = np.float32(0)
LOG2_E, SMALLEST = np.float32(1.4426950408889634), np.float32(-126)  # of the exponents that there are
# 2 ** r for r in [0, 1) to 1e-7, through its Chebyshev nodes.
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c) for c in (1.0, 0.693146944, 0.240230456, 0.0554806292, 0.00968418643, 0.00123913318, 0.000218657849)
)


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Sums may be taken in any order, as in a matrix product; NaN and infinity are what they are."""
    made: Callable[P, T] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})(
        function
    )
    with suppress(RuntimeError):  # no folder for it can be written: it is compiled each time
        made.enable_caching()  # type: ignore[attr-defined]  # numba's
    return made


Room: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def linear_room(batch: int, inputs: int, outputs: int) -> Room:
    """What `train_linear` works in: samples, outputs or the gradient by them, weights and velocities, all with some
    rows and columns more, so that there are whole blocks."""
    b, o = -(-batch // SAMPLES) * SAMPLES, -(-outputs // OUTPUTS) * OUTPUTS
    k = -(-(inputs + 1) // LANES) * LANES
    return _aligned(b, k), _aligned(b, o), _aligned(o, k), _aligned(o, k)


def _aligned(rows: int, columns: int) -> NDArray[np.float32]:
    """From the beginning of a cache line on."""
    size = 4 * rows * columns
    memory = np.empty(size + LINE, dtype=np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(np.float32).reshape(rows, columns)


@compiled
def train_linear(
    vectors: NDArray[np.float32],
    velocities: NDArray[np.float32],
    rows: NDArray[np.int64],
    steps: NDArray[np.int64],
    samples: NDArray[np.uint8] | NDArray[np.float32],
    targets: NDArray[np.int64],
    places: NDArray[np.int64],
    room: Room,
    shape: tuple[int, int, bool, bool],
    numbers: tuple[np.float32, np.float32, np.float32, np.float32],
) -> NDArray[np.bool_]:
    """Steps of SGD for models of one linear layer, W (outputs, inputs) and the biases: `steps` (n,) of the models in
    `rows` (n,) of `vectors` (N, size), with `velocities` (N, size) of momentum or decay, else (0, 0).

    Their batches are the `samples` (count, inputs) and `targets` (count,), classes, at `places` (steps, n, batch).
    `shape`: inputs, outputs, whether there are biases, whether the loss is the squared error of classes in place of
    cross-entropy. `numbers`: what samples are multiplied by, learning rate, momentum, weight decay. `room`:
    `linear_room`.

    Which models (n,) are finite afterwards; the others are as they were.
    """
    x, d, weights, speeds = room
    exponents = np.empty(d.size, dtype=np.int32)
    inputs, outputs, has_bias, squared = shape
    scale, rate, momentum, decay = numbers
    batch = places.shape[2]
    moving = len(velocities) > 0
    factor = np.float32(2 / (outputs * batch) if squared else 1 / batch)
    if not moving:
        factor *= -rate
    good = np.ones(len(rows), dtype=np.bool_)
    x[:] = 0
    weights[:] = 0
    speeds[:] = 0
    for model in range(len(rows)):
        _load(vectors[rows[model]], weights, inputs, outputs, has_bias)
        if moving:
            _load(velocities[rows[model]], speeds, inputs, outputs, has_bias)
        for step in range(steps[model]):
            _fetch(samples, places[step, model], scale, x, has_bias)
            for first in range(0, len(x), 2):
                _multiply(weights, x, first, d)
            if squared:
                _error(d, targets, places[step, model], outputs, factor)
            else:
                _softmax_error(d, exponents, targets, places[step, model], outputs, factor)
            if moving:
                if momentum:
                    speeds *= momentum
                else:
                    speeds[:] = 0  # whatever they were
                for first in range(0, len(x), SAMPLES):
                    _add_products(speeds, x, first, d)
                if decay:
                    speeds += decay * weights
                weights -= rate * speeds
            else:
                for first in range(0, len(x), SAMPLES):
                    _add_products(weights, x, first, d)
        if not np.isfinite(np.sum(weights)):
            good[model] = False
            continue
        _store(weights, vectors[rows[model]], inputs, outputs, has_bias)
        if moving:
            _store(speeds, velocities[rows[model]], inputs, outputs, has_bias)
    return good


@compiled
def _load(vector: NDArray[np.float32], matrix: NDArray[np.float32], inputs: int, outputs: int, has_bias: bool) -> None:
    """A row of the matrix for each output: its weights, zeros, and its bias at the end."""
    for o in range(outputs):
        matrix[o, :inputs] = vector[o * inputs : (o + 1) * inputs]
        matrix[o, -1] = vector[inputs * outputs + o] if has_bias else ZERO


@compiled
def _store(matrix: NDArray[np.float32], vector: NDArray[np.float32], inputs: int, outputs: int, has_bias: bool) -> None:
    """Undo of `_load`."""
    for o in range(outputs):
        vector[o * inputs : (o + 1) * inputs] = matrix[o, :inputs]
        if has_bias:
            vector[inputs * outputs + o] = matrix[o, -1]


@compiled
def _fetch(
    samples: NDArray[np.uint8] | NDArray[np.float32],
    places: NDArray[np.int64],
    scale: np.float32,
    x: NDArray[np.float32],
    has_bias: bool,
) -> None:
    """Puts the samples at `places` (b,) into the first rows of `x` (B, K), and after them a 1 for the bias."""
    inputs = samples.shape[1]
    for i in range(len(places)):
        sample = samples[places[i]]
        row = x[i]
        for k in range(inputs):
            row[k] = scale * np.float32(sample[k])
        if has_bias:
            row[-1] = 1


@compiled
def _multiply(weights: NDArray[np.float32], x: NDArray[np.float32], first: int, out: NDArray[np.float32]) -> None:
    """out (B, O) <- x W' of the samples `first` and `first + 1`, for `weights` (O, K) and `x` (B, K)."""
    x0, x1 = x[first], x[first + 1]
    z0, z1 = out[first], out[first + 1]
    for o in range(0, len(weights), OUTPUTS):
        w0, w1, w2, w3, w4 = weights[o], weights[o + 1], weights[o + 2], weights[o + 3], weights[o + 4]
        s00 = s01 = s02 = s03 = s04 = s10 = s11 = s12 = s13 = s14 = ZERO
        for k in range(len(x0)):
            s00 += x0[k] * w0[k]
            s01 += x0[k] * w1[k]
            s02 += x0[k] * w2[k]
            s03 += x0[k] * w3[k]
            s04 += x0[k] * w4[k]
            s10 += x1[k] * w0[k]
            s11 += x1[k] * w1[k]
            s12 += x1[k] * w2[k]
            s13 += x1[k] * w3[k]
            s14 += x1[k] * w4[k]
        z0[o], z0[o + 1], z0[o + 2], z0[o + 3], z0[o + 4] = s00, s01, s02, s03, s04
        z1[o], z1[o + 1], z1[o + 2], z1[o + 3], z1[o + 4] = s10, s11, s12, s13, s14


@compiled
def _add_products(weights: NDArray[np.float32], x: NDArray[np.float32], first: int, d: NDArray[np.float32]) -> None:
    """weights (O, K) += d' x of the four samples from `first` on, for `d` (B, O) and `x` (B, K)."""
    x0, x1, x2, x3 = x[first], x[first + 1], x[first + 2], x[first + 3]
    d0, d1, d2, d3 = d[first], d[first + 1], d[first + 2], d[first + 3]
    for o in range(0, len(weights), OUTPUTS):
        p, q, r, s, t = o, o + 1, o + 2, o + 3, o + 4
        w0, w1, w2, w3, w4 = weights[p], weights[q], weights[r], weights[s], weights[t]
        d00, d01, d02, d03, d04 = d0[p], d0[q], d0[r], d0[s], d0[t]
        d10, d11, d12, d13, d14 = d1[p], d1[q], d1[r], d1[s], d1[t]
        d20, d21, d22, d23, d24 = d2[p], d2[q], d2[r], d2[s], d2[t]
        d30, d31, d32, d33, d34 = d3[p], d3[q], d3[r], d3[s], d3[t]
        for k in range(len(x0)):
            w0[k] += d00 * x0[k] + d10 * x1[k] + d20 * x2[k] + d30 * x3[k]
            w1[k] += d01 * x0[k] + d11 * x1[k] + d21 * x2[k] + d31 * x3[k]
            w2[k] += d02 * x0[k] + d12 * x1[k] + d22 * x2[k] + d32 * x3[k]
            w3[k] += d03 * x0[k] + d13 * x1[k] + d23 * x2[k] + d33 * x3[k]
            w4[k] += d04 * x0[k] + d14 * x1[k] + d24 * x2[k] + d34 * x3[k]


@compiled
def _softmax_error(
    z: NDArray[np.float32],
    exponents: NDArray[np.int32],
    targets: NDArray[np.int64],
    places: NDArray[np.int64],
    outputs: int,
    factor: np.float32,
) -> None:
    """In place of outputs z (B, O) the gradient of the cross-entropy, times `factor`. `exponents` (B * O,): room."""
    for i in range(len(places)):
        row = z[i]
        largest = row[0]
        for o in range(1, outputs):
            largest = max(largest, row[o])
        for o in range(len(row)):
            row[o] = max(LOG2_E * (row[o] - largest), SMALLEST)
    flat = z.reshape(-1)
    for k in range(len(flat)):  # 2 ** flat, without a call for each
        whole = np.floor(flat[k])
        rest = flat[k] - whole
        exponents[k] = (np.int32(whole) + 127) << 23
        flat[k] = C0 + rest * (C1 + rest * (C2 + rest * (C3 + rest * (C4 + rest * (C5 + rest * C6)))))
    powers = exponents.view(np.float32)
    for k in range(len(flat)):
        flat[k] *= powers[k]
    for i in range(len(places)):
        row = z[i]
        total = ZERO
        for o in range(outputs):
            total += row[o]
        for o in range(outputs):
            row[o] *= factor / total
        row[outputs:] = 0
        row[targets[places[i]]] -= factor


@compiled
def _error(
    z: NDArray[np.float32], targets: NDArray[np.int64], places: NDArray[np.int64], outputs: int, factor: np.float32
) -> None:
    """The same for the squared error."""
    for i in range(len(places)):
        row = z[i, :outputs]
        row *= factor
        row[targets[places[i]]] -= factor


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
