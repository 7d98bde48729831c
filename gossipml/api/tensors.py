"""The outer form of Open Inference Protocol requests (KServe V2, REST, JSON tensors), and its answers.

An inference request is `{"id"?, "parameters"?, "inputs": [{"name", "shape", "datatype", "data"}], "outputs"?:
[{"name"}]}`; `data` is row-major, flat or nested as the shape says. Checked here: form, names, datatype and shape
against the model card, the count and range of the elements. Left out: the binary tensor extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

from gossipml.api.ports import JSON, ModelCard, PredictAnswer, Tensor, TensorInputs, TensorSpec
from gossipml.errors import UserError

MAX_INPUTS = 64  # tensors of one request; models here have one or two
MAX_RANK = 8
MAX_ELEMENTS = 1 << 19  # what the body cap holds at two bytes an element; bounds what a shape can promise
MAX_ID = 256  # characters of a request's id, which is echoed

Element: TypeAlias = bool | int | float | str

_INT: tuple[type[Element], ...] = (int,)
_FLOAT: tuple[type[Element], ...] = (float, int)
# The Python types that an element may have, first the one it gets, and the least and the greatest value.
_KINDS: dict[str, tuple[tuple[type[Element], ...], float, float]] = {
    "BOOL": ((bool,), 0, 0),
    **{f"UINT{bits}": (_INT, 0, (1 << bits) - 1) for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": (_INT, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (8, 16, 32, 64)},
    "FP16": (_FLOAT, -65504.0, 65504.0),
    "FP32": (_FLOAT, -3.4028234663852886e38, 3.4028234663852886e38),
    "FP64": (_FLOAT, -math.inf, math.inf),
    "BYTES": ((str,), 0, 0),
}
DATATYPES = tuple(_KINDS)


def read_infer_request(body: JSON, card: ModelCard) -> tuple[TensorInputs, str | None]:
    """The checked tensors and the request's id, or UserError."""
    if not isinstance(body, dict):
        raise UserError('an inference request is an object: {"inputs": [{"name", "shape", "datatype", "data"}]}')
    identifier = body.get("id")
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > MAX_ID):
        raise UserError(f"id must be text of at most {MAX_ID} characters")
    _check_parameters(body, "the request")
    items = body.get("inputs")
    if not isinstance(items, list) or not 0 < len(items) <= MAX_INPUTS:
        raise UserError(f"inputs must be a list of 1 to {MAX_INPUTS} tensors")
    tensors = tuple(_read_tensor(item, card.inputs) for item in items)
    given = [tensor.name for tensor in tensors]
    for spec in card.inputs:
        if given.count(spec.name) != 1:
            how = "missing" if spec.name not in given else "given more than once"
            raise UserError(f"input {spec.name!r} is {how}; {card.name} takes {_names(card.inputs)}, each once")
    return TensorInputs(tensors, _read_outputs(body, card)), identifier


def write_infer_answer(answer: PredictAnswer, model: str, identifier: str | None) -> dict[str, JSON]:
    body: dict[str, JSON] = {"model_name": model, "model_version": answer.version}
    if identifier is not None:
        body["id"] = identifier
    body["parameters"] = {"peer": answer.peer}
    body["outputs"] = [
        {"name": t.name, "datatype": t.datatype, "shape": list(t.shape), "data": list(t.data)} for t in answer.outputs
    ]
    return body


def describe_model(card: ModelCard) -> dict[str, JSON]:
    """Metadata of a model as the protocol wants it."""
    body: dict[str, JSON] = {
        "name": card.name,
        "versions": [card.version] if card.version else [],
        "platform": card.platform,
        "inputs": [_describe_spec(spec) for spec in card.inputs],
        "outputs": [_describe_spec(spec) for spec in card.outputs],
    }
    if card.labels:
        body["parameters"] = {"labels": list(card.labels)}
    return body


def _describe_spec(spec: TensorSpec) -> JSON:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _read_tensor(item: JSON, specs: Sequence[TensorSpec]) -> Tensor:
    if not isinstance(item, dict):
        raise UserError('each input must be an object: {"name", "shape", "datatype", "data"}')
    name = item.get("name")
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        raise UserError(f"there is no input {_shown(name)}; the model takes {_names(specs)}")
    datatype = item.get("datatype")
    if datatype not in DATATYPES:
        raise UserError(f"input {name!r}: datatype {_shown(datatype)} is none of {', '.join(DATATYPES)}")
    if datatype != spec.datatype:
        raise UserError(f"input {name!r}: datatype is {datatype}, the model takes {spec.datatype}")
    shape = _read_shape(item.get("shape"), spec)
    _check_parameters(item, f"input {name!r}")
    if "data" not in item:
        raise UserError(f"input {name!r} has no data; send it as JSON (binary tensors are not understood)")
    items = item["data"]
    if not isinstance(items, list):
        raise UserError(f"input {name!r}: data must be a list")
    elements: list[JSON] = []
    nested = any(isinstance(element, list) for element in items)
    _flatten(items, shape if nested else (math.prod(shape),), spec, elements)
    return Tensor(spec.name, spec.datatype, shape, _checked(elements, spec))


def _read_shape(value: JSON, spec: TensorSpec) -> tuple[int, ...]:
    """Checked against the specification, and to hold something."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_RANK:
        raise UserError(f"input {spec.name!r}: shape must be a list of 1 to {MAX_RANK} integers")
    shape = tuple(n for n in value if isinstance(n, int) and not isinstance(n, bool) and n > 0)
    if len(shape) != len(value):
        raise UserError(f"input {spec.name!r}: shape must hold integers from 1 on")
    if len(shape) != len(spec.shape) or any(
        wanted not in (-1, got) for wanted, got in zip(spec.shape, shape, strict=True)
    ):
        raise UserError(
            f"input {spec.name!r}: shape is {list(shape)}, the model takes {list(spec.shape)} (-1: any length)"
        )
    if math.prod(shape) > MAX_ELEMENTS:
        raise UserError(
            f"input {spec.name!r}: shape {list(shape)} means {math.prod(shape)} elements, over the limit of "
            f"{MAX_ELEMENTS}; send fewer at once"
        )
    return shape


def _flatten(items: list[JSON], shape: tuple[int, ...], spec: TensorSpec, elements: list[JSON]) -> None:
    """Append the elements of nested lists that must be exactly as `shape` says."""
    length, *rest = shape
    if len(items) != length:
        raise UserError(f"input {spec.name!r}: data has {len(items)} elements where the shape says {length}")
    if not rest:
        elements.extend(items)
        return
    for item in items:
        if not isinstance(item, list):
            raise UserError(f"input {spec.name!r}: data must be flat, or nested as its shape says")
        _flatten(item, tuple(rest), spec, elements)


def _checked(elements: list[JSON], spec: TensorSpec) -> tuple[Element, ...]:
    """The elements in the datatype's own Python type. All at once, in C: there may be half a million of them."""
    kinds, low, high = _KINDS[spec.datatype]
    fit = set(map(type, elements)) <= set(kinds)  # type() and not isinstance(): True is no number here
    if fit and low < high:
        numbers = cast("list[float]", elements)
        fit = low <= min(numbers) and max(numbers) <= high
    if fit:
        convert = cast("Callable[[JSON], Element]", kinds[0])
        return tuple(map(convert, elements))
    wrong = next(e for e in elements if type(e) not in kinds or (isinstance(e, int | float) and not low <= e <= high))
    bounds = f" (a number from {low} to {high})" if low < high else ""
    raise UserError(f"input {spec.name!r}: {_shown(wrong)} is no {spec.datatype}{bounds}")


def _read_outputs(body: dict[str, JSON], card: ModelCard) -> tuple[str, ...]:
    items = body.get("outputs")
    if items is None:
        return ()
    if not isinstance(items, list) or len(items) > MAX_INPUTS:
        raise UserError(f"outputs must be a list of at most {MAX_INPUTS} names")
    names: list[str] = []
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in (spec.name for spec in card.outputs):
            raise UserError(f"there is no output {_shown(name)}; {card.name} gives {_names(card.outputs)}")
        if name not in names:
            names.append(name)
    return tuple(names)


def _check_parameters(item: dict[str, JSON], what: str) -> None:
    parameters = item.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise UserError(f"parameters of {what} must be an object")
    if parameters and "binary_data_size" in parameters:
        raise UserError(f"{what} announces binary tensors, which are not understood; send data as JSON")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs) or "none"


def _shown(value: JSON) -> str:
    """A stranger's value in a sentence: short."""
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return repr(value[:40])
        case _:
            return repr(value)
