"""The store against its disk: every byte flipped, a crash at every write, full, failing. Nothing that was acknowledged
is lost, nothing corrupt is ever given to anybody, and what is damaged can be fetched anew."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gossipml.env.simulated_disk import Operation, SimulatedDisk
from gossipml.errors import UserError
from gossipml.models import merkle
from gossipml.models.manifest import Manifest
from gossipml.models.store import Store, StoreConfig
from gossipml.models.store_content import Content
from tests.models.stores import content_of, fill, manifest_of, opened, piece_of, read_all

TWO = 16_700  # bytes that make two pieces
THREE = 40_000


@dataclass
class Network:
    """What other peers have: where a damaged store gets its versions back."""

    contents: dict[bytes, bytes]
    manifests: dict[bytes, Manifest]

    @classmethod
    def of(cls, *versions: tuple[Manifest, bytes]) -> Network:
        return cls({manifest.root: data for manifest, data in versions}, {m.version: m for m, _ in versions})

    async def heal(self, store: Store) -> int:
        """Fetch what the store says it lacks; how many pieces that were."""
        fetched = 0
        for manifest in [*(self.manifests[version] for version in store.lost()), *store.wanted()]:
            data = self.contents[manifest.root]
            content = await store.begin(manifest, merkle.layer_of(data))
            fetched += content.missing
            await fill(store, manifest, data)
        return fetched

    async def check(self, store: Store) -> int:
        """Read every piece of everything: right, or missing. How many versions could be read whole."""
        whole = 0
        for manifest in self.manifests.values():
            content, data = store.content(manifest.root), self.contents[manifest.root]
            if content is None or store.get(manifest.version) is None:
                continue
            for index in range(content.count):
                assert await content.read(index) in (None, piece_of(data, index)), "corrupt bytes were served"
            whole += content.complete
        return whole


async def restore(disk: SimulatedDisk, files: dict[str, bytes]) -> None:
    for path, data in disk.files().items():
        if files.get(path) != data:
            await disk.remove(path)
    for path, data in files.items():
        if disk.files().get(path) != data:
            await disk.write(path, data)


def flips(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for path, data in files.items():
        for offset in range(len(data)):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << offset % 8
            yield path, bytes(flipped)


async def test_a_flipped_byte_at_every_offset_of_a_store_is_found_and_healed() -> None:
    disk = SimulatedDisk(latency=0)
    store = await opened(disk)
    one, two = content_of(60, 1), content_of(90, 2)
    versions = [(manifest_of(one), one), (manifest_of(two, height=2), two)]
    network = Network.of(*versions)
    for manifest, data in versions:
        await store.add(manifest, data)
    await store.pin(versions[0][0].version)
    files = disk.files()
    assert len(files) == 5
    found = 0
    for path, flipped in flips(files):
        await disk.write(path, flipped)
        again = await opened(disk)
        await network.check(again)
        noticed = bool(again.lost() or again.wanted())
        assert noticed or (path == "models/pins" and len(again.pins) == 2), "pinned is everything then"
        found += 1
        await network.heal(again)
        last = await opened(disk)
        assert await network.check(last) == 2 and len(last.versions()) == 2 and not last.lost()
        assert versions[0][0].version in last.pins
        await restore(disk, files)
    assert found == sum(len(data) for data in files.values()) > 900


async def test_a_flipped_byte_in_content_of_several_pieces_costs_only_its_piece() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk, StoreConfig(cache=0, spare=0)), content_of(TWO)
    manifest, damaged = manifest_of(data), list[Content]()
    store.on_damage = damaged.append
    await store.add(manifest, data)
    content = store.content(manifest.root)
    assert content is not None and content.count == 2
    path = f"models/content/{manifest.root.hex()}"
    for offset in range(0, len(data), 7):  # each offset is checked by the hash of its piece; each 7th for the time
        flipped = bytearray(data)
        flipped[offset] ^= 0x10
        await disk.write(path, bytes(flipped))
        bad = offset // merkle.LEAF
        assert await content.read(1 - bad) == piece_of(data, 1 - bad)
        assert await content.read(bad) is None
        assert not store.holds(manifest.version) and store.wanted() == [manifest] and damaged.pop() is content
        assert (content.missing, content.has(bad)) == (1, False)
        assert await content.write(bad, piece_of(data, bad))
        await content.finish()
        assert store.holds(manifest.version) and await read_all(content) == data
    assert sorted(disk.files()) == sorted([path, f"{path}.layer", f"models/manifests/{manifest.version.hex()}"])


async def test_a_flipped_byte_in_piece_hashes_or_bitfield_costs_no_more_than_fetching_again() -> None:
    disk = SimulatedDisk(latency=0)
    store = await opened(disk)
    whole, part = content_of(THREE, 1), content_of(THREE, 2)
    versions = [(manifest_of(whole), whole), (manifest_of(part, name="part"), part)]
    network = Network.of(*versions)
    await store.add(versions[0][0], whole)
    content = await fill(store, versions[1][0], part, most=2)
    await content.save()
    files = disk.files()
    small = {path: data for path, data in files.items() if path.endswith((".layer", ".have"))}
    assert sorted(path.rpartition(".")[2] for path in small) == ["have", "layer", "layer"]
    for path, flipped in flips(small):
        await disk.write(path, flipped)
        again = await opened(disk)
        assert again.holds(versions[0][0].version), "piece hashes of whole content are made anew"
        assert await network.check(again) == 1
        assert again.wanted() == [versions[1][0]]
        assert await network.heal(again) == 1, "pieces on disk are found again"
        assert await network.check(again) == 2 and len(again.versions()) == 2
        await restore(disk, files)


async def test_a_file_cut_or_lengthened_at_any_place_is_found() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk), content_of(THREE)
    manifest = manifest_of(data)
    network = Network.of((manifest, data))
    await store.add(manifest, data)
    await store.pin(manifest.version)
    files = disk.files()
    for path, content in files.items():
        for size in {0, 1, len(content) // 2, len(content) - 1}:
            await disk.write(path, content[:size])
            again = await opened(disk)
            await network.check(again)
            await network.heal(again)
            assert await network.check(again) == 1 and again.versions() == [manifest] and manifest.version in again.pins
            await restore(disk, files)
        await disk.write(path, content + bytes(1000))
        again = await opened(disk)
        await network.check(again)
        await network.heal(again)
        assert await network.check(again) == 1
        await restore(disk, files)
    for path in files:
        await disk.remove(path)
        again = await opened(disk)
        await network.heal(again)
        assert await network.check(again) == ("manifests" not in path)
        await restore(disk, files)


async def test_a_damaged_manifest_keeps_its_content_until_it_is_fetched() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk), content_of(THREE)
    manifest = manifest_of(data)
    await store.add(manifest, data)
    await disk.write(f"models/manifests/{manifest.version.hex()}", b"garbage")
    await disk.write("models/manifests/README", b"not ours")
    again = await opened(disk)
    assert again.lost() == [manifest.version] and again.versions() == []
    content = await again.begin(manifest)
    assert content.finished and again.versions() == [manifest] and again.lost() == []
    assert "models/manifests/README" in disk.files()


@dataclass
class Acknowledged:
    """What a store had promised when so many operations had happened."""

    operations: int
    held: frozenset[bytes]
    known: frozenset[bytes]
    pins: frozenset[bytes]


async def test_a_crash_at_every_write_loses_nothing_acknowledged_and_serves_nothing_corrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gossipml.models.store_content.SYNC_LEAST", 30_000)
    disk = SimulatedDisk(latency=0, record=True)
    store = await opened(disk, StoreConfig(keep_last=2, spare=0))
    small, big, other = content_of(200, 1), content_of(THREE, 2), content_of(THREE, 3)
    first, second, third = manifest_of(small), manifest_of(big, height=2), manifest_of(other, height=3)
    back = manifest_of(small, height=4, note="rollback")
    network = Network.of((first, small), (second, big), (third, other), (back, small))
    promised: list[Acknowledged] = []

    def acknowledge() -> None:
        held = frozenset(manifest.version for manifest in store.versions())
        known = held | {manifest.version for manifest in store.wanted()}
        promised.append(Acknowledged(len(disk.operations), held, known, store.pins))

    acknowledge()
    await store.add(first, small)
    acknowledge()
    content = await store.begin(second, merkle.layer_of(big))
    for index in (2, 0, 1):
        await content.write(index, piece_of(big, index))
    await content.finish()
    acknowledge()
    await store.pin(second.version)
    acknowledge()
    await store.begin(back)
    acknowledge()
    broken = bytearray(big)
    broken[20_000] ^= 1
    await disk.write_at(content.path, 16384, bytes(broken[16384:32768]))  # the disk decays
    await disk.fsync(content.path)
    store._cache.drop_all(content.root)
    assert await content.read(1) is None  # from here on `second` is no longer promised
    acknowledge()
    await content.write(1, piece_of(big, 1))
    await content.finish()
    acknowledge()
    await store.add(third, other)
    acknowledge()
    assert await store.collect() == [first]
    acknowledge()
    await store.unpin(second.version)
    acknowledge()
    await store.remove(third.version)
    acknowledge()
    assert store.versions() == [back, second]

    points = 0
    for count, after in disk.crash_points(torn=4):
        points += 1
        before = [ack for ack in promised if ack.operations <= count][-1]
        coming = next((ack for ack in promised if ack.operations > count), before)
        again = await opened(after, StoreConfig(keep_last=2, spare=0))
        held = {manifest.version for manifest in again.versions()}
        decayed = {second.version} if promised[4].operations <= count < promised[6].operations else set()
        assert (before.held & coming.held) - decayed <= held, f"lost after {count} operations"
        known = held | {manifest.version for manifest in again.wanted()}
        assert known <= before.known | coming.known, f"came back after {count} operations"
        assert again.pins in (before.pins, coming.pins)
        assert again.lost() == [], "a crash damages no manifest"
        assert not [path for path in after.files() if path.endswith(".tmp") or "incoming" in path]
        await network.check(again)
        await network.heal(again)
        assert not again.wanted()
        assert await network.check(again) == len({m.version for m in again.versions()})
        assert before.held & coming.held <= {manifest.version for manifest in again.versions()}
        last = await opened(after)
        assert last.versions() == again.versions() and last.used == again.used
    assert points == (len(disk.operations) + 1) * 6 > 400


async def test_a_disk_that_fills_in_mid_download_says_so_and_the_download_goes_on_when_it_is_freed() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk), content_of(100_000)
    manifest = manifest_of(data)
    content = await store.begin(manifest, merkle.layer_of(data))
    assert content.count == 7
    for index in range(3):
        assert await content.write(index, piece_of(data, index))
    disk.capacity = disk.used + 5000
    with pytest.raises(UserError, match=r"disk is full: piece 3 of 7.*free some space.*is kept"):
        await content.write(3, piece_of(data, 3))
    assert content.missing == 4 and await content.read(3) is None and await content.read(2) == piece_of(data, 2)
    with pytest.raises(UserError, match="too full"):
        await store.add(manifest_of(content_of(6000), name="other"), content_of(6000))
    disk.capacity = disk.used  # not even the bitfield can be saved
    with pytest.raises(UserError, match="disk is full: which pieces are there"):
        await content.save()
    disk.capacity = None
    again = await opened(disk)
    content = await again.begin(manifest)
    assert content.missing == 4
    assert await read_all(await fill(again, manifest, data)) == data and again.holds(manifest.version)


@pytest.mark.parametrize("kind", ["write", "write_at", "fsync", "rename", "fsync_folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_whatever_write_fails_is_a_clear_error_and_works_when_tried_again(kind: str, number: int) -> None:
    """Each operation of that kind in turn, for a download and for a version of our own."""
    theirs, ours = content_of(THREE, 1), content_of(TWO, 2)
    first, second = manifest_of(theirs), manifest_of(ours, name="ours")
    for failing in range(20):
        disk = SimulatedDisk(latency=0)
        store = await opened(disk)
        seen = [0]

        def fault(operation: Operation, failing: int = failing, seen: list[int] = seen) -> int | None:
            if operation.kind != kind:
                return None
            seen[0] += 1
            return number if seen[0] == failing + 1 else None

        disk.fault = fault
        errors = 0
        for attempt in (lambda: fill(store, first, theirs), lambda: store.add(second, ours)):  # noqa: B023  # run at once
            try:
                await attempt()
            except UserError as error:
                errors += 1
                assert "disk is full" in str(error) if number == errno.ENOSPC else "could not be stored" in str(error)
                assert await attempt() is not None
        assert store.holds(first.version) and store.holds(second.version)
        disk.power_loss()
        again = await opened(disk)
        assert again.versions() == store.versions()
        assert await Network.of((first, theirs), (second, ours)).check(again) == 2
        if errors == 0:
            assert seen[0] <= failing, "every operation of the kind had its turn"
            return
    raise AssertionError("more operations than turns")


async def test_a_sector_that_cannot_be_read_is_a_missing_piece_and_a_passing_failure_is_not() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk, StoreConfig(cache=0, spare=0)), content_of(THREE)
    manifest = manifest_of(data)
    await store.add(manifest, data)
    content = store.content(manifest.root)
    assert content is not None
    disk.fault = lambda operation: errno.EMFILE if operation.kind == "read_at" else None
    assert await content.read(1) is None
    assert store.holds(manifest.version), "too many open files say nothing about the piece"
    disk.fault = lambda operation: errno.EIO if operation.kind == "read_at" else None
    assert await content.read(1) is None
    assert not store.holds(manifest.version) and content.missing == 1
    disk.fault = None
    await disk.remove(content.path)
    assert await content.read(0) is None and await content.read(2) is None and content.missing == 3
    assert (await fill(store, manifest, data)).finished and await read_all(content) == data


async def test_damage_is_remembered_on_a_read_only_disk_as_long_as_the_process_lives() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk, StoreConfig(cache=0, spare=0)), content_of(THREE)
    manifest = manifest_of(data)
    await store.add(manifest, data)
    content = store.content(manifest.root)
    assert content is not None
    await disk.write_at(content.path, 100, b"decay")
    disk.fault = lambda operation: errno.EROFS if operation.kind not in ("read_at", "size") else None
    assert await content.read(0) is None
    assert not store.holds(manifest.version)
    with pytest.raises(UserError, match="could not be stored: Read-only"):
        await content.write(0, piece_of(data, 0))
    with pytest.raises(UserError, match="the removal could not be stored"):
        await store.remove(manifest.version)
    assert store.wanted() == [manifest]


async def test_scrubbing_finds_what_nobody_asked_for() -> None:
    disk = SimulatedDisk(latency=0)
    store, data = await opened(disk), content_of(100_000)
    manifest = manifest_of(data)
    content = await fill(store, manifest, data)
    assert await content.scrub() == 0
    await disk.write_at(content.path, 20_000, b"x")
    await disk.write_at(content.path, 90_000, b"x")
    assert await content.read(1) == piece_of(data, 1), "from memory, still good"
    assert await content.scrub() == 2
    assert not store.holds(manifest.version) and await content.read(1) is None
    again = await opened(disk)
    assert again.wanted() == [manifest], "remembered over a restart"
