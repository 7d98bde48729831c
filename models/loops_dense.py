"""Small dense networks in loops that numba compiles (the extra `simulate`).

Softmax regression on a batch of 32 is a million floating-point operations, 10 us; each operation of torch costs 3 us,
and 30 after a product that has pushed its code out of the cache. Here all steps of many peers are one call: the weights
of a peer stay in the cache while it trains, and its samples are fetched once.

Products are made of tiles (`loops_tiles`); matrices are filled up with zeros to whole ones. A row is a sample;
where a layer has biases, its inputs have a last column of ones, and its weights one of biases. Everything is
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gossipml.models.loops import ZERO, compiled
from gossipml.models.loops_tiles import COLUMNS, OUTPUTS, ROWS, SAMPLES, add_tile, multiply_tile

Matrices: TypeAlias = tuple[NDArray[np.float32], ...]

WHOLE: Final = 20  # rows of a buffer are a multiple of ROWS, SAMPLES and OUTPUTS
LINE: Final = 64  # bytes of a cache line

LOG2_E, SMALLEST = np.float32(1.4426950408889634), np.float32(-126)  # of the exponents that there are
# 2 ** r for r in [0, 1) to 1e-7, through its Chebyshev nodes.
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c) for c in (1.0, 0.693146944, 0.240230456, 0.0554806292, 0.00968418643, 0.00123913318, 0.000218657849)
)


class Room(NamedTuple):
    """What `train_dense` works in: of each layer the inputs (B, K), the gradient by its outputs, weights and velocities
    (O, K)."""

    x: Matrices
    d: Matrices
    weights: Matrices
    speeds: Matrices


def dense_room(batch: int, layers: Sequence[tuple[int, int]]) -> Room:
    """For so many samples and layers with so many inputs and outputs."""
    rows = _whole(batch, WHOLE)
    outputs = [_whole(outputs, ROWS) for _, outputs in layers]
    columns = [
        _whole(max(inputs, before) + 1, COLUMNS) for (inputs, _), before in zip(layers, [0, *outputs], strict=False)
    ]
    return Room(
        tuple(_aligned(rows, k) for k in columns),
        tuple(_aligned(rows, o) for o in [*columns[1:], outputs[-1]]),
        tuple(_aligned(o, k) for o, k in zip(outputs, columns, strict=True)),
        tuple(_aligned(o, k) for o, k in zip(outputs, columns, strict=True)),
    )


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step


def _aligned(rows: int, columns: int) -> NDArray[np.float32]:
    """Zeros, from the beginning of a cache line on."""
    size = 4 * rows * columns
    memory = np.zeros(size + LINE, dtype=np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(np.float32).reshape(rows, columns)


@compiled
def train_dense(
    vectors: NDArray[np.float32],
    velocities: NDArray[np.float32],
    rows: NDArray[np.int64],
    steps: NDArray[np.int64],
    samples: NDArray[np.uint8] | NDArray[np.float32],
    targets: NDArray[np.int64],
    places: NDArray[np.int64],
    room: Room,
    layers: NDArray[np.int64],
    squared: bool,
    numbers: tuple[np.float32, np.float32, np.float32, np.float32],
) -> NDArray[np.bool_]:
    """Steps of SGD for models of linear layers with ReLU between them: `steps` (n,) of the models in `rows` (n,) of
    `vectors` (N, size), with `velocities` (N, size) of momentum or decay, else (0, 0).

    Their batches are the `samples` (count, inputs) and `targets` (count,), classes, at `places` (steps, n, batch).
    `layers` (L, 4): inputs, outputs, whether there are biases, and where in a vector the weights (outputs, inputs)
    begin, which the biases follow. `squared`: the loss is the squared error of classes in place of cross-entropy.
    `numbers`: what samples are multiplied by, learning rate, momentum, weight decay. `room`: `dense_room`.

    Which models (n,) are finite afterwards; the others are as they were.
    """
    x, d, weights, speeds = room.x, room.d, room.weights, room.speeds
    last = len(layers) - 1
    scale, rate, momentum, decay = numbers
    batch, outputs = places.shape[2], layers[last, 1]
    exponents = np.empty(batch * d[last].shape[1], dtype=np.int32)
    moving = len(velocities) > 0
    factor = np.float32(2 / (outputs * batch) if squared else 1 / batch)
    if not moving:
        factor *= -rate
    good = np.ones(len(rows), dtype=np.bool_)
    _clear(room, layers)
    for model in range(len(rows)):
        _load(vectors[rows[model]], weights, layers)
        if moving:
            _load(velocities[rows[model]], speeds, layers)
        for step in range(steps[model]):
            _fetch(samples, places[step, model], scale, x[0])
            for layer in range(last):
                _multiply(weights[layer], x[layer], batch, x[layer + 1])
                _rectify(x[layer + 1][:batch], len(weights[layer]))
            _multiply(weights[last], x[last], batch, d[last])
            if squared:
                _error(d[last], targets, places[step, model], outputs, factor)
            else:
                _softmax_error(d[last], exponents, targets, places[step, model], outputs, factor)
            for layer in range(last, -1, -1):
                if layer:
                    d[layer - 1][:] = 0
                    _add_product(d[layer - 1], d[layer], False, weights[layer], len(weights[layer]))
                    _rectify_back(d[layer - 1], x[layer][:batch])
                if not moving:
                    _add_product(weights[layer], d[layer], True, x[layer], batch)
                    continue
                if momentum:
                    speeds[layer][:] *= momentum
                else:
                    speeds[layer][:] = 0  # whatever they were
                _add_product(speeds[layer], d[layer], True, x[layer], batch)
                if decay:
                    speeds[layer][:] += decay * weights[layer]
                weights[layer][:] -= rate * speeds[layer]
        for layer in range(last + 1):
            good[model] &= np.isfinite(np.sum(weights[layer]))
        if not good[model]:
            _clear(room, layers)  # what fills matrices up is not zero any more
            continue
        _store(weights, vectors[rows[model]], layers)
        if moving:
            _store(speeds, velocities[rows[model]], layers)
    return good


@compiled
def _clear(room: Room, layers: NDArray[np.int64]) -> None:
    """All is zero, but the inputs of biases."""
    for layer in range(len(layers)):
        room.x[layer][:] = 0
        room.x[layer][:, -1] = layers[layer, 2]
        room.d[layer][:] = 0
        room.weights[layer][:] = 0
        room.speeds[layer][:] = 0


@compiled
def _load(vector: NDArray[np.float32], matrices: Matrices, layers: NDArray[np.int64]) -> None:
    """A row of the matrix for each output: its weights, zeros, and its bias at the end."""
    for layer in range(len(layers)):
        inputs, outputs, has_bias, start = layers[layer]
        matrix = matrices[layer]
        for o in range(outputs):
            matrix[o, :inputs] = vector[start + o * inputs : start + (o + 1) * inputs]
            matrix[o, -1] = vector[start + inputs * outputs + o] if has_bias else ZERO


@compiled
def _store(matrices: Matrices, vector: NDArray[np.float32], layers: NDArray[np.int64]) -> None:
    """Undo of `_load`."""
    for layer in range(len(layers)):
        inputs, outputs, has_bias, start = layers[layer]
        matrix = matrices[layer]
        for o in range(outputs):
            vector[start + o * inputs : start + (o + 1) * inputs] = matrix[o, :inputs]
            if has_bias:
                vector[start + inputs * outputs + o] = matrix[o, -1]


@compiled
def _fetch(
    samples: NDArray[np.uint8] | NDArray[np.float32],
    places: NDArray[np.int64],
    scale: np.float32,
    x: NDArray[np.float32],
) -> None:
    """Puts the samples at `places` (b,) into the first rows of `x` (B, K)."""
    inputs = samples.shape[1]
    for i in range(len(places)):
        sample = samples[places[i]]
        row = x[i]
        for k in range(inputs):
            row[k] = scale * np.float32(sample[k])


@compiled
def _multiply(weights: NDArray[np.float32], x: NDArray[np.float32], batch: int, out: NDArray[np.float32]) -> None:
    """The first rows of `out` (B, ..) <- those of x W', for `weights` (O, K) and `x` (B, K), so many and some more."""
    width, to_width = 4 * x.shape[1], 4 * out.shape[1]
    left, right, to = x.ctypes.data, weights.ctypes.data, out.ctypes.data
    for o in range(0, len(weights), OUTPUTS):
        for i in range(0, batch, SAMPLES):
            multiply_tile(to + i * to_width + 4 * o, to_width, left + i * width, right + o * width, width, x.shape[1])


@compiled
def _rectify(x: NDArray[np.float32], count: int) -> None:
    """ReLU, of the first columns of x (B, K)."""
    for i in range(len(x)):
        row = x[i, :count]
        for k in range(count):
            row[k] = ZERO if row[k] < 0 else row[k]


@compiled
def _rectify_back(d: NDArray[np.float32], x: NDArray[np.float32]) -> None:
    """Of the gradient d (.., K) by the outputs x (B, K) of ReLU that by its inputs."""
    for i in range(len(x)):
        own, row = d[i], x[i]
        for k in range(len(row)):
            own[k] = own[k] if row[k] > 0 else ZERO


@compiled
def _softmax_error(
    z: NDArray[np.float32],
    exponents: NDArray[np.int32],
    targets: NDArray[np.int64],
    places: NDArray[np.int64],
    outputs: int,
    factor: np.float32,
) -> None:
    """In place of outputs z (B, O), of as many as there are places, the gradient of the cross-entropy, times `factor`.
    `exponents` (b * O,): room."""
    for i in range(len(places)):
        row = z[i]
        largest = row[0]
        for o in range(1, outputs):
            largest = max(largest, row[o])
        for o in range(len(row)):
            row[o] = max(LOG2_E * (row[o] - largest), SMALLEST)
    flat = z[: len(places)].reshape(-1)
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
def _add_product(
    c: NDArray[np.float32], a: NDArray[np.float32], across: bool, b: NDArray[np.float32], count: int
) -> None:
    """c (M, N) += a b, or a' b where `across`, for the first columns of a, or its rows, and rows of b (.., N)."""
    step = 4 * a.shape[1]
    row, column = (4, step) if across else (step, 4)
    width = 4 * c.shape[1]
    to, left, right = c.ctypes.data, a.ctypes.data, b.ctypes.data
    for n in range(0, c.shape[1], COLUMNS):
        for m in range(0, len(c), ROWS):
            add_tile(to + m * width + 4 * n, width, left + m * row, row, column, right + 4 * n, width, count)
