"""A disk in memory that loses what was not synced, fills up and fails, and remembers every operation.

After a power loss a file holds its last synced content, or the new one, or any prefix of it; of several parts
written since (`write_at`) each is there, or a prefix of it, or not, each for itself, and zeros where none is. Each
change of a folder (a new name, a rename, a removal) that no `fsync_folder` followed has happened or has not, each
for itself. That is more than most file systems inflict and all that POSIX promises. A rename itself is atomic.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from gossipml.env import Check
from gossipml.env.paths import checked_path, folder_of

Kind = Literal[
    "read", "read_at", "write", "write_at", "size", "free", "fsync", "rename", "fsync_folder", "remove", "list"
]
UNLIMITED = 1 << 50  # what a disk without `capacity` says is free
LATENCY = 0.0005  # seconds an operation takes, so that a crash can land between any two


@dataclass(frozen=True)
class Operation:
    """One call, as `SimulatedDisk.operations` records those that change something."""

    kind: Kind
    path: str
    data: bytes = b""
    private: bool = False
    target: str = ""
    """Where a rename leads."""
    offset: int = 0
    """Where a part is read or written."""


@dataclass(eq=False)
class _File:
    data: bytes
    synced: bytes | None  # None: never synced, so not even empty for sure
    private: bool
    unsynced: list[Operation] = field(default_factory=list)  # what was written since; begins anew at a `write`


_Change = dict[str, "_File | None"]
"""A change of a folder that is not synced yet: names and what they now stand for."""


class MountedDisk:
    """`Disk` as one process sees it: dead as soon as the process is."""

    def __init__(self, store: SimulatedDisk, alive: Callable[[], bool]) -> None:
        self._store = store
        self._alive = alive

    async def read(self, path: str, *, limit: int) -> bytes:
        path = checked_path(path)
        await self._begin(Operation("read", path))
        data = self._store.content(path)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"{len(data)} bytes are over the limit of {limit}", path)
        return data

    async def write(self, path: str, data: bytes | memoryview, *, private: bool = False) -> None:
        await self._change(Operation("write", checked_path(path), bytes(data), private))

    async def read_at(self, path: str, offset: int, size: int, *, check: Check | None = None) -> bytes:
        path = checked_path(path)
        await self._begin(Operation("read_at", path, offset=offset))
        data = self._store.content(path)[offset : offset + size]
        return data if check is None or check(data) else b""

    async def write_at(self, path: str, offset: int, data: bytes | memoryview, *, check: Check | None = None) -> bool:
        path = checked_path(path)
        if check is not None and not check(data):
            await trio.lowlevel.checkpoint()
            return False
        await self._change(Operation("write_at", path, bytes(data), offset=offset))
        return True

    async def size(self, path: str) -> int | None:
        path = checked_path(path)
        await self._begin(Operation("size", path))
        try:
            return len(self._store.content(path))
        except FileNotFoundError:
            return None

    async def free(self) -> int:
        await self._begin(Operation("free", ""))
        store = self._store
        return UNLIMITED if store.capacity is None else max(0, store.capacity - store.used)

    async def fsync(self, path: str) -> None:
        await self._change(Operation("fsync", checked_path(path)))

    async def rename(self, old: str, new: str) -> None:
        await self._change(Operation("rename", checked_path(old), target=checked_path(new)))

    async def fsync_folder(self, path: str) -> None:
        await self._change(Operation("fsync_folder", checked_path(path, folder=True)))

    async def remove(self, path: str) -> None:
        await self._change(Operation("remove", checked_path(path)))

    async def list(self, path: str) -> list[str]:
        path = checked_path(path, folder=True)
        await self._begin(Operation("list", path))
        prefix = path + "/" if path else ""
        inside = [name for name in self._store.files() if name.startswith(prefix)]
        return sorted({name[len(prefix) :].split("/")[0] for name in inside})

    async def _change(self, operation: Operation) -> None:
        await self._begin(operation)
        self._store.apply(operation)

    async def _begin(self, operation: Operation) -> None:
        store = self._store
        if store.latency:
            await trio.sleep(store.latency)
        else:
            await trio.lowlevel.checkpoint()
        if not self._alive():
            raise OSError(errno.EIO, "the process that asks is dead", operation.path)
        if store.fault is not None and (number := store.fault(operation)):
            raise OSError(number, os.strerror(number), operation.path)


class SimulatedDisk(MountedDisk):
    """`Disk` in memory. Outlives the crash of the process; see `power_loss`."""

    def __init__(self, *, latency: float = LATENCY, record: bool = False) -> None:
        super().__init__(self, lambda: True)
        self.capacity: int | None = None
        """Bytes that fit; more is ENOSPC. None: any number."""
        self.fault: Callable[[Operation], int | None] | None = None
        """Asked before each operation: an errno makes it fail, as `lambda op: errno.EIO if ...` does."""
        self.operations: list[Operation] = []
        """What changed the disk, in order; filled when made with `record`."""
        self.latency = latency
        self._record = record
        self._names: dict[str, _File] = {}
        self._synced: dict[str, _File] = {}
        self._pending: list[_Change] = []

    # What a test looks at.

    def files(self) -> dict[str, bytes]:
        """Every file and its content."""
        return {path: self._names[path].data for path in sorted(self._names)}

    def content(self, path: str) -> bytes:
        return self._file(path).data

    def is_private(self, path: str) -> bool:
        return self._file(path).private

    def mount(self, alive: Callable[[], bool]) -> MountedDisk:
        """The disk for a process, until `alive()` is false."""
        return MountedDisk(self, alive)

    @property
    def used(self) -> int:
        return sum(len(file.data) for file in self._names.values())

    def power_loss(self, rng: random.Random | None = None, *, keep: bool = False) -> None:
        """Lose what was not synced: all of it, none of it (`keep`), or by chance (`rng`)."""

        def kept() -> bool:
            return keep if rng is None else rng.random() < 0.5

        names = dict(self._synced)
        for change in self._pending:
            if kept():
                _apply_change(names, change)
        for file in dict.fromkeys(names.values()):
            data = file.synced or b""
            for write in file.unsynced:
                if kept():
                    data = _written(data, write)
                elif rng is not None and rng.random() < 0.5:
                    data = _written(data, write, rng.randint(0, len(write.data)))  # torn
            file.data = file.synced = data
            file.unsynced = []
        self._names, self._synced, self._pending = names, dict(names), []

    def crash_points(self, *, torn: int = 2) -> Iterator[tuple[int, SimulatedDisk]]:
        """For each prefix of the recorded operations, the disks that a power loss there may leave behind.

        Yields how many operations had happened, and a disk: everything unsynced lost, everything kept, and
        `torn` mixtures.
        """
        for count in range(len(self.operations) + 1):
            for variant in range(2 + torn):
                disk = SimulatedDisk(latency=self.latency)
                for operation in self.operations[:count]:
                    disk.apply(operation)
                if variant < 2:
                    disk.power_loss(keep=variant == 1)
                else:
                    disk.power_loss(random.Random(count * 1000 + variant))
                yield count, disk

    # How it works.

    def apply(self, operation: Operation) -> None:
        """Do it at once."""
        path = operation.path
        match operation.kind:
            case "write" | "write_at":
                self._write(operation)
            case "fsync":
                file = self._file(path)
                file.synced = file.data
                file.unsynced = []
                # fsync of a new file makes its name lasting on common file systems; POSIX does not say so.
            case "rename":
                self._enter({path: None, operation.target: self._file(path)})
            case "remove":
                self._file(path)
                self._enter({path: None})
            case "fsync_folder":
                lasting = [change for change in self._pending if any(folder_of(name) == path for name in change)]
                self._pending = [change for change in self._pending if change not in lasting]
                for change in lasting:
                    _apply_change(self._synced, change)
        if self._record:
            self.operations.append(operation)

    def _write(self, operation: Operation) -> None:
        path, whole = operation.path, operation.kind == "write"
        file = self._names.get(path)
        before = file.data if file else b""
        after = _written(before, operation)
        room = None if self.capacity is None else self.capacity - self.used + len(before)
        full = room is not None and len(after) > max(room, 0 if whole else len(before))
        if full:  # as in reality, what fits is there
            assert room is not None
            fits = max(0, max(room, 0 if whole else len(before)) - operation.offset)
            operation = replace(operation, data=operation.data[:fits])
        if file is None:
            file = _File(b"", None, operation.private)
            self._enter({path: file})
        file.data = _written(before, operation)
        file.unsynced = [operation] if whole else [*file.unsynced, operation]
        file.private = file.private or operation.private
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _enter(self, change: _Change) -> None:
        _apply_change(self._names, change)
        self._pending.append(change)

    def _file(self, path: str) -> _File:
        try:
            return self._names[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None


def _apply_change(names: dict[str, _File], change: _Change) -> None:
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def _written(data: bytes, operation: Operation, size: int | None = None) -> bytes:
    """The content of a file after the first `size` bytes of a write, or all."""
    new = operation.data[:size]
    if operation.kind == "write":
        return new
    if not new:
        return data
    start, end = operation.offset, operation.offset + len(new)
    return data[:start].ljust(start, b"\0") + new + data[end:]
