"""One picture from hostile bytes: its size, or its pixels in a wanted size.

Pillow decodes. Before it does, the format must be one of a few (each decoder is attack surface), the file and the
picture must be within bounds (a PNG of a kilobyte can claim 100,000 x 100,000 pixels), and only what the header
says is allocated. Whatever Pillow raises becomes one UserError that names the file.

A picture is scaled to the wanted height and width without keeping its proportions (as Keras and torchvision do by
default), bilinear with antialiasing. Orientation marks of cameras (EXIF) are not looked at; of animations the first
picture counts; transparency is dropped unless the model asks for four channels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, int, int]  # height, width, channels

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF87a", b"GIF89a", b"RIFF")
MAX_FILE = 64 << 20  # bytes; the largest camera pictures have half
MAX_PIXELS = 1 << 26  # 8192 x 8192: 256 MiB while it is decoded; a camera has 50 million
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def looks_like_picture(data: bytes) -> bool:
    """Whether these bytes begin as a picture does; JSON and CSV never do."""
    return data.startswith(BEGINNINGS) and (not data.startswith(b"RIFF") or data[8:12] == b"WEBP")


def decode(data: bytes, shape: Shape, where: str) -> NDArray[np.uint8]:
    """The pixels, scaled to (height, width, channels); 1, 3 or 4 channels are grey, RGB and RGBA."""
    height, width, channels = shape
    with _opened(data, where) as image:
        # A JPEG may be decoded at a half, a quarter, an eighth where that is still large enough: four times as fast.
        image.draft(None, (width, height))
        picture = _eight_bits(image, where).convert(MODES[channels])
        if picture.size != (width, height):
            from PIL.Image import Resampling

            picture = picture.resize((width, height), Resampling.BILINEAR)
        return np.asarray(picture, dtype=np.uint8).reshape(shape)


def measure(data: bytes, where: str) -> Shape:
    """Height, width and natural channels of a picture; its pixels are not decoded."""
    with _opened(data, where) as image:
        clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        grey = image.mode in ("1", "L", "I;16", "I;16B")
        return image.height, image.width, 4 if clear else 1 if grey else 3


def read_picture(path: Path) -> bytes:
    """The file's bytes, within bounds."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE:
        raise UserError(f"{path} has over {MAX_FILE >> 20} MiB; make the picture smaller, or remove it")
    return data


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image]:
    """The picture with its header read. UserError for whatever goes wrong inside."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable metadata, and of sizes: those are checked below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if not 0 < image.width * image.height <= MAX_PIXELS:
                    raise UserError(_too_many(where, f"{image.width} x {image.height}"))
                yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{where} is not a picture that can be read ({', '.join(FORMATS)}); remove it") from None
    except Image.DecompressionBombError:  # Pillow's own bound, 2.7 times ours, found while the header is read
        raise UserError(_too_many(where, f"over {2 * (Image.MAX_IMAGE_PIXELS or 0)}")) from None
    except MemoryError:
        raise UserError(f"{where} is too large for the memory of this machine; make the picture smaller") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, and more
        raise UserError(f"{where} is damaged ({type(error).__name__}: {error}); replace it, or remove it") from None


def _too_many(where: str, count: str) -> str:
    return f"{where} has {count} pixels, more than the {MAX_PIXELS} allowed; make the picture smaller, or remove it"


def _eight_bits(image: Image, where: str) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I;16"):
        return images.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{where} has pixels of 32 bits ({image.mode}); save it with 8 bits a channel")
    return image
