"""Brings a model and a data source together: the checks, and what the one learns from the other.

- A model that takes its shape from the data (`Adaptive`: any number of values and classes) gets `Facts`.
- Pictures are decoded in the size that the model asks for.
- Classes are matched by name: a peer that has only some of a model's classes, or has them in another order, trains
  the right outputs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, Labelled, Rows
from gossipml.models.registry import nearest
from gossipml.models.sources_images import Pictures
from gossipml.models.spec import Facts, Spec, adapts, check_interface, picture_shape, sample_shape

CHUNK_VALUES = 1 << 20  # of samples looked at together
MAX_NAMED = 1024  # values with names: more are no parameters that a person gives, and would not fit into messages
SAMPLE = 1000  # samples that the mean of pictures is taken from
CHOOSE = "choose another --data or --model"


def prepare(spec: Spec, data: Dataset) -> tuple[Spec, Dataset]:
    """The model as it is on this source, and the source as this model takes it. UserError when they do not fit."""
    if adapts(spec):
        spec = check_interface(spec.adapt(describe(data)), f"the model {spec.name!r} for {data.source!r}")
    if isinstance(data.train.inputs, Pictures):
        data = _size_pictures(spec, data)
    check_fit(spec, data)
    return spec, _match_labels(spec, data)


def describe(data: Dataset) -> Facts:
    """What a model can learn of a source before it trains. Reads the train part once."""
    inputs = data.train.inputs
    mean, scale = _moments(inputs) if len(inputs.shape) == 2 else _moment(inputs)
    if data.labels:
        target_mean, target_scale = 0.0, 1.0
    else:
        values = data.train.targets.astype(np.float64)
        target_mean, target_scale = float(values.mean()), float(values.std()) or 1.0
    named = len(data.features) == math.prod(inputs.shape[1:]) <= MAX_NAMED
    features = data.features if named else ()
    return Facts(data.source, tuple(inputs.shape[1:]), data.labels, features, mean, scale, target_mean, target_scale)


def check_fit(spec: Spec, data: Dataset) -> None:
    """UserError when the model cannot train on this source."""
    want = sample_shape(spec)
    if spec.labels and not data.labels:
        raise UserError(
            f"the source {data.source!r} has numbers to predict, such as {data.train.targets[0]:g}, and no classes; "
            f"the model {spec.name!r} tells classes apart: use linear, or {CHOOSE}"
        )
    try:
        found = spec.ingest(data.train.inputs[:1]).shape[1:]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model {spec.name!r} cannot read a sample of {data.source!r} of shape "
            f"{list(data.train.inputs.shape[1:])}: {error}; {CHOOSE}"
        ) from error
    size, values = math.prod(data.train.inputs.shape[1:]), math.prod(want)
    if size != values:
        raise UserError(
            f"the model {spec.name!r} takes {values} values a sample (ingested as {list(found)}), the source "
            f"{data.source!r} has {size}; {CHOOSE}"
        )
    if spec.labels and data.classes > len(spec.labels):
        raise UserError(
            f"the model {spec.name!r} knows {len(spec.labels)} classes, the source {data.source!r} has "
            f"{data.classes}; {CHOOSE}"
        )


def _size_pictures(spec: Spec, data: Dataset) -> Dataset:
    """Pictures in the size of the model, or in their own where it takes that many flat values."""
    want, size = sample_shape(spec), picture_shape(spec)
    pictures = [data.train.inputs, data.test.inputs]
    height, width, channels = data.train.inputs.shape[1:]
    if size is None:
        flat = next((n for n in (channels, 3, 1, 4) if height * width * n == math.prod(want)), None)
        if flat is None or len(want) != 1:
            raise UserError(
                f"the model {spec.name!r} takes samples of shape {list(want)}, {data.source!r} has pictures; give "
                "the model an input_shape of (height, width, channels) with 1, 3 or 4 channels, last, and let its "
                "ingest change their order"
            )
        size = (height, width, flat)
    train, test = (rows.sized(size) if isinstance(rows, Pictures) else rows for rows in pictures)
    return replace(data, train=replace(data.train, inputs=train), test=replace(data.test, inputs=test))


def _match_labels(spec: Spec, data: Dataset) -> Dataset:
    """The data set with the class numbers of the model."""
    if not spec.labels or data.labels == spec.labels:
        return data
    numbers = [*map(str, range(data.classes))]
    unknown = [label for label in data.labels if label not in spec.labels]
    if unknown and list(data.labels) != numbers:
        raise UserError(
            f"the source {data.source!r} has the class {unknown[0]!r}, which the model {spec.name!r} does not know; "
            f"{nearest(unknown[0], spec.labels)}"
        )
    if unknown:  # a source without names, such as MNIST's: class 3 is the model's fourth
        return replace(data, labels=spec.labels)
    number = np.array([spec.labels.index(label) for label in data.labels], dtype=np.int64)

    def numbered(part: Labelled) -> Labelled:
        return Labelled(part.inputs, number[part.targets])

    return replace(data, train=numbered(data.train), test=numbered(data.test), labels=spec.labels)


def _moment(rows: Rows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of all values of some samples, evenly chosen."""
    count = max(1, min(SAMPLE, (64 * CHUNK_VALUES) // max(1, math.prod(rows.shape[1:]))))
    some = np.asarray(rows[np.arange(0, len(rows), max(1, len(rows) // count))[:count]])
    return (float(some.mean(dtype=np.float64)),), (float(some.std(dtype=np.float64)) or 1.0,)


def _moments(rows: Rows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (1 where a column is constant) of the columns, in float64 (Chan et al. 1979)."""
    width = rows.shape[1]
    count, mean, squares = 0, np.zeros(width), np.zeros(width)
    step = max(1, CHUNK_VALUES // width)
    for start in range(0, len(rows), step):
        chunk = np.asarray(rows[start : start + step], dtype=np.float64)  # (k, width)
        own = chunk.mean(0)
        total = count + len(chunk)
        apart = own - mean
        squares += ((chunk - own) ** 2).sum(0) + apart**2 * (count * len(chunk) / total)
        mean += apart * (len(chunk) / total)
        count = total
    deviation = np.sqrt(squares / max(1, count))
    # A column that only rounding makes vary would be blown up to noise.
    steady = deviation <= 1e-6 * np.abs(mean)
    return tuple(mean.tolist()), tuple(np.where(steady | (deviation == 0), 1.0, deviation).tolist())
