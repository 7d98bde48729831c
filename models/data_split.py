"""Writes the parts of a data set as data sets of their own: `gossipml data split`.

What part I of N holds is what `--split RULE --part I/N` would give a peer, with the same seed; each part carries the
common test part and the names of all classes, so that a peer with `npz:.../part-1-of-4.npz` or
`images:.../part-1-of-4` trains and is measured the same. The same split gives the same bytes. Rows are copied in
pieces and pictures are linked (copied, where the file system has no links), so a set larger than memory is split,
too. A part appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, Labelled, Rows
from gossipml.models.partition import Indices, Rule, split_indices
from gossipml.models.sources_images import Pictures

CHUNK_BYTES = 16 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a ZIP file knows: equal splits are equal files


@dataclass(frozen=True)
class WrittenPart:
    """One part on disk."""

    source: str
    """What to give as `--data`."""
    samples: int
    counts: tuple[int, ...]
    """Samples of each class; empty where targets are values."""


def write_parts(data: Dataset, rule: Rule, count: int, seed: int, out: Path) -> list[WrittenPart]:
    """Writes `count` parts into the folder `out`. UserError when that is impossible; then nothing is left there."""
    parts = split_indices(data.train.targets, data.classes, rule, count, seed)
    pictures = isinstance(data.train.inputs, Pictures)
    written: list[WrittenPart] = []
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already and not an empty folder; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        for number, indices in enumerate(parts, 1):
            name = f"part-{number:0{len(str(count))}}-of-{count}"
            unfinished, path = out / f".{name}.part", out / (name if pictures else f"{name}.npz")
            try:
                (_write_pictures if pictures else _write_arrays)(data, indices, unfinished)
                unfinished.rename(path)
            except BaseException:
                _remove(unfinished)
                raise
            counts = np.bincount(data.train.targets[indices].astype(np.int64), minlength=data.classes)
            written.append(
                WrittenPart(
                    f"{'images' if pictures else 'npz'}:{path}",
                    len(indices),
                    tuple(counts.tolist()) if data.labels else (),
                )
            )
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror or error}") from None
    return written


def _write_arrays(data: Dataset, indices: Indices, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # not compressed: it can be mapped
        for name, part in (("train", data.train.at(indices)), ("test", data.test)):
            _write_array(archive, f"x_{name}", part.inputs)
            _write_array(archive, f"y_{name}", part.targets)
        for name, texts in (("label_names", data.labels), ("feature_names", data.features)):
            if texts:
                _write_array(archive, name, np.array(texts, dtype=np.str_))


def _write_array(archive: zipfile.ZipFile, name: str, rows: Rows) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": tuple(rows.shape)}
    with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_2_0(stream, header)
        each = int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, each))
        for start in range(0, len(rows), step):
            chunk: np.ndarray[Any, Any] = np.ascontiguousarray(rows[start : start + step])  # Any: of the source's type
            stream.write(chunk.tobytes())


def _write_pictures(data: Dataset, indices: Indices, folder: Path) -> None:
    for name, part in (("train", data.train.at(indices)), ("test", data.test)):
        for label in data.labels:
            (folder / name / label).mkdir(parents=True)  # an empty one too: the class exists
        _link_pictures(part, data.labels, folder / name)


def _link_pictures(part: Labelled, labels: tuple[str, ...], folder: Path) -> None:
    assert isinstance(part.inputs, Pictures)
    for number, target in enumerate(part.targets):
        path = part.inputs.files.path(number)
        copy = folder / labels[int(target)] / path.name
        try:
            os.link(path, copy)
        except OSError:
            shutil.copyfile(path, copy)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
