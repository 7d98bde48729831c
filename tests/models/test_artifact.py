"""Safetensors headers: one error for each malformation; what is packed is the same each time and loads elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from gossipml.errors import RemoteError, UserError
from gossipml.models import artifact
from gossipml.models.artifact import header_size, pack, read_file_header, read_header


def file_of(header: object, body: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_names_types_and_shapes_of_a_file_by_the_safetensors_package() -> None:
    data = save({"b": np.zeros((2, 3), np.float32), "a": np.zeros(5, np.int8)}, {"k": "v"})
    header = read_header(data, len(data))
    assert {(t.name, t.dtype, t.shape) for t in header.tensors} == {("b", "F32", (2, 3)), ("a", "I8", (5,))}
    assert (header.metadata, header.info, header.parameters) == ({"k": "v"}, {}, 11)
    assert header.tensors[-1].end == len(data)
    exact = header_size(data[:8], len(data))
    assert read_header(memoryview(data)[:exact], len(data)) == header


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "of 0 bytes"),
        (b"1234567", "of 7 bytes"),
        ((2 << 20).to_bytes(8, "little") + bytes(3 << 20), "claims 2097152 bytes; the limit"),
        (b"\xff" * 20, "the limit"),
        ((100).to_bytes(8, "little") + b"{}", "100 bytes of a file of 10"),
        (file_of(b" {}"), "does not begin with {"),
        (file_of(b"[]"), "does not begin with {"),
        (file_of(b'{"\xff": 1}'), "not UTF-8"),
        (file_of(b'{"a": }'), "not JSON"),
        (file_of(b'{"a": NaN}'), "NaN is no JSON"),
        (file_of(b'{"a": ' + b"[" * 100_000), "not JSON"),
        (file_of(b'{"a": ' + b"1" * 10_000 + b"}"), "not JSON"),
        (file_of(b'{"a": 1, "a": 2}'), "twice"),
        (file_of({"__metadata__": {"a": 1}}), "metadata"),
        (file_of({"__metadata__": []}), "metadata"),
        (file_of({"": tensor()}, 8), "0 characters"),
        (file_of({"x" * 513: tensor()}, 8), "513 characters"),
        (file_of({"a": 1}), "exactly dtype"),
        (file_of({"a": tensor() | {"more": 1}}, 8), "exactly dtype"),
        (file_of({"a": tensor(dtype="F33")}, 8), "unknown type 'F33'"),
        (file_of({"a": tensor(dtype=None)}, 8), "unknown type None"),
        (file_of({"a": tensor(shape=2)}, 8), "no shape"),
        (file_of({"a": tensor(shape=[2.0])}, 8), "no shape"),
        (file_of({"a": tensor(shape=[True, 2])}, 8), "no shape"),
        (file_of({"a": tensor(shape=[-2])}, 8), "no shape"),
        (file_of({"a": tensor(shape=[1] * 17)}, 8), "no shape"),
        (file_of({"a": tensor(offsets=[0])}, 8), "no two offsets"),
        (file_of({"a": tensor(offsets=[0, "8"])}, 8), "no two offsets"),
        (file_of({"a": tensor(offsets=[8, 0])}, 8), "does not take the bytes 8 to 0"),
        (file_of({"a": tensor(shape=[3])}, 8), "does not take the bytes 0 to 8"),
        (file_of({"a": tensor(dtype="F4", shape=[3], offsets=[0, 1])}, 1), "does not take"),
        (file_of({"a": tensor(shape=[1 << 40, 1 << 40])}, 8), "does not take"),
        (file_of({"a": tensor(), "b": tensor(offsets=[4, 12])}, 12), "overlaps"),
        (file_of({"a": tensor(), "b": tensor()}, 8), "overlaps"),
        (file_of({"a": tensor(), "b": tensor(offsets=[9, 17])}, 17), "hole"),
        (file_of({"a": tensor(offsets=[1, 9])}, 9), "hole"),
        (file_of({"a": tensor()}, 9), "the file at"),
        (file_of({"a": tensor()}, 7), "the file at"),
        (file_of({f"t{n}": tensor(shape=[0], offsets=[0, 0]) for n in range(10_001)}), "10001 tensors"),
    ],
)
def test_each_malformation_has_an_error_of_its_own(data: bytes, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        read_header(data, len(data))


def test_scalars_empty_tensors_and_half_bytes_are_fine() -> None:
    data = file_of(
        {
            "scalar": tensor(shape=[], offsets=[0, 4]),
            "empty": tensor(shape=[0, 7], offsets=[4, 4]),
            "halves": tensor(dtype="F4", shape=[4], offsets=[4, 6]),
        },
        6,
    )
    assert read_header(data, len(data)).parameters == 5
    assert read_header(file_of({}), 10).tensors == ()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_garbage_is_refused_without_another_error(text: bytes, body: int) -> None:
    data = file_of(b"{" + text, body)
    with pytest.raises(RemoteError):
        read_header(data, len(data))


def test_packed_tensors_are_the_same_bytes_each_time_and_load_with_safetensors_alone(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3), "n": torch.tensor(3)}
    info = {"model": "digits-mlp", "spec": "ab" * 32}
    data = pack(tensors, info)
    assert data == pack(dict(reversed(tensors.items())), dict(reversed(info.items())))
    header = read_header(data, len(data))
    assert header.info == info and header.parameters == 10
    (tmp_path / "f.safetensors").write_bytes(data)
    with safe_open(tmp_path / "f.safetensors", "numpy") as opened:
        assert opened.get_tensor("w").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert read_file_header(tmp_path / "f.safetensors") == header


def test_a_model_that_could_not_be_read_back_is_not_packed() -> None:
    with pytest.raises(UserError, match="513 characters"):
        pack({"x" * 513: torch.ones(1)}, {})


def test_a_users_file_that_is_none_is_said_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"m\.safetensors cannot be read: No such file"):
        read_file_header(path)
    for data in (b"", b"x", b"PK\3\4 a zip file, as torch.save makes it"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.safetensors cannot be used.*safetensors package"):
            read_file_header(path)


def test_info_of_a_file_from_elsewhere_is_harmless() -> None:
    for text in ("[]", "{", "1", '{"a": 1}', "[" * 5000):
        data = file_of({"__metadata__": {artifact.INFO: text}})
        assert read_header(data, len(data)).info == {}


def test_headers_are_read_without_torch() -> None:
    code = "import sys; from gossipml.models import artifact, store, store_files; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"
