"""Reads one prediction request and writes its answer; many at once where they come together.

A request comes in one of these forms:
- `json`: `{"instances": [SAMPLE, ...]}`, answered by `{"predictions": [ANSWER, ...]}`; or one SAMPLE, or a list of
  them, answered by the ANSWER alone (or by predictions);
- `csv`: one row, answered by the ANSWER;
- `picture`: the bytes of one picture (JPEG, PNG, BMP, GIF, WebP), answered by the ANSWER;
- `infer`: the Open Inference Protocol, see `gossipml.models.infer`.
A SAMPLE is a list of numbers in the shape of the model's input (or flat), or an object of the feature names
(`{"a": 0, "b": 1}`; the query parameters of a URL, so numbers may be text). A query without names uses
`values=1,2,3`. Where the model takes pictures, `{"image": TEXT}` is a SAMPLE, too, TEXT being a data URL or base64 of
a picture, which is scaled to the model's size; a data URL also by itself. Values are raw, as the data source has them:
`ingest` scales them.

Every fault is a UserError with a sentence. The daemon has bounded the body; here count, name, shape, datatype
and finiteness are checked. Knows nothing of torch: `forward` is passed in.
"""

from __future__ import annotations

import base64
import binascii
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

import numpy as np

from gossipml import strict_json
from gossipml.errors import UserError
from gossipml.models.registry import nearest
from gossipml.models.sources_picture import MAX_PIXELS, decode, looks_like_picture, measure
from gossipml.models.spec import DATATYPES, Array, Json, Spec, TensorSpec, picture_shape, sample_shape

MAX_SAMPLES = 4096  # per request; bounds the time that one request takes from training
MAX_INPUT_VALUES = 1 << 24  # 64 MiB of float32
DATA_URL = "data:image/"

Form: TypeAlias = Literal["json", "picture", "csv", "infer"]
FORMS: tuple[Form, ...] = ("json", "picture", "csv", "infer")

Forward = Callable[[Array], Array]
"""Ingested samples (n, ...) float32 to outputs (n, ...)."""


@dataclass(frozen=True)
class Names:
    """What an answer says of itself."""

    model: str
    version: str
    peer: str


@dataclass(frozen=True)
class Written:
    body: bytes = field(repr=False)
    json_size: int | None = None
    """How many bytes of the body are JSON, where binary tensors follow."""


@dataclass(frozen=True)
class Question:
    """A request that was read."""

    samples: Array
    """Raw, (n, ...)."""
    write: Callable[[list[dict[str, Json]], Names], Written]
    """The answer of these answers of `egest`, one a sample."""


def read(spec: Spec, form: Form, body: bytes, json_size: int | None = None) -> Question:
    """What the request asks, or UserError."""
    from gossipml.models.infer import read_infer

    match form:
        case "infer":
            return read_infer(spec, body, json_size)
        case "picture":
            return Question(_read_picture(spec, body).reshape(1, *sample_shape(spec)), _write_one)
        case "csv":
            return Question(_stack(spec, [_read_row(body)]), _write_one)
        case "json":
            samples, single = read_samples(spec, cast("Json", strict_json.parse(body)))
            return Question(samples, _write_one if single else _write_all)


Answers: TypeAlias = "list[dict[str, Json]] | Exception"


def answer_together(spec: Spec, questions: Sequence[Question], forward: Forward) -> list[Answers]:
    """The answers of `egest` to each question, or what went wrong with it; one pass through the model for all."""
    try:
        samples = [question.samples for question in questions]
        answers = predict_samples(spec, np.concatenate(samples) if len(samples) > 1 else samples[0], forward)
    except Exception as error:
        if len(questions) == 1:
            return [error]
        return [answer_together(spec, [question], forward)[0] for question in questions]
    divided: list[Answers] = []
    begin = 0
    for question in questions:
        end = begin + len(question.samples)
        divided.append(answers[begin:end])
        begin = end
    return divided


def answer(spec: Spec, request: bytes, forward: Forward) -> bytes:
    """The answer to one picture or JSON, an infer request where it has "inputs"; or UserError."""
    form: Form = "picture" if looks_like_picture(request) else "json"
    if form == "json" and "inputs" not in spec.features:
        value = strict_json.parse(request)
        form = "infer" if isinstance(value, dict) and "inputs" in value else "json"
    question = read(spec, form, request)
    (found,) = answer_together(spec, [question], forward)
    if isinstance(found, Exception):
        raise found
    return question.write(found, Names(spec.name, "", "")).body


def _write_one(answers: list[dict[str, Json]], names: Names) -> Written:
    return _write(answers[0], names)


def _write_all(answers: list[dict[str, Json]], names: Names) -> Written:
    return _write({"predictions": list(answers)}, names)


def _write(answer: dict[str, Json], names: Names) -> Written:
    whole = {**answer, "model": names.model, "version": names.version, "peer": names.peer}
    return Written(strict_json.dump(cast("strict_json.JSON", whole)))


def _read_row(body: bytes) -> list[Json]:
    """The cells of the one row of the body."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8 at byte {error.start}; send CSV as UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        raise UserError(f"the body has {len(lines)} lines with something in them; send one row without a header")
    try:
        return [cell.strip() for cell in next(csv.reader(lines, strict=True))]
    except csv.Error as error:
        raise UserError(f"the row is not CSV: {error}") from None


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
    if isinstance(value, str) and value.startswith(DATA_URL):
        return _stack(spec, [value]), True
    if not isinstance(value, list) or not value:
        raise UserError(f"the request is no sample; {_expected(spec)}")
    if set(map(type, value)) <= {int, float}:
        if len(value) == math.prod(shape):  # what is asked most; nothing more is to be looked at
            return numbers(value, spec.inputs[0]).reshape(1, *shape), True
        raise UserError(f"the sample has {len(value)} values; {_expected(spec)}")
    if isinstance(value[0], list) and len(shape) > 1 and shape_of(value) == shape:
        return _stack(spec, [value]), True
    return _stack(spec, value), False


def _stack(spec: Spec, samples: list[Json]) -> Array:
    check_count(spec, len(samples), math.prod(sample_shape(spec)))
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
    found = shape_of(sample)
    if found != sample_shape(spec) and found != (size,):
        raise UserError(f"the sample has the shape {list(found or ())}; {_expected(spec)}")
    return numbers(sample, spec.inputs[0], text=True).reshape(-1)


def _picture_in(spec: Spec, sample: Json) -> bytes | None:
    """The bytes of a picture where the sample is one."""
    if isinstance(sample, str) and sample.startswith(DATA_URL):
        text: Json = sample
    elif isinstance(sample, dict) and set(sample) == {"image"} and "image" not in spec.features:
        text = sample["image"]
    else:
        return None
    try:
        if isinstance(text, str):
            head, comma, data = text.partition(",")
            is_url = comma and head.startswith(DATA_URL) and head.endswith(";base64")  # RFC 2397
            return base64.b64decode(data if is_url else text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise UserError('"image" is not base64; send the bytes of a picture file in base64, or data:image/png;base64,...')


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


def numbers(values: list[Json], tensor: TensorSpec, *, text: bool = False) -> Array:
    """Nested lists of one shape as a flat array of the tensor's datatype; finite. `text` lets numbers be text."""
    flat: list[Json] = values
    while flat and isinstance(flat[0], list):
        flat = [item for row in flat for item in row]  # type: ignore[union-attr]  # shape_of saw equal lists
    kinds: set[type] = set(map(type, flat))
    if tensor.datatype == "BYTES":
        if kinds - {str}:
            raise UserError(f"the values of {tensor.name!r} must be text")
        return np.array(flat, dtype=np.object_)
    allowed = {int, float} | ({str} if text else set()) | ({bool} if tensor.datatype == "BOOL" else set())
    if kinds - allowed:
        wrong = next(item for item in flat if type(item) not in allowed)
        raise UserError(f"a value of {tensor.name!r} is {_kind(wrong)}; send numbers")
    kind = DATATYPES[tensor.datatype]
    try:
        if kinds <= {int} and np.issubdtype(kind, np.integer):
            wide = np.uint64 if tensor.datatype == "UINT64" else np.int64
            exact: Array = np.array(flat, dtype=wide)  # float64 has 53 bits
        else:
            items = [float(item) for item in flat] if str in kinds else flat  # type: ignore[arg-type]
            exact = np.array(items, dtype=np.float64)
    except (ValueError, OverflowError):
        raise UserError(f"a value of {tensor.name!r} is not a number; send finite numbers") from None
    with np.errstate(all="ignore"):
        cast: Array = exact.astype(kind)
        whole = np.issubdtype(kind, np.floating) or bool((cast == exact).all())
    if not np.isfinite(exact).all() or not whole or (np.issubdtype(kind, np.floating) and not np.isfinite(cast).all()):
        raise UserError(f"a value of {tensor.name!r} is not a finite {tensor.datatype}; send finite numbers")
    return cast


def check_count(spec: Spec, samples: int, size: int) -> None:
    if not 1 <= samples <= MAX_SAMPLES or samples * size > MAX_INPUT_VALUES:
        bound = min(MAX_SAMPLES, max(1, MAX_INPUT_VALUES // size))
        raise UserError(f"the request has {samples} samples; {spec.name!r} takes 1 to {bound} at a time")


def shape_of(value: Json) -> tuple[int, ...] | None:
    """Shape of equally long nested lists; None when they are not."""
    if not isinstance(value, list):
        return ()
    if not value:
        return (0,)
    first = shape_of(value[0])
    if first is None or (first == () and list in set(map(type, value))):
        return None
    if first != () and any(shape_of(item) != first for item in value[1:]):
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
