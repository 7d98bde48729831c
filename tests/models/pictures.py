"""Small picture files for tests."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def picture(shade: int, size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A file of one colour; `size` is width and height."""
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).convert(mode).save(out, kind)
    return out.getvalue()


def fill(folder: Path, classes: dict[str, int], **options: object) -> Path:
    """A folder a class with so many pictures; the shade is ten times the class and the number."""
    for place, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number:03}.png").write_bytes(picture(100 * place + number, **options))  # type: ignore[arg-type]
    return folder
