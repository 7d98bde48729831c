"""Data sources: what `--data SOURCE` names, as arrays with a fixed common test part.

`digits` (shipped with scikit-learn), `xor` (generated), `mnist:DIR` (IDX files; see `idx`). Every peer has the
same train and test part of a source, in the same order; `partition` then gives each its share of the train
part. Samples stay raw, as the source has them: the model's `ingest` scales them. No torch here.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.idx import load_mnist
from gossipml.models.partition import Part, Rule, hold_out, part_indices
from gossipml.models.registry import nearest
from gossipml.models.spec import Array, Spec, sample_shape

SEED = 20160  # of the fixed test parts and generated samples; not the user's seed: they are common to all


@dataclass(frozen=True)
class Labelled:
    """Raw samples and their class numbers."""

    inputs: Array  # (n, ...)
    targets: NDArray[np.int64]  # (n,)

    def __len__(self) -> int:
        return len(self.targets)

    def at(self, indices: NDArray[np.int64] | NDArray[np.bool_]) -> Labelled:
        """A copy of some of them."""
        return Labelled(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Dataset:
    """The part of a source to train on, and the part that nobody trains on."""

    source: str
    train: Labelled
    test: Labelled
    labels: tuple[str, ...]

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


def take_part(data: Dataset, rule: Rule, part: Part, seed: int) -> LocalData:
    """One peer's share, copied out, so that the rest can be freed."""
    train, validation = hold_out(part_indices(data.train.targets, data.classes, rule, part, seed), part, seed)
    return LocalData(data.train.at(train), data.train.at(validation), data.test)


def source_names() -> list[str]:
    """What can stand before the colon of a SOURCE, or alone."""
    return sorted([*_PLAIN, *_WITH_FOLDER])


def check_source(source: str) -> None:
    """UserError when there is no such source; looks at no file's content."""
    name, colon, argument = source.partition(":")
    if name in _PLAIN and not colon:
        return
    if name in _PLAIN:
        raise UserError(f"the data source {name!r} takes nothing after a colon; write {name!r}")
    if name not in _WITH_FOLDER:
        known = [*_PLAIN, *(f"{name}:DIR" for name in _WITH_FOLDER)]
        hint = nearest(f"{name}:DIR" if colon or name in ("mnist", "minst") else name, known)
        raise UserError(f"there is no data source {source!r}; {hint}")
    if not argument:
        raise UserError(f"the data source {source!r} names no folder; write {name}:DIR with the folder of its files")
    if not Path(argument).is_dir():
        what = "is a file, not a folder" if Path(argument).exists() else "does not exist"
        raise UserError(f"the folder {argument!r} of the data source {name!r} {what}; write {name}:DIR")


def load_source(source: str) -> Dataset:
    """The source, whole and checked. UserError says which file is wrong, how, and what would be right."""
    check_source(source)
    name, _, argument = source.partition(":")
    return _PLAIN[name]() if name in _PLAIN else _WITH_FOLDER[name](Path(argument))


def check_fit(spec: Spec, data: Dataset) -> None:
    """UserError when the model cannot train on this source."""
    want = sample_shape(spec)
    try:
        found = spec.ingest(data.train.inputs[:1]).shape[1:]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model {spec.name!r} cannot read a sample of {data.source!r} of shape "
            f"{list(data.train.inputs.shape[1:])}: {error}; choose another --data or --model"
        ) from error
    size, values = int(np.prod(data.train.inputs.shape[1:])), int(np.prod(want))
    if size != values:
        raise UserError(
            f"the model {spec.name!r} takes {values} values a sample (ingested as {list(found)}), the source "
            f"{data.source!r} has {size}; choose another --data or --model"
        )
    if spec.labels and data.classes > len(spec.labels):
        raise UserError(
            f"the model {spec.name!r} knows {len(spec.labels)} classes, the source {data.source!r} has "
            f"{data.classes}; choose another --data or --model"
        )


def load_digits() -> Dataset:
    """1,797 pictures of 8x8 in 17 shades (UCI ML hand-written digits); every fifth of a class is for testing."""
    found = importlib.util.find_spec("sklearn")  # found, not imported: an import costs a second and 80 MB
    folder = Path(found.origin).parent if found is not None and found.origin else None
    file = folder / "datasets" / "data" / "digits.csv.gz" if folder else None
    remedy = "install it again: pip install --force-reinstall scikit-learn"
    if file is None or not file.is_file():
        raise UserError(f"the data source 'digits' is a file of scikit-learn, which is not installed whole; {remedy}")
    try:
        with gzip.open(file, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; {remedy}") from None
    if table.shape != (1797, 65):
        raise UserError(f"{file} has {table.shape} values instead of 1797 lines of 65; {remedy}")
    samples, targets = table[:, :64].astype(np.uint8), table[:, 64].astype(np.int64)
    test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(targets == label)[::5]] = True  # stratified: 20 % of each class
    whole = Labelled(samples, targets)
    return Dataset("digits", whole.at(~test), whole.at(test), tuple(map(str, range(10))))


def generate_xor() -> Dataset:
    """400 points near the corners of the unit square, each corner 100 times; the four corners for testing."""
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    targets = np.array([0, 1, 1, 0], dtype=np.int64)
    noise = np.random.RandomState(SEED).normal(scale=0.1, size=(400, 2)).astype(np.float32)
    train = Labelled(np.tile(corners, (100, 1)) + noise, np.tile(targets, 100))
    return Dataset("xor", train, Labelled(corners, targets), ("0", "1"))


def _mnist(folder: Path) -> Dataset:
    train, train_labels, test, test_labels = load_mnist(folder)
    classes = tuple(map(str, range(10)))
    return Dataset(f"mnist:{folder}", Labelled(train, train_labels), Labelled(test, test_labels), classes)


_PLAIN: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "xor": generate_xor}
_WITH_FOLDER: dict[str, Callable[[Path], Dataset]] = {"mnist": _mnist}
