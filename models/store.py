"""The model versions that this peer holds, on its disk: found after any crash, verified whenever they are read.

    HOME/models/manifests/ID        the signed bytes of `gossipml.models.manifest`; ID is their SHA-256
    HOME/models/content/ROOT...     `gossipml.models.store_content`: one file for all versions with the same bytes
    HOME/models/pins                ids that are never collected, one a line under the SHA-256 of the lines
    HOME/models/incoming/           files on their way in; emptied at every start

A version is *held* when its manifest and the whole content are lasting; only then does `holds` say so. A manifest
without whole content is *wanted*: a download that was interrupted, or whose content turned out corrupt; it is fetched
(again) piece by piece. What a crash or a broken disk damages is recognised by its hash and never given to anybody:

- a damaged manifest: `lost` names the version, which can be fetched by its id; contents are not cleared away then;
- damaged piece hashes: made anew from whole content, else fetched;
- a damaged bitfield: the pieces are looked at;
- damaged pins: everything is pinned, so that nothing is collected.

Collection keeps, for each name, the pinned versions, the `keep_last` latest whole ones, and as many wanted ones that
are later than these. Manifests are given here after `read_manifest`: the store knows neither network nor time.

Left out: choosing what to fetch and whom to ask (`gossipml.daemon`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gossipml.env import Compute, Disk, Lock, write_atomic
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models import artifact, merkle
from gossipml.models.manifest import Manifest
from gossipml.models.store_content import (
    FOLDER,
    Content,
    PieceCache,
    check_header,
    remove_if_there,
    storing,
)
from gossipml.models.store_open import (
    INCOMING,
    MANIFESTS,
    PINS,
    STEP,
    TreeHasher,
    clear,
    clear_leftovers,
    clear_orphans,
    find_layer,
    find_manifests,
    find_pins,
    hash_file,
)
from gossipml.models.store_rules import (
    MAX_PINS,
    choose,
    cost_of,
    full_bits,
    kept,
    latest_first,
    pins_file,
    read_have,
    readable,
)


@dataclass(frozen=True)
class StoreConfig:
    quota: int = 0
    """Bytes that the store may take; 0 for as much as the disk has."""
    keep_last: int = 5
    """Versions of each name that are kept beside pinned ones (guess)."""
    cache: int = 64 << 20
    """Bytes of verified pieces in memory: 32 of the largest, a piece for each of many askers."""
    spare: int = 64 << 20
    """Bytes that stay free on the disk for what else the peer writes: states, logs, audit (guess)."""


@dataclass(frozen=True)
class Measured:
    """A file under HOME that can become content."""

    path: str
    size: int
    root: bytes
    layer: bytes = field(repr=False)
    header: artifact.Header = field(repr=False)


class Store:
    """Call `open` first. All methods may run at the same time."""

    def __init__(self, disk: Disk, compute: Compute, config: StoreConfig | None = None) -> None:
        self._disk = disk
        self._compute = compute
        self._config = config or StoreConfig()
        self._cache = PieceCache(self._config.cache)
        self._manifests: dict[bytes, Manifest] = {}
        self._contents: dict[bytes, Content] = {}
        self._lost: set[bytes] = set()
        self._pins: set[bytes] = set()
        self._incoming: dict[str, int] = {}
        self._unscanned: set[bytes] = set()  # contents whose bitfield says less than the disk may hold
        self._numbers = itertools.count()
        self._lock = Lock()  # for what changes more than one file
        self.on_damage: Callable[[Content], None] = lambda content: None
        """Called when content turns out corrupt: it has missing pieces now, and its versions are wanted."""

    # What is there.

    def versions(self, name: str = "") -> list[Manifest]:
        """What is held, of one name or all, latest first."""
        return latest_first(one for one in self._manifests.values() if name in ("", one.name) and self._whole(one))

    def wanted(self) -> list[Manifest]:
        """What should be held and is not whole, latest first: `begin` it and download."""
        return latest_first(
            one for one in self._manifests.values() if not self._whole(one) and not self._is_hopeless(one)
        )

    def lost(self) -> list[bytes]:
        """Ids of versions whose manifest on this disk is damaged: fetch it by its id and `begin`."""
        return sorted(self._lost)

    def get(self, version: bytes) -> Manifest | None:
        """A manifest, whether its content is whole or not."""
        return self._manifests.get(version)

    def manifest(self, version: bytes) -> bytes | None:
        """The bytes of a manifest, for somebody who asks."""
        found = self._manifests.get(version)
        return None if found is None else found.data

    def holds(self, version: bytes) -> bool:
        found = self._manifests.get(version)
        return found is not None and self._whole(found)

    def find(self, name: str, prefix: str = "") -> Manifest:
        """The version of `name` that a person means by the beginning of its id, the latest for none. UserError."""
        versions = self.versions(name)
        if not versions:
            raise UserError(f"no version of {name!r:.80} is held here; `gossipml models pull {name:.80}` fetches it")
        return choose(versions, name, prefix)

    def content(self, root: bytes) -> Content | None:
        """The bytes with this root, whole or not."""
        return self._contents.get(root)

    def layer(self, root: bytes) -> bytes | None:
        content = self._contents.get(root)
        return None if content is None else content.layer

    @property
    def pins(self) -> frozenset[bytes]:
        return frozenset(self._pins)

    @property
    def used(self) -> int:
        """Bytes that are taken or promised: unfinished content counts whole."""
        return (
            sum(cost_of(content.size) for content in self._contents.values())
            + sum(len(manifest.data) for manifest in self._manifests.values())
            + sum(self._incoming.values())
        )

    @contextmanager
    def using(self, root: bytes) -> Iterator[None]:
        """Collection leaves the content alone meanwhile."""
        content = self._contents.get(root)
        if content is not None:
            content.users += 1
        try:
            yield
        finally:
            if content is not None:
                content.users -= 1

    # Content from others.

    async def begin(self, manifest: Manifest, layer: bytes | None = None) -> Content:
        """Content to be downloaded into; as far as it got, when it was begun before.

        `layer` may be left out when it is known (`layer()`), or when there is one piece. RemoteError when it is not the
        layer of the manifest's root; UserError when quota or disk are too small.
        """
        async with self._lock:
            content = await self._known(manifest) or await self._load(manifest.root, manifest.size)
            if content is None and layer is None:
                raise LocalError(f"the piece hashes of {manifest.version.hex()[:12]} are not known; fetch them first")
            if content is None and layer is not None:
                await self._compute.run(merkle.check_layer, layer, manifest.root, manifest.size)
                await self._make_room(cost_of(manifest.size), manifest)
                content = await self._new(manifest.root, manifest.size, layer)
                self._unscanned.add(manifest.root)  # a crash may have left pieces of it
            assert content is not None
            if content.refused:
                raise RemoteError(content.refused)
            if manifest.root not in self._contents and content.missing == content.count:
                await self._make_room(cost_of(manifest.size), manifest)
            await self._keep(manifest)
            self._contents[manifest.root] = content
            rescan = manifest.root in self._unscanned
            self._unscanned.discard(manifest.root)
        if rescan:
            await content.rescan()
        return content

    # Content of our own.

    async def add(self, manifest: Manifest, content: bytes) -> Manifest:
        """Hold a version whose bytes are in memory. UserError when quota or disk are too small."""
        measured = await self.prepare(content)
        try:
            return await self.ingest(manifest, measured)
        except BaseException:
            self._incoming.pop(measured.path, None)  # the file goes at the next start
            raise

    async def prepare(self, content: bytes) -> Measured:
        """Write bytes to disk and hash them, so that a manifest can be signed for `ingest`. UserError."""
        size, path = len(content), f"{INCOMING}/{next(self._numbers)}.own"
        self._incoming[path] = size  # counts at once: two at the same time must not both fit
        try:
            header = artifact.read_header(content, size)
            async with self._lock:
                await self._make_room(size, counted=True)
            hasher = TreeHasher(size)
            with storing("the version"):
                for start in range(0, size, STEP):
                    part = memoryview(content)[start : start + STEP]
                    await self._disk.write_at(path, start, part, check=hasher.take)
            return Measured(path, size, *hasher.found(), header)
        except BaseException as error:
            self._incoming.pop(path, None)
            if isinstance(error, UserError):  # a full disk, mostly; when cancelled the file stays until the next start
                await clear(self._disk, path)
            if isinstance(error, RemoteError):
                raise UserError(f"this is no version of a model: {error}") from None
            raise

    async def measure(self, path: str) -> Measured:
        """Hash a file under HOME in bounded memory. UserError when it is no safetensors file or too large."""
        size = await self._disk.size(path)
        if size is None:
            raise UserError(f"{path} is not there any more; begin again")
        if size > merkle.MAX_SIZE:
            raise UserError(f"{path} has {size} bytes; the largest version has {merkle.MAX_SIZE}")
        try:
            header = await check_header(self._disk, path, size)
        except RemoteError as error:
            raise UserError(f"{path} is no version of a model: {error}") from None
        self._incoming[path] = size
        try:
            async with self._lock:
                await self._make_room(size, counted=True, on_disk=True)
            return Measured(path, size, *(await hash_file(self._disk, path, size)), header)
        except BaseException:
            self._incoming.pop(path, None)
            raise

    async def ingest(self, manifest: Manifest, measured: Measured) -> Manifest:
        """Take over a measured file as the content of `manifest`; held when this returns. UserError, LocalError."""
        if (manifest.root, manifest.size) != (measured.root, measured.size):
            raise LocalError(f"the manifest of {manifest.name} is of other bytes than {measured.path}")
        async with self._lock:
            content = await self._known(manifest)
            if content is None:
                content = await self._new(measured.root, measured.size, measured.layer)
            with storing("the version"):
                if content.finished:
                    await remove_if_there(self._disk, measured.path)
                else:
                    await self._disk.write_at(content.path, 0, b"")  # makes the folder
                    await self._disk.rename(measured.path, content.path)
                    content.fill()
            await content.finish()
            # The manifest comes last: until then a crash leaves a file that nobody misses.
            self._contents[measured.root] = content
            self._incoming.pop(measured.path, None)
            self._unscanned.discard(measured.root)
            await self._keep(manifest)
        return manifest

    async def discard(self, measured: Measured) -> None:
        """Give up a measured file."""
        self._incoming.pop(measured.path, None)
        await remove_if_there(self._disk, measured.path)

    # What stays and what goes.

    async def pin(self, version: bytes) -> None:
        """Never collect it. UserError when it is not here."""
        async with self._lock:
            if version not in self._manifests:
                raise UserError(f"version {version.hex()[:12]} is not here; pull it first")
            await self._save_pins(self._pins | {version})

    async def unpin(self, version: bytes) -> None:
        async with self._lock:
            await self._save_pins(self._pins - {version})

    async def remove(self, version: bytes) -> None:
        """Forget a version, and its content when no other version has it. UserError when the disk fails."""
        async with self._lock:
            await self._remove(version)

    async def collect(self) -> list[Manifest]:
        """Remove what neither a pin nor the keep-last rule keeps; what went."""
        async with self._lock:
            return await self._collect(None)

    async def open(self) -> None:
        """Find what is there, whatever happened before. OSError alone when the disk cannot be read at all."""
        async with self._lock:
            await clear_leftovers(self._disk)
            self._manifests, self._lost = await find_manifests(self._disk)
            self._pins = await find_pins(self._disk, {*self._manifests, *self._lost})
            for root, size in {(manifest.root, manifest.size): None for manifest in self._manifests.values()}:
                content, other = await self._load(root, size), self._contents.get(root)
                if content is not None and (other is None or not _is_begun(other)):
                    self._contents[root] = content
            if not self._lost:
                await clear_orphans(self._disk, {manifest.root for manifest in self._manifests.values()})

    # How it works. What follows runs under the lock.

    def _whole(self, manifest: Manifest) -> bool:
        content = self._contents.get(manifest.root)
        return content is not None and content.size == manifest.size and content.finished

    def _is_hopeless(self, manifest: Manifest) -> bool:
        """Whether its content turned out to be no model, or to have another size."""
        content = self._contents.get(manifest.root)
        if content is None:
            return False
        return bool(content.refused) or (content.size != manifest.size and _is_begun(content))

    async def _known(self, manifest: Manifest) -> Content | None:
        """The content of a manifest if it is there. RemoteError when its size is a lie.

        A root alone does not tell the size (see `merkle`): a false size must not keep the true one out. Content that
        was finished is of the true one; among unfinished ones the first that has a piece stays.
        """
        content = self._contents.get(manifest.root)
        if content is None or content.size == manifest.size:
            return content
        if _is_begun(content):
            raise RemoteError(
                f"the manifest of {manifest.name} claims {manifest.size} bytes for content of {content.size} bytes"
            )
        await self._drop_content(content)
        return None

    async def _new(self, root: bytes, size: int, layer: bytes) -> Content:
        if merkle.piece_count(size) > 1:
            with storing("the piece hashes"):
                await write_atomic(self._disk, f"{FOLDER}/{root.hex()}.layer", layer)
        # A file under its own name is there when its piece hashes were damaged.
        placed = await self._disk.size(f"{FOLDER}/{root.hex()}") is not None
        return self._content(root, size, layer, placed=placed)

    def _content(self, root: bytes, size: int, layer: bytes, *, bits: bytes = b"", placed: bool = False) -> Content:
        return Content(
            self._disk,
            self._compute,
            self._cache,
            root,
            size,
            layer,
            on_damage=self._damaged,
            bits=bits,
            placed=placed,
        )

    def _damaged(self, content: Content) -> None:
        self.on_damage(content)

    async def _keep(self, manifest: Manifest) -> None:
        if manifest.version not in self._manifests:
            with storing("the manifest"):
                await write_atomic(self._disk, f"{MANIFESTS}/{manifest.version.hex()}", manifest.data)
            self._manifests[manifest.version] = manifest
            self._lost.discard(manifest.version)

    async def _make_room(
        self, size: int, coming: Manifest | None = None, *, counted: bool = False, on_disk: bool = False
    ) -> None:
        """UserError unless `size` bytes fit into the quota, and on the disk beside what unfinished content still needs;
        collects before it gives up. `counted`: `used` has them already; `on_disk`: they are there."""
        wrong = await self._no_room(size, counted=counted, on_disk=on_disk)
        if wrong:
            await self._collect(coming)
            wrong = await self._no_room(size, counted=counted, on_disk=on_disk)
        if wrong:
            raise UserError(wrong)

    async def _no_room(self, size: int, *, counted: bool, on_disk: bool) -> str:
        """Why there is none; empty when there is."""
        quota, used = self._config.quota, self.used - (size if counted else 0)
        if quota and used + size > quota:
            return (
                f"the model store is full: {readable(size)} do not fit into the quota of {readable(quota)}, of which "
                f"{readable(used)} are taken; raise `quota`, or remove or unpin versions (`gossipml models list`, "
                "`gossipml models rm`)"
            )
        if on_disk:
            return ""
        coming = sum(min(content.size, content.missing * content.piece_length) for content in self._contents.values())
        free, spoken_for = await self._disk.free(), coming + self._config.spare
        if free < size + spoken_for:
            return (
                f"the disk is too full: {readable(size)} are needed, {readable(free)} are free, of which "
                f"{readable(spoken_for)} are spoken for; free some space, or remove versions (`gossipml models rm`)"
            )
        return ""

    async def _collect(self, coming: Manifest | None) -> list[Manifest]:
        every = [manifest for manifest in self._manifests.values() if not self._is_hopeless(manifest)]
        stays = kept(every, self._whole, self._pins, self._config.keep_last)
        busy = {root for root, content in self._contents.items() if content.users}
        if coming is not None:
            busy.add(coming.root)
        gone = [one for one in self._manifests.values() if one.version not in stays and one.root not in busy]
        for manifest in gone:
            await self._remove(manifest.version)
        return gone

    async def _remove(self, version: bytes) -> None:
        self._lost.discard(version)
        manifest = self._manifests.get(version)
        with storing("the removal"):
            # The manifest goes first, for good: never shall one come back without its content.
            await remove_if_there(self._disk, f"{MANIFESTS}/{version.hex()}")
            await self._disk.fsync_folder(MANIFESTS)
            self._manifests.pop(version, None)
            if version in self._pins:
                await self._save_pins(self._pins - {version})
            if manifest is None or any(other.root == manifest.root for other in self._manifests.values()):
                return
            content = self._contents.get(manifest.root)
            if content is not None:
                await self._drop_content(content)
            else:
                for suffix in ("", ".part", ".have", ".layer"):
                    await remove_if_there(self._disk, f"{FOLDER}/{manifest.root.hex()}{suffix}")

    async def _drop_content(self, content: Content) -> None:
        self._contents.pop(content.root, None)
        with storing("the removal"):
            await content.drop()

    async def _save_pins(self, pins: set[bytes]) -> None:
        if len(pins) > MAX_PINS:
            raise UserError(f"{len(pins)} versions are pinned; unpin some: {MAX_PINS} is the limit")
        if pins != self._pins:
            with storing("the pins"):
                await write_atomic(self._disk, PINS, pins_file(pins))
            self._pins = pins

    async def _load(self, root: bytes, size: int) -> Content | None:
        """Content as the disk has it; None when its piece hashes are not known."""
        base, count = f"{FOLDER}/{root.hex()}", merkle.piece_count(size)
        length = await self._disk.size(base)
        placed = length is not None
        layer = await find_layer(self._disk, self._compute, root, size, placed=placed)
        if layer is None:
            return None
        try:
            bits = read_have(await self._disk.read(f"{base}.have", limit=count + 40), root, count)
        except FileNotFoundError:
            bits = full_bits(count) if placed and length == size else None
        except OSError:
            bits = None
        if bits == full_bits(count) and placed:  # a crash at the very end of `finish`
            await clear(self._disk, f"{base}.have")
            await clear(self._disk, f"{base}.part")
        elif bits != full_bits(count):
            self._unscanned.add(root)
        return self._content(root, size, layer, bits=bits or b"", placed=placed)


def _is_begun(content: Content) -> bool:
    """Whether a piece of it was ever there: it came from somebody who had it, and was verified."""
    return content.finished or content.missing < content.count
