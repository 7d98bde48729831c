"""Reads `npz:FILE`: arrays as `numpy.savez` writes them, without pickle.

The arrays are found by name: `x_train`, `y_train`, `x_test`, `y_test` (Keras), `train_images`, `train_labels`,
`test_images`, `test_labels` (MedMNIST), or `x` and `y`, from which a part is held out for testing; capitals do not
matter. `label_names` and `feature_names` may name classes and values (`gossipml data split` writes them).

Samples that are stored without compression are mapped when they are many, so a file larger than memory trains;
compressed ones must fit. Sizes are judged by the headers before anything is allocated (NEP 1 for the .npy format),
and a compressed member that unfolds to anything else than its header says is refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, FileRows, Labelled, Rows, Targets
from gossipml.models.sources_table import (
    MAX_CLASSES,
    MAX_COLUMNS,
    MIN_SAMPLES,
    check_names,
    divide,
    label_numbers,
    label_texts,
)
from gossipml.models.spec import MAX_SAMPLE_VALUES, Array

IN_MEMORY = 512 << 20  # bytes; an array that is stored plain is mapped from here on
MAX_PACKED = 4 << 30  # bytes that a compressed array may unfold to: it cannot be mapped
MAX_MEMBERS = 64
MAX_HEADER = 10_000  # characters, numpy's own bound: a header is parsed as a Python literal
CHUNK = 1 << 22
PAIRS = (
    (("x_train", "y_train"), ("x_test", "y_test")),
    (("train_images", "train_labels"), ("test_images", "test_labels")),
    (("x", "y"),),
    (("images", "labels"),),
    (("data", "target"),),
)
WANTED = "name the arrays x_train, y_train, x_test and y_test, or x and y"


@dataclass(frozen=True)
class _Member:
    """One array in the file, before it is read."""

    where: str
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]  # Any: whichever the file says
    header: int  # bytes before the values

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_npz(path: Path, source: str) -> Dataset:
    """The data set in the file. UserError names file, array and remedy."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive, path, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{path} is not a whole .npz file ({error}); write it again with numpy.savez") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _load(archive: zipfile.ZipFile, path: Path, source: str) -> Dataset:
    members = _members(archive, path)
    pairs = _find_pairs(members, path)
    samples = [_samples(archive, path, members[pair[0]]) for pair in pairs]
    given = [_read(archive, members[pair[1]]) for pair in pairs]
    for rows, numbers, pair in zip(samples, given, pairs, strict=True):
        if len(rows) != len(numbers):
            raise UserError(
                f"{path} has {len(rows)} samples in {pair[0]!r} and {len(numbers)} labels in {pair[1]!r}; there must "
                "be as many"
            )
        if rows.shape[1:] != samples[0].shape[1:]:
            raise UserError(
                f"{path} has samples of shape {list(samples[0].shape[1:])} to train on and of "
                f"{list(rows.shape[1:])} for testing; they must be alike"
            )
    # Together, so that a label has one number in both parts.
    targets, labels = _targets(given, _names(archive, members, "label_names"), f"{path}, {pairs[0][1]!r},")
    features = _names(archive, members, "feature_names")
    features = features if len(features) == math.prod(samples[0].shape[1:]) else ()
    if len(pairs) == 1:
        return divide(source, samples[0], targets, labels, features, str(path))
    count = len(samples[0])
    if count < MIN_SAMPLES or count == len(targets):
        raise UserError(
            f"{path} holds {count} samples to train on and {len(targets) - count} for testing; gossipml needs "
            f"{MIN_SAMPLES} and 1 or more"
        )
    train, test = Labelled(samples[0], targets[:count]), Labelled(samples[1], targets[count:])
    return Dataset(source, train, test, labels, features)


def _find_pairs(members: dict[str, _Member], path: Path) -> tuple[tuple[str, str], ...]:
    for pairs in PAIRS:
        if all(name in members for pair in pairs for name in pair):
            return pairs
    raise UserError(f"{path} holds the arrays {', '.join(sorted(members)) or '(none)'}; {WANTED}")


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, _Member]:
    """The arrays by their names in small letters; only their headers are read."""
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise UserError(f"{path} holds {len(infos)} arrays, over {MAX_MEMBERS}; {WANTED}")
    known = {name for pairs in PAIRS for pair in pairs for name in pair} | {"label_names", "feature_names"}
    found: dict[str, _Member] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy").lower()
        if name in found:
            raise UserError(f"{path} holds two arrays {name!r}; write it again with numpy.savez")
        if name in known:
            found[name] = _header(archive, info, f"{path}, {info.filename.removesuffix('.npy')!r},")
    return found


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> _Member:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{where} is encrypted or compressed in an unusual way; write it again with numpy.savez")
    with archive.open(info) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"format version {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER)
        except Exception as error:  # the header is a Python literal: its parser raises a dozen kinds
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            raise UserError(f"{where} is no .npy array ({reason}); write it again with numpy.savez") from None
        header = stream.tell()
    if dtype.hasobject or dtype.kind not in "buifSU" or dtype.itemsize == 0:
        what = "Python objects, which would be unpickled" if dtype.hasobject else f"values of type {dtype}"
        raise UserError(f"{where} holds {what}; convert it to numbers or text (array.astype) and write it again")
    member = _Member(where, info, shape, fortran, dtype, header)
    if any(n < 0 for n in shape) or info.file_size != header + member.size:
        raise UserError(f"{where} has {info.file_size} bytes, its header says {header + member.size}; write it again")
    return member


def _samples(archive: zipfile.ZipFile, path: Path, member: _Member) -> Rows:
    if member.dtype.kind not in "buif" or not member.shape:
        raise UserError(f"{member.where} holds {member.dtype} of shape {list(member.shape)}, not numbers in rows")
    width = math.prod(member.shape[1:])
    if not 1 <= width <= MAX_SAMPLE_VALUES:
        raise UserError(f"{member.where} has {width} values a sample; 1 to {MAX_SAMPLE_VALUES} are read")
    stored = member.info.compress_type == zipfile.ZIP_STORED
    values = _map(path, member) if stored and member.size > IN_MEMORY else _read(archive, member)
    if values.ndim == 1:
        values = values.reshape(-1, 1)
    _check_finite(values, member.where)
    return FileRows(values) if isinstance(values, np.memmap) else values


def _map(path: Path, member: _Member) -> Array:
    with path.open("rb") as file:
        file.seek(member.info.header_offset)
        local = file.read(30)  # APPNOTE.TXT 4.3.7: lengths of name and extra field, which may differ from the index
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise UserError(f"{member.where} is damaged; write it again with numpy.savez")
        skip = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = member.info.header_offset + 30 + skip + member.header
        if start + member.size > path.stat().st_size:
            raise UserError(f"{path} is cut off; copy it again")
        order = "F" if member.fortran else "C"
        return np.memmap(file, dtype=member.dtype, mode="r", offset=start, shape=member.shape, order=order)  # type: ignore[call-overload,no-any-return]  # the shape's type


def _read(archive: zipfile.ZipFile, member: _Member) -> Array:
    if member.size > MAX_PACKED:
        raise UserError(
            f"{member.where} unfolds to {member.size >> 30} GiB in memory, over {MAX_PACKED >> 30}; write it without "
            "compression (numpy.savez), then it is read as it is needed"
        )
    values = bytearray(member.size)
    with archive.open(member.info) as stream:
        _fill(stream, bytearray(member.header), member.where)
        _fill(stream, values, member.where)
        stream.read(1)  # the end: the checksum is compared
    flat: Array = np.frombuffer(values, dtype=member.dtype)
    array = flat.reshape(member.shape, order="F" if member.fortran else "C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _fill(stream: IO[bytes], out: bytearray, where: str) -> None:
    view, done = memoryview(out), 0
    while done < len(out):
        data = stream.read(min(CHUNK, len(out) - done))
        if not data:
            raise UserError(f"{where} ends after {done} of {len(out)} bytes; write it again with numpy.savez")
        view[done : done + len(data)] = data
        done += len(data)


def _check_finite(values: Array, where: str) -> None:
    if values.dtype.kind != "f":
        return
    step = max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        rows = np.asarray(values[start : start + step])
        if not np.isfinite(rows).all():
            row = start + int(np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))[0])
            raise UserError(f"{where} holds a value that is missing or infinite in sample {row}; remove the sample")


def _targets(given: list[Array], names: tuple[str, ...], where: str) -> tuple[Targets, tuple[str, ...]]:
    columns = [values.reshape(len(values)) if values.shape[1:] in ((), (1,)) else None for values in given]
    if any(column is None for column in columns):
        raise UserError(f"{where} has the shape {list(given[0].shape)}; give one label a sample (for one-hot: argmax)")
    whole = np.concatenate([column for column in columns if column is not None])
    if whole.dtype.kind == "S":
        try:
            whole = np.char.decode(whole, "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} holds labels that are not text in UTF-8; write them as text") from None
    if whole.dtype.kind == "U":
        return label_texts(whole, where)
    if names:
        if whole.dtype.kind not in "bui" or (whole.size and not 0 <= whole.min() <= whole.max() < len(names)):
            raise UserError(
                f"{where} does not fit the {len(names)} label_names: give numbers from 0 to {len(names) - 1}"
            )
        return whole.astype(np.int64), names
    return label_numbers(whole.astype(np.float64), where)


def _names(archive: zipfile.ZipFile, members: dict[str, _Member], kind: str) -> tuple[str, ...]:
    member = members.get(kind)
    if member is None:
        return ()
    if member.dtype.kind != "U" or len(member.shape) != 1 or member.size > 1 << 24:
        raise UserError(f"{member.where} is no list of names; write it as numpy.array([...], dtype=str)")
    names = tuple(map(str, _read(archive, member)))
    most = MAX_CLASSES if kind == "label_names" else MAX_COLUMNS
    if len(names) > most:
        raise UserError(f"{member.where} holds {len(names)} names; at most {most} are read")
    check_names(names, member.where)
    return names
