"""Whole swarms on the simulated network and virtual time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

import pytest
import trio

from gossipml.env import Stream
from gossipml.env.link import Link, fixed
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.ids import Contact
from gossipml.peer import swarm_wire as w
from gossipml.peer.fetching import TICK
from gossipml.peer.swarm import SwarmConfig
from gossipml.peer.swarm_stream import Buffers

from .swarms import (
    KB,
    FakeContent,
    FakeHasher,
    Node,
    RudeOwner,
    Swarms,
    ask_raw,
    fill,
    hear,
    known,
    made_up,
    offer,
    swarms,
)

Scenario = Callable[[World, Swarms], Awaitable[None]]
MB = 1 << 20


def play(scenario: Scenario, seed: int = 1, *, link: Link | None = None) -> str:
    async def main(world: World) -> str:
        async with swarms(world) as nodes:
            await scenario(world, nodes)
        return world.digest

    return run_simulation(main, seed, link=link or Link())


def content(
    name: str = "model", count: int = 32, *, have: set[int] | None = None, length: int = 64 * KB
) -> FakeContent:
    return FakeContent(name, count * length - 100, length, have)


async def seeds(nodes: Swarms, number: int, count: int = 32, config: SwarmConfig | None = None) -> list[Node]:
    started = [await nodes.start(f"seed{i}", config) for i in range(number)]
    for node in started:
        node.shelf.put(content(count=count))
    return started


async def fetch(node: Node, wanted: FakeContent, *contacts: Contact) -> None:
    node.shelf.put(wanted)
    await node.swarm.download(wanted, known(*contacts))


def right(fetched: FakeContent) -> bool:
    return fetched.finished and sorted(fetched.writes) == sorted(set(fetched.writes)) and fetched.complete


# What should work.


@pytest.mark.parametrize(
    ("size", "length"), [(1000, 16 * KB), (1, 16 * KB), (64 * KB, 64 * KB), (10 * MB + 5, 256 * KB)]
)
def test_a_content_of_any_size_comes_whole(size: int, length: int) -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        ann, bob = await nodes.start("ann"), await nodes.start("bob")
        ann.shelf.put(FakeContent("model", size, length))
        wanted, heard = FakeContent("model", size, length, set()), []
        await bob.swarm.download(wanted, known(ann.contact), lambda done, of: heard.append((done, of)))
        assert right(wanted)
        assert heard[-1] == (size, size)
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)
        assert bob.swarm.stats.bytes_down == ann.swarm.stats.bytes_up == size
        assert bob.swarm.transfers() == []

    play(scenario)


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_known_is_dialled_at_once(seed: int) -> None:
    """Whatever task runs first: a small content does not wait for the next look at who is to be dialled."""

    async def scenario(world: World, nodes: Swarms) -> None:
        (ann,) = await seeds(nodes, 1, count=1)
        bob = await nodes.start("bob")
        wanted, started = content(count=1, have=set()), trio.current_time()
        await fetch(bob, wanted, ann.contact)
        assert right(wanted)
        assert trio.current_time() - started < TICK

    play(scenario, seed, link=Link(delay=fixed(0.001)))


def test_all_sources_are_used() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(delay=fixed(0.01), bandwidth=2e6))
        sources = await seeds(nodes, 5, count=256)
        bob = await nodes.start("bob")
        wanted, started = content(count=256, have=set()), trio.current_time()
        await fetch(bob, wanted, *(node.contact for node in sources))
        assert right(wanted)
        assert all(node.swarm.stats.pieces_up > 16 for node in sources)
        assert trio.current_time() - started < 2.4  # 16 MiB at 2 MB/s: from one 8.4 s, from three 2.8
        assert bob.swarm.stats.pieces_wasted <= 4

    play(scenario)


def test_two_partial_downloaders_complete_each_other() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        ann, bob = await nodes.start("ann"), await nodes.start("bob")
        ours, theirs = content(have=set(range(0, 32, 2))), content(have=set(range(1, 32, 2)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, ann, ours, bob.contact)
            nursery.start_soon(fetch, bob, theirs, ann.contact)
        assert right(ours)
        assert right(theirs)
        assert set(ours.writes) == set(range(1, 32, 2))

    play(scenario)


def test_a_downloader_serves_what_it_has_at_once_and_its_askers_hear_of_new_pieces() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_link("seed0", "bob", Link(delay=fixed(0.01), bandwidth=1e6))
        world.partition(["seed0", "bob"], ["cid"])
        seed, bob, cid = (await seeds(nodes, 1))[0], await nodes.start("bob"), await nodes.start("cid")
        world.partition(["seed0"], ["cid"])
        first, second = content(have=set()), content(have=set())
        world.heal()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, first, seed.contact)
            nursery.start_soon(fetch, cid, second, bob.contact)  # knows the other downloader alone
            started = trio.current_time()
        assert right(first)
        assert right(second)
        assert trio.current_time() - started < 4.5  # 2 MiB at 1 MB/s, and not twice that

    play(scenario)


def test_whom_we_fetch_from_learns_that_we_have_pieces_too() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        ann, bob = await nodes.start("ann"), await nodes.start("bob")
        ours, theirs = content(have=set(range(16))), content(have=set(range(16, 32)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, ann, ours)  # knows nobody
            nursery.start_soon(fetch, bob, theirs, ann.contact)
        assert right(ours)
        assert right(theirs)

    play(scenario)


def test_a_download_goes_on_from_the_pieces_that_are_there() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        bob = await nodes.start("bob")
        wanted = content(have=set(range(20)))
        await fetch(bob, wanted, seed.contact)
        assert right(wanted)
        assert sorted(wanted.writes) == list(range(20, 32))

    play(scenario)


def test_complete_content_is_finished_without_asking_anybody() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        bob = await nodes.start("bob")
        wanted = content()
        await fetch(bob, wanted)
        assert wanted.finished

    play(scenario)


def test_the_same_seed_gives_the_same_run() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        sources = await seeds(nodes, 3)
        wanted = content(have=set())
        await fetch(await nodes.start("bob"), wanted, *(node.contact for node in sources))

    assert play(scenario, 5) == play(scenario, 5) != play(scenario, 6)


def test_one_content_is_not_downloaded_twice_at_once() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        bob = await nodes.start("bob")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, content(have=set()))
            await trio.sleep(1)
            with pytest.raises(LocalError, match="being fetched already"):
                await fetch(bob, content(have=set()))
            nursery.cancel_scope.cancel()

    play(scenario)


def test_a_transfer_shows_what_is_going_on() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(delay=fixed(0.01), bandwidth=1e5))
        (seed,) = await seeds(nodes, 1)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        with trio.move_on_after(10):
            await fetch(bob, wanted, seed.contact)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, wanted, seed.contact)
            await trio.sleep(8)
            (down,), (up,) = bob.swarm.transfers(), seed.swarm.transfers()
            assert (down.sources, down.askers, up.sources, up.askers) == (1, 0, 0, 1)
            assert 0 < down.done < down.size == up.size == up.done
            assert down.rate_down == pytest.approx(1e5, rel=0.3)
            assert up.rate_up == pytest.approx(1e5, rel=0.6)
            nursery.cancel_scope.cancel()

    play(scenario)


# Death, silence, slowness.


def test_a_source_that_dies_in_the_middle_of_a_piece_costs_only_time() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(delay=fixed(0.01), bandwidth=5e5))
        one, two = await seeds(nodes, 2)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, wanted, one.contact, two.contact)
            await trio.sleep(0.5)
            nodes.crash(one)
        assert right(wanted)
        assert bob.faults == []

    play(scenario)


def test_when_all_sources_die_and_one_comes_back_the_download_goes_on() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(delay=fixed(0.01), bandwidth=5e5))
        one, two = await seeds(nodes, 2, count=128)
        bob = await nodes.start("bob")
        wanted = content(count=128, have=set())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, wanted, one.contact, two.contact)
            await trio.sleep(0.5)
            nodes.crash(one)
            nodes.crash(two)
            await trio.sleep(40)
            there = len(wanted.held)
            assert 0 < there < 128
            (await nodes.start("seed1")).shelf.put(content(count=128))
        assert right(wanted)
        assert len(wanted.writes) == 128  # nothing was fetched again

    play(scenario)


def test_a_download_that_nobody_feeds_says_so_and_keeps_what_came() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        seed.shelf.put(content(have={1, 2, 3}))
        bob = await nodes.start("bob", SwarmConfig(patience=30))
        wanted = content(have=set())
        started = trio.current_time()
        with pytest.raises(RemoteError, match=r"29 of 32 pieces .* for 30 s nobody sent any; 1 peers are known"):
            await fetch(bob, wanted, seed.contact)
        assert 30 <= trio.current_time() - started < 32
        assert wanted.held == {1, 2, 3}
        seed.shelf.put(content())
        await fetch(bob, wanted, seed.contact)
        assert right(wanted)

    play(scenario)


def test_a_download_without_providers_says_so() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        bob = await nodes.start("bob", SwarmConfig(patience=5))
        with pytest.raises(RemoteError, match="nobody provides it"):
            await fetch(bob, content(have=set()))

    play(scenario)


def test_providers_are_asked_again_and_their_errors_are_survived() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        bob, asked = await nodes.start("bob"), []

        async def providers() -> list[Contact]:
            asked.append(trio.current_time())
            if len(asked) == 1:
                raise RemoteError("the table of the network is empty")
            return [seed.contact] if len(asked) > 3 else []

        wanted = content(have=set())
        await bob.swarm.download(wanted, providers)
        assert right(wanted)
        assert len(asked) == 4

    play(scenario)


def test_a_silent_source_is_left_and_its_pieces_come_from_others() -> None:
    """The cable is cut: no reset, no answer."""

    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(delay=fixed(0.01), bandwidth=5e5))
        one, two = await seeds(nodes, 2)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, wanted, one.contact, two.contact)
            await trio.sleep(0.5)
            world.power_off("seed0")
            one.scope.cancel()
        assert right(wanted)
        assert trio.current_time() < 15
        assert bob.faults == []

    play(scenario)


def test_a_source_that_stalls_in_mid_piece_is_left_without_a_fault() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        ended = trio.Event()

        async def stall(owner: RudeOwner, stream: Stream) -> None:
            await offer(owner, stream, content())
            ask = await owner.hear(stream)
            assert isinstance(ask, w.Ask)
            await stream.send_all(w.encode(w.Piece(ask.indexes[0], 64 * KB)), b"only the beginning")
            with pytest.raises((trio.BrokenResourceError, RemoteError)):
                while True:
                    await owner.hear(stream)
            ended.set()

        rude = RudeOwner(world, "rude", stall)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, rude.contact, seed.contact)
        assert right(wanted)
        assert trio.current_time() < 5  # somebody else was asked long before the time-out
        alone = content("alone", have=set())
        with trio.move_on_after(14):
            await fetch(bob, alone, rude.contact)
        assert ended.is_set()
        assert bob.faults == []

    play(scenario)


def test_one_that_says_it_lives_and_sends_nothing_holds_nobody_up() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)

        async def hang(owner: RudeOwner, stream: Stream) -> None:
            await offer(owner, stream, content())
            while True:
                await stream.send_all(w.encode(w.Alive()))
                await trio.sleep(1)

        rude = [RudeOwner(world, f"rude{i}", hang) for i in range(3)]
        for owner in rude:
            await nodes.nursery.start(owner.run)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, *(owner.contact for owner in rude), seed.contact)
        assert right(wanted)
        assert trio.current_time() < 60

    play(scenario)


def test_a_trickle_does_not_hold_a_buffer_for_ever() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        sent: list[int] = []

        async def trickle(owner: RudeOwner, stream: Stream) -> None:
            sent.append(0)
            await offer(owner, stream, content())
            ask = await owner.hear(stream)
            assert isinstance(ask, w.Ask)
            await stream.send_all(w.encode(w.Piece(ask.indexes[0], 64 * KB)))
            while True:
                await stream.send_all(b"x")
                sent[-1] += 1
                await trio.sleep(1)

        rude = RudeOwner(world, "rude", trickle)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob", SwarmConfig(patience=60))
        with trio.move_on_after(20):
            await fetch(bob, content(have=set()), rude.contact)
        assert 12 <= sent[0] <= 16  # 10 s, and 64 KiB at 16 KiB/s
        assert bob.swarm.buffers.used == 0

    play(scenario)


def test_a_slow_source_gives_way_to_a_fast_one() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_link("seed0", "bob", Link(delay=fixed(0.2), bandwidth=3e4))
        world.set_link("seed1", "bob", Link(delay=fixed(0.01), bandwidth=1e7))
        slow, fast = await seeds(nodes, 2)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, slow.contact, fast.contact)
        assert right(wanted)
        assert trio.current_time() < 4  # the slow one alone needs 2.2 s a piece and had two
        assert slow.swarm.stats.pieces_up <= 3

    play(scenario)


# Lies.


def test_a_wrong_piece_is_a_fault_and_comes_from_another() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)

        async def lie(owner: RudeOwner, stream: Stream) -> None:
            await offer(owner, stream, content())
            while True:
                ask = await owner.hear(stream)
                if isinstance(ask, w.Ask):
                    for index in ask.indexes:
                        length = content().length(index)
                        await stream.send_all(w.encode(w.Piece(index, length)), b"\xff" * length)

        rude = RudeOwner(world, "rude", lie)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, rude.contact, seed.contact)
        assert right(wanted)
        assert {peer for peer, _ in bob.faults} == {rude.contact.peer}
        assert "does not match its hash" in bob.faults[0][1]
        assert bob.swarm.stats.pieces_bad == len(bob.faults) >= 1
        assert rude.streams == 1  # nobody dialled it again

    play(scenario)


def test_a_liar_alone_is_tried_a_few_times_and_nothing_wrong_is_kept() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        async def lie(owner: RudeOwner, stream: Stream) -> None:
            await offer(owner, stream, content())
            ask = await owner.hear(stream)
            assert isinstance(ask, w.Ask)
            length = content().length(ask.indexes[0])
            await stream.send_all(w.encode(w.Piece(ask.indexes[0], length)), bytes(length))
            await trio.sleep_forever()

        rude = RudeOwner(world, "rude", lie)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob", SwarmConfig(patience=600))
        wanted = content(have=set())
        with pytest.raises(RemoteError, match="32 of 32 pieces"):
            await fetch(bob, wanted, rude.contact)
        assert wanted.held == set()
        assert len(bob.faults) == rude.streams == 3

    play(scenario)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"\xff" * 100_000, "header of 4294967295 bytes"),
        (b"\x00\x00\x00\x05hello" * 10_000, "msgpack"),
        (w.encode(w.Open(bytes(32), 1)), "unknown kind 'open' from the owner"),
        (w.encode(w.Have((32,))), "piece 32 of a content of 32"),
        (w.encode(w.NoPiece((30,), lost=True)), "was not asked for"),
        (w.encode(w.HoldIs("")), "without a question"),
        (w.encode(w.Piece(30, 1)), "without being asked|of 1 bytes"),
        (w.encode(w.Alive()) * 3000, "more than 200 messages a second"),
        (w.encode(w.Have((1,))) * 3000, "more than 200 messages a second"),
    ],
)
def test_rubbish_ends_the_session_and_is_a_fault(said: bytes, reason: str) -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        async def rave(owner: RudeOwner, stream: Stream) -> None:
            await owner.hear(stream)
            await stream.send_all(w.encode(w.Bits(32)), w.write_bits(0b10, 32))
            while True:
                await stream.send_all(said * (1 + 20_000 // len(said)))

        rude = RudeOwner(world, "rude", rave)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob")
        with trio.move_on_after(5):
            await fetch(bob, content(have=set()), rude.contact)
        assert [peer for peer, _ in bob.faults] == [rude.contact.peer]
        assert re.search(reason, bob.faults[0][1])
        assert rude.streams == 1
        assert bob.swarm.buffers.used == 0

    play(scenario)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (w.encode(w.Bits(31)) + bytes(4), "31 pieces; it has 32"),
        (w.encode(w.Bits(32)) + b"\xff" * 4, None),
        (w.encode(w.HoldsAre(())), "HoldsAre as the answer to an open"),
        (w.encode(w.Piece(0, 5)), "Piece as the answer to an open"),
        (w.encode(w.Alive()) * 3000, "more than 200"),
    ],
)
def test_a_wrong_answer_to_an_open_is_a_fault(answer: bytes, reason: str | None) -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        async def reply(owner: RudeOwner, stream: Stream) -> None:
            await owner.hear(stream)
            await stream.send_all(answer)
            await trio.sleep_forever()

        rude = RudeOwner(world, "rude", reply)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob")
        with trio.move_on_after(5):
            await fetch(bob, content(have=set()), rude.contact)
        if reason is None:
            assert bob.faults == []
        else:
            assert reason in bob.faults[0][1]

    play(scenario)


def test_garbage_at_full_speed_does_not_keep_an_honest_source_from_feeding_us() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)

        async def flood(owner: RudeOwner, stream: Stream) -> None:
            await offer(owner, stream, content())
            while True:
                await stream.send_all(b"\xa5" * (1 << 18))

        rude = [RudeOwner(world, f"rude{i}", flood) for i in range(5)]
        for owner in rude:
            await nodes.nursery.start(owner.run)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, *(owner.contact for owner in rude), seed.contact)
        assert right(wanted)
        assert trio.current_time() < 10
        assert {peer for peer, _ in bob.faults} <= {owner.contact.peer for owner in rude}

    play(scenario)


# Our own disk.


def test_a_full_disk_ends_the_download_with_its_error_and_keeps_what_came() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        bob = await nodes.start("bob")
        wanted = content(have=set())

        def progress(done: int, size: int) -> None:
            if done > size / 2:
                wanted.failure = UserError("the disk is full: free some space")

        with pytest.raises(UserError, match="the disk is full"):
            await bob.swarm.download(wanted, known(seed.contact), progress)
        assert 16 <= len(wanted.held) < 32
        assert not wanted.finished
        assert bob.swarm.buffers.used == 0
        wanted.failure = None
        await fetch(bob, wanted, seed.contact)
        assert right(wanted)

    play(scenario)


def test_a_piece_that_turns_corrupt_at_the_seed_comes_from_elsewhere_or_when_it_is_back() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        seed, other = await seeds(nodes, 2)
        seed.shelf.put(content()).corrupt = {3, 4, 5}
        other.shelf.put(content(have={3, 4}))
        bob = await nodes.start("bob")
        wanted = content(have=set())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, bob, wanted, seed.contact, other.contact)
            await trio.sleep(10)
            assert wanted.held == set(range(32)) - {5}
            repaired = other.shelf.contents[wanted.root]  # the other one gets it from somewhere
            repaired.held.add(5)
            other.swarm._serving.arrived(wanted.root, 5)
        assert right(wanted)
        assert bob.faults == []

    play(scenario)


def test_a_disk_that_cannot_be_read_loses_pieces_and_no_session() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        class Broken(FakeContent):
            async def read(self, index: int) -> bytes | None:
                if index < 4:
                    raise OSError(5, "input/output error")
                return await super().read(index)

        (seed,) = await seeds(nodes, 1)
        seed.shelf.put(Broken("model", 32 * 64 * KB - 100, 64 * KB))
        bob = await nodes.start("bob", SwarmConfig(patience=10))
        wanted = content(have=set())
        with pytest.raises(RemoteError, match="4 of 32 pieces"):
            await fetch(bob, wanted, seed.contact)
        assert seed.accepted == 1

    play(scenario)


# Limits.


@pytest.mark.parametrize(
    ("uploader", "downloader", "seconds"),
    [
        (SwarmConfig(upload_rate=2e5), SwarmConfig(), 10.5),
        (SwarmConfig(upload_rate_peer=2e5), SwarmConfig(), 10.5),
        (SwarmConfig(), SwarmConfig(download_rate=2e5), 10.5),
        (SwarmConfig(), SwarmConfig(download_rate_peer=2e5), 10.5),
    ],
    ids=["upload", "upload to a peer", "download", "download from a peer"],
)
def test_rates_hold(uploader: SwarmConfig, downloader: SwarmConfig, seconds: float) -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, config=uploader)
        bob = await nodes.start("bob", downloader)
        wanted, started = content(have=set()), trio.current_time()
        await fetch(bob, wanted, seed.contact)
        assert trio.current_time() - started == pytest.approx(seconds, rel=0.12)

    play(scenario)


def test_the_total_rate_is_shared_and_the_rate_of_a_peer_is_not() -> None:
    def run(config: SwarmConfig) -> float:
        took = 0.0

        async def scenario(world: World, nodes: Swarms) -> None:
            nonlocal took
            (seed,) = await seeds(nodes, 1, config=config)
            async with trio.open_nursery() as nursery:
                for name in ("bob", "cid"):
                    node = await nodes.start(name)
                    node.swarm.port = 0  # so that they do not find each other
                    nursery.start_soon(fetch, node, content(have=set()), seed.contact)
            took = trio.current_time()

        play(scenario)
        return took

    assert run(SwarmConfig(upload_rate=4e5)) == pytest.approx(10.5, rel=0.15)
    assert run(SwarmConfig(upload_rate_peer=4e5)) == pytest.approx(5.3, rel=0.15)


def test_a_very_low_rate_still_feeds_somebody_within_the_time_outs() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, count=4, config=SwarmConfig(upload_rate=20_000))
        wanted = [content(count=4, have=set()) for _ in range(5)]
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(wanted):
                node = await nodes.start(f"bob{number}")
                node.swarm.port = 0
                nursery.start_soon(fetch, node, each, seed.contact)
        assert all(right(each) for each in wanted)
        assert trio.current_time() < 90  # 5 times 256 KiB at 20 kB/s: 66 s

    play(scenario)


def test_askers_are_served_in_equal_shares_over_time() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, count=200, config=SwarmConfig(upload_rate=2e6, slots=2))
        wanted = [content(count=200, have=set()) for _ in range(6)]
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(wanted):
                node = await nodes.start(f"bob{number}")
                node.swarm.port = 0
                nursery.start_soon(fetch, node, each, seed.contact)
            await trio.sleep(2)
            before = [len(each.held) for each in wanted]
            for _ in range(4):
                await trio.sleep(5)
                now = [len(each.held) for each in wanted]
                shares = [b - a for a, b in zip(before, now, strict=True)]
                assert sum(shares) == pytest.approx(2e6 * 5 / (64 * KB), rel=0.1)
                assert max(shares) - min(shares) <= 3
                before = now
            nursery.cancel_scope.cancel()

    play(scenario)


def test_when_all_slots_are_taken_by_slow_askers_the_others_wait_in_a_queue_and_come_to_their_turn() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, count=16, config=SwarmConfig(slots=2))
        names = [f"bob{number}" for number in range(6)]
        for name in names:
            world.set_link("seed0", name, Link(delay=fixed(0.02), bandwidth=1e5))
        wanted = {name: content(count=16, have=set()) for name in names}
        async with trio.open_nursery() as nursery:
            for name in names:
                node = await nodes.start(name)
                node.swarm.port = 0
                nursery.start_soon(fetch, node, wanted[name], seed.contact)
        assert all(right(each) for each in wanted.values())
        assert seed.accepted == 6  # nobody thought it dead and came back

    play(scenario)


def test_a_stream_too_many_is_told_so_and_the_asker_comes_again() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, config=SwarmConfig(askers=2, upload_rate=2e5))
        wanted = [content(have=set()) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(wanted):
                node = await nodes.start(f"bob{number}")
                node.swarm.port = 0
                nursery.start_soon(fetch, node, each, seed.contact)
        assert all(right(each) for each in wanted)
        assert seed.accepted > 3
        assert seed.faults == []

    play(scenario)


def test_an_idle_stream_makes_room_for_a_newcomer() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, config=SwarmConfig(askers=1))
        idle = await ask_raw(world, "idle", seed.contact)
        await idle.send_all(w.encode(w.Open(content().root, 0)))
        await trio.sleep(15)
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, seed.contact)
        assert right(wanted)

    play(scenario)


def test_memory_does_not_grow_with_the_model() -> None:
    """3 GB in pieces of 1 MiB: at no time more than the buffers are in use, on either side."""

    async def scenario(world: World, nodes: Swarms) -> None:
        class Big(FakeContent):
            granted = 0

            async def read(self, index: int) -> bytes | None:
                Big.granted = max(Big.granted, seed.swarm._serving.uploads._bytes)
                await trio.lowlevel.checkpoint()
                return zeros

            async def write(self, index: int, data: bytearray, hasher: FakeHasher) -> bool:
                await trio.lowlevel.checkpoint()
                self.held.add(index)
                return len(data) == len(zeros)

        zeros = bytes(MB)
        config = SwarmConfig(buffers=8 << 20)
        seed, bob = await nodes.start("seed", config), await nodes.start("bob", config)
        seed.shelf.put(Big("big", 3000 * MB, MB))
        wanted = Big("big", 3000 * MB, MB, set())
        await fetch(bob, wanted, seed.contact)
        assert wanted.finished
        assert bob.swarm.stats.bytes_down == 3000 * MB
        assert MB <= bob.swarm.buffers.peak <= config.buffers
        assert MB <= Big.granted <= config.buffers // 2
        assert len(bob.swarm.buffers._made) == 0

    play(scenario, link=Link(delay=fixed(0.001)))


def test_a_buffer_is_used_again_only_when_nobody_has_it() -> None:
    async def main() -> None:
        buffers = Buffers(100)
        kept = await buffers.acquire(50)
        buffers.release(kept)
        other = await buffers.acquire(50)
        assert other is not kept
        view, number = memoryview(other), id(other)
        buffers.release(other)
        del other
        third = await buffers.acquire(50)
        assert id(third) not in (number, id(kept))  # a view of it is still about
        buffers.release(third)
        view.release()
        del view, third
        used = {id(await buffers.acquire(50)) for _ in range(2)}
        assert len(buffers._made) == 3
        assert id(kept) not in used

    trio.run(main)


# Askers that break the rules.


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (w.encode(w.Ask((0,))), "before a content is open"),
        (w.encode(w.Open(content().root, 0)) * 2, "a stream is for one content"),
        (w.encode(w.Open(content().root, 0)) + w.encode(w.Ask((32,))), "piece 32 of a content of 32"),
        (w.encode(w.Open(content().root, 0)) + w.encode(w.Ask((1, 1))), "asked for twice"),
        (w.encode(w.Piece(1, 1)), "unknown kind 'piece' from the dialler"),
        (w.encode(w.AskHolds(())) * 3000, "more than 200 messages"),
        (w.encode(w.Cancel((1,))) * 3000, "more than 200 messages"),
        (b"\x00" * 50, "header of 0 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "header of"),
    ],
)
def test_an_asker_that_breaks_the_rules_is_cut_off_and_reported(said: bytes, reason: str) -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1)
        stream = await ask_raw(world, "rude", seed.contact)
        await stream.send_all(said)
        with trio.fail_after(5), pytest.raises((trio.BrokenResourceError, RemoteError)):
            while True:
                await fill(stream, bytearray(1))
        assert len(seed.faults) == 1
        assert reason in seed.faults[0][1]
        bob = await nodes.start("bob")
        wanted = content(have=set())
        await fetch(bob, wanted, seed.contact)  # the others are served as before
        assert right(wanted)

    play(scenario)


def test_an_asker_that_reads_nothing_is_cut_off_and_its_slot_is_free() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        seed = await nodes.start("seed", SwarmConfig(slots=1))
        big = seed.shelf.put(FakeContent("model", 64 * MB, MB))
        stream = await ask_raw(world, "rude", seed.contact)
        await stream.send_all(w.encode(w.Open(big.root, 0)), w.encode(w.Ask(tuple(range(60)))))
        await trio.sleep(2)
        bob = await nodes.start("bob")
        wanted = FakeContent("model", 64 * MB, MB, set(range(60)))
        await fetch(bob, wanted, seed.contact)
        assert wanted.finished
        assert trio.current_time() < 45
        assert seed.faults == []  # slow is no fault

    play(scenario)


def test_a_cancelled_request_is_answered_once() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        (seed,) = await seeds(nodes, 1, config=SwarmConfig(upload_rate=64 * KB))
        stream = await ask_raw(world, "bob", seed.contact)
        await stream.send_all(w.encode(w.Open(content().root, 0)), w.encode(w.Ask((0, 1, 2, 3))))
        await stream.send_all(w.encode(w.Cancel((3,))), w.encode(w.Cancel((9,))))
        assert await hear(stream, w.from_owner) == w.Bits(32)
        await fill(stream, bytearray(4))
        answers: dict[int, str] = {}
        with trio.move_on_after(60):
            while True:
                message = await hear(stream, w.from_owner)
                if isinstance(message, w.Piece):
                    body = bytearray(message.length)
                    await fill(stream, body)
                    assert body == made_up("model", message.index, message.length)
                    answers[message.index] = "piece"
                elif isinstance(message, w.NoPiece):
                    assert not message.lost
                    answers |= dict.fromkeys(message.indexes, "none")
        assert answers == {0: "piece", 1: "piece", 2: "piece", 3: "none"}

    play(scenario)


def test_what_comes_while_a_content_is_opened_is_announced_after_its_bitfield() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        ann = await nodes.start("ann")
        held = ann.shelf.put(content(count=8, have={0}))
        serving = ann.swarm._serving

        def arrive(root: bytes, asker: Contact) -> None:  # before the answer to the open has left
            serving.arrived(root, 5)
            for session in serving._sessions.values():
                session.announce()

        serving.on_asker = arrive
        stream = await ask_raw(world, "bob", ann.contact)
        await stream.send_all(w.encode(w.Open(held.root, 4000)))
        assert await hear(stream, w.from_owner) == w.Bits(8)
        await fill(stream, bits := bytearray(1))
        assert bits == b"\x80"
        assert await hear(stream, w.from_owner) == w.Have((5,))

    play(scenario)


# Questions.


def test_questions_are_answered() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        ann, bob = await nodes.start("ann"), await nodes.start("bob")
        version, root = hashlib.sha256(b"good manifest").digest(), bytes(32)
        ann.shelf.manifests[version] = b"good manifest"
        ann.shelf.layers[root] = bytes(range(64))
        ann.shelf.held = {bytes([n]) * 32 for n in range(0, 200, 2)}
        assert await bob.swarm.manifest(version, [ann.contact]) == b"good manifest"
        assert await bob.swarm.layer(root, 2, [ann.contact]) == bytes(range(64))
        assert await bob.swarm.layer(root, 1, []) == root
        asked = [bytes([n % 256]) * 32 for n in range(300)]
        assert await bob.swarm.holds(ann.contact, asked) == [one in ann.shelf.held for one in asked]
        assert await bob.swarm.hold(ann.contact, b"good manifest") == ""
        assert await bob.swarm.hold(ann.contact, b"bad manifest") == "no room"
        assert ann.shelf.asked_to_hold[0] == (bob.id, b"good manifest")
        assert bob.faults == ann.faults == []

    play(scenario)


def test_a_question_goes_to_the_next_when_one_does_not_know_lies_or_is_dead() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        version = hashlib.sha256(b"m").digest()

        async def lie(owner: RudeOwner, stream: Stream) -> None:
            await owner.hear(stream)
            await stream.send_all(w.encode(w.ManifestIs(b"another")))

        async def hang(owner: RudeOwner, stream: Stream) -> None:
            await trio.sleep_forever()

        liar, hanging = RudeOwner(world, "liar", lie), RudeOwner(world, "hanging", hang)
        await nodes.nursery.start(liar.run)
        await nodes.nursery.start(hanging.run)
        dead, ignorant, ann, bob = [await nodes.start(name) for name in ("dead", "ignorant", "ann", "bob")]
        nodes.crash(dead)
        ann.shelf.manifests[version] = b"m"
        contacts = [bob.contact, dead.contact, hanging.contact, liar.contact, ignorant.contact, ann.contact]
        started = trio.current_time()
        assert await bob.swarm.manifest(version, contacts) == b"m"
        assert trio.current_time() - started < 3
        assert [peer for peer, _ in bob.faults] == [liar.contact.peer]
        with pytest.raises(RemoteError, match=r"nobody gave the manifest .*: 1 peers were asked .*no such version"):
            await bob.swarm.manifest(version, [ignorant.contact])

    play(scenario)


def test_a_layer_that_does_not_fit_is_a_fault_and_comes_from_another() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        one, two, three, bob = [await nodes.start(name) for name in ("one", "two", "three", "bob")]
        one.shelf.layers[bytes(32)] = bytes(96)  # of another length
        two.shelf.layers[bytes(32)] = bytes(64)  # of another content
        three.shelf.layers[bytes(32)] = b"right" + bytes(59)
        contacts = [one.contact, two.contact, three.contact]
        layer = await bob.swarm.layer(bytes(32), 2, contacts, lambda found: found.startswith(b"right"))
        assert layer == b"right" + bytes(59)
        assert {peer for peer, _ in bob.faults} == {one.id, two.id}

    play(scenario)


def test_one_that_cannot_be_asked_is_a_remote_error() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        dead, bob = await nodes.start("dead"), await nodes.start("bob")
        nodes.crash(dead)
        with pytest.raises(RemoteError, match="cannot reach"):
            await bob.swarm.holds(dead.contact, [bytes(32)])
        with pytest.raises(RemoteError, match="no address"):
            await bob.swarm.hold(dead.contact._replace(addresses=()), b"good")

    play(scenario)


def test_one_that_says_only_that_it_lives_does_not_answer() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        async def live(owner: RudeOwner, stream: Stream) -> None:
            while True:
                await stream.send_all(w.encode(w.Alive()))
                await trio.sleep(0.01)

        rude = RudeOwner(world, "rude", live)
        await nodes.nursery.start(rude.run)
        bob = await nodes.start("bob")
        with pytest.raises(RemoteError, match="gives no answer"):
            await bob.swarm.hold(rude.contact, b"good")
        assert len(bob.faults) == 1

    play(scenario)


def test_many_downloaders_with_faults_all_around_end_with_the_same_bytes() -> None:
    async def scenario(world: World, nodes: Swarms) -> None:
        world.set_default_link(Link(bandwidth=2e6, loss=0.02))
        sources = await seeds(nodes, 2, count=48)
        downloaders = [await nodes.start(f"bob{number}") for number in range(8)]
        wanted = [content(count=48, have=set()) for _ in downloaders]
        contacts = [node.contact for node in (*sources, *downloaders)]
        async with trio.open_nursery() as nursery:
            for node, each in zip(downloaders, wanted, strict=True):
                nursery.start_soon(fetch, node, each, *contacts)
            await trio.sleep(1)
            world.partition(["seed0", "bob0", "bob1", "bob2"], ["seed1"])
            await trio.sleep(8)
            world.heal()
            await trio.sleep(1)
            nodes.crash(sources[0])
        assert all(right(each) for each in wanted)
        assert all(node.faults == [] for node in downloaders)
        up = sum(node.swarm.stats.pieces_up for node in downloaders)
        assert up > 3 * 48  # they fed each other

    for seed in range(3):
        play(scenario, seed)
