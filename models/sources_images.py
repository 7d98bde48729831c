"""Reads `images:DIR`: one folder a class, with the class's pictures in it.

    DIR/CLASS/*.jpg                             a fifth of each class is held out for testing
    DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg  (or validation, val, valid instead of test)

An empty folder is a class of which there are no pictures here.

Only names are kept in memory (some 20 bytes a picture). Pixels are decoded for each batch, in the size the model
asks for, and remembered while all of a part fits into `CACHE`; a folder larger than memory trains at the speed of
the decoder. Names are sorted by their bytes, so that everybody who has the same folder has the same order.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, Indices, Labelled
from gossipml.models.sources_picture import SUFFIXES, Shape, decode, measure, read_picture
from gossipml.models.sources_table import MAX_CLASSES, MIN_SAMPLES, check_names, divide

CACHE = 256 << 20  # bytes of decoded pixels a part: all of CIFAR-10 (150 MB)
MAX_PICTURES = 1 << 25
TEST_FOLDERS = ("test", "validation", "val", "valid")
WANTED = "put the pictures of each class into a folder with the name of the class"


@dataclass(frozen=True)
class Files:
    """Where pictures lie: folders, and the number of the folder and the name of each."""

    folders: tuple[str, ...]
    folder: NDArray[np.int32]  # (n,)
    names: NDArray[np.bytes_]  # (n,)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> Path:
        return Path(self.folders[self.folder[number]], os.fsdecode(bytes(self.names[number])))

    def at(self, indices: Indices) -> Files:
        return Files(self.folders, self.folder[indices], self.names[indices])


class Pictures:
    """A stream of pictures: uint8 (n, height, width, channels), decoded when asked for."""

    def __init__(self, files: Files, size: Shape) -> None:
        self.files = files
        self._size = size
        self.shape = (len(files), *size)
        self.dtype = np.dtype(np.uint8)
        self._cache: NDArray[np.uint8] | None = None
        self._known: NDArray[np.bool_] = np.zeros(len(files), dtype=bool)
        self._numbers = np.arange(len(files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Any, /) -> Any:  # as of Rows
        numbers = self._numbers[key]
        if numbers.ndim == 0:
            return self._read(numbers.reshape(1))[0]
        return self._read(numbers)

    def take(self, indices: Indices) -> Pictures:
        return Pictures(self.files.at(indices), self._size)

    def sized(self, size: Shape) -> Pictures:
        """The same pictures in another size."""
        return self if size == self._size else Pictures(self.files, size)

    def _read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        if len(self.files) * math.prod(self._size) > CACHE:
            pixels = np.empty((len(numbers), *self._size), dtype=np.uint8)
            for place, number in enumerate(numbers):
                pixels[place] = self._decode(int(number))
            return pixels
        if self._cache is None:  # the system gives memory as it is written, so one look costs one picture
            self._cache = np.empty(self.shape, dtype=np.uint8)
        for number in numbers[~self._known[numbers]]:
            self._cache[number] = self._decode(int(number))
            self._known[number] = True
        return self._cache[numbers]

    def _decode(self, number: int) -> NDArray[np.uint8]:
        path = self.files.path(number)
        return decode(read_picture(path), self._size, str(path))


def load_images(folder: Path, source: str) -> Dataset:
    """The classes and where their pictures lie; one picture is looked at for its size."""
    train_folder = folder / "train"
    if not train_folder.is_dir():
        files, targets, labels = _find(folder)
        inputs = Pictures(files, _natural_size(files))
        return divide(source, inputs, targets, labels, (), str(folder))
    files, targets, labels = _find(train_folder)
    inputs = Pictures(files, _natural_size(files))
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test_folder is None:
        return divide(source, inputs, targets, labels, (), str(train_folder))
    test_files, test_targets, test_labels = _find(test_folder)
    for label in test_labels:
        if label not in labels:
            raise UserError(f"the class {label!r} is in {test_folder} but not in {train_folder}; {WANTED} in both")
    if len(targets) < MIN_SAMPLES:
        raise UserError(f"{train_folder} holds {len(targets)} pictures; gossipml needs {MIN_SAMPLES} or more")
    number = np.array([labels.index(label) for label in test_labels], dtype=np.int64)
    test = Labelled(Pictures(test_files, inputs.shape[1:]), number[test_targets])
    return Dataset(source, Labelled(inputs, targets), test, labels)


def _natural_size(files: Files) -> Shape:
    path = files.path(0)
    return measure(read_picture(path), str(path))


def _find(folder: Path) -> tuple[Files, NDArray[np.int64], tuple[str, ...]]:
    """The pictures of all class folders, by class and then by name."""
    try:
        classes = sorted(
            (os.fsencode(entry.name), entry.path)
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if len(classes) > MAX_CLASSES:
            raise UserError(f"{folder} holds {len(classes)} folders; at most {MAX_CLASSES} classes are read")
        found = [_names_in(path) for _, path in classes]
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
    if not classes or not any(map(len, found)):
        raise UserError(f"{folder} holds no folder with pictures ({', '.join(SUFFIXES)}); {WANTED}")
    if sum(map(len, found)) > MAX_PICTURES:
        raise UserError(f"{folder} holds over {MAX_PICTURES} pictures; name a smaller folder")
    number = np.repeat(np.arange(len(classes)), [len(names) for names in found])
    files = Files(tuple(path for _, path in classes), number.astype(np.int32), np.concatenate(found))
    labels = tuple(_label(name, folder) for name, _ in classes)
    check_names(labels, str(folder))
    return files, number.astype(np.int64), labels


def _names_in(folder: str) -> NDArray[np.bytes_]:
    names = sorted(
        os.fsencode(entry.name)
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
    )
    return np.array(names, dtype=np.bytes_)


def _label(name: bytes, folder: Path) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{folder} has a folder whose name {name!r} is not UTF-8; rename it") from None
