"""Answers one prediction request: JSON in, JSON out.

The request is the body of the client, one of
- the Open Inference Protocol (KServe V2) infer request: `{"inputs": [{"name", "datatype", "shape", "data"}],
  "outputs": [{"name"}]?, "id"?}`; answered by `{"model_name", "outputs": [...], "id"?}`;
- `{"instances": [SAMPLE, ...]}`, answered by `{"predictions": [ANSWER, ...]}`;
- one SAMPLE, or a list of them, answered by the ANSWER alone (or by predictions);
- the bytes of one picture (JPEG, PNG, BMP, GIF, WebP), answered by the ANSWER.
A SAMPLE is a list of numbers in the shape of the model's input (or flat), or an object of the feature names
(`{"a": 0, "b": 1}`; the query parameters of a URL, so numbers may be text). A query without names uses
`values=1,2,3`. Where the model takes pictures, `{"image": BASE64}` is a SAMPLE, too: the bytes of a picture, which is
scaled to the model's size. Values are raw, as the data source has them: `ingest` scales them.

Every fault is a UserError with a sentence. The daemon has bounded the body; here count, name, shape, datatype
and finiteness are checked. Knows nothing of torch: `forward` is passed in.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable

import numpy as np

from gossipml.errors import UserError
from gossipml.models.registry import nearest
from gossipml.models.sources_picture import MAX_PIXELS, decode, looks_like_picture, measure
from gossipml.models.spec import DATATYPES, Array, Json, Spec, TensorSpec, picture_shape, sample_shape

MAX_SAMPLES = 4096  # per request; bounds the time that one request takes from training
MAX_INPUT_VALUES = 1 << 24  # 64 MiB of float32

Forward = Callable[[Array], Array]
"""Ingested samples (n, ...) float32 to outputs (n, ...)."""


def answer(spec: Spec, request: bytes, forward: Forward) -> bytes:
    """The answer as JSON, or UserError."""
    if looks_like_picture(request):
        reply: Json = predict_samples(spec, _read_picture(spec, request).reshape(1, *sample_shape(spec)), forward)[0]
        return _write(reply)
    value = parse(request)
    if isinstance(value, dict) and "inputs" in value and "inputs" not in spec.features:
        reply = _infer(spec, value, forward)
    else:
        samples, single = read_samples(spec, value)
        answers = predict_samples(spec, samples, forward)
        reply = answers[0] if single else {"predictions": list(answers)}
    return _write(reply)


def _write(reply: Json) -> bytes:
    return json.dumps(reply, allow_nan=False, separators=(",", ":")).encode()


def parse(request: bytes) -> Json:
    """The JSON value; UserError for NaN, Infinity, numbers beyond float64 and what is not JSON."""

    def refuse(constant: str) -> Json:
        raise UserError(f"the request holds {constant}, which is not a number that JSON has; send finite numbers")

    try:
        value: Json = json.loads(request, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON: {error}") from None
    return value


def predict_samples(spec: Spec, samples: Array, forward: Forward) -> list[dict[str, Json]]:
    """One answer per raw sample (n, ...)."""
    answers = spec.egest(forward(spec.ingest(samples)))
    if len(answers) != len(samples):
        raise UserError(f"the model's egest gave {len(answers)} answers for {len(samples)} samples")
    return answers


def read_samples(spec: Spec, value: Json) -> tuple[Array, bool]:
    """Raw samples (n, ...) of the easy form, and whether the request was one sample by itself."""
    shape = sample_shape(spec)
    if isinstance(value, dict) and "instances" in value and "instances" not in spec.features:
        instances = value["instances"]
        if not isinstance(instances, list) or not instances:
            raise UserError('"instances" is not a list of at least one sample; send {"instances": [[...], ...]}')
        return _stack(spec, instances), False
    if isinstance(value, dict):
        return _stack(spec, [value]), True
    if not isinstance(value, list) or not value:
        raise UserError(f"the request is no sample; {_expected(spec)}")
    if all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        if len(value) == math.prod(shape):
            return _stack(spec, [value]), True
        raise UserError(f"the sample has {len(value)} values; {_expected(spec)}")
    if isinstance(value[0], list) and len(shape) > 1 and _shape_of(value) == shape:
        return _stack(spec, [value]), True
    return _stack(spec, value), False


def _stack(spec: Spec, samples: list[Json]) -> Array:
    _check_count(spec, len(samples), math.prod(sample_shape(spec)))
    shape = sample_shape(spec)
    _check_pictures(spec, samples)
    return np.stack([_read_sample(spec, sample).reshape(shape) for sample in samples])


def _read_sample(spec: Spec, sample: Json) -> Array:
    size = math.prod(sample_shape(spec))
    if (picture := _picture_in(spec, sample)) is not None:
        return _read_picture(spec, picture)
    if isinstance(sample, dict):
        sample = _named_values(spec, sample)
    if not isinstance(sample, list):
        raise UserError(f"a sample is {_kind(sample)}; {_expected(spec)}")
    found = _shape_of(sample)
    if found != sample_shape(spec) and found != (size,):
        raise UserError(f"the sample has the shape {list(found or ())}; {_expected(spec)}")
    return _numbers(sample, spec.inputs[0]).reshape(-1)


def _picture_in(spec: Spec, sample: Json) -> bytes | None:
    """The bytes of a picture where the sample is one."""
    if not isinstance(sample, dict) or set(sample) != {"image"} or "image" in spec.features:
        return None
    text = sample["image"]
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise UserError('"image" is not base64; send the bytes of a picture file in base64')


def _check_pictures(spec: Spec, samples: list[Json]) -> None:
    """UserError when the pictures of a request would take long to decode: a small file may hold a huge picture."""
    pixels = 0
    for sample in samples:
        if (picture := _picture_in(spec, sample)) is not None:
            height, width, _ = measure(picture, "the picture")
            pixels += height * width
            if pixels > MAX_PIXELS:
                raise UserError(
                    f"the pictures of the request have over {MAX_PIXELS} pixels together; send smaller ones"
                )


def _read_picture(spec: Spec, picture: bytes) -> Array:
    """The pixels as the model's flat raw values."""
    size = picture_shape(spec)
    if size is None or spec.inputs[0].datatype in ("BOOL", "BYTES"):
        raise UserError(f"the model {spec.name!r} takes no pictures; {_expected(spec)}")
    kind = DATATYPES[spec.inputs[0].datatype]
    pixels: Array = decode(picture, size, "the picture").reshape(-1)
    white = getattr(spec, "white", 255.0)
    return (pixels if white == 255.0 else pixels * (white / 255.0)).astype(kind)


def _named_values(spec: Spec, sample: dict[str, Json]) -> list[Json]:
    if not spec.features:
        values = sample.get("values")
        if set(sample) != {"values"}:
            raise UserError(f"the model {spec.name!r} has no parameter names; {_expected(spec)}")
        return list(values.split(",")) if isinstance(values, str) else values if isinstance(values, list) else [values]
    for name in sample:
        if name not in spec.features:
            raise UserError(f"the model {spec.name!r} has no input {name!r}; {nearest(name, spec.features)}")
    missing = [name for name in spec.features if name not in sample]
    if missing:
        raise UserError(f"the input {', '.join(map(repr, missing))} is missing; {_expected(spec)}")
    return [sample[name] for name in spec.features]


def _infer(spec: Spec, request: dict[str, Json], forward: Forward) -> dict[str, Json]:
    tensor = spec.inputs[0]
    inputs = request["inputs"]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        count = len(inputs) if isinstance(inputs, list) else 0
        raise UserError(f'"inputs" holds {count} tensors; the model {spec.name!r} takes one, {tensor.name!r}')
    wanted = _wanted_outputs(spec, request.get("outputs"))
    samples = _read_tensor(spec, inputs[0])
    answers = predict_samples(spec, samples, forward)
    reply: dict[str, Json] = {
        "model_name": spec.name,
        "outputs": [_write_tensor(output, answers) for output in wanted],
    }
    if isinstance(identifier := request.get("id"), str):
        reply["id"] = identifier
    return reply


def _read_tensor(spec: Spec, given: dict[str, Json]) -> Array:
    tensor = spec.inputs[0]
    if given.get("name") != tensor.name:
        raise UserError(f"there is no input {given.get('name')!r}; the model {spec.name!r} takes {tensor.name!r}")
    datatype = given.get("datatype")
    if datatype != tensor.datatype:
        raise UserError(f"the input {tensor.name!r} has datatype {datatype!r}; send {tensor.datatype}")
    shape = given.get("shape")
    if (
        not isinstance(shape, list)
        or any(not isinstance(n, int) or isinstance(n, bool) for n in shape)
        or len(shape) != len(tensor.shape)
        or shape[1:] != list(tensor.shape[1:])
    ):
        raise UserError(f"the input {tensor.name!r} has shape {shape}; send {list(tensor.shape)}")
    count = shape[0]
    assert isinstance(count, int)
    _check_count(spec, count, math.prod(tensor.shape[1:]))
    data = given.get("data")
    if not isinstance(data, list):
        raise UserError(f"the input {tensor.name!r} has no list of data; send the values in row-major order")
    found = _shape_of(data)
    full = (count, *tensor.shape[1:])
    if found != full and found != (math.prod(full),):
        raise UserError(f"the data of {tensor.name!r} has the shape {list(found or ())}, its shape says {list(full)}")
    return _numbers(data, tensor).reshape(full)


def _wanted_outputs(spec: Spec, given: Json) -> tuple[TensorSpec, ...]:
    if given is None or given == []:
        return spec.outputs
    known = {output.name: output for output in spec.outputs}
    if not isinstance(given, list) or len(given) > len(known):
        raise UserError(f'"outputs" is not a list of at most {len(known)} of {", ".join(known)}')
    wanted = []
    for item in given:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in known:
            raise UserError(f"there is no output {name!r}; {nearest(str(name), known)}")
        wanted.append(known[name])
    return tuple(wanted)


def _write_tensor(output: TensorSpec, answers: list[dict[str, Json]]) -> dict[str, Json]:
    try:
        values: Array = np.array([answer[output.name] for answer in answers], dtype=DATATYPES[output.datatype])
        values = values.reshape(len(answers), *output.shape[1:])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"the model's egest gives no {output.name!r} of shape {list(output.shape)}") from None
    flat: list[Json] = values.reshape(-1).tolist()
    return {"name": output.name, "datatype": output.datatype, "shape": list(values.shape), "data": flat}


def _numbers(values: list[Json], tensor: TensorSpec) -> Array:
    """Nested lists of one shape as an array of the tensor's datatype; finite."""
    flat: list[Json] = values
    while flat and isinstance(flat[0], list):
        flat = [item for row in flat for item in row]  # type: ignore[union-attr]  # _shape_of saw equal lists
    if tensor.datatype == "BYTES":
        if not all(isinstance(item, str) for item in flat):
            raise UserError(f"the values of {tensor.name!r} must be text")
        return np.array(flat, dtype=np.object_)
    for item in flat:
        if (isinstance(item, bool) and tensor.datatype != "BOOL") or not isinstance(item, int | float | str):
            raise UserError(f"a value of {tensor.name!r} is {_kind(item)}; send numbers")
    try:
        exact = np.array([float(item) for item in flat], dtype=np.float64)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        raise UserError(f"a value of {tensor.name!r} is not a number; send finite numbers") from None
    kind = DATATYPES[tensor.datatype]
    with np.errstate(all="ignore"):
        cast: Array = exact.astype(kind)
        whole = np.issubdtype(kind, np.floating) or bool((cast == exact).all())
    if not np.isfinite(exact).all() or not whole or (np.issubdtype(kind, np.floating) and not np.isfinite(cast).all()):
        raise UserError(f"a value of {tensor.name!r} is not a finite {tensor.datatype}; send finite numbers")
    return cast


def _check_count(spec: Spec, samples: int, size: int) -> None:
    if not 1 <= samples <= MAX_SAMPLES or samples * size > MAX_INPUT_VALUES:
        bound = min(MAX_SAMPLES, max(1, MAX_INPUT_VALUES // size))
        raise UserError(f"the request has {samples} samples; {spec.name!r} takes 1 to {bound} at a time")


def _shape_of(value: Json) -> tuple[int, ...] | None:
    """Shape of equally long nested lists; None when they are not."""
    if not isinstance(value, list):
        return ()
    if not value:
        return (0,)
    first = _shape_of(value[0])
    if first is None or (first == () and any(isinstance(item, list) for item in value)):
        return None
    if first != () and any(_shape_of(item) != first for item in value[1:]):
        return None
    return (len(value), *first)


def _kind(value: Json) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _expected(spec: Spec) -> str:
    shape = sample_shape(spec)
    if spec.features and len(spec.features) <= 16:
        return f"{spec.name!r} takes {', '.join(spec.features)}"
    return f"{spec.name!r} takes a list of {math.prod(shape)} values" + (
        f" or the shape {list(shape)}" if len(shape) > 1 else ""
    )
