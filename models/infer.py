"""Requests and answers of the Open Inference Protocol (KServe V2, REST), JSON and binary tensors.

A request is `{"id"?, "parameters"?, "inputs": [TENSOR], "outputs"?: [{"name", "parameters"?}]}`, a TENSOR `{"name",
"datatype", "shape", "data"}`, its data row-major, flat or nested as the shape says. By the binary tensor data extension
a TENSOR may have `"parameters": {"binary_data_size": N}` in the place of `data`: its bytes, little-endian, follow the
JSON, whose length is told apart from the body; text is a 32-bit length and UTF-8. Outputs are binary where
`"parameters": {"binary_data": true}` of the output, or `"binary_data_output": true` of the request, says so.

Other parameters are not looked at, as the protocol allows.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from gossipml import strict_json
from gossipml.errors import UserError
from gossipml.models.predict import Names, Question, Written, check_count, numbers, shape_of
from gossipml.models.registry import nearest
from gossipml.models.spec import DATATYPES, Array, Json, Spec, TensorSpec

MAX_ID = 256  # characters of a request's id, which is echoed
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class _Wanted:
    tensor: TensorSpec
    binary: bool


def read_infer(spec: Spec, body: bytes, json_size: int | None) -> Question:
    """What the request asks. UserError when it does not fit the model."""
    size = len(body) if json_size is None else json_size
    if not 0 <= size <= len(body):
        raise UserError(f"the JSON of the request is said to have {size} bytes, and the body has {len(body)}")
    request = cast("Json", strict_json.parse(body[:size] if size < len(body) else body))
    if not isinstance(request, dict):
        raise UserError('an inference request is an object: {"inputs": [{"name", "shape", "datatype", "data"}]}')
    identifier = request.get("id")
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > MAX_ID):
        raise UserError(f"id is not text of at most {MAX_ID} characters")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        count = len(inputs) if isinstance(inputs, list) else 0
        name = spec.inputs[0].name
        raise UserError(f'"inputs" holds {count} tensors; the model {spec.name!r} takes one, {name!r}')
    binary = _parameters(request, "the request").get("binary_data_output", False)
    wanted = _wanted_outputs(spec, request.get("outputs"), binary)
    samples = _read_tensor(spec, inputs[0], body[size:])
    return Question(samples, partial(_write, identifier, wanted))


def _write(identifier: Json, wanted: tuple[_Wanted, ...], answers: list[dict[str, Json]], names: Names) -> Written:
    reply: dict[str, Json] = {"model_name": names.model, "model_version": names.version}
    if identifier is not None:
        reply["id"] = identifier
    if names.peer:
        reply["parameters"] = {"peer": names.peer}
    described: list[Json] = []
    binary: list[bytes] = []
    for output in wanted:
        values = _values(output.tensor, answers)
        tensor: dict[str, Json] = {
            "name": output.tensor.name, "datatype": output.tensor.datatype, "shape": list(values.shape)
        }  # fmt: skip
        if output.binary:
            binary.append(_bytes(values))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = values.reshape(-1).tolist()
        described.append(tensor)
    reply["outputs"] = described
    body = strict_json.dump(cast("strict_json.JSON", reply))
    return Written(body + b"".join(binary), len(body) if binary else None)


def _read_tensor(spec: Spec, given: dict[str, Json], binary: bytes) -> Array:
    tensor = spec.inputs[0]
    if given.get("name") != tensor.name:
        raise UserError(f"there is no input {_shown(given.get('name'))}; the model {spec.name!r} takes {tensor.name!r}")
    if given.get("datatype") != tensor.datatype:
        raise UserError(
            f"the input {tensor.name!r} has datatype {_shown(given.get('datatype'))}; send {tensor.datatype}"
        )
    shape = given.get("shape")
    if (
        not isinstance(shape, list)
        or any(not isinstance(n, int) or isinstance(n, bool) for n in shape)
        or len(shape) != len(tensor.shape)
        or shape[1:] != list(tensor.shape[1:])
    ):
        raise UserError(f"the input {tensor.name!r} has shape {shape!s:.80}; send {list(tensor.shape)}")
    count = shape[0]
    assert isinstance(count, int)
    check_count(spec, count, math.prod(tensor.shape[1:]))
    full = (count, *tensor.shape[1:])
    size = _parameters(given, f"the input {tensor.name!r}").get("binary_data_size")
    if size is not None:
        if "data" in given:
            raise UserError(f"the input {tensor.name!r} has data and binary_data_size; send one of them")
        if size != len(binary) or isinstance(size, bool):
            raise UserError(
                f"binary_data_size of {tensor.name!r} is {_shown(size)}, and {len(binary)} bytes follow the JSON, "
                "whose length is the header Inference-Header-Content-Length"
            )
        return _of_bytes(binary, tensor, full)
    if binary:
        raise UserError(f"{len(binary)} bytes follow the JSON, and no input has a binary_data_size")
    data = given.get("data")
    if not isinstance(data, list):
        raise UserError(f"the input {tensor.name!r} has no list of data; send the values in row-major order")
    found = shape_of(data)
    if found != full and found != (math.prod(full),):
        raise UserError(f"the data of {tensor.name!r} has the shape {list(found or ())}, its shape says {list(full)}")
    return numbers(data, tensor).reshape(full)


def _of_bytes(data: bytes, tensor: TensorSpec, shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    if tensor.datatype == "BYTES":
        return np.array(_texts(data, count, tensor.name), dtype=np.object_).reshape(shape)
    kind = np.dtype(DATATYPES[tensor.datatype]).newbyteorder("<")
    if len(data) != count * kind.itemsize:
        raise UserError(
            f"the input {tensor.name!r} has {len(data)} bytes; {count} values of {tensor.datatype} take "
            f"{count * kind.itemsize}"
        )
    if tensor.datatype == "BOOL" and data.strip(b"\0\1"):
        raise UserError(f"a byte of the input {tensor.name!r} is neither 0 nor 1; BOOL has no others")
    values: Array = np.frombuffer(data, kind).reshape(shape)
    if np.issubdtype(kind, np.floating) and not np.isfinite(values).all():
        raise UserError(f"a value of {tensor.name!r} is not a finite {tensor.datatype}; send finite numbers")
    return values


def _texts(data: bytes, count: int, name: str) -> list[str]:
    texts, at = [], 0
    try:
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size + length
            if at > len(data):
                raise struct.error
            texts.append(data[at - length : at].decode())
    except (struct.error, UnicodeDecodeError):
        raise UserError(f"the input {name!r} is not {count} texts of UTF-8, each after its length in 32 bits") from None
    if at != len(data):
        raise UserError(f"the input {name!r} has {len(data) - at} bytes after its last text")
    return texts


def _wanted_outputs(spec: Spec, given: Json, binary: Json) -> tuple[_Wanted, ...]:
    if not isinstance(binary, bool):
        raise UserError("binary_data_output is true or false")
    if given is None or given == []:
        return tuple(_Wanted(output, binary) for output in spec.outputs)
    known = {output.name: output for output in spec.outputs}
    if not isinstance(given, list) or len(given) > len(known):
        raise UserError(f'"outputs" is not a list of at most {len(known)} of {", ".join(known)}')
    wanted = []
    for item in given:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(item, dict) or not isinstance(name, str) or name not in known:
            raise UserError(f"there is no output {_shown(name)}; {nearest(str(name)[:64], known)}")
        its = _parameters(item, f"the output {name!r}").get("binary_data", binary)
        if not isinstance(its, bool):
            raise UserError(f"binary_data of the output {name!r} is true or false")
        wanted.append(_Wanted(known[name], its))
    return tuple(wanted)


def _parameters(item: dict[str, Json], what: str) -> dict[str, Json]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise UserError(f"the parameters of {what} are no object")
    return parameters


def _values(output: TensorSpec, answers: list[dict[str, Json]]) -> Array:
    """What the answers have by that name (n, ...)."""
    try:
        values: Array = np.array([answer[output.name] for answer in answers], dtype=DATATYPES[output.datatype])
        return values.reshape(len(answers), *output.shape[1:])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"the model's egest gives no {output.name!r} of shape {list(output.shape)}") from None


def _bytes(values: Array) -> bytes:
    if values.dtype == np.object_:
        texts = [str(text).encode() for text in values.reshape(-1)]
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _shown(value: Json) -> str:
    """A stranger's value in a sentence: short."""
    return f"{value!r:.60}" if not isinstance(value, dict | list) else "a list or object"
