"""Relative paths under a peer's home, checked before they reach a disk."""

from __future__ import annotations

from gossipml.errors import LocalError

MAX_PATH = 512  # far above any path that gossipml makes; below what file systems take


def checked_path(path: str, *, folder: bool = False) -> str:
    """The path, or LocalError when it could leave the home: absolute, with `..`, a drive or a NUL.

    Callers check the names that users and peers give long before; this is the last line behind them.
    An empty path is the home itself, for a folder only.
    """
    if folder and path == "":
        return path
    parts = path.split("/")
    if len(path) > MAX_PATH or any(part in ("", ".", "..") for part in parts) or set(path) & set("\\:\0"):
        raise LocalError(f"path {path!r} is not a plain relative path under the home")
    return path


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]
