"""Parts restart when they crash, and one never takes another down."""

from __future__ import annotations

import itertools
import random

import pytest
import trio
from trio.testing import MockClock

from gossipml.daemon.supervisor import LAST_PAUSE, RED, Supervisor
from gossipml.errors import UserError


class TrioClock:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return trio.current_time()


def supervisor() -> Supervisor:
    return Supervisor(TrioClock(), random.Random(1))


async def test_a_crashed_part_starts_again_and_others_go_on(autojump_clock: MockClock) -> None:
    starts: list[float] = []
    beats = 0

    async def crashing(task_status: trio.TaskStatus[int]) -> None:
        starts.append(trio.current_time())
        task_status.started(len(starts))
        await trio.sleep(1)
        raise ValueError("boom")

    async def calm(task_status: trio.TaskStatus[None]) -> None:
        nonlocal beats
        task_status.started()
        while True:
            await trio.sleep(1)
            beats += 1

    keeper = supervisor()
    async with keeper.running("calm", calm), keeper.running("crashing", crashing) as first:
        assert first == 1
        await trio.sleep(600)
    assert len(starts) > 5
    assert beats >= 598
    pauses = [later - earlier - 1 for earlier, later in itertools.pairwise(starts)]
    assert pauses[0] < pauses[2] < pauses[4]
    assert max(pauses) <= LAST_PAUSE * 1.2


async def test_health_turns_red_after_repeated_crashes_and_says_why(autojump_clock: MockClock) -> None:
    async def crashing(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep(0.01)
        raise RuntimeError("disk on fire")

    keeper = supervisor()
    async with keeper.running("store", crashing):
        await trio.sleep(0.1)
        assert keeper.problems() == []
        await trio.sleep(60)
        assert keeper.parts["store"].crashes >= RED
        assert keeper.problems() == ["store: RuntimeError: disk on fire"]


async def test_a_calm_time_forgives(autojump_clock: MockClock) -> None:
    count = 0

    async def part(task_status: trio.TaskStatus[None]) -> None:
        nonlocal count
        count += 1
        task_status.started()
        await trio.sleep(0.01 if count < 5 else 1000)
        raise RuntimeError("again")

    keeper = supervisor()
    async with keeper.running("part", part):
        await trio.sleep(30)
        assert keeper.parts["part"].crashes == 4
        await trio.sleep(1000)
        assert keeper.parts["part"].crashes == 1


async def test_a_users_mistake_at_the_start_is_raised(autojump_clock: MockClock) -> None:
    async def part(task_status: trio.TaskStatus[None]) -> None:
        raise UserError("port 1 is taken")

    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match="port 1 is taken")):
        async with supervisor().running("api", part):
            pytest.fail("the part never started")


async def test_a_users_mistake_later_stops_only_that_part(autojump_clock: MockClock) -> None:
    runs = 0

    async def part(task_status: trio.TaskStatus[None]) -> None:
        nonlocal runs
        runs += 1
        task_status.started()
        await trio.sleep(1)
        raise UserError("the data is gone; mount it and start the peer again")

    keeper = supervisor()
    async with keeper.running("learner", part):
        await trio.sleep(1000)
    assert runs == 1
    assert keeper.problems() == ["learner: the data is gone; mount it and start the peer again"]


async def test_a_part_that_ends_by_itself_starts_again(autojump_clock: MockClock) -> None:
    runs = 0

    async def part(task_status: trio.TaskStatus[None]) -> None:
        nonlocal runs
        runs += 1
        task_status.started()

    async with supervisor().running("part", part):
        await trio.sleep(10)
    assert runs > 2


async def test_blocks_stop_inside_out(autojump_clock: MockClock) -> None:
    order: list[str] = []

    def part(name: str):  # type: ignore[no-untyped-def]
        async def run(task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                order.append(name)

        return run

    keeper = supervisor()
    async with (
        keeper.running("dht", part("dht")),
        keeper.running("mesh", part("mesh")),
        keeper.running("api", part("api")),
    ):
        await trio.sleep(1)
    assert order == ["api", "mesh", "dht"]
