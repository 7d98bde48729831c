"""Virtual time: jumps, order, and the same order again for the same seed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest
import trio
import trio.testing
from trio._core import _run as trio_run

from gossipml.env import Env
from gossipml.env.link import Link, heavy_tailed
from gossipml.env.simulated import World, run_simulation
from gossipml.env.virtual_time import VirtualTime, deterministic
from gossipml.errors import LocalError
from gossipml.ids import Address


def test_hours_pass_in_a_moment_and_calls_fall_between_the_sleeps() -> None:
    seen: list[tuple[float, str]] = []

    async def scenario(world: World) -> None:
        time_of = world._time
        for moment in (5.0, 0.5, 7200.0, 0.5):
            time_of.call_at(moment, lambda moment=moment: seen.append((time_of.now(), f"call {moment}")))
        for _ in range(3):
            await trio.sleep(3600)
            seen.append((world.now(), "slept"))

    started = time.perf_counter()
    run_simulation(scenario, seed=1)
    assert time.perf_counter() - started < 5
    assert seen == [
        (0.5, "call 0.5"),
        (0.5, "call 0.5"),
        (5.0, "call 5.0"),
        (3600.0, "slept"),
        (7200.0, "call 7200.0"),
        (7200.0, "slept"),
        (10800.0, "slept"),
    ]


def test_the_system_is_heard_while_a_world_turns() -> None:
    async def scenario(world: World) -> int:
        called = threading.Event()
        threading.Thread(target=trio.lowlevel.current_trio_token().run_sync_soon, args=(called.set,)).start()
        turns = 0
        while not called.is_set() and turns < 100_000:
            await trio.sleep(1)
            turns += 1
        return turns

    assert run_simulation(scenario, seed=1) < 100_000


def test_time_outs_run_on_virtual_time() -> None:
    async def scenario(world: World) -> float:
        env = world.env("alice")
        with trio.move_on_after(90):
            await trio.sleep_forever()
        assert env.clock.wall() - env.clock.now() > 1e9
        return env.clock.now()

    assert run_simulation(scenario, seed=1) == 90


async def test_a_world_needs_virtual_time() -> None:
    with pytest.raises(LocalError, match="use run_simulation"):
        World(1)


async def test_one_run_holds_one_world(autojump_clock: trio.testing.MockClock) -> None:
    World(1)
    with pytest.raises(LocalError, match="one run holds one world"):
        VirtualTime()


async def test_a_world_works_in_a_plain_test_on_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    world = World(1)
    a, b = [await world.env(name).net.bind_datagrams(Address("0.0.0.0", 5)) for name in "ab"]
    await a.send(b"hello", Address(world.host("b"), 5))
    assert await b.receive() == (b"hello", Address(world.host("a"), 5))
    assert 0.01 <= trio.current_time() <= 0.03


def test_trio_schedules_by_the_seed_alone() -> None:
    """The private parts of trio that this stands on still do what they did."""

    async def order() -> list[int]:
        finished: list[int] = []

        async def task(number: int) -> None:
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            finished.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(task, number)
        return finished

    def run(seed: int) -> list[int]:
        with deterministic(seed):
            return trio.run(order)

    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()) == before


def busy_world(seed: int) -> str:
    """Five peers that talk at random over bad links, with a partition and a crash; the digest of it all."""
    names = ["ann", "bob", "cid", "dot", "eve"]

    async def peer(world: World, env: Env) -> None:
        socket = await env.net.bind_datagrams(Address("0.0.0.0", 5))

        async def answer() -> None:
            while True:
                data, sender = await socket.receive()
                if len(data) < 8:
                    await socket.send(data + env.secrets(2), sender)

        async def ask() -> None:
            while True:
                await trio.sleep(env.rng.expovariate(5.0))
                await socket.send(env.secrets(1), Address(world.host(env.rng.choice(names)), 5))

        async with trio.open_nursery() as nursery:
            for task in (answer, ask, ask):
                nursery.start_soon(task)

    async def scenario(world: World) -> str:
        async with trio.open_nursery() as nursery:
            scopes = {name: trio.CancelScope() for name in names}

            async def live(name: str) -> None:
                with scopes[name]:
                    await peer(world, world.env(name))

            for name in names:
                nursery.start_soon(live, name)
            await trio.sleep(20)
            world.partition(["ann", "bob"], ["cid", "dot"])
            await trio.sleep(20)
            world.power_off("eve")
            scopes["eve"].cancel()
            world.heal()
            await trio.sleep(20)
            nursery.cancel_scope.cancel()
        assert world.events > 1000
        return world.digest

    link = Link(delay=heavy_tailed(0.05), loss=0.05, duplicate=0.05, reorder=0.05, bandwidth=1e5)
    return run_simulation(scenario, seed, link=link)


def test_equal_seeds_give_equal_traces_in_every_process() -> None:
    here = busy_world(1)
    assert busy_world(1) == here
    assert busy_world(2) != here
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_virtual_time as t; "
    for hash_seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run(
            [sys.executable, "-c", code + "print(t.busy_world(1))"],
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert output.stdout.strip() == here


def test_the_digest_covers_what_the_trace_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossipml.env.simulated.TRACE_ENTRIES", 3)

    async def scenario(world: World) -> tuple[int, int, str]:
        for number in range(10):
            world.note("count", size=number)
        return len(world.trace), world.events, world.digest

    entries = b"".join(repr((0.0, "count", "", "", number, 0)).encode() for number in range(10))
    assert run_simulation(scenario, seed=1) == (3, 10, hashlib.sha256(entries).hexdigest())
