"""Data sources: what `--data SOURCE` names, as a data set with a fixed common test part.

| SOURCE | what |
|---|---|
| `digits`, `iris`, `wine`, `breast-cancer` | shipped with scikit-learn |
| `xor` | generated |
| `mnist:DIR` | IDX files (`idx`): MNIST, Fashion-MNIST, Kuzushiji-MNIST |
| `cifar10:DIR` | CIFAR-10's binary or python batches |
| `images:DIR` | folders of pictures, one a class; decoded as they are needed |
| `csv:FILE#LABEL`, `parquet:FILE#LABEL` | a table of numbers and a column of labels |
| `npz:FILE` | numpy arrays |

Every peer that has the same files has the same train and test part of a source, in the same order; `partition` then
gives each its share of the train part. Samples stay raw, as the source has them: the model's `ingest` scales them.
`data_fit` brings a model and a source together. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossipml.errors import UserError
from gossipml.models.data_fit import check_fit, prepare
from gossipml.models.dataset import Dataset, Labelled, LocalData, Rows, Stream
from gossipml.models.idx import load_mnist
from gossipml.models.partition import Part, Rule, hold_out, part_indices
from gossipml.models.sources_cifar import load_cifar10
from gossipml.models.sources_csv import load_csv
from gossipml.models.sources_images import load_images
from gossipml.models.sources_npz import load_npz
from gossipml.models.sources_parquet import check_parquet, load_parquet
from gossipml.models.sources_shipped import generate_xor, load_breast_cancer, load_digits, load_iris, load_wine

__all__ = [
    "Dataset",
    "Labelled",
    "LocalData",
    "Rows",
    "Source",
    "Stream",
    "check_fit",
    "check_source",
    "load_source",
    "prepare",
    "source_names",
    "sources",
    "take_part",
]


@dataclass(frozen=True)
class Source:
    """One kind of SOURCE."""

    name: str
    argument: Literal["", "DIR", "FILE", "FILE#LABEL"]
    about: str

    @property
    def form(self) -> str:
        """How it is written."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


def take_part(data: Dataset, rule: Rule, part: Part, seed: int) -> LocalData:
    """One peer's share, copied out, so that the rest can be freed. Of a stream nothing is copied."""
    train, validation = hold_out(part_indices(data.train.targets, data.classes, rule, part, seed), part, seed)
    return LocalData(data.train.at(train), data.train.at(validation), data.test)


def sources() -> list[Source]:
    """Every kind of source, those that need no files first."""
    return list(_SOURCES.values())


def source_names() -> list[str]:
    """What can stand before the colon of a SOURCE, or alone."""
    return sorted(_SOURCES)


def check_source(source: str) -> None:
    """UserError when there is no such source; looks at no file's content."""
    name, colon, argument = source.partition(":")
    kind = _SOURCES.get(name)
    if kind is None:
        close = [_SOURCES[each].form for each in difflib.get_close_matches(name, _SOURCES, n=1, cutoff=0.5)]
        hint = "".join(f"did you mean {form!r}? " for form in close)
        raise UserError(
            f"there is no data source {source!r}; {hint}there are {', '.join(each.form for each in _SOURCES.values())}"
        )
    if not kind.argument:
        if colon:
            raise UserError(f"the data source {name!r} takes nothing after a colon; write {name!r}")
        return
    if kind.argument == "DIR":
        if not argument:
            raise UserError(
                f"the data source {source!r} names no folder; write {kind.form} with the folder of its files"
            )
        if not Path(argument).is_dir():
            what = "is a file, not a folder" if Path(argument).exists() else "does not exist"
            raise UserError(f"the folder {argument!r} of the data source {name!r} {what}; write {kind.form}")
        return
    file, label = _split(kind, argument)
    if not file:
        raise UserError(f"the data source {source!r} names no file; write {kind.form}")
    if kind.argument == "FILE#LABEL" and not label:
        raise UserError(
            f"the data source {source!r} names no column of labels; write {kind.form}, as in {name}:{file}#label"
        )
    if not Path(file).is_file():
        what = "is a folder, not a file" if Path(file).is_dir() else "does not exist"
        raise UserError(f"the file {file!r} of the data source {name!r} {what}; write {kind.form}")
    if name == "parquet":
        check_parquet()


def load_source(source: str) -> Dataset:
    """The source, whole and checked. UserError says which file is wrong, how, and what would be right."""
    check_source(source)
    name, _, argument = source.partition(":")
    if name in _PLAIN:
        return _PLAIN[name]()
    path, label = _split(_SOURCES[name], argument)
    match name:
        case "mnist":
            return _mnist(Path(path), source)
        case "cifar10":
            return load_cifar10(Path(path), source)
        case "images":
            return load_images(Path(path), source)
        case "npz":
            return load_npz(Path(path), source)
        case "csv":
            return load_csv(Path(path), label, source)
        case _:
            return load_parquet(Path(path), label, source)


def _split(kind: Source, argument: str) -> tuple[str, str]:
    """Path and label column. A # in the name of the file is none of ours: the last one counts."""
    if kind.argument != "FILE#LABEL":
        return argument, ""
    path, _, label = argument.rpartition("#")
    return (path, label) if path else (label, "")


def _mnist(folder: Path, source: str) -> Dataset:
    train, train_labels, test, test_labels = load_mnist(folder)
    classes = tuple(map(str, range(10)))
    return Dataset(source, Labelled(train, train_labels), Labelled(test, test_labels), classes)


_PLAIN: dict[str, Callable[[], Dataset]] = {
    "digits": load_digits,
    "iris": load_iris,
    "wine": load_wine,
    "breast-cancer": load_breast_cancer,
    "xor": generate_xor,
}
_SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("digits", "", "1,797 pictures of digits, 8x8, 10 classes; comes with gossipml"),
        Source("iris", "", "150 flowers, 4 measures, 3 classes; comes with gossipml"),
        Source("wine", "", "178 wines, 13 measures, 3 classes; comes with gossipml"),
        Source("breast-cancer", "", "569 tumours, 30 measures, 2 classes; comes with gossipml"),
        Source("xor", "", "404 points of two values, 2 classes; generated"),
        Source("mnist", "DIR", "IDX files, gzip-compressed or not: MNIST, Fashion- and Kuzushiji-MNIST"),
        Source("cifar10", "DIR", "CIFAR-10's binary or python batches"),
        Source("images", "DIR", "pictures in folders named after their class, perhaps under train/ and test/"),
        Source("csv", "FILE#LABEL", "a table of numbers; LABEL is a column's name, or its number from 1"),
        Source("npz", "FILE", "numpy arrays x_train, y_train, x_test, y_test, or x and y"),
        Source("parquet", "FILE#LABEL", "a table of numbers; needs pip install 'gossipml[parquet]'"),
    )
}
