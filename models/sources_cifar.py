"""Reads `cifar10:DIR`: CIFAR-10 (Krizhevsky 2009) as its author distributes it, binary or python version.

Binary: `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, each a row of records of one label byte and
3,072 bytes of picture: 32 x 32 red values row by row, then green, then blue. Python: the same without `.bin`, see
`sources_cifar_python`. Pictures become (n, 32, 32, 3).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, Labelled
from gossipml.models.sources_cifar_python import MAX_FILE, Pixels, read_batch
from gossipml.models.spec import Array

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, CHANNELS = 32, 3
PIXELS = SIDE * SIDE * CHANNELS
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
REMEDY = "unpack cifar-10-binary.tar.gz (or cifar-10-python.tar.gz) and name the folder of its batches"

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def load_cifar10(folder: Path, source: str) -> Dataset:
    """50,000 pictures to train on, 10,000 for testing. UserError names the file that is wrong, and how."""
    suffix = _find_version(folder)
    train, test = (_join([_batch(folder, name + suffix) for name in names]) for names in (TRAIN, TEST))
    return Dataset(source, train, test, CLASSES)


def _find_version(folder: Path) -> str:
    for suffix in (".bin", ""):
        here = [name for name in (*TRAIN, *TEST) if (folder / (name + suffix)).is_file()]
        missing = [name + suffix for name in (*TRAIN, *TEST) if name not in here]
        if here and missing:
            raise UserError(f"{str(folder)!r} holds {here[0]}{suffix} but no {', '.join(missing)}; {REMEDY}")
        if here:
            return suffix
    others = sorted(path.name for path in folder.iterdir())[:5]
    found = f"it holds {', '.join(others)}" if others else "it is empty"
    hint = (
        f"for class folders with pictures write images:{folder}"
        if any(name in others for name in ("train", "test"))
        else REMEDY
    )
    raise UserError(f"there is no data_batch_1.bin or data_batch_1 in {str(folder)!r}: {found}; {hint}")


def _batch(folder: Path, name: str) -> Batch:
    path = folder / name
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UserError(f"{path} has {size} bytes, over {MAX_FILE}; {REMEDY}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    pixels, labels = _binary(data, path) if name.endswith(".bin") else _python(data, path)
    if labels.max() >= len(CLASSES) or labels.min() < 0:
        raise UserError(f"{path} holds the label {labels.max()}, not 0 to 9; {REMEDY}")
    # (n, channel, row, column) -> (n, row, column, channel), as every picture format has it
    return pixels.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _binary(data: bytes, path: Path) -> Batch:
    if not data or len(data) % (1 + PIXELS):
        raise UserError(f"{path} has {len(data)} bytes, not whole records of {1 + PIXELS}; {REMEDY}")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python(data: bytes, path: Path) -> Batch:
    batch = read_batch(data, str(path))
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, Pixels) or pixels.values is None or pixels.values.shape[1] != PIXELS:
        raise UserError(f"{path} has no array 'data' of {PIXELS} bytes a picture; {REMEDY}")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise UserError(f"{path} has no list 'labels' of numbers; {REMEDY}")
    if len(labels) != len(pixels.values):
        raise UserError(f"{path} has {len(pixels.values)} pictures and {len(labels)} labels; {REMEDY}")
    return pixels.values, np.array(labels, dtype=np.int64)


def _join(batches: list[Batch]) -> Labelled:
    whole: Array = np.concatenate([pixels for pixels, _ in batches])
    return Labelled(np.ascontiguousarray(whole), np.concatenate([labels for _, labels in batches]))
