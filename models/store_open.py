"""Finding what a store's folder holds, whatever a crash or a broken disk has left there."""

from __future__ import annotations

import logging
from collections.abc import Collection

from gossipml.env import Compute, Disk, write_atomic
from gossipml.errors import RemoteError, UserError
from gossipml.models import merkle
from gossipml.models.manifest import MAX_MANIFEST, Manifest, parse_manifest, version_id
from gossipml.models.store_content import FOLDER, remove_if_there
from gossipml.models.store_rules import MAX_PINS, hash_of, pins_file, read_pins

log = logging.getLogger("gossipml.store")

MANIFESTS = "models/manifests"
INCOMING = "models/incoming"
PINS = "models/pins"
STEP = merkle.MAX_PIECE  # what a file is written and hashed in: a whole number of pieces of any length


class TreeHasher:
    """The tree of a file that comes in steps of `STEP`. `take` is the check of a disk, which calls it with each step
    in turn, off the event loop."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._length, self._leaves = merkle.piece_length(size), merkle.piece_leaves(size)
        self._layer: list[bytes] = []
        self._seen = 0

    def take(self, part: bytes | memoryview) -> bool:
        view = memoryview(part)
        for start in range(0, len(view), self._length):
            self._layer.append(merkle.piece_hash(view[start : start + self._length], self._leaves))
        self._seen += len(view)
        return True

    def found(self) -> tuple[bytes, bytes]:
        """Root and layer. UserError when the file became shorter on the way."""
        if self._seen != self._size:
            raise UserError(f"the file changed while it was read: {self._seen} bytes of {self._size}; try again")
        layer = b"".join(self._layer)
        return merkle.root_of_layer(layer, self._size), layer


async def hash_file(disk: Disk, path: str, size: int) -> tuple[bytes, bytes]:
    """Root and layer of a file, in bounded memory. UserError when it is shorter than `size`."""
    hasher = TreeHasher(size)
    for start in range(0, size, STEP):
        await disk.read_at(path, start, min(STEP, size - start), check=hasher.take)
    return hasher.found()


async def find_manifests(disk: Disk) -> tuple[dict[bytes, Manifest], set[bytes]]:
    """The manifests in the folder, and the ids of those that are damaged."""
    found: dict[bytes, Manifest] = {}
    lost: set[bytes] = set()
    for name in await disk.list(MANIFESTS):
        version = hash_of(name)
        if version is None:
            log.warning("%s/%s is not ours and is left alone", MANIFESTS, name)
            continue
        try:
            data = await disk.read(f"{MANIFESTS}/{name}", limit=MAX_MANIFEST)
            if version_id(data) != version:
                raise RemoteError("its bytes have another hash")
            found[version] = parse_manifest(data)
        except (OSError, RemoteError) as error:
            log.warning("the manifest of version %s is damaged (%s); it is fetched anew", name[:12], error)
            lost.add(version)
    return found, lost


async def find_pins(disk: Disk, every: Collection[bytes]) -> set[bytes]:
    """The pinned versions; `every` one when the file is damaged, so that nothing is collected by mistake."""
    try:
        pins = read_pins(await disk.read(PINS, limit=(MAX_PINS + 1) * 65))
    except FileNotFoundError:
        return set()
    except OSError:
        pins = None
    if pins is None:
        log.warning("%s is damaged: every version is pinned; unpin those that may go", PINS)
        pins = set(every)
        try:
            await write_atomic(disk, PINS, pins_file(pins))
        except OSError as error:
            log.warning("%s cannot be written: %s", PINS, error)
    return pins


async def find_layer(disk: Disk, compute: Compute, root: bytes, size: int, *, placed: bool) -> bytes | None:
    """The piece hashes of content; made anew from the whole file (`placed`) when they are damaged; None if unknown."""
    base = f"{FOLDER}/{root.hex()}"
    if merkle.piece_count(size) == 1:
        return root
    try:
        layer = await disk.read(f"{base}.layer", limit=merkle.piece_count(size) * merkle.HASH)
        await compute.run(merkle.check_layer, layer, root, size)
        return layer
    except (OSError, RemoteError) as error:
        if not placed:
            return None
        log.warning("the piece hashes of %s are damaged (%s); they are made anew", root.hex()[:12], error)
    try:
        found, layer = await hash_file(disk, base, size)
        if found != root:
            return None
        await write_atomic(disk, f"{base}.layer", layer)
    except (OSError, UserError) as error:
        log.warning("the piece hashes of %s cannot be made: %s", root.hex()[:12], error)
        return None
    return layer


async def clear_leftovers(disk: Disk) -> None:
    """Remove what was being written when the last process ended."""
    for folder in ("models", MANIFESTS, FOLDER):
        for name in await disk.list(folder):
            if name.endswith(".tmp"):
                await clear(disk, f"{folder}/{name}")
    for name in await disk.list(INCOMING):
        await clear(disk, f"{INCOMING}/{name}")


async def clear_orphans(disk: Disk, roots: Collection[bytes]) -> None:
    """Remove content that no manifest names."""
    names = {root.hex() for root in roots}
    for name in await disk.list(FOLDER):
        if name.partition(".")[0] not in names:
            await clear(disk, f"{FOLDER}/{name}")


async def clear(disk: Disk, path: str) -> None:
    """Remove a leftover; if the disk does not let us, it is only in the way."""
    try:
        await remove_if_there(disk, path)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
