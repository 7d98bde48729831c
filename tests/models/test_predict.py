from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models.builtin import DigitsMlp, MnistMlp, Xor
from gossipml.models.predict import MAX_SAMPLES, answer
from gossipml.models.spec import Array, Spec
from tests.models.pictures import picture


def ask(spec: Spec, value: object) -> Any:  # Any: JSON
    """The answer of a stand-in module: xor itself, or the sum of the inputs as class 3."""

    def forward(inputs: Array) -> Array:
        assert inputs.dtype == np.float32
        if isinstance(spec, Xor):
            different: Array = np.abs(inputs[:, :1] - inputs[:, 1:])
            return different
        scores = np.zeros((len(inputs), 10), dtype=np.float32)
        scores[:, 3] = inputs.sum(1)
        return scores

    request = value if isinstance(value, bytes) else json.dumps(value).encode()
    return json.loads(answer(spec, request, forward))


BY_XOR = {"model": "xor", "version": "", "peer": ""}


def tensor(data: object, shape: object = (1, 2), **changes: object) -> dict[str, object]:
    return {"inputs": [{"name": "input", "datatype": "FP32", "shape": shape, "data": data, **changes}]}


def test_query_parameters_are_text() -> None:
    assert ask(Xor(), {"a": "0", "b": "1"}) == {"result": 1, "probability": 1.0} | BY_XOR


@pytest.mark.parametrize("value", [[1, 1], {"a": 1, "b": 1.0}])
def test_one_sample_gives_its_answer_alone(value: object) -> None:
    assert ask(Xor(), value) == {"result": 0, "probability": 0.0} | BY_XOR


@pytest.mark.parametrize("value", [[[0, 1], [1, 1]], {"instances": [[0, 1], {"a": 1, "b": 1}]}])
def test_many_samples_give_predictions(value: object) -> None:
    assert [each["result"] for each in ask(Xor(), value)["predictions"]] == [1, 0]


def test_a_classifier_gives_label_and_probabilities() -> None:
    reply = ask(DigitsMlp(), [16] * 64)
    assert reply["label"] == "3"
    assert sum(reply["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert ask(DigitsMlp(), {"values": ",".join(["16"] * 64)}) == reply


def test_the_open_inference_protocol() -> None:
    reply = ask(Xor(), tensor([0, 1, 1, 1], [2, 2]) | {"id": "7"})
    assert reply == {
        "model_name": "xor",
        "model_version": "",
        "id": "7",
        "outputs": [
            {"name": "result", "datatype": "INT64", "shape": [2, 1], "data": [1, 0]},
            {"name": "probability", "datatype": "FP32", "shape": [2, 1], "data": [1.0, 0.0]},
        ],
    }
    nested = ask(Xor(), tensor([[0, 1]]) | {"outputs": [{"name": "result"}]})
    assert nested["outputs"] == [{"name": "result", "datatype": "INT64", "shape": [1, 1], "data": [1]}]
    labels = ask(DigitsMlp(), tensor([1] * 64, [1, 64]))["outputs"][1]
    assert labels == {"name": "label", "datatype": "BYTES", "shape": [1, 1], "data": ["3"]}


@pytest.mark.parametrize(
    "value, says",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[NaN, 1]", "NaN is not a JSON number"),
        (b"[Infinity, 1]", "Infinity is not"),
        (b"[-Infinity, 1]", "-Infinity is not"),
        (b"[1e999, 1]", "too large for a 64-bit float"),
        (b"[1e39, 1]", "not a finite FP32"),
        (b"[1" + b"0" * 400 + b", 1]", "more than 64 bits"),
        (b"[" * 100_000, "nested deeper than 32"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ({"a": "nan", "b": "1"}, "not a finite FP32"),
        ({"a": "one", "b": "1"}, "is not a number"),
        ({"a": None, "b": 1}, "is null"),
        ({"a": True, "b": 1}, "is true or false"),
        ({"a": {}, "b": 1}, "is an object"),
        ({"a": 1}, "the input 'b' is missing; 'xor' takes a, b"),
        ({"a": 1, "b": 1, "c": 1}, "no input 'c'"),
        ({"instances": []}, "not a list of at least one"),
        ({"instances": 3}, "not a list of at least one"),
        ({"instances": [[0, 1]] * (MAX_SAMPLES + 1)}, "'xor' takes 1 to 4096 at a time"),
        ([], "is no sample"),
        (3, "is no sample"),
        ("x", "is no sample"),
        ([1, 2, 3], "has 3 values; 'xor' takes a, b"),
        ([[1, 2], [1]], "has the shape [1]"),
        ([[1, [2]]], "has the shape []"),
        ([[[1, 2]]], "has the shape [1, 2]"),
        ({"inputs": []}, "holds 0 tensors; the model 'xor' takes one, 'input'"),
        ({"inputs": 3}, "holds 0 tensors"),
        (tensor([0, 1], name="x"), "there is no input 'x'"),
        (tensor([0, 1], datatype="INT32"), "send FP32"),
        (tensor([0, 1], [2]), "has shape [2]; send [-1, 2]"),
        (tensor([0, 1], [1, 3]), "has shape [1, 3]"),
        (tensor([0, 1], [True, 2]), "has shape"),
        (tensor([0, 1], [10**9, 2]), "1 to 4096 at a time"),
        (tensor([0, 1], [0, 2]), "has 0 samples"),
        (tensor([0, 1], [-1, 2]), "has -1 samples"),
        (tensor([0, 1, 1]), "has the shape [3], its shape says [1, 2]"),
        (tensor([[0], [1]]), "has the shape [2, 1]"),
        (tensor("01"), "no list of data"),
        (tensor([0, None]), "is null"),
        (tensor([0, 1]) | {"outputs": [{"name": "reslt"}]}, "did you mean 'result'"),
        (tensor([0, 1]) | {"outputs": 3}, "is not a list of at most 2"),
    ],
)
def test_bad_requests_get_a_sentence(value: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(Xor(), value)
    assert says in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["a", "b", "inputs", "instances", "name", "shape", "data", "datatype", "values"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_gives_an_answer_or_a_user_error(value: object) -> None:
    for spec in (Xor(), DigitsMlp()):
        try:
            ask(spec, value)
        except UserError:
            pass


def test_an_egest_that_forgets_a_sample_is_the_models_fault() -> None:
    class Forgetful(Xor):
        def egest(self, outputs: Array) -> list[Any]:
            return []

    with pytest.raises(UserError, match="egest gave 0 answers for 1 samples"):
        ask(Forgetful(), [0, 1])


def brightness(spec: Spec, value: object) -> float:
    """The mean of what the module gets for a request."""
    seen: list[Array] = []

    def forward(inputs: Array) -> Array:
        seen.append(inputs)
        return np.zeros((len(inputs), 10), dtype=np.float32)

    answer(spec, value if isinstance(value, bytes) else json.dumps(value).encode(), forward)
    return float(np.concatenate(seen).mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_a_picture_is_a_request_by_itself_and_a_sample_in_base64(kind: str) -> None:
    data = picture(200, (50, 40), kind=kind)
    sample = {"image": base64.b64encode(data).decode()}
    expected = (200 * 0.299 + 55 * 0.587 + 7 * 0.114) / 255  # grey, as the model takes it
    for request in (data, sample, [sample, sample], {"instances": [sample, [0] * 784]}):
        times = 0.5 if isinstance(request, dict) and "instances" in request else 1.0
        assert brightness(MnistMlp(), request) == pytest.approx(expected * times, abs=0.05)


def test_white_is_as_white_as_in_the_data() -> None:
    mean = brightness(MnistMlp(), picture(200))
    assert brightness(DigitsMlp(), picture(200)) == pytest.approx(mean, abs=0.01)
    assert brightness(DigitsMlp(), [16] * 64) == brightness(MnistMlp(), [255] * 784) == 1.0


def test_a_model_of_colours_gets_them() -> None:
    from gossipml.models.builtin_pictures import CifarCnn

    assert brightness(CifarCnn(), picture(200)) != pytest.approx(brightness(CifarCnn(), picture(55)), abs=0.01)


@pytest.mark.parametrize(
    "spec, request_, says",
    [
        (Xor(), picture(1), "takes no pictures; 'xor' takes"),
        (MnistMlp(), picture(1)[:40], "the picture"),
        (MnistMlp(), {"image": "not base64!"}, '"image" is not base64'),
        (MnistMlp(), {"image": 5}, '"image" is not base64'),
        (MnistMlp(), {"image": ""}, "the picture is not a picture that can be read"),
        (MnistMlp(), {"image": base64.b64encode(b"<svg/>").decode()}, "is not a picture that can be read"),
    ],
)
def test_what_is_no_picture_for_the_model_is_refused(spec: Spec, request_: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(spec, request_)
    assert says in str(caught.value)


def test_many_huge_pictures_in_one_request_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossipml.models.predict.MAX_PIXELS", 5000)
    sample = {"image": base64.b64encode(picture(9, (60, 50))).decode()}
    assert ask(MnistMlp(), [sample])
    with pytest.raises(UserError, match="over 5000 pixels together; send smaller ones"):
        ask(MnistMlp(), [sample] * 2)
