"""The bytes of one version on disk: pieces that are verified before they are written and again when they are read.

    content/ROOT         the safetensors file, whole
    content/ROOT.part    the file while pieces are missing, sparse
    content/ROOT.have    which pieces are there (BEP 3 bitfield) and its SHA-256; beside ROOT: which are still good
    content/ROOT.layer   the hashes of the pieces, when there is more than one

What a crash finds: `.have` never names a piece that is not lasting, since the data is synced before it is written
(every few MB, and at the end). Pieces that came after it are found again by `rescan`. ROOT without `.have`, or with a
full one, is whole: `finish` syncs the data, writes the full `.have`, renames, syncs the folder, and only then calls
the content finished. A piece that is found corrupt turns finished content into unfinished one, in place.

Left out: sharing of equal pieces between versions.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from gossipml.env import Check, Compute, Disk, Lock, write_atomic
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models import artifact, merkle
from gossipml.models.store_rules import full_bits, have_file

log = logging.getLogger("gossipml.store")

FOLDER = "models/content"
SYNC_MOST = 64 << 20  # unsynced bytes that a crash may cost, at most
SYNC_LEAST = 4 << 20  # a sync of less costs more than it saves
SYNC_SHARE = 8  # between these: a part of the content
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class PieceCache:
    """Pieces that were verified a short while ago, so that not every asker costs a read and a hash."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pieces: OrderedDict[tuple[bytes, int], bytes | bytearray] = OrderedDict()
        self.bytes = 0

    def get(self, root: bytes, index: int) -> bytes | bytearray | None:
        piece = self._pieces.get((root, index))
        if piece is not None:
            self._pieces.move_to_end((root, index))
        return piece

    def put(self, root: bytes, index: int, piece: bytes | bytearray | memoryview) -> None:
        if len(piece) > self._capacity:
            return
        self.drop(root, index)
        # No copy, but of a part of something larger: a bytearray is given away (see `Content.write`).
        self._pieces[root, index] = bytes(piece) if isinstance(piece, memoryview) else piece
        self.bytes += len(piece)
        while self.bytes > self._capacity:
            _, oldest = self._pieces.popitem(last=False)
            self.bytes -= len(oldest)

    def drop(self, root: bytes, index: int) -> None:
        self.bytes -= len(self._pieces.pop((root, index), b""))

    def drop_all(self, root: bytes) -> None:
        for index in [index for held, index in self._pieces if held == root]:
            self.drop(root, index)


class Content:
    """Made by the store. All methods may run at the same time."""

    def __init__(
        self,
        disk: Disk,
        compute: Compute,
        cache: PieceCache,
        root: bytes,
        size: int,
        layer: bytes,
        *,
        on_damage: Callable[[Content], None],
        bits: bytes = b"",
        placed: bool = False,
    ) -> None:
        self.root = root
        self.size = size
        self.layer = layer
        self.piece_length = merkle.piece_length(size)
        self.count = merkle.piece_count(size)
        self.removed = False
        self.refused = ""
        """Why it is whole and no version all the same: nobody asks for it again."""
        self.users = 0
        """Who needs it now: such content is not collected."""
        self._disk = disk
        self._compute = compute
        self._cache = cache
        self._on_damage = on_damage
        self._bits = bytearray(bits or (self.count + 7) // 8)
        self.missing = self.count - sum(byte.bit_count() for byte in self._bits)
        """How many pieces are not there."""
        self._placed = placed  # under its own name, not `.part`
        self._lasting = placed and not self.missing
        self._saved = bytes(self._bits)
        self._unsynced = 0
        self._writing: set[int] = set()
        self._lock = Lock()
        self._leaves = merkle.piece_leaves(size)
        self._sync_after = min(SYNC_MOST, max(SYNC_LEAST, size // SYNC_SHARE))

    @property
    def path(self) -> str:
        return self._base if self._placed else f"{self._base}.part"

    @property
    def _base(self) -> str:
        return f"{FOLDER}/{self.root.hex()}"

    @property
    def complete(self) -> bool:
        """Every piece is there. Lasting only when `finished`."""
        return self.missing == 0

    @property
    def finished(self) -> bool:
        """Whole, and after any crash still whole."""
        return self._lasting and self.missing == 0

    def have(self) -> bytes:
        """Which pieces are there: bitfield of BEP 3, the first piece in the highest bit of the first byte."""
        return bytes(self._bits)

    def has(self, index: int) -> bool:
        return 0 <= index < self.count and bool(self._bits[index >> 3] & (0x80 >> (index & 7)))

    def piece_size(self, index: int) -> int:
        return merkle.piece_size(self.size, index)

    async def read(self, index: int) -> bytes | bytearray | None:
        """A piece, verified; None when it is not there, or no longer: a corrupt piece becomes a missing one."""
        if not self.has(index):
            return None
        piece = self._cache.get(self.root, index)
        if piece is not None:
            return piece
        piece = await self._read(index)
        if piece is None:
            return None
        if piece:
            self._cache.put(self.root, index, piece)
            return piece
        await self._lose(index)
        return None

    def hasher(self, piece: bytearray) -> merkle.PieceHasher:
        """For a piece that arrives in this buffer: hears of every byte of it, and goes to `write` with it."""
        return merkle.PieceHasher(piece, self._leaves)

    async def write(
        self, index: int, data: bytes | bytearray | memoryview, hasher: merkle.PieceHasher | None = None
    ) -> bool:
        """Store a piece; False, and nothing is written, when these are not its bytes. A bytearray is given away: its
        bytes may not be changed while anybody, such as the cache here, refers to it.

        Without a hasher that has heard of all its bytes they are hashed here, in a thread.

        UserError when it cannot be stored (disk full): what is there stays, and the download can go on later.
        """
        self._check_kept()
        if not 0 <= index < self.count or len(data) != self.piece_size(index):
            return False
        check: Check | None = self._check(index)
        if hasher is not None:
            if hasher.digest() != self._expected(index):
                return False
            check = None
        if self.has(index):
            return True
        if index in self._writing:
            # The endgame brings a piece twice. Two writers would outlive each other: one has the file finished and
            # renamed, the other makes it anew.
            return check is None or await self._compute.run(check, memoryview(data))
        self._writing.add(index)
        try:
            view = data if isinstance(data, bytes) else memoryview(data)
            with storing(f"piece {index} of {self.count}"):
                good = await self._disk.write_at(self.path, index * self.piece_length, view, check=check)
        finally:
            self._writing.discard(index)
        if not good or self.removed:
            return good
        self._cache.put(self.root, index, data)
        self._mark(index)
        self._unsynced += len(data)
        if self._unsynced >= self._sync_after:
            await self.save()
        return True

    async def save(self) -> None:
        """Make what is there lasting, so that a crash from now on costs none of it. UserError when the disk is full."""
        async with self._lock:
            if not self.removed and bytes(self._bits) != self._saved:
                with storing("which pieces are there"):
                    await self._save()

    async def finish(self) -> None:
        """Make whole content lasting: only afterwards is it `finished`. Nothing happens when it is.

        RemoteError when the whole is no safetensors file; UserError when the disk fails.
        """
        async with self._lock:
            if self.finished:
                return
            self._check_kept()
            if self.missing:
                raise LocalError(f"content with {self.missing} missing pieces cannot be finished")
            with storing("the version"):
                try:
                    await check_header(self._disk, self.path, self.size)
                except RemoteError as error:
                    self.refused = str(error)
                    raise
                await self._save()  # full: says after a crash that the file under its own name is whole
                if not self._placed:
                    await self._disk.rename(self.path, self._base)
                    self._placed = True
                await self._disk.fsync_folder(FOLDER)
                self._lasting = True
                await remove_if_there(self._disk, f"{self._base}.have")

    async def rescan(self) -> int:
        """Look for pieces on disk that nothing says are there, after a crash; how many were found."""
        found = 0
        there = await self._disk.size(self.path) or 0
        for index in range(self.count):
            if not self.has(index) and index * self.piece_length < there and await self._read(index):
                self._mark(index)
                found += 1
        return found

    async def scrub(self) -> int:
        """Read every piece from the disk and verify it; how many were corrupt and are missing now."""
        bad = 0
        for index in range(self.count):
            if self.has(index) and await self._read(index) == b"":
                bad += 1
                await self._lose(index)
        return bad

    def fill(self) -> None:
        """Say that all pieces are there: the store has put the whole file at `path`."""
        self._bits = bytearray(full_bits(self.count))
        self.missing = 0
        self._lasting = False

    async def drop(self) -> None:
        """Remove it from the disk."""
        self.removed = True
        self._cache.drop_all(self.root)
        async with self._lock:
            for path in (self._base, f"{self._base}.part", f"{self._base}.have", f"{self._base}.layer"):
                await remove_if_there(self._disk, path)

    # How it works.

    def _check_kept(self) -> None:
        if self.removed:
            raise UserError(f"the version was removed while it came in (content {self.root.hex()[:12]})")

    def _expected(self, index: int) -> bytes:
        return self.layer[index * merkle.HASH : (index + 1) * merkle.HASH]

    def _check(self, index: int) -> Check:
        return partial(_matches, self.piece_size(index), self._leaves, self._expected(index))

    async def _read(self, index: int) -> bytes | None:
        """A verified piece from the disk; b"" when it is corrupt, None when the disk cannot say now."""
        while True:
            path = self.path
            try:
                return await self._disk.read_at(
                    path, index * self.piece_length, self.piece_size(index), check=self._check(index)
                )
            except FileNotFoundError:
                async with self._lock:  # it may be renamed just now: done on the disk, and not yet known here
                    if self.removed:
                        return None
                    if path == self.path:  # else it was finished in between
                        return b""
            except OSError as error:
                if error.errno == errno.EIO:  # a bad sector: written anew, the disk finds another
                    return b""
                log.warning("piece %d of %s cannot be read: %s", index, self.root.hex()[:12], error)
                return None

    def _mark(self, index: int) -> None:
        if not self.has(index):
            self._bits[index >> 3] |= 0x80 >> (index & 7)
            self.missing -= 1

    async def _lose(self, index: int) -> None:
        """A corrupt piece is a missing one: remembered over a crash if the disk allows, else found again."""
        if self.removed or not self.has(index):
            return
        self._bits[index >> 3] &= ~(0x80 >> (index & 7))
        self.missing += 1
        self._lasting = False
        self._cache.drop(self.root, index)
        log.warning("piece %d of %s is corrupt on this disk; it is fetched anew", index, self.root.hex()[:12])
        try:
            await self.save()
        except UserError as error:
            log.warning("%s", error)
        self._on_damage(self)

    async def _save(self) -> None:
        bits, self._unsynced = bytes(self._bits), 0
        try:
            await self._disk.fsync(self.path)
        except FileNotFoundError:  # all of it lost
            if any(bits):
                raise
        await write_atomic(self._disk, f"{self._base}.have", have_file(bits, self.root))
        self._saved = bits


class storing:  # used as a verb: `with storing(what)`
    """OSError of the disk becomes a UserError that says what to do."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in _FULL:
                raise UserError(
                    f"the disk is full: {self._what} could not be stored; free some space (`gossipml models rm` "
                    "removes versions) and try again: what was stored before is kept"
                ) from error
            raise UserError(f"{self._what} could not be stored: {error.strerror or error}") from error


async def check_header(disk: Disk, path: str, size: int) -> artifact.Header:
    """The header of a safetensors file on disk. RemoteError when it is none."""
    start = await disk.read_at(path, 0, artifact.PREFIX)
    return artifact.read_header(await disk.read_at(path, 0, artifact.header_size(start, size)), size)


async def remove_if_there(disk: Disk, path: str) -> None:
    try:
        await disk.remove(path)
    except FileNotFoundError:
        pass


def _matches(size: int, leaves: int, expected: bytes, piece: bytes | memoryview) -> bool:
    return len(piece) == size and merkle.piece_hash(piece, leaves) == expected
