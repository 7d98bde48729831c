"""Open Inference Protocol: what an inference request must look like."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.api import tensors
from gossipml.api.ports import JSON, ModelCard, Tensor, TensorInputs, TensorSpec
from gossipml.errors import UserError

from .fake_node import DIGITS, XOR


def tensor(**changes: JSON) -> dict[str, JSON]:
    return {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [0, 1, 1, 1], **changes}


def card(datatype: str, *shape: int) -> ModelCard:
    return ModelCard("m", "1", "p", (TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", (-1,)),), True)


def test_flat_and_nested_data_are_the_same_tensor() -> None:
    flat, _ = tensors.read_infer_request({"inputs": [tensor()]}, XOR)
    nested, _ = tensors.read_infer_request({"inputs": [tensor(data=[[0, 1], [1, 1]])]}, XOR)
    assert flat == nested == TensorInputs((Tensor("x", "FP32", (2, 2), (0.0, 1.0, 1.0, 1.0)),), ())


def test_the_id_and_the_wanted_outputs_are_read() -> None:
    body: JSON = {"id": "42", "inputs": [tensor()], "outputs": [{"name": "y"}, {"name": "y"}], "parameters": {}}
    payload, identifier = tensors.read_infer_request(body, XOR)
    assert (payload.outputs, identifier) == (("y",), "42")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([], "an inference request is an object"),
        ({}, "inputs must be a list"),
        ({"inputs": []}, "inputs must be a list"),
        ({"inputs": {}}, "inputs must be a list"),
        ({"inputs": [tensor()] * 65}, "inputs must be a list of 1 to 64"),
        ({"inputs": [7]}, "each input must be an object"),
        ({"inputs": [tensor(), tensor()]}, "'x' is given more than once"),
        ({"inputs": [tensor(name="z")]}, "no input 'z'; the model takes 'x'"),
        ({"inputs": [tensor(name=None)]}, "no input null"),
        ({"inputs": [tensor(name=["x"])]}, "no input a list"),
        ({"inputs": [tensor(datatype="float32")]}, "'float32' is none of BOOL"),
        ({"inputs": [tensor(datatype=[])]}, "datatype a list is none of"),
        ({"inputs": [tensor(datatype="FP64")]}, "datatype is FP64, the model takes FP32"),
        ({"inputs": [tensor(shape=[])]}, "shape must be a list of 1 to 8"),
        ({"inputs": [tensor(shape=[1] * 9)]}, "shape must be a list of 1 to 8"),
        ({"inputs": [tensor(shape="2")]}, "shape must be a list"),
        ({"inputs": [tensor(shape=[True, 2])]}, "integers from 1"),
        ({"inputs": [tensor(shape=[2.0, 2])]}, "integers from 1"),
        ({"inputs": [tensor(shape=[0, 2])]}, "integers from 1"),
        ({"inputs": [tensor(shape=[-1, 2])]}, "integers from 1"),
        ({"inputs": [tensor(shape=[2, 3])]}, r"\[2, 3\], the model takes \[-1, 2\]"),
        ({"inputs": [tensor(shape=[4])]}, r"\[4\], the model takes \[-1, 2\]"),
        ({"inputs": [tensor(shape=[2**63, 2])]}, "over the limit of 524288"),
        ({"inputs": [{k: v for k, v in tensor().items() if k != "data"}]}, "has no data"),
        ({"inputs": [tensor(data=5)]}, "data must be a list"),
        ({"inputs": [tensor(data=[1, 2, 3])]}, "3 elements where the shape says 4"),
        ({"inputs": [tensor(data=[1] * 5)]}, "5 elements where the shape says 4"),
        ({"inputs": [tensor(data=[[1, 2], [3]])]}, "1 elements where the shape says 2"),
        ({"inputs": [tensor(data=[[1, 2], 3])]}, "nested as its shape says"),
        ({"inputs": [tensor(data=[[[1], [2]], [[3], [4]]])]}, "a list is no FP32"),
        ({"inputs": [tensor(data=[1, 2, 3, "4"])]}, "'4' is no FP32"),
        ({"inputs": [tensor(data=[1, 2, 3, True])]}, "True is no FP32"),
        ({"inputs": [tensor(data=[1, 2, 3, None])]}, "null is no FP32"),
        ({"inputs": [tensor(data=[1, 2, 3, {}])]}, "an object is no FP32"),
        ({"inputs": [tensor(data=[1, 2, 3, 1e39])]}, "1e[+]39 is no FP32"),
        ({"inputs": [tensor(parameters=[])]}, "parameters of input 'x' must be an object"),
        ({"inputs": [tensor(parameters={"binary_data_size": 4})]}, "binary"),
        ({"inputs": [tensor()], "parameters": 1}, "parameters of the request must be an object"),
        ({"inputs": [tensor()], "id": 3}, "id must be text"),
        ({"inputs": [tensor()], "id": "x" * 257}, "id must be text of at most 256"),
        ({"inputs": [tensor()], "outputs": {}}, "outputs must be a list"),
        ({"inputs": [tensor()], "outputs": [{"name": "z"}]}, "no output 'z'; xor gives 'y'"),
        ({"inputs": [tensor()], "outputs": ["y"]}, "no output null"),
    ],
)
def test_a_malformed_request_is_refused_with_what_is_wrong(body: JSON, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tensors.read_infer_request(body, XOR)


def test_a_missing_input_is_named() -> None:
    two = ModelCard("m", "1", "p", (*XOR.inputs, *DIGITS.inputs), XOR.outputs, True)
    with pytest.raises(UserError, match="'pixels' is missing; m takes 'x', 'pixels'"):
        tensors.read_infer_request({"inputs": [tensor()]}, two)


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("UINT8", [0, 255], [-1, 256, 1.0, "1", True]),
        ("INT8", [-128, 127], [-129, 128]),
        ("INT16", [-32768, 32767], [32768]),
        ("UINT16", [65535], [65536]),
        ("INT32", [-(2**31)], [2**31]),
        ("UINT32", [2**32 - 1], [2**32]),
        ("INT64", [-(2**63)], [2**63]),
        ("UINT64", [2**64 - 1], [-1]),
        ("FP16", [65504, 0.5], [65505, False]),
        ("FP64", [1.7e308, 3], ["3"]),
        ("BOOL", [True, False], [0, 1, "true"]),
        ("BYTES", ["", "text"], [1, None]),
    ],
)
def test_elements_fit_their_datatype(datatype: str, good: list[JSON], bad: list[JSON]) -> None:
    def read(element: JSON) -> JSON:
        body: JSON = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": [element]}]}
        return tensors.read_infer_request(body, card(datatype, -1))[0].inputs[0].data[0]

    assert [read(element) for element in good] == good
    for element in bad:
        with pytest.raises(UserError, match=f"no {datatype}"):
            read(element)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_nested_data_of_any_shape_is_flattened_row_major(shape: list[int]) -> None:
    flat = [float(n) for n in range(math.prod(shape))]
    nested: list[JSON] = [*flat]
    for length in reversed(shape[1:]):
        nested = [nested[i : i + length] for i in range(0, len(nested), length)]
    body: JSON = {"inputs": [{"name": "x", "datatype": "FP64", "shape": shape, "data": nested}]}
    payload, _ = tensors.read_infer_request(body, card("FP64", *[-1] * len(shape)))
    assert payload.inputs[0] == Tensor("x", "FP64", tuple(shape), tuple(flat))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | st.sampled_from(["x", "FP32", "y"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["inputs", "outputs", "id", "name", "shape", "datatype", "data", "parameters"]), inner
        )
    ),
)


PLACES: tuple[Callable[[JSON], JSON], ...] = (
    lambda v: v,
    lambda v: {"inputs": v},
    lambda v: {"inputs": [v]},
    lambda v: {"inputs": [tensor()], "outputs": v},
    lambda v: {"inputs": [tensor(shape=v)]},
    lambda v: {"inputs": [tensor(data=v)]},
    lambda v: {"inputs": [tensor(datatype=v)]},
)


@given(ANYTHING, st.sampled_from(PLACES))
def test_any_json_is_a_request_or_a_users_error(value: JSON, place: Callable[[JSON], JSON]) -> None:
    try:
        payload, _ = tensors.read_infer_request(place(value), XOR)
    except UserError:
        return
    assert all(len(t.data) == math.prod(t.shape) for t in payload.inputs)
