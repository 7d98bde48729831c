"""The store: what it holds, keeps, refuses and collects. Crashes and damage: `test_store_faults`."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from gossipml.env.real import real_env
from gossipml.env.simulated_disk import SimulatedDisk
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models import merkle, store_files
from gossipml.models.manifest import Manifest
from gossipml.models.store import Store, StoreConfig
from gossipml.models.store_content import PieceCache
from tests.models.stores import CONFIG, InlineCompute, content_of, fill, manifest_of, opened, piece_of, read_all

THREE = 40_000  # bytes that make three pieces


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(latency=0, record=True)


async def test_a_downloaded_version_is_held_once_it_is_finished(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    manifest = manifest_of(data)
    content = await store.begin(manifest, merkle.layer_of(data))
    assert (content.count, content.missing, content.have(), content.size) == (3, 3, b"\x00", len(data))
    assert store.wanted() == [manifest] and store.versions() == [] and not store.holds(manifest.version)
    for index in (2, 0, 1):
        assert await content.read(index) is None
        assert await content.write(index, piece_of(data, index))
        assert await content.read(index) == piece_of(data, index)
    assert content.have() == b"\xe0" and content.complete and not content.finished
    assert not store.holds(manifest.version), "not before it is lasting"
    await content.finish()
    assert store.holds(manifest.version) and store.wanted() == [] and store.versions("digits-mlp") == [manifest]
    assert store.manifest(manifest.version) == manifest.data and store.layer(manifest.root) == merkle.layer_of(data)
    assert disk.files()[f"models/content/{manifest.root.hex()}"] == data
    await content.finish()  # nothing happens
    assert await read_all(content) == data


async def test_bytes_that_are_not_the_piece_are_never_written(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    before = disk.files()
    right = piece_of(data, 1)
    for index, wrong in [
        (1, right[:-1]),
        (1, right + b"x"),
        (1, b""),
        (1, bytes(16384)),
        (0, right),
        (3, b""),
        (-1, b""),
    ]:
        assert not await content.write(index, wrong)
    assert disk.files() == before and content.missing == 3
    assert await content.write(1, memoryview(bytearray(right)))
    assert await content.write(1, b"whatever comes late") is False
    assert await content.write(1, right)


async def test_a_piece_that_was_hashed_as_it_came_is_verified_by_that(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    before = disk.files()
    for wrong in (piece_of(data, 0), bytes(16384)):
        buffer = bytearray(wrong)
        hasher = content.hasher(buffer)
        hasher.arrived(len(buffer))
        assert not await content.write(1, buffer, hasher)
    assert disk.files() == before and content.missing == 3
    for index in (1, 1, 2):  # the second time it is there already
        buffer = bytearray(piece_of(data, index))
        hasher = content.hasher(buffer)
        for part in (100, len(buffer) - 100):
            hasher.arrived(part)
        assert await content.write(index, buffer, hasher)
        assert await content.read(index) == piece_of(data, index)
    hasher = content.hasher(buffer)
    hasher.arrived(5)
    with pytest.raises(LocalError, match="hashed after 5"):
        await content.write(2, buffer, hasher)
    assert content.missing == 1


async def test_a_view_that_is_used_again_does_not_change_what_was_stored(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    buffer = bytearray(piece_of(data, 0))
    assert await content.write(0, memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert await content.read(0) == piece_of(data, 0)


async def test_a_buffer_that_is_given_away_is_kept_without_a_copy(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    buffer = bytearray(piece_of(data, 0))
    assert await content.write(0, buffer)
    assert await content.read(0) is buffer


async def test_a_piece_that_is_read_while_the_file_gets_its_name_is_not_taken_for_corrupt(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    for index in range(content.count):
        assert await content.write(index, piece_of(data, index))
    rename = disk.rename

    async def read() -> None:
        assert await content.read(1) == piece_of(data, 1)

    async with trio.open_nursery() as nursery:

        async def rename_and_tell_late(old: str, new: str) -> None:
            await rename(old, new)
            store._cache.drop_all(content.root)
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()

        monkeypatch.setattr(disk, "rename", rename_and_tell_late)
        await content.finish()
    assert content.finished and content.missing == 0


async def test_wrong_piece_hashes_are_refused_and_nothing_is_kept(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    for layer in (b"", bytes(96), merkle.layer_of(data)[:-32]):
        with pytest.raises(RemoteError, match="piece hashes"):
            await store.begin(manifest_of(data), layer)
    with pytest.raises(LocalError, match="fetch them first"):
        await store.begin(manifest_of(data))
    assert disk.files() == {} and store.used == 0 and store.wanted() == []


async def test_content_of_one_piece_needs_no_hashes(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(500)
    content = await store.begin(manifest_of(data))
    assert await content.write(0, data)
    await content.finish()
    assert sorted(disk.files()) == [
        f"models/content/{content.root.hex()}",
        f"models/manifests/{manifest_of(data).version.hex()}",
    ]


async def test_content_that_is_no_safetensors_file_is_refused_when_it_is_whole(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), b"no safetensors" * 2000
    manifest = manifest_of(data)
    with pytest.raises(RemoteError, match="safetensors header"):
        await fill(store, manifest, data)
    assert not store.holds(manifest.version) and store.wanted() == [], "nobody asks for it again"
    with pytest.raises(RemoteError, match="safetensors header"):
        await store.begin(manifest)
    assert await store.collect() == [manifest]
    assert disk.files() == {}


async def test_one_content_serves_several_versions_and_goes_with_the_last(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    first = manifest_of(data)
    await fill(store, first, data)
    used = store.used
    back = manifest_of(data, height=3, note="rollback to " + first.version.hex()[:12])
    content = await store.begin(back)
    assert content.finished and store.holds(back.version), "nothing is copied"
    assert store.used == used + len(back.data)
    await store.remove(first.version)
    assert store.versions() == [back] and await read_all(content) == data
    await store.remove(back.version)
    assert disk.files() == {} and store.used == 0 and store.content(back.root) is None
    with pytest.raises(UserError, match="was removed"):
        await content.write(0, piece_of(data, 0))
    assert await content.read(0) is None


async def test_a_false_size_does_not_keep_the_true_one_out(disk: SimulatedDisk) -> None:
    """A root does not tell the size: 64 bytes of two hashes have the root of the two blocks."""
    data = content_of(20_000)
    layer = merkle.layer_of(data)
    assert merkle.root_of(layer) == merkle.root_of(data), "an inner node is the hash of 64 bytes, as a leaf can be"
    true, false = manifest_of(data), manifest_of(layer)
    store = await opened(disk)
    await store.begin(false)
    await fill(store, true, data)
    assert store.holds(true.version)
    with pytest.raises(RemoteError, match="claims 64 bytes"):
        await store.begin(false)
    for again in (store, await opened(disk)):
        assert again.versions() == [true] and again.wanted() == [] and not again.holds(false.version)
    assert await store.collect() == [false] and store.versions() == [true]


async def test_our_own_version_is_held_when_add_returns(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(3 << 20)
    manifest = manifest_of(data)
    assert await store.add(manifest, data) is manifest
    assert store.holds(manifest.version)
    content = store.content(manifest.root)
    assert content is not None and await read_all(content) == data
    assert store.used == len(data) + 32 * content.count + len(manifest.data)
    again = manifest_of(data, height=2)
    await store.add(again, data)
    assert store.versions() == [again, manifest]
    assert [name for name in disk.files() if "incoming" in name] == []


async def test_bytes_can_be_stored_before_their_manifest_is_signed(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    measured = await store.prepare(data)
    assert (measured.root, measured.size, measured.layer) == (merkle.root_of(data), len(data), merkle.layer_of(data))
    assert [tensor.name for tensor in measured.header.tensors] == ["w"]
    assert store.used == len(data) and store.versions() == []
    await store.discard(measured)
    assert store.used == 0 and disk.files() == {}
    with pytest.raises(UserError, match="no version of a model"):
        await store.prepare(b"something else")
    with pytest.raises(LocalError, match="of other bytes"):
        await store.ingest(manifest_of(content_of(10)), await store.prepare(data))


async def test_adding_what_is_being_downloaded_completes_it(disk: SimulatedDisk) -> None:
    store, data = await opened(disk), content_of(THREE)
    content = await fill(store, manifest_of(data), data, most=1)
    own = manifest_of(data, height=2)
    await store.add(own, data)
    assert store.holds(own.version) and store.holds(manifest_of(data).version) and content.finished
    again = await opened(disk)
    assert len(again.versions()) == 2


async def test_a_version_is_found_by_the_beginning_of_its_id(disk: SimulatedDisk) -> None:
    store = await opened(disk)
    with pytest.raises(UserError, match="gossipml models pull digits-mlp"):
        store.find("digits-mlp")
    manifests = [manifest_of(content_of(100, seed), height=seed) for seed in (1, 2, 3)]
    for seed, manifest in enumerate(manifests, 1):
        await store.add(manifest, content_of(100, seed))
    assert store.find("digits-mlp") == manifests[2]
    assert store.find("digits-mlp", manifests[0].version.hex()[:6].upper()) == manifests[0]
    assert store.find("digits-mlp", manifests[1].version.hex()) == manifests[1]
    with pytest.raises(UserError, match="at least 6"):
        store.find("digits-mlp", manifests[0].version.hex()[:5])
    with pytest.raises(UserError, match="has no version 'ffffff'"):
        store.find("digits-mlp", "ffffff")


async def test_collection_keeps_the_latest_the_pinned_and_what_is_in_use(disk: SimulatedDisk) -> None:
    store = await opened(disk, StoreConfig(keep_last=2, spare=0))
    made = [manifest_of(content_of(100, height), height=height) for height in range(1, 7)]
    other = manifest_of(content_of(100, 9), name="other")
    for manifest in made:
        await store.add(manifest, content_of(100, manifest.height))
    await store.add(other, content_of(100, 9))
    await store.pin(made[0].version)
    with store.using(made[1].root):
        assert await store.collect() == made[2:4]
    assert await store.collect() == [made[1]]
    assert store.versions("digits-mlp") == [made[5], made[4], made[0]] and store.versions("other") == [other]
    assert (await opened(disk)).pins == {made[0].version}
    await store.unpin(made[0].version)
    assert await store.collect() == [made[0]]
    with pytest.raises(UserError, match="is not here"):
        await store.pin(made[0].version)


async def test_a_head_that_never_becomes_whole_costs_no_whole_version(disk: SimulatedDisk) -> None:
    store = await opened(disk, StoreConfig(keep_last=2, spare=0))
    whole = [manifest_of(content_of(100, height), height=height) for height in (1, 2, 3)]
    for manifest in whole:
        await store.add(manifest, content_of(100, manifest.height))
    wanted = [manifest_of(content_of(100, height), height=height) for height in range(4, 9)]
    for manifest in wanted:
        await store.begin(manifest)
    old = manifest_of(content_of(100, 50), height=1)
    await store.begin(old)
    assert set(await store.collect()) == {whole[0], *wanted[:3], old}
    assert store.versions() == [whole[2], whole[1]] and store.wanted() == [wanted[4], wanted[3]]


async def test_a_quota_is_kept_and_says_what_to_do(disk: SimulatedDisk) -> None:
    store = await opened(disk, StoreConfig(quota=100_000, keep_last=2, spare=0))
    old = [manifest_of(content_of(THREE, height), height=height) for height in (1, 2)]
    for manifest in old:
        await store.add(manifest, content_of(THREE, manifest.height))
    data = content_of(THREE, 3)
    for attempt in (store.begin(manifest_of(data, height=3), merkle.layer_of(data)), store.prepare(data)):
        with pytest.raises(UserError, match=r"40\.[12] kB do not fit into the quota of 100\.0 kB.*raise `quota`"):
            await attempt
    assert store.versions() == [old[1], old[0]] and store.wanted() == []
    assert not [name for name in disk.files() if "incoming" in name]
    await store.remove(old[0].version)
    await fill(store, manifest_of(data, height=3), data)
    assert store.used <= 100_000


async def test_a_quota_that_is_full_of_old_versions_makes_room_by_itself(disk: SimulatedDisk) -> None:
    store = await opened(disk, StoreConfig(quota=130_000, keep_last=1, spare=0))
    for height in (1, 2, 3):
        await store.add(manifest_of(content_of(THREE, height), height=height), content_of(THREE, height))
    data = content_of(THREE, 4)
    await fill(store, manifest_of(data, height=4), data)
    assert [manifest.height for manifest in store.versions()] == [4, 3]


async def test_a_download_that_cannot_fit_the_disk_is_not_begun(disk: SimulatedDisk) -> None:
    store, data = await opened(disk, StoreConfig(spare=1000)), content_of(THREE)
    disk.capacity = len(data) + 900
    with pytest.raises(UserError, match=r"the disk is too full: 40\.2 kB are needed, 41\.0 kB are free"):
        await store.begin(manifest_of(data), merkle.layer_of(data))
    assert disk.files() == {}


async def test_pieces_in_memory_are_not_read_again_and_stay_within_their_bound(disk: SimulatedDisk) -> None:
    data = content_of(200_000)
    store = await opened(disk)
    await store.add(manifest_of(data), data)
    reads: list[str] = []
    disk.fault = lambda operation: reads.append(operation.kind)  # None: no fault
    content = store.content(merkle.root_of(data))
    assert content is not None
    for _ in range(5):
        assert await content.read(3) == piece_of(data, 3)
    assert reads == ["read_at"]
    cache = PieceCache(100)
    for index in range(20):
        cache.put(b"r", index, bytes(30))
    assert cache.bytes == 90 and cache.get(b"r", 19) and cache.get(b"r", 16) is None
    cache.put(b"r", 19, bytes(10))
    cache.put(b"r", 20, bytes(101))
    assert cache.bytes == 70 and cache.get(b"r", 20) is None
    cache.drop_all(b"r")
    assert cache.bytes == 0


async def test_data_is_synced_before_the_bitfield_that_names_it(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossipml.models.store_content.SYNC_LEAST", 50_000)
    store, data = await opened(disk), content_of(300_000)
    content = await store.begin(manifest_of(data), merkle.layer_of(data))
    disk.operations.clear()
    for index in range(content.count):
        await content.write(index, piece_of(data, index))
    await content.finish()
    kinds = [(op.kind, op.path.rpartition("/")[2].rpartition(".")[2][:4]) for op in disk.operations]
    saved = [("fsync", "part"), ("write", "tmp"), ("fsync", "tmp"), ("rename", "tmp")]
    starts = [i for i, kind in enumerate(kinds) if kind == ("fsync", "part")]
    assert len(starts) == 5, "four times on the way (each fourth piece), and at the end"
    for start in starts:
        assert kinds[start : start + 4] == saved
    assert [kind for kind, _ in kinds[starts[-1] + 4 :]] == ["fsync_folder", "rename", "fsync_folder", "remove"]


async def test_the_same_piece_from_two_peers_at_once_leaves_one_file(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = SimulatedDisk(latency=0.01)
    store, data = await opened(disk), content_of(THREE)
    manifest = manifest_of(data)
    content = await store.begin(manifest, merkle.layer_of(data))
    results: list[bool] = []

    async def bring(index: int, bytes_: bytes, delay: float) -> None:
        await trio.sleep(delay)
        results.append(await content.write(index, bytes_))

    async with trio.open_nursery() as nursery:
        for index in range(3):
            for delay in (0, 0.003, 0.006):
                nursery.start_soon(bring, index, piece_of(data, index), delay)
            nursery.start_soon(bring, index, bytes(content.piece_size(index)), 0.001)
    assert sorted(results) == [False] * 3 + [True] * 9
    await content.finish()
    assert sorted(name.rpartition(".")[2] for name in disk.files()) == sorted(
        ["layer", f"models/content/{content.root.hex()}", f"models/manifests/{manifest.version.hex()}"]
    )


async def test_everything_at_once_leaves_a_store_that_opens_the_same(autojump_clock: trio.testing.MockClock) -> None:
    """Downloads, own versions, collection, pins and removals of six names, all at the same time."""
    disk = SimulatedDisk(latency=0.001)
    store = await opened(disk, StoreConfig(keep_last=2, spare=0))

    async def live(name: str, seed: int) -> None:
        before: Manifest | None = None
        for height in range(1, 6):
            data = content_of(20_000 + 1000 * seed, 100 * seed + height)
            manifest = manifest_of(data, name=name, height=height)
            if height % 2:
                await store.add(manifest, data)
            else:
                await fill(store, manifest, data)
            assert store.holds(manifest.version)
            if height == 2:
                await store.pin(manifest.version)
            if before is not None and height == 4:
                await store.remove(before.version)
            await store.collect()
            before = manifest

    async with trio.open_nursery() as nursery:
        for seed in range(6):
            nursery.start_soon(live, f"model-{seed}", seed)
    held = store.versions()
    assert sorted({manifest.height for manifest in held}) == [2, 4, 5] and len(held) == 18
    again = await opened(disk)
    assert again.versions() == held and again.pins == store.pins and again.used == store.used
    for manifest in held:
        content = again.content(manifest.root)
        assert content is not None and await content.scrub() == 0


# On a real disk.


async def test_a_users_file_is_staged_measured_taken_over_and_exported(tmp_path: Path) -> None:
    home, env = tmp_path / "home", real_env(tmp_path / "home")
    data = content_of(3_000_000)
    source = tmp_path / "model.safetensors"
    source.write_bytes(data)
    store = Store(env.disk, env.compute, CONFIG)
    await store.open()
    measured = await store.measure(store_files.stage(source, home))
    manifest = manifest_of(data, note="imported", spec=b"")
    assert (measured.root, measured.size) == (manifest.root, manifest.size)
    await store.ingest(manifest, measured)
    assert store.holds(manifest.version) and source.exists()
    assert not list((home / "models" / "incoming").iterdir())
    assert store_files.read_versions(home) == [manifest]
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    assert store_files.export(home, manifest.version, target) == manifest
    assert target.read_bytes() == data
    store_files.export(home, manifest.version, tmp_path)
    assert (tmp_path / f"digits-mlp-{manifest.version.hex()[:12]}.safetensors").read_bytes() == data
    content = store.content(manifest.root)
    assert content is not None and await read_all(content) == data


async def test_a_download_on_a_real_disk_goes_on_after_the_process_was_killed(tmp_path: Path) -> None:
    env, data = real_env(tmp_path), content_of(THREE)
    store = Store(env.disk, env.compute, CONFIG)
    await store.open()
    await fill(store, manifest_of(data), data, most=2)  # and then nothing: no save, no end
    again = Store(env.disk, env.compute, CONFIG)
    await again.open()
    assert again.wanted() == [manifest_of(data)] and store_files.read_versions(tmp_path) == []
    content = await again.begin(manifest_of(data))
    assert content.missing == 1
    assert (await fill(again, manifest_of(data), data)).finished


def test_export_refuses_what_is_corrupt_and_leaves_the_old_file(tmp_path: Path) -> None:
    home, data = tmp_path / "home", content_of(THREE)
    manifest = manifest_of(data)
    env = real_env(home)

    async def make() -> None:
        await Store(env.disk, env.compute, CONFIG).add(manifest, data)

    trio.run(make)
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    path = home / "models" / "content" / manifest.root.hex()
    broken = bytearray(data)
    broken[20_000] ^= 1
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"piece 1 of version .* is corrupt.*models pull digits-mlp"):
        store_files.export(home, manifest.version, target)
    path.write_bytes(data)
    layer = path.with_name(path.name + ".layer")
    layer.write_bytes(bytes(96))
    with pytest.raises(UserError, match=r"piece hashes .* damaged"):
        store_files.export(home, manifest.version, target)
    with pytest.raises(UserError, match="is not whole on this peer"):
        store_files.export(home, b"x" * 32, target)
    layer.write_bytes(merkle.layer_of(data))
    with pytest.raises(UserError, match="cannot be written"):
        store_files.export(home, manifest.version, tmp_path / "no" / "folder" / "f")
    assert target.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [home, target]
    path.write_bytes(data[:-1])
    assert store_files.read_versions(home) == []


def test_stage_refuses_what_is_no_safetensors_file_and_copies_nothing(tmp_path: Path) -> None:
    source = tmp_path / "f"
    source.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="safetensors"):
        store_files.stage(source, tmp_path / "home")
    with pytest.raises(UserError, match="cannot be read"):
        store_files.stage(tmp_path / "none", tmp_path / "home")
    assert not (tmp_path / "home").exists()


async def test_a_staged_file_that_is_none_or_gone_is_said(disk: SimulatedDisk) -> None:
    store = Store(disk, InlineCompute(), CONFIG)
    with pytest.raises(UserError, match="not there any more"):
        await store.measure("models/incoming/x")
    await disk.write("models/incoming/x", b"\xff" * 100)
    with pytest.raises(UserError, match="no version of a model"):
        await store.measure("models/incoming/x")
