"""Reads IDX files, gzip-compressed or not: the format of MNIST, Fashion-MNIST and Kuzushiji-MNIST.

    0, 0, type, dimensions, then one big-endian uint32 per dimension, then the values in row-major order
(http://yann.lecun.com/exdb/mnist/, "The IDX file format"). Only type 8, unsigned byte, is read. The length
must be exactly what the header says: never silently less.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

UNSIGNED_BYTE = 8
MAX_VALUES = 1 << 30  # 1 GiB, over twenty times MNIST; bounds what a header can make us allocate
CHUNK = 1 << 20

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def load_mnist(folder: Path) -> tuple[Images, Labels, Images, Labels]:
    """Training images (n, 28, 28) and labels (n,), then those for testing, of the four files in a folder."""
    train = _load_pair(folder, "train")
    test = _load_pair(folder, "t10k")
    return (*train, *test)


def read_idx(path: Path, dimensions: int) -> Images:
    """The array in one file with that many dimensions."""
    try:
        packed = _first_bytes(path, 2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            return _read(stream, path, dimensions, None if packed else path.stat().st_size)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); {REMEDY}") from None
    except EOFError:
        raise UserError(f"{path} is cut off: its gzip data ends early; {REMEDY}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


REMEDY = "fetch the file again (the four IDX files of MNIST, gzip-compressed or not)"


def _load_pair(folder: Path, part: str) -> tuple[Images, Labels]:
    image_file, label_file = _find(folder, part, "images", 3), _find(folder, part, "labels", 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} has {len(images)} images and {label_file} {len(labels)} labels; they do not belong "
            f"together: {REMEDY}"
        )
    if images.shape[1:] != (28, 28):
        raise UserError(f"{image_file} has images of {images.shape[1]}x{images.shape[2]}, not 28x28; {REMEDY}")
    if len(labels) == 0:
        raise UserError(f"{image_file} holds no images; {REMEDY}")
    if labels.max() > 9:
        raise UserError(f"{label_file} holds the label {labels.max()}, over 9; {REMEDY}")
    return images, labels.astype(np.int64)


def _find(folder: Path, part: str, what: str, dimensions: int) -> Path:
    names = [f"{part}-{what}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path.name for path in folder.iterdir())[:5]
    found = f"it holds {', '.join(others)}" if others else "it is empty"
    raise UserError(f"there is no {names[0]} (or .gz) in {str(folder)!r}: {found}; {REMEDY}")


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(count)


def _read(stream: BinaryIO, path: Path, dimensions: int, file_size: int | None) -> Images:
    header = stream.read(4 + 4 * dimensions)
    if header[:2] != b"\0\0":
        looks = "looks like text, perhaps CSV" if header[:4].isascii() and header else "is something else"
        raise UserError(f"{path} is not an IDX file: it begins with {header[:8]!r} and {looks}; {REMEDY}")
    if len(header) < 4 + 4 * dimensions:
        raise UserError(f"{path} is cut off in its header after {len(header)} bytes; {REMEDY}")
    if header[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} holds values of IDX type {header[2]:#04x}, not unsigned bytes (0x08); {REMEDY}")
    if header[3] != dimensions:
        raise UserError(f"{path} has {header[3]} dimensions instead of {dimensions}; {REMEDY}")
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4", offset=4))
    size = math.prod(shape)
    if size > MAX_VALUES:
        raise UserError(f"{path} claims {size} values, over the limit of {MAX_VALUES}; {REMEDY}")
    if file_size is not None and file_size != len(header) + size:  # before anything is allocated
        raise UserError(f"{path} has {file_size} bytes, its header says {len(header) + size}; {REMEDY}")
    values = np.empty(size, dtype=np.uint8)
    view, filled = values.data, 0
    while filled < size:
        count = stream.readinto(view[filled : filled + CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path} is cut off: {filled} of {size} values are there; {REMEDY}")
        filled += count
    if stream.read(1):
        raise UserError(f"{path} goes on after its {size} values; {REMEDY}")
    return values.reshape(shape)
