"""bfloat16 and int4 for `encoding`: its table says what they are, this file how.

bfloat16: the upper half of a float32, rounded to the nearest, to even between two.

int4: blocks of 64 values. scale = -peak / 8, where peak is the value of the block with the largest magnitude; it is
sent as a bfloat16, rounded away from zero. value = (nibble - 8) * scale, nibble from 0 to 15, so that the peak falls
on 0 and all sixteen levels are used (the other end is clipped to 7). Two values a byte, the first in the lower half;
the upper half of an odd last byte is ignored. Block size and signed scale are measured: mean squared error of a
normal distribution, in % of its variance (bytes per value):

| block | -7 to 7, scale max / 7 | signed scale |
|---|---|---|
| 32 | 0.95 (0.563) | 0.74 (0.563) |
| 64 | 1.17 (0.531) | 0.91 (0.531) |
| 256 | 1.61 (0.508) | 1.24 (0.508) |

Block scales: Dettmers et al. 2022 (8-bit optimisers via block-wise quantisation).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import LocalError, RemoteError

Vector = NDArray[np.float32]
Bytes = bytes | bytearray | memoryview

INT4_BLOCK: Final = 64
_SLICE: Final = 256 * INT4_BLOCK  # 64 KiB of float32, as in `encoding`
_MAX_MAGNITUDE: Final = np.float32(1e9)  # as in `encoding`, which imports this file
_UPPER: Final = np.uint32(0x7FFF)
_BFLOAT16_MOST: Final = int(_MAX_MAGNITUDE.view(np.uint32)) >> 16  # bits of the largest that is sent
_BFLOAT16_BOUND: Final = float(np.uint32(_BFLOAT16_MOST << 16).view(np.float32))
_SCALE_MOST: Final = int(np.float32(_MAX_MAGNITUDE / np.float32(8)).view(np.uint32)) >> 16
_INT4_BOUND: Final = 8 * float(np.uint32(_SCALE_MOST << 16).view(np.float32))
SMALLEST_SCALE: Final = (
    float(np.finfo(np.float32).tiny) * 8
)  # of a scale; below it 1 / scale overflows: such blocks are 0


def int4_size(n: int) -> int:
    return 2 * -(-n // INT4_BLOCK) + -(-n // 2)


def encode_bfloat16(values: Vector, out: memoryview | bytearray) -> None:
    """Writes 2 n bytes. LocalError when a value is not finite or too large."""
    target = np.frombuffer(out, dtype="<u2", count=len(values))
    bits = np.empty(min(len(values), _SLICE), dtype=np.uint32)
    for start in range(0, len(values), _SLICE):
        piece = values[start : start + _SLICE]
        largest = max(float(piece.max()), -float(piece.min()))
        if not largest <= _BFLOAT16_BOUND:  # NaN compares false
            raise LocalError(f"a parameter is {largest:g}; bfloat16 sends finite values up to {_BFLOAT16_BOUND:g}")
        exact, rounded = piece.view(np.uint32), bits[: len(piece)]
        np.right_shift(exact, 16, out=rounded)
        rounded &= 1  # half of the last place is added, and one more where that makes the result even
        rounded += _UPPER
        rounded += exact
        rounded >>= 16
        target[start : start + _SLICE] = rounded


def decode_bfloat16(data: Bytes, out: Vector) -> None:
    """Fills `out` from 2 len(out) bytes. RemoteError when a value is not finite or too large."""
    source = np.frombuffer(data, dtype="<u2")
    bits = out.view(np.uint32)
    for start in range(0, len(out), _SLICE):
        piece = source[start : start + _SLICE]
        largest = int(np.bitwise_and(piece, 0x7FFF).max())
        if largest > _BFLOAT16_MOST:  # infinity and NaN are larger still
            value = float(np.uint32(largest << 16).view(np.float32))
            raise RemoteError(f"update holds the value {value:g}; finite values up to {_BFLOAT16_BOUND:g} are merged")
        np.left_shift(piece, 16, out=bits[start : start + _SLICE], dtype=np.uint32)


def encode_int4(values: Vector, out: memoryview | bytearray) -> None:
    """Writes int4_size(n) bytes. LocalError when a value is not finite or too large."""
    n = len(values)
    blocks = -(-n // INT4_BLOCK)
    scales = np.frombuffer(out, dtype="<u2", count=blocks)
    packed = np.frombuffer(out, dtype=np.uint8, count=-(-n // 2), offset=2 * blocks)
    scratch = np.empty(_SLICE, dtype=np.float32)
    nibbles = np.empty(_SLICE, dtype=np.uint8)
    for start in range(0, n, _SLICE):
        piece = values[start : start + _SLICE]
        count = len(piece)
        whole = -(-count // INT4_BLOCK) * INT4_BLOCK
        if count < whole:
            piece = np.concatenate([piece, np.zeros(whole - count, dtype=np.float32)])
        source, rows = piece.reshape(-1, INT4_BLOCK), scratch[:whole].reshape(-1, INT4_BLOCK)
        scale = _signed_scales(source)
        scales[start // INT4_BLOCK : start // INT4_BLOCK + len(scale)] = scale.view(np.uint32) >> 16
        usable = np.abs(scale) > SMALLEST_SCALE
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)
        np.multiply(source, inverse[:, None], out=rows)
        np.rint(rows, out=rows)
        rows += 8
        np.minimum(rows, 15, out=rows)
        nibbles[:whole] = scratch[:whole]
        pairs = nibbles[: count + count % 2].view("<u2")  # two values: 0x0b0a
        packed[start // 2 : start // 2 + len(pairs)] = pairs | (pairs >> 4)  # 0xba in the lower byte, which stays


def _signed_scales(source: Vector) -> Vector:
    """(blocks, 64) -> (blocks,) scales that a bfloat16 holds; zero for blocks that are all but zero."""
    columns = np.ascontiguousarray(source.T)  # (64, blocks): extremes of long rows, twice as fast as of short ones
    high, low = columns.max(axis=0), columns.min(axis=0)
    peak = np.where(high >= -low, high, low)  # NaN goes through
    largest = float(np.abs(peak).max())
    if not largest <= _INT4_BOUND:  # NaN compares false
        raise LocalError(f"a parameter is {largest:g}; int4 sends finite values up to {_INT4_BOUND:g}")
    return rounded_scales(peak)


def rounded_scales(peaks: Vector) -> Vector:
    """The scales of blocks with these peaks."""
    bits = (peaks * np.float32(-0.125)).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def decode_int4(data: Bytes, out: Vector) -> None:
    """Fills `out` from int4_size(len(out)) bytes. RemoteError when a scale is not finite or too large."""
    n = len(out)
    blocks = -(-n // INT4_BLOCK)
    bits = np.frombuffer(data, dtype="<u2", count=blocks)
    packed = np.frombuffer(data, dtype=np.uint8, count=-(-n // 2), offset=2 * blocks)
    if n and int((bits & 0x7FFF).max()) > _SCALE_MOST:  # infinity and NaN are larger still
        raise RemoteError(f"int4 update holds a scale that is not within {_INT4_BOUND / 8:g}")
    scales = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    scratch = np.empty(_SLICE, dtype=np.float32)
    for start in range(0, n, _SLICE):
        count = min(_SLICE, n - start)
        pairs = packed[start // 2 : (start + count + 1) // 2].astype("<u2")
        pairs |= pairs << 4
        pairs &= 0x0F0F
        values = scratch[: 2 * len(pairs)]
        np.subtract(pairs.view(np.uint8), np.float32(8), out=values, dtype=np.float32)
        scale = scales[start // INT4_BLOCK : -(-(start + count) // INT4_BLOCK)]
        full = count // INT4_BLOCK * INT4_BLOCK
        piece = out[start : start + count]
        rows = values[:full].reshape(-1, INT4_BLOCK)
        np.multiply(rows, scale[: len(rows), None], out=piece[:full].reshape(-1, INT4_BLOCK))
        if full < count:
            np.multiply(values[full:count], scale[-1], out=piece[full:])
