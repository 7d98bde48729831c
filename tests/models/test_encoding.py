from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gossipml.errors import LocalError, RemoteError
from gossipml.models.encoding import (
    BLOCK,
    ENCODINGS,
    MAX_MAGNITUDE,
    SLICE,
    Vector,
    decode,
    encode,
    encode_into,
    encoded_size,
)
from gossipml.models.encoding_narrow import INT4_BLOCK

vectors = hnp.arrays(
    np.float32, st.integers(1, 3 * BLOCK + 7), elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=True)
)


@settings(deadline=None)
@given(vectors)
def test_float32_gives_back_every_bit(values: Vector) -> None:
    assert decode("float32", encode("float32", values), len(values)).tobytes() == values.tobytes()


@settings(deadline=None)
@given(vectors)
def test_float16_is_the_nearest_half(values: Vector) -> None:
    assert (decode("float16", encode("float16", values), len(values)) == values.astype(np.float16)).all()


@settings(deadline=None)
@given(vectors)
def test_int8_error_is_at_most_half_a_step(values: Vector) -> None:
    decoded = decode("int8", encode("int8", values), len(values))
    for start in range(0, len(values), BLOCK):
        piece = values[start : start + BLOCK]
        step = np.abs(piece).max() / 127
        assert np.abs(decoded[start : start + BLOCK] - piece).max() <= step * 0.501 + 1e-36


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, SLICE - 1, SLICE + 1, 2 * SLICE + BLOCK + 3])
def test_sizes_around_blocks_and_slices(encoding: str, n: int) -> None:
    values = np.linspace(-3, 5, n, dtype=np.float32)
    data = encode(encoding, values)
    assert len(data) == encoded_size(encoding, n)
    assert np.abs(decode(encoding, data, n) - values).max() < (0.65 if encoding == "int4" else 0.03)


@settings(deadline=None)
@given(vectors)
def test_bfloat16_is_the_nearest_as_torch_rounds(values: Vector) -> None:
    decoded = decode("bfloat16", encode("bfloat16", values), len(values))
    assert decoded.tobytes() == torch.from_numpy(values).bfloat16().float().numpy().tobytes()


@settings(deadline=None)
@given(vectors)
def test_int4_error_is_half_a_step_or_what_the_shorter_end_lacks(values: Vector) -> None:
    decoded = decode("int4", encode("int4", values), len(values))
    for start in range(0, len(values), INT4_BLOCK):
        piece, found = values[start : start + INT4_BLOCK], decoded[start : start + INT4_BLOCK]
        step = np.abs(piece).max() / 8 * (1 + 2**-7)  # the scale is rounded up to 8 binary digits
        within = np.abs(piece) <= 7 * step
        assert np.abs(found - piece).max() <= step * 1.001 + 1e-36
        assert np.abs(found - piece)[within].max(initial=0) <= step * 0.501 + 1e-36


def test_the_layout_of_bfloat16_and_int4_is_what_the_docstring_says() -> None:
    assert encode("bfloat16", np.array([1.0, -2.0], dtype=np.float32)) == bytes.fromhex("803f00c0")
    data = encode("int4", np.array([-8, 7, 0], dtype=np.float32))
    assert data == bytes.fromhex("803f") + bytes([0xF0, 0x88]), "the scale 1; 0 and 15; 8, and the end filled up"
    assert decode("int4", data[:-1] + b"\xf8", 3).tolist() == [-8, 7, 0], "the upper half of the last byte is ignored"


def test_the_layout_of_int8_is_what_the_docstring_says() -> None:
    data = encode("int8", np.array([127, -127, 1, 0], dtype=np.float32))
    assert data == np.float32(1).tobytes() + bytes([127, 129, 1, 0])


def test_encode_into_leaves_the_rest_of_the_buffer_alone() -> None:
    out = bytearray(b"\xaa" * 20)
    assert encode_into("int8", np.ones(4, dtype=np.float32), out) == 8
    assert out[8:] == b"\xaa" * 12
    with pytest.raises(LocalError, match="do not fit into 7"):
        encode_into("int8", np.ones(4, dtype=np.float32), memoryview(bytearray(7)))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e9, -2e9])
@pytest.mark.parametrize("place", [0, SLICE, SLICE + 300])
def test_values_that_are_no_parameters_are_neither_sent_nor_merged(encoding: str, bad: float, place: int) -> None:
    values = np.ones(SLICE + 301, dtype=np.float32)
    values[place] = bad
    with pytest.raises(LocalError):
        encode(encoding, values)
    if encoding == "float32":
        with pytest.raises(RemoteError, match="update holds the value"):
            decode("float32", values.tobytes(), len(values))
    if encoding == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        with pytest.raises(RemoteError, match="update holds the value"):
            decode("bfloat16", bits.tobytes(), len(values))
    if encoding == "float16" and not abs(bad) < np.inf:
        with pytest.raises(RemoteError, match="update holds the value"):
            decode("float16", values.astype(np.float16).tobytes(), len(values))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1e-30, 1e30, MAX_MAGNITUDE])
def test_hostile_scales_are_refused(scale: float) -> None:
    data = bytearray(encode("int8", np.ones(2 * BLOCK, dtype=np.float32)))
    data[4:8] = np.float32(scale).tobytes()
    with pytest.raises(RemoteError, match="scale"):
        decode("int8", data, 2 * BLOCK)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 1e30, -1e30, MAX_MAGNITUDE / 7])
def test_hostile_scales_of_int4_are_refused(scale: float) -> None:
    data = bytearray(encode("int4", np.ones(2 * INT4_BLOCK, dtype=np.float32)))
    data[2:4] = np.array([scale], dtype="<f4").tobytes()[2:]
    with pytest.raises(RemoteError, match="scale"):
        decode("int4", data, 2 * INT4_BLOCK)


@settings(deadline=None)
@given(st.sampled_from(ENCODINGS), st.binary(max_size=1200), st.integers(1, 600))
def test_any_bytes_give_finite_values_or_remote_error(encoding: str, data: bytes, n: int) -> None:
    try:
        values = decode(encoding, data, n)
    except RemoteError:
        return
    assert len(data) == encoded_size(encoding, n)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= MAX_MAGNITUDE


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wrong_lengths_are_refused(encoding: str) -> None:
    data = encode(encoding, np.ones(300, dtype=np.float32))
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(RemoteError, match="300 parameters take"):
            decode(encoding, wrong, 300)


def test_an_unknown_encoding_is_the_senders_fault() -> None:
    with pytest.raises(RemoteError, match="unknown encoding 'int3'"):
        encoded_size("int3", 10)
    with pytest.raises(RemoteError):
        decode("", b"", 0)


def test_encoding_is_the_same_everywhere() -> None:
    values = np.random.RandomState(1).normal(size=1000).astype(np.float32)
    assert encode("int8", values) == encode("int8", values.copy())
    assert encode("int8", np.zeros(3, dtype=np.float32)) == bytes(7)
    assert encode("int4", values) == encode("int4", values.copy())
    assert decode("int4", encode("int4", np.zeros(3, dtype=np.float32)), 3).tolist() == [0, 0, 0]
