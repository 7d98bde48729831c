"""Files on a real disk, synchronously: for the disk of `Env` (in threads) and for the command line.

OSError passes as the system gives it (disk full, read-only, no permission); what to tell the user is the
caller's to say, who knows what the file is for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gossipml.errors import UserError

PRIVATE_MODE = 0o600
_BINARY = getattr(os, "O_BINARY", 0)
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)


def read(path: Path, *, limit: int) -> bytes:
    """The whole file; OSError(EFBIG) when it is longer than `limit`, before more than that is in memory."""
    with open(path, "rb") as file:
        return _bounded(file, path, limit)


def read_private(path: Path, *, limit: int) -> bytes:
    """A file that holds a secret; UserError when others than its owner can read it."""
    with open(path, "rb") as file:
        # The open file is asked, not its name, which could point elsewhere in between. Windows has no modes.
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if sys.platform != "win32" and mode & 0o077:
            raise UserError(
                f"{path} holds a secret, but its mode {mode:04o} lets others reach it; run: chmod 600 {path}"
            )
        return _bounded(file, path, limit)


def _bounded(file: BinaryIO, path: Path, limit: int) -> bytes:
    # The size is asked first: read(limit + 1) would set that much memory aside, whatever the file holds.
    data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"longer than the limit of {limit} bytes", str(path))
    return data


def write(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Replace the content of a file in place; makes the folder when it is missing. `private`: mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, data, os.O_CREAT | os.O_TRUNC, private=private)


def write_atomic(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Replace a file so that after a crash at any point it holds the old or the new content, whole.

    When it cannot be written (disk full), the old file stays and nothing else is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: the daemon and the command line may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write(temporary, data, os.O_CREAT | os.O_EXCL, private=private, sync=True)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def read_at(path: Path, offset: int, size: int, check: Callable[[bytes | memoryview], bool] | None = None) -> bytes:
    """A part of a file, short only at its end; b"" when `check(part)` says no."""
    with open(path, "rb", buffering=0) as file:
        # The size is asked first: read(size) would set that much memory aside, whatever the file holds.
        size = max(0, min(size, os.fstat(file.fileno()).st_size - offset))
        file.seek(offset)
        data = file.read(size)
        while data and len(data) < size and (more := file.read(size - len(data))):
            data += more
    return data if check is None or check(data) else b""


def write_at(
    path: Path, offset: int, data: bytes | memoryview, check: Callable[[bytes | memoryview], bool] | None = None
) -> bool:
    """Replace a part of a file, which is made or extended; False, and nothing written, when `check(data)` says no."""
    if check is not None and not check(data):
        return False
    flags = os.O_WRONLY | os.O_CREAT | _BINARY | _CLOSE_ON_EXEC
    try:
        number = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(path, flags, 0o666)
    with open(number, "wb", buffering=0) as file:
        file.seek(offset)
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]
    return True


def size(path: Path) -> int | None:
    """Bytes of a file; None when it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def free(folder: Path) -> int:
    """Bytes that this user may still write to the disk that holds `folder`, or that will hold it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fresh_name() -> str:
    """A file name that nobody else has."""
    return secrets.token_hex(8)


def fsync(path: Path) -> None:
    _fsync(path, os.O_RDWR)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder lasting. Windows has no such call and needs none."""
    if sys.platform != "win32":
        _fsync(path, os.O_RDONLY)


def list_folder(path: Path) -> list[str]:
    """Names in a folder, sorted; empty when it is missing."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _write(path: Path, data: bytes | memoryview, flags: int, *, private: bool, sync: bool = False) -> None:
    number = os.open(path, os.O_WRONLY | _BINARY | _CLOSE_ON_EXEC | flags, PRIVATE_MODE if private else 0o666)
    with open(number, "wb", buffering=0) as file:
        if private and sys.platform != "win32":
            os.fchmod(number, PRIVATE_MODE)  # the file may have been there before, with another mode
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]
        if sync:
            os.fsync(number)


def _fsync(path: Path, flags: int) -> None:
    number = os.open(path, flags | _BINARY | _CLOSE_ON_EXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
