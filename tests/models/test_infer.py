"""Open Inference Protocol: tensors in JSON and in binary, both ways."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models.builtin import DigitsMlp, Xor
from gossipml.models.predict import Names, Written, answer_together, read
from gossipml.models.spec import DATATYPES, Array, Json, Spec, TensorSpec

NAMES = Names("xor", "v7", "anna")
SAMPLES = np.array([[0, 1], [1, 1]], dtype="<f4")


def ask(spec: Spec, body: bytes, json_size: int | None = None) -> Written:
    """The answer of a stand-in module: xor itself, or class 3."""

    def forward(inputs: Array) -> Array:
        if isinstance(spec, DigitsMlp):
            return np.eye(10, dtype=np.float32)[[3] * len(inputs)]
        different: Array = np.abs(inputs[:, :1] - inputs[:, 1:])
        return different

    question = read(spec, "infer", body, json_size)
    (found,) = answer_together(spec, [question], forward)
    assert not isinstance(found, Exception)
    return question.write(found, NAMES)


def binary(data: bytes, size: object = None, shape: object = (2, 2), **more: object) -> tuple[bytes, int]:
    parameters = {"binary_data_size": len(data) if size is None else size}
    tensor = {"name": "input", "datatype": "FP32", "shape": shape, "parameters": parameters}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + data, len(head)


def split(written: Written) -> tuple[dict[str, Any], bytes]:  # Any: JSON
    assert written.json_size is not None
    return json.loads(written.body[: written.json_size]), written.body[written.json_size :]


def test_an_answer_names_model_version_peer_and_the_id_of_its_request() -> None:
    request = {"id": "7", "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]}]}
    written = ask(Xor(), json.dumps(request).encode())
    reply = json.loads(written.body)
    assert written.json_size is None
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("7", "xor", "v7")
    assert reply["parameters"] == {"peer": "anna"}


def test_binary_tensors_are_read_and_given_as_numpy_writes_them() -> None:
    reply, tail = split(ask(Xor(), *binary(SAMPLES.tobytes(), parameters={"binary_data_output": True})))
    assert [output["parameters"]["binary_data_size"] for output in reply["outputs"]] == [16, 8]
    assert np.frombuffer(tail[:16], "<i8").tolist() == [1, 0]
    assert np.frombuffer(tail[16:], "<f4").tolist() == [1.0, 0.0]


def test_each_output_may_be_binary_or_not() -> None:
    wanted = [{"name": "probability", "parameters": {"binary_data": True}}, {"name": "result"}]
    reply, tail = split(ask(Xor(), *binary(SAMPLES.tobytes(), outputs=wanted)))
    assert "data" not in reply["outputs"][0] and reply["outputs"][1]["data"] == [1, 0]
    assert np.frombuffer(tail, "<f4").tolist() == [1.0, 0.0]
    as_json = [{"name": "result", "parameters": {"binary_data": False}}]
    request = binary(SAMPLES.tobytes(), outputs=as_json, parameters={"binary_data_output": True})
    assert ask(Xor(), *request).json_size is None


def test_binary_text_is_a_length_and_utf8() -> None:
    zeros = np.zeros((1, 64), dtype="<f4").tobytes()
    reply, tail = split(ask(DigitsMlp(), *binary(zeros, shape=[1, 64], outputs=[
        {"name": "label", "parameters": {"binary_data": True}}
    ])))  # fmt: skip
    assert reply["outputs"][0]["parameters"] == {"binary_data_size": 5}
    assert tail == struct.pack("<I", 1) + b"3"


class Texts(Xor):
    """Takes text; answers whether two are equal."""

    inputs = (TensorSpec("input", "BYTES", (-1, 2)),)

    def ingest(self, samples: Array) -> Array:
        return np.array([[0, float(a != b)] for a, b in samples], dtype=np.float32)


def test_text_comes_in_binary() -> None:
    data = b"".join(struct.pack("<I", len(text)) + text for text in ("é".encode(), b"x", b"", b""))
    body, size = binary(data)
    body, size = body.replace(b"FP32", b"BYTES"), size + 1
    assert json.loads(ask(Texts(), body, size).body)["outputs"][0]["data"] == [1, 0]
    for wrong in (data[:-1], data + b"x", data.replace("é".encode(), b"\xff\xff"), b"\xff" * 8):
        body, size = binary(wrong)
        with pytest.raises(UserError):
            ask(Texts(), body.replace(b"FP32", b"BYTES"), size + 1)


INTEGERS = ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]


@pytest.mark.parametrize("datatype", [*INTEGERS, "FP16", "FP32", "FP64"])
def test_every_datatype_of_the_protocol_comes_in_both_ways_and_within_its_bounds(datatype: str) -> None:
    kind = np.dtype(DATATYPES[datatype])
    values = 2 ** (8 * kind.itemsize)
    low: float
    high: float
    low, high = (0, values - 1) if datatype.startswith("U") else (-values // 2, values // 2 - 1)
    outside = [low - 1, high + 1, 0.5]
    if datatype not in INTEGERS:
        high = float(np.finfo(kind).max)
        low, outside = -high, [2.0 * high, -2.0 * high]

    class Wide(Xor):
        inputs = (TensorSpec("input", datatype, (-1, 2)),)

    def samples(body: bytes, json_size: int | None = None) -> Array:
        return read(Wide(), "infer", body, json_size).samples

    wanted = np.array([[low, high], [0, 1]], dtype=kind)
    tensor = {"name": "input", "datatype": datatype, "shape": [2, 2]}
    in_json = samples(json.dumps({"inputs": [tensor | {"data": [low, high, 0, 1]}]}).encode())
    data = wanted.astype(kind.newbyteorder("<")).tobytes()
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]}).encode()
    in_binary = samples(head + data, len(head))
    for found in (in_json, in_binary):
        assert found.dtype == kind and (found == wanted).all()
    for wrong in outside:
        with pytest.raises(UserError):
            samples(json.dumps({"inputs": [tensor | {"data": [wrong, 0, 0, 0]}]}).encode())


RAW = SAMPLES.tobytes()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (binary(RAW[:-1]), "15 bytes; 4 values of FP32 take 16"),
        (binary(RAW, 12), "binary_data_size of 'input' is 12, and 16 bytes follow"),
        (binary(RAW, True), "is True"),
        (binary(RAW, "16"), "is '16'"),
        (binary(RAW, -1), "is -1"),
        (binary(b"", 0), "0 bytes; 4 values"),
        (binary(np.full((2, 2), np.nan, "<f4").tobytes()), "not a finite FP32"),
        (binary(np.full((2, 2), np.inf, "<f4").tobytes()), "not a finite FP32"),
        (binary(RAW, shape=[10**9, 2]), "1 to 4096 at a time"),
        ((binary(RAW)[0], None), "not UTF-8|not JSON"),
        ((b"{}", 3), "is said to have 3 bytes, and the body has 2"),
        ((b"[]", 2), "an inference request is an object"),
        (binary(RAW, outputs=[{"name": "result", "parameters": {"binary_data": 1}}]), "is true or false"),
        (binary(RAW, parameters={"binary_data_output": "yes"}), "is true or false"),
        (binary(RAW, parameters=[]), "are no object"),
        (binary(RAW, id=7), "id is not text"),
        (binary(RAW, id="x" * 257), "at most 256"),
    ],
)
def test_binary_requests_that_do_not_fit_get_a_sentence(body: tuple[bytes, int | None], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ask(Xor(), *body)


def test_data_twice_or_bytes_for_nobody_are_refused() -> None:
    tensor: dict[str, Json] = {"name": "input", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(UserError, match="8 bytes follow the JSON, and no input"):
        ask(Xor(), head + RAW[:8], len(head))
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": 8}}]}).encode()
    with pytest.raises(UserError, match="send one of them"):
        ask(Xor(), head + RAW[:8], len(head))


@given(st.binary(max_size=60), st.integers(-1, 300))
def test_any_bytes_are_an_answer_or_a_user_error(tail: bytes, size: int) -> None:
    body, head = binary(tail)
    for json_size in (size, head):
        try:
            ask(Xor(), body, json_size)
        except UserError:
            pass
