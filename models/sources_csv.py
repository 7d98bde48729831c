"""Reads `csv:FILE#LABEL`: a table of numbers with one column of labels (RFC 4180, gzip-compressed or not).

The first line names the columns; where it is data already there are no names, and LABEL is a column's number from 1.
Separators are commas, semicolons or tabs, whichever the first line has most of. Lines are read one after the other
and bounded in length, so a file of any size, or of one endless line, takes bounded memory.

Not here: text in other columns than that of the labels. Peers would have to agree on what each word means; encode
it as numbers first.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset
from gossipml.models.registry import nearest
from gossipml.models.sources_table import MAX_COLUMNS, LabelColumn, Spool, check_finite, check_names, divide

MAX_LINE = 1 << 24  # bytes: 65,536 columns of 256 characters
CHUNK = 1 << 20  # values of a chunk of rows, at least one row: 30 MB as Python's numbers


def load_csv(path: Path, label: str, source: str) -> Dataset:
    """The table, its label column apart. UserError names file, line, value and remedy."""
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            return _load(stream, path, label, source)  # type: ignore[arg-type]  # GzipFile reads as BinaryIO does
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is a damaged or cut off gzip file ({error}); copy it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}; save it as CSV with commas") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _load(stream: BinaryIO, path: Path, label: str, source: str) -> Dataset:
    lines = _lines(stream, path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} is empty; it needs a line of column names and one line a sample")
    separator = max(",;\t", key=first.count)
    head = [cell.strip() for cell in next(csv.reader([first], delimiter=separator, strict=True))]
    # A line of names holds no number, or the name of the label: a file that begins with its data (5.1,3.5,setosa)
    # must not lose its first sample.
    named = not any(map(_is_number, head)) or (label in head and not _is_number(label))
    names = head if named else [f"x{number}" for number in range(1, len(head) + 1)]
    _check_names(names, path)
    place = _find_label(names, label, path)
    features = tuple(name for number, name in enumerate(names) if number != place)
    if not features:
        raise UserError(f"{path} has no column beside the label {label!r}; it needs one or more columns of numbers")
    reader = csv.reader(lines if named else _again(first, lines), delimiter=separator, strict=True)
    spool, labels = Spool(len(features), str(path)), LabelColumn(names[place], str(path))
    count = max(1, CHUNK // len(names))
    rows: list[list[float]] = []
    texts: list[str] = []
    places: list[int] = []
    for row in reader:
        # Quoted line breaks and empty lines make the reader's own count the only right one.
        line = reader.line_num + (1 if named else 0)
        if not row:
            continue
        if len(row) != len(names):
            raise UserError(
                f"{path} line {line} has {len(row)} values, the first line {len(names)}; every line needs as many"
            )
        places.append(line)
        texts.append(row.pop(place))
        rows.append(_numbers(row, features, path, line))
        if len(rows) == count:
            _flush(spool, labels, rows, texts, places, features, path)
    _flush(spool, labels, rows, texts, places, features, path)
    targets, classes = labels.finish()
    return divide(source, spool.finish(), targets, classes, features, str(path))


def _flush(
    spool: Spool,
    labels: LabelColumn,
    rows: list[list[float]],
    texts: list[str],
    places: list[int],
    features: tuple[str, ...],
    path: Path,
) -> None:
    if not rows:
        return
    table = np.array(rows, dtype=np.float64)
    check_finite(table, features, str(path), "line", places)
    labels.add(texts, "line", places)
    spool.add(table.astype(np.float32))
    for gathered in (rows, texts, places):
        gathered.clear()


def _numbers(row: list[str], features: tuple[str, ...], path: Path, line: int) -> list[float]:
    try:
        return list(map(float, row))
    except ValueError:
        pass
    for name, cell in zip(features, row, strict=True):
        if not cell.strip():
            raise UserError(f"{path} line {line}: the value of {name!r} is missing; fill it in, or remove the line")
        if not _is_number(cell):
            raise UserError(
                f"{path} line {line}: the value of {name!r} is {cell[:40]!r}, not a number; write it as a number, or "
                "leave the column out"
            )
    raise AssertionError("unreachable: one of the cells is no number")


def _find_label(names: list[str], label: str, path: Path) -> int:
    if label in names:
        return names.index(label)
    if label.isascii() and label.isdigit() and len(label) < 7:
        if 1 <= int(label) <= len(names):
            return int(label) - 1
        raise UserError(f"{path} has {len(names)} columns; there is no column {label}")
    raise UserError(f"{path} has no column {label!r}; {nearest(label, names[:50])}")


def _check_names(names: list[str], path: Path) -> None:
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{path} has {len(names)} columns; at most {MAX_COLUMNS} are read")
    if "" in names:
        raise UserError(f"{path} has no name for column {names.index('') + 1} in its first line; name every column")
    check_names(names, str(path))


def _lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    encoding = "utf-8-sig"
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{path} line {number} is longer than {MAX_LINE} bytes; is this a CSV file?")
        if b"\0" in line:
            raise UserError(f"{path} line {number} holds a zero byte, so it is no text; save it as CSV in UTF-8")
        yield line.decode(encoding)
        encoding = "utf-8"


def _again(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
