"""What tables have in common, from whatever file they come: rows of numbers, a column of labels, a test part.

Rows are gathered in memory while they are few and in a file without a name once they are many (`Spool`), so that a
table larger than memory trains, too. A label column holds names (classes), whole numbers (classes, when they are
few) or any numbers (values to predict). A test part is a random fifth of each class, the same for all who read the
same file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, FileRows, Labelled, Rows, Targets
from gossipml.models.spec import Array

IN_MEMORY = 512 << 20  # bytes of one table; a tenth of the memory of a small laptop
MAX_SPOOL = 256 << 30  # bytes; more than anyone trains on at one peer, and bounds what a packed file can unfold to
MAX_COLUMNS = 1 << 16
MAX_CLASSES = 1000  # of a label column: as many as ImageNet has; more different labels are names of rows, or values
MAX_NAME = 100  # characters of the name of a class or column: all of them pass through messages and pages
MIN_SAMPLES = 10  # eight to train on, two for testing
MAX_TEST = 10_000  # samples: the accuracy is known to half a point; a larger part would only take time each round
TEST_SHARE = 0.2
SEED = 20160  # of the fixed test parts and generated samples; not the user's seed: they are common to all
MISSING = frozenset(("", "?", "na", "n/a", "nan", "null"))  # as the UCI files, pandas and R write it


class Spool:
    """Rows (n, width) of float32 that arrive piece by piece."""

    def __init__(self, width: int, where: str) -> None:
        self._width = width
        self._where = where
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._size = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        """UserError when there is no room."""
        data = rows.astype(np.float32, copy=False).tobytes()
        self._size += len(data)
        if self._size > MAX_SPOOL:
            raise UserError(f"{self._where} unfolds to over {MAX_SPOOL >> 30} GiB of numbers; split the file")
        try:
            if self._file is None and self._size > IN_MEMORY:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the array mapped from it
                self._file.write(self._memory)
                self._memory = bytearray()
            if self._file is None:
                self._memory += data
            else:
                self._file.write(data)
        except OSError as error:
            raise self._no_room(error) from None

    def finish(self) -> Rows:
        """All rows: an array, or a stream of the file's."""
        if self._file is None:
            return np.frombuffer(self._memory, dtype=np.float32).reshape(-1, self._width)
        try:
            self._file.flush()
            mapped: Array = np.memmap(self._file, dtype=np.float32, mode="r").reshape(-1, self._width)
        except OSError as error:
            raise self._no_room(error) from None
        finally:
            self._file.close()  # the mapping stays; nothing else has a name for the file
        return FileRows(mapped)

    def _no_room(self, error: OSError) -> UserError:
        return UserError(
            f"{self._where} is too large for memory, and the folder for temporary files {tempfile.gettempdir()} does "
            f"not take it ({error.strerror or error}); free some space there, or set TMPDIR"
        )


class LabelColumn:
    """Labels, row by row; what they are shows at the end."""

    def __init__(self, name: str, where: str) -> None:
        self._where = f"the column {name!r} of {where}"
        self._codes: list[NDArray[np.int32]] = []
        self._values: list[NDArray[np.float64]] = []
        self._known: dict[str, int] = {}
        self._numeric = True

    def add(self, texts: Sequence[str], unit: str, places: Sequence[int]) -> None:
        """The labels of further lines (or rows: `unit`), as text, and their numbers. UserError for a missing one."""
        codes = np.empty(len(texts), dtype=np.int32)
        values = np.full(len(texts), np.nan)
        known = self._known
        for place, text in enumerate(texts):
            text = text.strip()
            code = known.get(text)
            if code is None:
                if text.lower() in MISSING:
                    raise UserError(
                        f"{self._where} has no label in {unit} {places[place]} ({text!r}); fill it in, or remove "
                        "the row"
                    )
                code = -1 if len(known) > MAX_CLASSES else known.setdefault(text, len(known))
            codes[place] = code
            if self._numeric:
                number = _number(text)
                self._numeric = math.isfinite(number)
                values[place] = number
        self._codes.append(codes)
        self._values.append(values if self._numeric else np.empty(0))

    def finish(self) -> tuple[Targets, tuple[str, ...]]:
        """Class numbers and their names, or values and no names."""
        codes = np.concatenate(self._codes) if self._codes else np.empty(0, dtype=np.int32)
        many = len(self._known) > MAX_CLASSES
        if self._numeric and len(codes):
            values = np.concatenate(self._values)
            targets, labels = label_numbers(values, self._where)
            return targets, labels
        if many:
            raise UserError(
                f"{self._where} holds over {MAX_CLASSES} different labels, such as {next(iter(self._known))!r}; are "
                "they names of the rows? Name the column of the classes after the #"
            )
        names = sorted(self._known)
        check_names(names, self._where)
        place = np.empty(len(names), dtype=np.int64)
        for number, name in enumerate(names):
            place[self._known[name]] = number
        return place[codes], tuple(names)


def label_numbers(values: NDArray[np.float64], where: str) -> tuple[Targets, tuple[str, ...]]:
    """Numbers as classes when they are whole and few, else as values to predict. UserError unless finite."""
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(
            f"{where} holds {values[row]} in row {row + 1}, which is no label; fill it in, or remove the row"
        )
    different = np.unique(values)
    if len(different) > MAX_CLASSES or (different != np.rint(different)).any():
        if np.abs(values).max() > np.finfo(np.float32).max:
            raise UserError(f"{where} holds {np.abs(values).max():g}, too large for float32; use another unit")
        return values.astype(np.float32), ()
    return np.searchsorted(different, values).astype(np.int64), tuple(f"{value:.0f}" for value in different)


def label_texts(texts: NDArray[np.str_], where: str) -> tuple[Targets, tuple[str, ...]]:
    """An array of names as class numbers."""
    column = LabelColumn("labels", where)
    column.add(texts.tolist(), "row", range(1, len(texts) + 1))
    return column.finish()


def divide(
    source: str, inputs: Rows, targets: Targets, labels: tuple[str, ...], features: tuple[str, ...], where: str
) -> Dataset:
    """The data set with its fixed test part. UserError when there are too few samples."""
    if len(targets) < MIN_SAMPLES:
        raise UserError(f"{where} holds {len(targets)} samples; gossipml needs {MIN_SAMPLES} or more")
    test = held_out(targets)
    whole = Labelled(inputs, targets)
    return Dataset(source, whole.at(~test), whole.at(test), labels, features)


def held_out(targets: Targets) -> NDArray[np.bool_]:
    """Which samples are for testing: a fifth of each class, 10,000 at most in all. Classes of one sample have none."""
    test = np.zeros(len(targets), dtype=bool)
    share = min(TEST_SHARE, MAX_TEST / len(targets))
    rng = np.random.RandomState(np.random.PCG64(SEED))  # as in `partition`: algorithms that never change
    if targets.dtype.kind == "f":
        test[rng.permutation(len(targets))[: math.ceil(len(targets) * share)]] = True
        return test
    for label in range(int(targets.max()) + 1):
        members = rng.permutation(np.flatnonzero(targets == label))
        count = len(members) * share
        if len(members) > 1:
            test[members[: max(1, int(count))]] = True
    if not test.any():  # every class has one sample: whoever trains on that says so
        test[rng.permutation(len(targets))[: math.ceil(len(targets) * share)]] = True
    return test


def check_names(names: Sequence[str], where: str) -> None:
    """UserError unless each is a short line of text and they differ."""
    for name in names:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UserError(
                f"{where} holds the name {name[:MAX_NAME]!r}; a name of a class or column is 1 to {MAX_NAME} "
                "characters that can be printed"
            )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} holds the name {twice!r} twice; give each its own")


def check_finite(
    rows: NDArray[np.float64], columns: Sequence[str], where: str, unit: str, places: Sequence[int]
) -> None:
    """UserError naming the first value that is not finite as float32."""
    bad = ~(np.abs(rows) <= np.finfo(np.float32).max)  # NaN compares false
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        value = rows[row, column]
        raise UserError(
            f"{where} {unit} {places[row]}: the value of {columns[column]!r} is "
            f"{'missing' if np.isnan(value) else value}; fill it in with a finite number, or remove the {unit}"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
