"""What a data source gives: samples and targets, in memory or read when they are needed.

`Labelled.inputs` is a numpy array where the samples fit in memory, and a `Stream` where they do not: picture files,
rows of a mapped file. Both give an array for an index array or a slice, so a training step is the same for both; a
stream differs in `take`, which chooses samples without reading any.

Targets are class numbers (int64) or, for regression, values (float32; then a data set has no class names).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gossipml.models.spec import Array

Indices: TypeAlias = "NDArray[np.int64] | NDArray[np.bool_]"
Targets: TypeAlias = "NDArray[np.int64] | NDArray[np.float32]"


class Rows(Protocol):
    """Samples by number: a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...  # Any: the element type is the source's

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any:  # Any: an int, a slice or an index array; an array, as numpy's does
        ...


class Stream(Rows, Protocol):
    """Samples that are read when they are asked for; holds a bounded number of them in memory."""

    def take(self, indices: Indices) -> Stream:
        """Some of the samples; reads nothing."""


@dataclass(frozen=True)
class Labelled:
    """Raw samples and their class numbers or values."""

    inputs: Rows  # (n, ...)
    targets: Targets  # (n,)

    def __len__(self) -> int:
        return len(self.targets)

    def at(self, indices: Indices) -> Labelled:
        """Some of them: a copy of an array, a stream of the chosen ones."""
        chosen = self.inputs.take(indices) if is_stream(self.inputs) else self.inputs[indices]
        return Labelled(chosen, self.targets[indices])


@dataclass(frozen=True)
class Dataset:
    """The part of a source to train on, and the part that nobody trains on."""

    source: str
    train: Labelled
    test: Labelled
    labels: tuple[str, ...]
    """Names of the classes; empty where the targets are values (regression)."""
    features: tuple[str, ...] = ()
    """Names of the values of a sample, where the source has them."""

    @property
    def classes(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LocalData:
    """What one peer has: its part of the train part, without and with the share held out for validation, and
    the common test part."""

    train: Labelled
    validation: Labelled
    test: Labelled


def is_stream(rows: Rows) -> TypeGuard[Stream]:
    """Whether these are read when they are asked for."""
    return not isinstance(rows, np.ndarray)


class FileRows:
    """Rows of an array that lies in a file (a numpy memory map): the system reads and forgets its pages."""

    def __init__(self, values: Array, chosen: NDArray[np.int64] | None = None) -> None:
        self._values = values
        self._chosen = np.arange(len(values), dtype=np.int64) if chosen is None else chosen
        self.shape = (len(self._chosen), *values.shape[1:])
        self.dtype = values.dtype

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: Any, /) -> Any:  # as of Rows
        return np.array(self._values[self._chosen[key]])  # a copy: what is in use never depends on the file

    def take(self, indices: Indices) -> FileRows:
        return FileRows(self._values, self._chosen[indices])
