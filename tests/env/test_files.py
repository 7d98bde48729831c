"""Files on a real disk: modes, bounds, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gossipml.env import files
from gossipml.errors import UserError

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_read_is_bounded(tmp_path: Path) -> None:
    files.write(tmp_path / "f", b"12345")
    assert files.read(tmp_path / "f", limit=5) == b"12345"
    with pytest.raises(OSError, match="limit of 4") as caught:
        files.read(tmp_path / "f", limit=4)
    assert caught.value.errno == errno.EFBIG


def test_write_replaces_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "f"
    files.write(path, b"a long first content")
    files.write(path, memoryview(b"short"))
    assert path.read_bytes() == b"short"


@posix
@pytest.mark.parametrize("write", [files.write, files.write_atomic])
def test_private_files_are_0600_also_when_they_were_wider(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write(path, b"new", private=True)
    assert mode(path) == 0o600
    assert files.read_private(path, limit=10) == b"new"


@posix
@pytest.mark.parametrize("wide", [0o640, 0o604, 0o644, 0o620, 0o666])
def test_a_secret_that_others_can_reach_is_refused_with_the_remedy(tmp_path: Path, wide: int) -> None:
    path = tmp_path / "token"
    files.write(path, b"secret", private=True)
    path.chmod(wide)
    with pytest.raises(UserError, match=f"mode {wide:04o}.*chmod 600 {path}"):
        files.read_private(path, limit=100)


def test_a_missing_secret_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_private(tmp_path / "none", limit=100)


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert files.list_folder(path.parent) == ["state"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_atomic_keeps_the_old_content_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert files.list_folder(tmp_path) == ["state"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_the_systems_error() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        files._write(Path("/dev/full"), b"x", 0, private=False)
    assert caught.value.errno == errno.ENOSPC


def test_parts_are_written_into_new_and_old_files_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "f"
    assert files.size(path) is None
    assert files.write_at(path, 4, b"tail")
    assert files.write_at(path, 0, memoryview(b"head"))
    assert path.read_bytes() == b"headtail" and files.size(path) == 8
    assert files.read_at(path, 2, 4) == b"adta"
    assert files.read_at(path, 6, 1 << 40) == b"il"  # and sets no terabyte aside
    assert files.read_at(path, 9, 1) == b""


def test_a_part_that_fails_its_check_is_neither_written_nor_given(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert not files.write_at(path, 0, b"x", lambda _: False)
    assert not path.exists()
    path.write_bytes(b"x")
    assert files.read_at(path, 0, 1, lambda _: False) == b""


def test_what_is_free_is_known_before_the_folder_exists(tmp_path: Path) -> None:
    assert 0 < files.free(tmp_path / "not" / "yet") <= shutil.disk_usage(tmp_path).total


def test_a_missing_folder_lists_as_empty(tmp_path: Path) -> None:
    assert files.list_folder(tmp_path / "none") == []
