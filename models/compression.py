"""What of a model goes over a link, and in how many bits: a form, its name, its bytes, and the way back.

| name | what is sent |
|---|---|
| `int8` (any of `encoding.ENCODINGS`) | all parameters |
| `int8-top10` | the 10 % that matter most, each block of 65,536 for itself (Stich, Cordonnier, Jaggi 2018; in gossip: Dhasade et al. 2023, JWINS) |
| `int8-3of8` | the third of eight fragments of consecutive parameters (Biswas et al. 2025, DivShare; Hegedus, Danner, Jelasity 2021, partitioned exchange) |
| `int8-1in8-0badc0de` | one of each eight parameters in a row, at random by the seed in the name (Hegedus, Danner, Jelasity 2021, sub-sampling) |

A body, `exact` being the number of buffers at the end of the vector (running statistics: few, and of other sizes than
the weights, so that they would suffer in a block with them):

    body    = exact values places
    exact   = the buffers as float32; in every body, whatever part of the parameters it holds
    values  = the parameters that are sent, in ascending order, as one vector of the encoding
    places  = only with top, of all blocks one after the other, as gaps in the code of Rice (Rice, Plaunt 1971; Golomb
              1966): the number g of parameters that are left out before each one that is sent, as g >> k zeros and a
              one, for all of the block; then the last bit of each g, the last but one, up to k. Least bit first, and
              each filled up with zeros to as many bytes as it can take at most; k is what takes the fewest bits for
              the percentage

Name and layout tell the length of a body before it is read: of each block, or last part of a block, ceil(10 %) are
sent. What is sent are parameters, not changes, because a receiver need not know what came before; which ones matter
most is up to the sender (`feedback`). The receiver writes them over a copy of its own model and merges that: where
nothing came the difference is zero. Its norm is then smaller; see `Form.share`.

Places that are sent take 5.1 bits each with top 10 %, 6.2 with top 5 % (a bit for each parameter is 10 and 20, a number
of two bytes 16); at random, 4.7 and 5.7 is the least that is possible.

Left out: entropy coding of values.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.arrays import A, is_numpy, largest, like, put, take, top
from gossipml.models.encoding import BLOCK, ENCODINGS, Vector, decode_into, encode_into, encoded_size
from gossipml.models.encoding_narrow import INT4_BLOCK, SMALLEST_SCALE, rounded_scales

SPAN: Final = 1 << 16  # parameters of a block of top-k: 256 KiB, in the cache
MOST_PERCENT: Final = 50  # of top-k: beyond, the places cost more than they save
MOST_FRAGMENTS: Final = 64  # a parameter is then heard of once in 64 sends (guess)
ALIASES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NAME: Final = re.compile(
    rf"({'|'.join(ENCODINGS)})(?:-top([1-9][0-9]?)|-([1-9][0-9]?)?of([1-9][0-9]?)|-1in([1-9][0-9]?)-([0-9a-f]{{8}}))?",
    re.ASCII,
)  # the part before `of` is left out in a choice

Places = slice | NDArray[np.intp]


@dataclass(frozen=True)
class Form:
    """One way to send a model. `fragment` counts from 0, in the name from 1."""

    values: str = "int8"
    percent: int = 100
    fragment: int = 0
    fragments: int = 1
    one_in: int = 1
    seed: int = 0
    """Of what one in `one_in` goes; 32 bits."""

    @property
    def name(self) -> str:
        """At most 32 characters of a-z, 0-9 and -, as the wire wants it."""
        if self.percent < 100:
            return f"{self.values}-top{self.percent}"
        if self.one_in > 1:
            return f"{self.values}-1in{self.one_in}-{self.seed:08x}"
        return f"{self.values}-{self.fragment + 1}of{self.fragments}" if self.fragments > 1 else self.values

    @property
    def share(self) -> float:
        """Of the parameters in a body. A difference of that many is about sqrt(share) as long as one of all; and its
        merge adds share * age to the mass of the round, not age: other messages hold other parameters."""
        return self.percent / 100 / self.fragments / self.one_in

    def at(self, step: int) -> Form:
        """The form of the step-th send: fragments in turn, so that all parameters have gone after one cycle."""
        return replace(self, fragment=step % self.fragments)

    def stretch(self, parameters: int) -> tuple[int, int]:
        """Begin and end of the fragment."""
        return (
            self.fragment * parameters // self.fragments,
            (self.fragment + 1) * parameters // self.fragments,
        )


def parse_form(name: str) -> Form:
    """What a header names. RemoteError when there is no such form."""
    match = _NAME.fullmatch(name)
    if match is None or (match[4] and not match[3]):
        raise RemoteError(
            f"unknown encoding {name[:32]!r}; known are {', '.join(ENCODINGS)}, with -top10, -1of8 or -1in8-0badc0de"
        )
    try:
        return _form(match)
    except ValueError as error:
        raise RemoteError(f"encoding {name[:32]!r}: {error}") from None


def parse_choice(text: str) -> Form | None:
    """What a person chose: as `parse_form`, but `int8-of8` stands for all eight fragments in turn; None is `auto`."""
    if text == "auto":
        return None
    head, dash, rest = text.partition("-")
    match = _NAME.fullmatch(ALIASES.get(head, head) + dash + rest)
    if match is None or match[3] or match[5]:
        near = difflib.get_close_matches(head, ("auto", *ENCODINGS, *ALIASES), n=1, cutoff=0.5)
        hint = f" did you mean {near[0] + dash + rest!r}?" if near and near[0] != head else ""
        raise UserError(
            f"there is no compression {text[:60]!r};{hint} choose auto, {', '.join(ENCODINGS)}, or one of these with "
            "-top10 (the 10 % that matter most) or -of8 (eight fragments in turn)"
        )
    try:
        return _form(match)
    except ValueError as error:
        raise UserError(f"compression {text!r}: {error}") from None


def _form(match: re.Match[str]) -> Form:
    values, percent, fragment, fragments, one_in, seed = match.groups()
    if percent and int(percent) > MOST_PERCENT:
        raise ValueError(f"top takes 1 to {MOST_PERCENT} %")
    if fragments and not 2 <= int(fragments) <= MOST_FRAGMENTS:
        raise ValueError(f"there can be 2 to {MOST_FRAGMENTS} fragments")
    if fragment and int(fragment) > int(fragments):
        raise ValueError("there is no such fragment")
    if one_in and not 2 <= int(one_in) <= MOST_FRAGMENTS:
        raise ValueError(f"one in 2 to {MOST_FRAGMENTS} can go")
    return Form(
        values, int(percent or 100), int(fragment or 1) - 1, int(fragments or 1), int(one_in or 1), int(seed or "0", 16)
    )


# Bytes.


def packed_size(form: Form, n: int, exact: int = 0) -> int:
    """Bytes of a body for a vector of n values of which the last `exact` are buffers."""
    sent = _sent(form, n - exact)
    return 4 * exact + encoded_size(form.values, sent) + _places_size(form, n - exact)


def pack_into(form: Form, values: Vector, out: memoryview, *, exact: int = 0, importance: Vector | None = None) -> int:
    """Writes the body to the beginning of `out`; how many bytes. `importance` (n - exact or more values) says what top
    sends; without it the largest magnitudes.

    LocalError when a value, or an importance, is not finite or too large: such parameters are never sent.
    """
    parameters = len(values) - exact
    size = packed_size(form, len(values), exact)
    if len(out) < size:
        raise LocalError(f"{size} encoded bytes do not fit into {len(out)}")
    if exact:
        encode_into("float32", values[parameters:], out)
    out = out[4 * exact :]
    if form.one_in > 1:
        drawn = values[:parameters][sampled_places(form, parameters)]
        if len(drawn):
            encode_into(form.values, drawn, out)
        return size
    if form.percent == 100:
        start, stop = form.stretch(parameters)
        if start < stop:
            encode_into(form.values, values[start:stop], out)
        return size
    kept = np.empty(_sent(form, parameters), dtype=np.float32)
    places = out[encoded_size(form.values, len(kept)) : size - 4 * exact]
    for block, among, where in _blocks(form, parameters):
        piece = values[block]
        weights = np.abs(piece if importance is None else importance[block])
        if not np.isfinite(weights.sum()):
            raise LocalError("a parameter, or its change, is not finite")
        chosen = top(weights, among.stop - among.start)
        kept[among] = piece[chosen]
        places[where] = _places(form, chosen, len(piece))
    if len(kept):
        encode_into(form.values, kept, out)
    return size


def pack(form: Form, values: Vector, *, exact: int = 0, importance: Vector | None = None) -> bytes:
    """The body; see `pack_into`."""
    out = bytearray(packed_size(form, len(values), exact))
    pack_into(form, values, memoryview(out), exact=exact, importance=importance)
    return bytes(out)


def unpack_into(form: Form, data: bytes | bytearray | memoryview, out: Vector, *, exact: int = 0) -> Places:
    """Writes what the body holds over `out`, and leaves the rest of it; where the parameters were written.

    RemoteError, with `out` undefined, unless the length fits, as many places as are due lie within their blocks, and
    every value is finite and at most MAX_MAGNITUDE.
    """
    parameters = len(out) - exact
    size = packed_size(form, len(out), exact)
    if len(data) != size:
        raise RemoteError(f"{form.name} update of {len(data)} bytes; {len(out)} parameters take {size}")
    body = memoryview(data)
    if exact:
        decode_into("float32", body[: 4 * exact], out[parameters:])
    body = body[4 * exact :]
    if form.one_in > 1:
        places = sampled_places(form, parameters)
        drawn = np.empty(len(places), dtype=np.float32)
        if len(drawn):
            decode_into(form.values, body, drawn)
        out[places] = drawn
        return places
    if form.percent == 100:
        start, stop = form.stretch(parameters)
        if start < stop:
            decode_into(form.values, body, out[start:stop])
        return slice(start, stop)
    kept = np.empty(_sent(form, parameters), dtype=np.float32)
    length = encoded_size(form.values, len(kept))
    if len(kept):
        decode_into(form.values, body[:length], kept)
    everywhere = np.empty(len(kept), dtype=np.intp)
    for block, among, where in _blocks(form, parameters):
        chosen = _read_places(form, body[length:][where], block.stop - block.start)
        np.add(chosen, block.start, out=everywhere[among])
    out[everywhere] = kept
    return everywhere


def _places(form: Form, chosen: NDArray[np.intp], size: int) -> bytes:
    """Of a block of `size`; `chosen` ascending."""
    gaps = chosen.copy()
    gaps[1:] -= chosen[:-1]
    gaps[1:] -= 1
    low = _low_bits(form.percent)
    ends = gaps >> low
    ends += 1
    np.cumsum(ends, out=ends)
    ends -= 1
    marks = np.zeros(_marks(form, size), dtype=np.uint8)
    marks[ends] = 1
    rests = gaps.astype(np.uint8)
    planes = (marks, *(rests & (1 << bit) for bit in range(low)))
    return b"".join(np.packbits(plane, bitorder="little").tobytes() for plane in planes)


def _read_places(form: Form, data: memoryview, size: int) -> NDArray[np.intp]:
    """Undo of `_places`. RemoteError when there are not as many places as are sent, or when they reach beyond the
    block."""
    low, count = _low_bits(form.percent), _kept(size, form.percent)
    bits = np.frombuffer(data, dtype=np.uint8)
    middle = -(-_marks(form, size) // 8)
    ends = np.flatnonzero(np.unpackbits(bits[:middle], bitorder="little").view(np.bool_))
    if len(ends) != count:
        raise RemoteError(f"{form.name} update marks {len(ends)} places, not {count}")
    places = ends.copy()  # here the steps from place to place
    places[1:] -= ends[:-1]
    places[1:] -= 1
    places <<= low
    if low:
        places |= _rests(bits[middle:].reshape(low, -1), count)
    places[1:] += 1
    np.cumsum(places, out=places)
    if count and int(places[-1]) >= size:
        raise RemoteError(f"{form.name} update marks a place beyond the model")
    return places


def _rests(planes: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Numbers (count,) by their bits (k, ...), packed."""
    rests = np.unpackbits(planes[0], count=count, bitorder="little")
    for bit, plane in enumerate(planes[1:], 1):
        rests |= np.unpackbits(plane, count=count, bitorder="little") << bit
    return rests


@cache
def _low_bits(percent: int) -> int:
    """The k of the code: what a place takes on average is then least."""
    p = percent / 100
    return min(range(8), key=lambda k: p * (1 + k) + (1 - p) / (1 << k))


def _marks(form: Form, size: int) -> int:
    """Bits of zeros and ones that a block of `size` can take at most."""
    count = _kept(size, form.percent)
    return count + (size - count >> _low_bits(form.percent))


def sampled_places(form: Form, parameters: int) -> NDArray[np.intp]:
    """Which parameters a form with `one_in` and seed sends, ascending: one of each `one_in` in a row, all with the same
    chance. Each place is drawn by splitmix64 (Steele, Lea, Flood 2014), so that every peer draws the same."""
    starts = np.arange(0, parameters, form.one_in, dtype=np.intp)
    places = starts + _offsets(form, np.arange(len(starts), dtype=np.uint64)).astype(np.intp)
    return places if not len(places) or places[-1] < parameters else places[:-1]


def _offsets(form: Form, rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (rows + np.uint64(form.seed << 32) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    offsets: NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) % np.uint64(form.one_in)
    return offsets


def _sent(form: Form, parameters: int) -> int:
    if form.one_in > 1:
        rows = -(-parameters // form.one_in)
        if rows == 0:
            return 0
        last = int(_offsets(form, np.array([rows - 1], dtype=np.uint64))[0])
        return rows - int((rows - 1) * form.one_in + last >= parameters)
    if form.percent == 100:
        start, stop = form.stretch(parameters)
        return stop - start
    whole, rest = divmod(parameters, SPAN)
    return whole * _kept(SPAN, form.percent) + _kept(rest, form.percent)


def _kept(size: int, percent: int) -> int:
    return -(-size * percent // 100)


def _places_size(form: Form, parameters: int) -> int:
    if form.percent == 100:
        return 0
    whole, rest = divmod(parameters, SPAN)
    return whole * _block_size(form, SPAN) + _block_size(form, rest)


def _block_size(form: Form, size: int) -> int:
    """Bytes of the places in a block of `size`."""
    return -(-_marks(form, size) // 8) + _low_bits(form.percent) * -(-_kept(size, form.percent) // 8)


def _blocks(form: Form, parameters: int) -> Iterator[tuple[slice, slice, slice]]:
    """Each block of parameters, where what is kept of it stands among all that is kept, and where its places stand."""
    among = where = 0
    for start in range(0, parameters, SPAN):
        stop = min(start + SPAN, parameters)
        count = _kept(stop - start, form.percent)
        size = _block_size(form, stop - start)
        yield slice(start, stop), slice(among, among + count), slice(where, where + size)
        among += count
        where += size


# The same without bytes: what a receiver has after `unpack_into`, for simulators.


def received(form: Form, values: A, own: A, *, exact: int = 0, importance: A | None = None) -> A:
    """(..., P) of the receiver, from the sender's `values` and the receiver's `own` (..., P): a new array."""
    parameters = values.shape[-1] - exact
    if form.one_in > 1:
        places = sampled_places(form, parameters)
        result = own + 0
        result[..., places] = rounded(form.values, values[..., places])
    elif form.percent == 100:
        start, stop = form.stretch(parameters)
        result = own + 0
        result[..., start:stop] = rounded(form.values, values[..., start:stop])
    else:
        weights = abs(values if importance is None else importance)
        result = own + 0
        kept = _zeros(values, _sent(form, parameters))
        everywhere = []
        for block, among, _ in _blocks(form, parameters):
            chosen = top(weights[..., block], among.stop - among.start) + block.start
            kept[..., among] = take(values, chosen)
            everywhere.append((chosen, among))
        kept = rounded(form.values, kept)
        for chosen, among in everywhere:
            put(result, chosen, kept[..., among])
    if exact:
        result[..., parameters:] = values[..., parameters:]
    return result


def rounded(encoding: str, values: A) -> A:
    """What is left of `values` (..., P) after `encode` and `decode`."""
    match encoding:
        case "float32":
            return values
        case "float16":
            return (
                values.astype(np.float16).astype(values.dtype) if is_numpy(values) else values.half().to(values.dtype)
            )
        case "bfloat16" if not is_numpy(values):
            return values.bfloat16().to(values.dtype)
        case "bfloat16":
            bits = values.astype(np.float32).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
            return nearest.view(np.float32).astype(values.dtype)
    size = values.shape[-1]
    width = BLOCK if encoding == "int8" else INT4_BLOCK
    padded = _zeros(values, -(-size // width) * width)
    padded[..., :size] = values
    rows = padded.reshape(*values.shape[:-1], -1, width)
    if encoding == "int8":
        scale = largest(abs(rows))[..., None] / 127
        rows = (rows * _inverse(scale)).round() * scale
    else:
        high, low = largest(rows), largest(-rows)
        upper = high >= low
        peaks = high * upper - low * ~upper
        peaks = peaks if is_numpy(peaks) else peaks.detach().cpu().numpy()
        scale = like(values, rounded_scales(peaks.astype(np.float32)))[..., None]
        rows = (rows * _inverse(scale)).round().clip(-8, 7) * scale
    return rows.reshape(*values.shape[:-1], -1)[..., :size]


def _inverse(scale: A) -> A:
    """1 / scale; 1 where that would overflow, and values of such a block round to 0."""
    usable = abs(scale) > SMALLEST_SCALE
    return 1 / (scale * usable + ~usable)


def _zeros(values: A, size: int) -> A:
    shape = (*values.shape[:-1], size)
    return np.zeros(shape, dtype=values.dtype) if is_numpy(values) else values.new_zeros(shape)
