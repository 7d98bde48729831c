"""What a data source holds, in numbers: `gossipml data info`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossipml.errors import UserError
from gossipml.models.builtin import BUILTIN
from gossipml.models.data_fit import describe, prepare
from gossipml.models.dataset import Dataset, is_stream


@dataclass(frozen=True)
class ClassCount:
    name: str
    train: int
    test: int


@dataclass(frozen=True)
class Feature:
    """One column of a table."""

    name: str
    mean: float
    deviation: float


@dataclass(frozen=True)
class Summary:
    source: str
    train: int
    test: int
    shape: tuple[int, ...]
    """Of a sample."""
    dtype: str
    bytes: int
    """Of the train part, were it all in memory."""
    streamed: bool
    """Whether samples are read as they are needed."""
    classes: tuple[ClassCount, ...]
    """Empty where the targets are values."""
    features: tuple[Feature, ...]
    """Empty where samples are no rows of a table."""
    target_mean: float | None
    target_deviation: float | None
    models: tuple[str, ...]
    """The built-in models that train on it."""


def summarise(data: Dataset) -> Summary:
    """Reads a table's train part once, and one sample of anything else."""
    facts = describe(data)
    counts = [np.bincount(part.targets.astype(np.int64), minlength=data.classes) for part in (data.train, data.test)]
    columns = len(facts.mean) if len(facts.sample_shape) == 1 else 0
    names = (facts.features or tuple(f"x{number}" for number in range(1, columns + 1))) if columns else ()
    return Summary(
        source=data.source,
        train=len(data.train),
        test=len(data.test),
        shape=facts.sample_shape,
        dtype=str(data.train.inputs.dtype),
        bytes=int(np.prod(data.train.inputs.shape, dtype=np.float64)) * data.train.inputs.dtype.itemsize,
        streamed=is_stream(data.train.inputs),
        classes=tuple(
            ClassCount(name, int(counts[0][number]), int(counts[1][number])) for number, name in enumerate(data.labels)
        ),
        features=tuple(Feature(*each) for each in zip(names, facts.mean[:columns], facts.scale[:columns], strict=True)),
        target_mean=None if data.labels else facts.target_mean,
        target_deviation=None if data.labels else facts.target_scale,
        models=tuple(name for name in sorted(BUILTIN) if _fits(name, data)),
    )


def _fits(name: str, data: Dataset) -> bool:
    try:
        prepare(BUILTIN[name](), data)
    except UserError:
        return False
    return True
