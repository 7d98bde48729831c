"""The simulated disk: what a power loss leaves, and that `write_atomic` survives one at any point."""

from __future__ import annotations

import errno
import random

import pytest
import trio
import trio.testing

from gossipml.env import write_atomic
from gossipml.env.simulated import World, run_simulation
from gossipml.env.simulated_disk import Operation, SimulatedDisk
from gossipml.errors import LocalError


def after_loss(disk: SimulatedDisk, seed: int | None = None, *, keep: bool = False) -> dict[str, bytes]:
    disk.power_loss(None if seed is None else random.Random(seed), keep=keep)
    return disk.files()


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(latency=0, record=True)


async def test_it_reads_what_was_written(disk: SimulatedDisk) -> None:
    await disk.write("state/ages", b"one", private=True)
    await disk.write("token", memoryview(b"two"))
    assert await disk.read("state/ages", limit=3) == b"one"
    assert await disk.list("") == ["state", "token"]
    assert await disk.list("state") == ["ages"]
    assert await disk.list("nowhere") == []
    assert disk.is_private("state/ages") and not disk.is_private("token")
    with pytest.raises(OSError) as caught:
        await disk.read("state/ages", limit=2)
    assert caught.value.errno == errno.EFBIG
    await disk.remove("token")
    for path in ("token", "state"):
        with pytest.raises(FileNotFoundError):
            await disk.read(path, limit=9)
    with pytest.raises(LocalError):
        await disk.read("../token", limit=9)


async def test_parts_of_a_file_are_read_and_written(disk: SimulatedDisk) -> None:
    assert await disk.size("m/f") is None
    assert await disk.write_at("m/f", 4, b"tail")
    assert await disk.size("m/f") == 8
    await disk.write_at("m/f", 0, memoryview(b"head"))
    await disk.write_at("m/f", 6, b"")
    assert await disk.read_at("m/f", 2, 4) == b"adta"
    assert await disk.read_at("m/f", 6, 99) == b"il"
    assert await disk.read_at("m/f", 9, 1) == b""
    with pytest.raises(FileNotFoundError):
        await disk.read_at("m/none", 0, 1)


async def test_a_part_that_is_not_what_it_should_be_is_neither_written_nor_given(disk: SimulatedDisk) -> None:
    def even(part: bytes | memoryview) -> bool:
        return len(part) % 2 == 0

    assert not await disk.write_at("f", 0, b"odd", check=even)
    assert await disk.size("f") is None
    assert await disk.write_at("f", 0, b"even", check=even)
    assert (await disk.read_at("f", 0, 3, check=even), await disk.read_at("f", 0, 2, check=even)) == (b"", b"ev")


async def test_parts_that_are_not_synced_are_lost_each_for_itself(disk: SimulatedDisk) -> None:
    await disk.write("f", b"........")
    await disk.fsync("f")
    await disk.fsync_folder("")
    await disk.write_at("f", 0, b"AB")
    await disk.write_at("f", 6, b"YZ12")
    seen = {after.files()["f"] for count, after in disk.crash_points(torn=60) if count == 5}
    assert {b"........", b"AB......", b"......YZ12", b"AB....YZ12"} <= seen
    assert any(data.endswith(b"YZ1") for data in seen), "a part is torn too"
    await disk.fsync("f")
    assert after_loss(disk) == {"f": b"AB....YZ12"}


async def test_a_disk_full_in_a_part_keeps_what_was_there(disk: SimulatedDisk) -> None:
    assert await disk.free() > 1 << 40
    await disk.write("f", b"12345678")
    disk.capacity = 10
    assert await disk.free() == 2
    with pytest.raises(OSError) as caught:
        await disk.write_at("f", 6, b"abcdefgh")
    assert caught.value.errno == errno.ENOSPC
    assert disk.files() == {"f": b"123456abcd"}
    await disk.write_at("f", 0, b"within")  # needs no room
    assert await disk.free() == 0


async def test_operations_take_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    disk = SimulatedDisk(latency=0.5)
    await disk.write("f", b"x")
    assert trio.current_time() == 0.5


async def test_what_is_not_synced_may_be_lost_kept_or_torn(disk: SimulatedDisk) -> None:
    await disk.write("f", b"old!")
    await disk.fsync("f")
    await disk.fsync_folder("")
    await disk.write("f", b"new content")
    seen = set()
    for _, copy in disk.crash_points(torn=40):
        seen.add(copy.files().get("f"))
    assert {None, b"", b"old!", b"new content"} <= seen
    assert any(data is not None and b"new content".startswith(data) and 0 < len(data) < 11 for data in seen)


async def test_synced_content_under_a_synced_name_is_lasting(disk: SimulatedDisk) -> None:
    await disk.write("a/f", b"content")
    await disk.fsync("a/f")
    await disk.fsync_folder("a")
    assert after_loss(disk) == {"a/f": b"content"}
    assert after_loss(disk, seed=1) == {"a/f": b"content"}


async def test_a_name_without_fsync_of_its_folder_may_be_lost(disk: SimulatedDisk) -> None:
    await disk.write("a/f", b"content")
    await disk.fsync("a/f")
    await disk.fsync_folder("b")  # another folder
    assert after_loss(disk) == {}


async def test_a_rename_before_fsync_may_leave_an_empty_file(disk: SimulatedDisk) -> None:
    """The classic mistake: rename made lasting, content not."""
    await disk.write("f", b"old")
    await disk.fsync("f")
    await disk.fsync_folder("")
    await disk.write("f.tmp", b"new")
    await disk.rename("f.tmp", "f")
    await disk.fsync_folder("")
    assert after_loss(disk) == {"f": b""}


@pytest.mark.parametrize("skip", [None, "fsync", "fsync_folder"])
async def test_write_atomic_survives_a_power_loss_at_any_point(disk: SimulatedDisk, skip: str | None) -> None:
    """Old or new, whole; and new once it has returned. Leaving out either fsync is noticed."""
    versions = [b"version one", b"version two, which is longer", b"v3"]
    done: list[int] = []
    for content in versions:
        await write_atomic(disk, "state/f", content, private=True)
        done.append(len(disk.operations))
    assert [operation.kind for operation in disk.operations[:4]] == ["write", "fsync", "rename", "fsync_folder"]
    if skip is not None:
        kept = [operation for operation in disk.operations if operation.kind != skip]
        disk.operations = kept
        done = [3, 6, 9]
    violations = 0
    points = 0
    for count, after in disk.crash_points(torn=8):
        points += 1
        finished = sum(1 for end in done if end <= count)
        found = after.files().get("state/f")
        allowed = {versions[finished - 1] if finished else None}
        if finished < len(versions):
            allowed.add(versions[finished])
        violations += found not in allowed
    assert points == (len(disk.operations) + 1) * 10
    assert (violations > 0) == (skip is not None)


async def test_a_full_disk_says_so_and_works_again_when_freed(disk: SimulatedDisk) -> None:
    await write_atomic(disk, "state", b"12345678")
    disk.capacity = 12
    with pytest.raises(OSError) as caught:
        await write_atomic(disk, "state", b"abcdefgh")
    assert caught.value.errno == errno.ENOSPC
    assert await disk.read("state", limit=99) == b"12345678"
    assert await disk.read("state.tmp", limit=99) == b"abcd"  # what fitted, as on a real disk
    disk.capacity = 100
    await write_atomic(disk, "state", b"abcdefgh")
    assert disk.files() == {"state": b"abcdefgh"}


async def test_faults_are_injected_by_operation(disk: SimulatedDisk) -> None:
    def fault(operation: Operation) -> int | None:
        return errno.EIO if operation.kind == "fsync" and operation.path.startswith("state/") else None

    disk.fault = fault
    with pytest.raises(OSError) as caught:
        await write_atomic(disk, "state/f", b"x")
    assert caught.value.errno == errno.EIO
    await write_atomic(disk, "elsewhere", b"x")
    disk.fault = None
    await write_atomic(disk, "state/f", b"x")


@pytest.mark.parametrize("fault", ["crash", "power_off"])
def test_a_killed_process_keeps_its_disk_and_a_power_loss_does_not(fault: str) -> None:
    async def scenario(world: World) -> dict[str, bytes]:
        env = world.env("a")
        await write_atomic(env.disk, "safe", b"synced")
        for number in range(20):
            await env.disk.write(f"f{number}", b"not synced")
        getattr(world, fault)("a")
        again = world.env("a")
        assert await again.disk.read("safe", limit=99) == b"synced"
        return world.disk("a").files()

    files = run_simulation(scenario, seed=1)
    whole = [name for name, data in files.items() if data == b"not synced"]
    assert len(whole) == 20 if fault == "crash" else len(whole) < 20
