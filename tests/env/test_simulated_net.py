"""The simulated network: links, identities, partitions, crashes, pauses."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio

from gossipml.env import GOSSIP, SWARM, Credentials, Datagrams, Env, Stream
from gossipml.env.link import Link, fixed, uniform
from gossipml.env.simulated import World, run_simulation
from gossipml.env.simulated_sockets import CONNECT_SECONDS, INBOX_DATAGRAMS
from gossipml.env.simulated_stream import WINDOW_BYTES
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.ids import Address

Members = Callable[..., Credentials]
WILDCARD = Address("0.0.0.0", 8711)
STEADY = Link(delay=fixed(0.1))


async def receive_exactly(stream: Stream, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = await stream.receive_into(view)
        assert count, f"the stream ended {len(view)} bytes early"
        view = view[count:]
    return bytes(data)


async def drain(socket: Datagrams, seconds: float) -> list[bytes]:
    received = []
    with trio.move_on_after(seconds):
        while True:
            received.append((await socket.receive())[0])
    return received


async def two_sockets(world: World) -> tuple[Datagrams, Datagrams, Address]:
    a = await world.env("a").net.bind_datagrams(WILDCARD)
    b = await world.env("b").net.bind_datagrams(WILDCARD)
    return a, b, Address(world.host("b"), 8711)


# Datagrams


def test_who_serves_hears_each_datagram_until_one_is_too_much_or_the_socket_closes() -> None:
    async def scenario(world: World) -> None:
        a, b, to_b = await two_sockets(world)
        heard: list[bytes] = []

        def hear(data: bytes, sender: Address) -> None:
            assert sender == Address(world.host("a"), 8711)
            heard.append(data)
            if data == b"bad":
                raise ValueError("too much")

        async def serve(error: type[Exception]) -> None:
            with pytest.raises(error):
                await b.serve(hear)

        a.post(b"1", to_b)
        await trio.sleep(1)  # it waits in the socket
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, ValueError)
            for data in (b"2", b"bad"):
                await trio.sleep(1)
                a.post(data, to_b)
        assert heard == [b"1", b"2", b"bad"]
        a.post(b"3", to_b)
        assert (await b.receive())[0] == b"3"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, trio.ClosedResourceError)
            await trio.sleep(1)
            await b.aclose()

    run_simulation(scenario, 1, link=STEADY)


def test_datagrams_take_the_links_delay() -> None:
    async def scenario(world: World) -> None:
        a, b, to_b = await two_sockets(world)
        await a.send(b"hello", to_b)
        assert await b.receive() == (b"hello", Address(world.host("a"), 8711))
        assert world.now() == 0.1
        assert world.trace[-1][1:5] == ("udp", "a", "b", 5)

    run_simulation(scenario, 1, link=STEADY)


@pytest.mark.parametrize(
    ("link", "low", "high"),
    [(Link(loss=0.3), 600, 800), (Link(duplicate=0.3), 1200, 1400), (Link(loss=1.0), 0, 0), (Link(), 1000, 1000)],
)
def test_loss_and_duplication_have_their_share(link: Link, low: int, high: int) -> None:
    async def scenario(world: World) -> int:
        a, b, to_b = await two_sockets(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, b, 20)
            for number in range(1000):
                await a.send(number.to_bytes(2), to_b)
                await trio.sleep(0.01)
        return sum(1 for entry in world.trace if entry[1] == "udp")

    assert low <= run_simulation(scenario, 1, link=link) <= high


@pytest.mark.parametrize("link", [Link(delay=uniform(0.0, 1.0)), Link(delay=fixed(0.01), reorder=0.5)])
def test_datagrams_overtake_each_other(link: Link) -> None:
    async def scenario(world: World) -> list[bytes]:
        a, b, to_b = await two_sockets(world)
        for number in range(100):
            await a.send(bytes([number]), to_b)
            await trio.sleep(0.01)
        return await drain(b, 5)

    received = run_simulation(scenario, 1, link=link)
    assert sorted(received) == [bytes([number]) for number in range(100)] != received


def test_bandwidth_is_shared_by_what_is_sent_at_once() -> None:
    async def scenario(world: World) -> list[float]:
        a, b, to_b = await two_sockets(world)
        for _ in range(3):
            await a.send(bytes(1000), to_b)
        times = []
        for _ in range(3):
            await b.receive()
            times.append(world.now())
        return times

    times = run_simulation(scenario, 1, link=Link(delay=fixed(0.1), bandwidth=1000))
    assert times == pytest.approx([1.1, 2.1, 3.1])


def test_an_inbox_that_nobody_reads_overflows() -> None:
    async def scenario(world: World) -> int:
        a, b, to_b = await two_sockets(world)
        for _ in range(INBOX_DATAGRAMS + 88):
            await a.send(b"x", to_b)
        await trio.sleep(1)
        assert sum(1 for entry in world.trace if entry[1] == "udp-overflow") == 88
        return len(await drain(b, 1))

    assert run_simulation(scenario, 1) == INBOX_DATAGRAMS


def test_a_port_in_use_is_refused_and_zero_takes_a_free_one(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        net, who = world.env("a").net, credentials("a")
        first = await net.bind_datagrams(WILDCARD)
        await net.listen(WILDCARD, who)
        with pytest.raises(UserError, match="UDP port 8711 is in use"):
            await net.bind_datagrams(WILDCARD)
        with pytest.raises(UserError, match="TCP port 8711 is in use"):
            await net.listen(WILDCARD, who)
        one, two = [(await net.bind_datagrams(Address("0.0.0.0", 0))).local.port for _ in range(2)]
        assert one != two
        await first.aclose()
        await net.bind_datagrams(WILDCARD)

    run_simulation(scenario, 1)


def test_addresses_are_those_others_reach() -> None:
    async def scenario(world: World) -> None:
        env = world.env("a")
        assert env.net.own_addresses(WILDCARD) == (Address(world.host("a"), 8711),)
        socket = await env.net.bind_datagrams(WILDCARD)
        await socket.send(b"me", Address("127.0.0.1", 8711))
        assert (await socket.receive())[0] == b"me"

    run_simulation(scenario, 1)


# Streams

Peer = Callable[[World, Env, Stream], Awaitable[None]]


async def echo(stream: Stream) -> None:
    buffer = memoryview(bytearray(5000))
    while count := await stream.receive_into(buffer):
        await stream.send_all(buffer[:count])


def connected(
    credentials: Members,
    dialler: Callable[[World, Stream], Awaitable[None]],
    handler: Callable[[Stream], Awaitable[None]] = echo,
    *,
    link: Link = STEADY,
    seed: int = 1,
) -> World:
    """Run `dialler` on `a` with a stream to `b`, where `handler` serves."""

    async def scenario(world: World) -> World:
        async with trio.open_nursery() as nursery:
            listener = await world.env("b").net.listen(WILDCARD, credentials("b"))
            nursery.start_soon(listener.serve, handler)
            net = world.env("a").net
            address = Address(world.host("b"), 8711)
            stream = await net.connect(address, credentials("b").identity.peer_id, credentials("a"))
            assert stream.peer_id == credentials("b").identity.peer_id
            await dialler(world, stream)
            nursery.cancel_scope.cancel()
        return world

    return run_simulation(scenario, seed, link=link)


def test_both_sides_know_the_protocol_that_the_dialler_chose(credentials: Members) -> None:
    async def name_it(stream: Stream) -> None:
        await stream.send_all(stream.protocol.encode())

    async def dialler(world: World, stream: Stream) -> None:
        assert stream.protocol == GOSSIP
        assert await receive_exactly(stream, len(GOSSIP)) == GOSSIP.encode()
        net = world.env("c").net
        swarm = await net.connect(stream.remote, None, credentials("c"), SWARM)
        assert swarm.protocol == SWARM
        assert await receive_exactly(swarm, len(SWARM)) == SWARM.encode()
        with pytest.raises(RemoteError, match="speaks no protocol of ours"):
            await net.connect(stream.remote, None, credentials("c"), "gossipml-other/1")

    connected(credentials, dialler, name_it)


def test_a_small_message_travels_in_one_piece(credentials: Members) -> None:
    async def read(stream: Stream) -> None:
        assert await receive_exactly(stream, 6) == b"headed"

    async def dialler(world: World, stream: Stream) -> None:
        await stream.send_all(b"head", memoryview(b"ed"))
        await trio.sleep(1)
        assert [entry[4] for entry in world.trace if entry[1] == "tcp"] == [6]

    connected(credentials, dialler, read)


def test_a_connection_takes_two_round_trips_and_an_echo_one(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        assert world.now() == pytest.approx(0.4)
        await stream.send_all(b"hello, ", bytearray(b"wor"), memoryview(b"ld"))
        assert await receive_exactly(stream, 12) == b"hello, world"
        assert world.now() == pytest.approx(0.6)

    connected(credentials, dialler)


def test_the_listener_sees_the_diallers_id(credentials: Members) -> None:
    seen: list[Stream] = []

    async def handler(stream: Stream) -> None:
        seen.append(stream)
        await echo(stream)

    async def dialler(world: World, stream: Stream) -> None:
        await trio.sleep(1)
        assert seen[0].peer_id == credentials("a").identity.peer_id
        assert seen[0].remote.host == world.host("a")

    connected(credentials, dialler, handler)


def test_strangers_wrong_peers_and_ourselves_are_refused(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        handled: list[Stream] = []

        async def handler(stream: Stream) -> None:
            handled.append(stream)

        listener = await world.env("b").net.listen(WILDCARD, credentials("b"))
        net = world.env("a").net
        address = Address(world.host("b"), 8711)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handler)
            with pytest.raises(RemoteError, match="not a member of this network or holds another token"):
                await net.connect(address, None, credentials("a", "another network"))
            with pytest.raises(RemoteError, match="as expected"):
                await net.connect(address, credentials("c").identity.peer_id, credentials("a"))
            with pytest.raises(RemoteError, match="is this peer itself"):
                await net.connect(address, None, credentials("b"))
            with pytest.raises(ConnectionRefusedError):
                await net.connect(Address(world.host("b"), 9), None, credentials("a"))
            await trio.sleep(10)
            assert handled == []
            nursery.cancel_scope.cancel()

    run_simulation(scenario, 1)


def test_nobody_at_the_address_times_out(credentials: Members) -> None:
    async def scenario(world: World) -> float:
        with pytest.raises(TimeoutError, match="does not answer"):
            await world.env("a").net.connect(Address("10.9.9.9", 1), None, credentials("a"))
        return world.now()

    assert run_simulation(scenario, 1) == CONNECT_SECONDS


def test_who_serves_hears_what_comes_in_its_moment_until_it_wants_no_more(credentials: Members) -> None:
    got = bytearray()
    buffer = memoryview(bytearray(100))
    ended = False

    def came(count: int) -> bool:
        got.extend(buffer[:count])
        if b"bad" in got:
            raise ValueError("too much")
        return count > 0 and not got.endswith(b".")

    async def handler(stream: Stream) -> None:
        nonlocal ended
        await stream.serve(lambda: buffer, came)
        assert got == b"one, two."
        with pytest.raises(ValueError, match="too much"):
            await stream.serve(lambda: buffer, came)
        got.clear()
        await stream.serve(lambda: buffer, came)
        ended = True

    async def dialler(world: World, stream: Stream) -> None:
        assert stream.post(b"one,", b" ")
        await trio.sleep(0.101)
        assert got == b"one, "
        assert stream.post(b"two.")
        await trio.sleep(1)
        assert stream.post(b"bad")
        await trio.sleep(1)
        assert stream.post(b"left to the end")
        assert not stream.unsent
        await stream.aclose()
        assert not stream.post(b"more")
        await trio.sleep(1)
        assert got == b"left to the end"
        assert ended

    connected(credentials, dialler, handler)


def test_what_finds_no_room_is_not_posted(credentials: Members) -> None:
    async def sleep(stream: Stream) -> None:
        await trio.sleep_forever()

    async def dialler(world: World, stream: Stream) -> None:
        posted = 0
        while stream.post(bytes(100_000)):
            posted += 100_000
        assert WINDOW_BYTES <= posted < WINDOW_BYTES + 100_000
        assert not stream.post(b"")

    connected(credentials, dialler, sleep)


def test_streams_keep_order_and_content_over_a_terrible_link(credentials: Members) -> None:
    data = bytes(range(256)) * 4000  # about a MB

    async def dialler(world: World, stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data

    connected(credentials, dialler, link=Link(delay=uniform(0, 2), loss=0.4, bandwidth=1e6))


def test_the_content_is_taken_when_it_is_sent(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        buffer = bytearray(b"before")
        await stream.send_all(buffer)
        buffer[:] = b"after!"
        assert await receive_exactly(stream, 6) == b"before"

    connected(credentials, dialler)


def test_a_reader_that_sleeps_holds_the_writer_up(credentials: Members) -> None:
    async def sleeper(stream: Stream) -> None:
        await trio.sleep(60)
        await receive_exactly(stream, 3 * WINDOW_BYTES)

    async def dialler(world: World, stream: Stream) -> None:
        await stream.send_all(bytes(WINDOW_BYTES))
        assert world.now() < 1
        await stream.send_all(bytes(2 * WINDOW_BYTES))
        assert world.now() > 60

    connected(credentials, dialler, sleeper)


def test_closing_ends_the_other_side_after_what_was_sent(credentials: Members) -> None:
    async def farewell(stream: Stream) -> None:
        await stream.send_all(b"bye")

    async def dialler(world: World, stream: Stream) -> None:
        assert await receive_exactly(stream, 3) == b"bye"
        assert await stream.receive_into(memoryview(bytearray(1))) == 0
        await stream.send_all(b"too late: it is lost, and the other side says so")
        await trio.sleep(1)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_into(memoryview(bytearray(1)))

    connected(credentials, dialler, farewell)


def test_an_exception_of_the_handler_ends_that_connection_alone(credentials: Members) -> None:
    async def handler(stream: Stream) -> None:
        raise ValueError("a bug")

    async def dialler(world: World, stream: Stream) -> None:
        assert await stream.receive_into(memoryview(bytearray(1))) == 0
        again = await world.env("c").net.connect(stream.remote, None, credentials("c"))
        assert again.peer_id == stream.peer_id

    connected(credentials, dialler, handler)


# Partitions, crashes, pauses


def test_a_partition_loses_datagrams_and_stalls_streams_until_it_heals(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        udp_a = await world.env("c").net.bind_datagrams(WILDCARD)
        await stream.send_all(b"under way")  # arrives after the partition began
        world.partition({"a"}, {"b"})
        await stream.send_all(b" and more")
        await udp_a.send(b"x", Address(world.host("b"), 8711))
        with trio.move_on_after(100) as scope:
            await stream.receive_into(memoryview(bytearray(1)))
        assert scope.cancelled_caught
        with trio.move_on_after(10) as scope:
            await world.env("d").net.connect(stream.remote, None, credentials("d"))
        assert scope.cancelled_caught
        world.heal()
        await stream.send_all(b", and after")
        assert await receive_exactly(stream, 29) == b"under way and more, and after"
        assert [entry[1] for entry in world.trace if entry[1].startswith("udp")] == ["udp-lost"]

    connected(credentials, dialler)


def test_groups_reach_themselves_and_nobody_else() -> None:
    async def scenario(world: World) -> set[tuple[str, str]]:
        names = "abcde"
        sockets = {name: await world.env(name).net.bind_datagrams(WILDCARD) for name in names}
        world.partition("ab", "c")
        for name in names:
            for other in names:
                await sockets[name].send(b"x", Address(world.host(other), 8711))
        await trio.sleep(1)
        return {(source, target) for _, kind, source, target, *_ in world.trace if kind == "udp"}

    groups = ["ab", "c", "de"]  # those in no group form one
    expected = {(one, other) for group in groups for one in group for other in group}
    assert run_simulation(scenario, 1) == expected


def test_a_killed_process_breaks_its_streams_and_refuses_new_ones(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        await stream.send_all(b"last words")
        assert await receive_exactly(stream, 10) == b"last words"
        world.crash("b")
        with pytest.raises(trio.BrokenResourceError, match="the other side died"):
            await stream.receive_into(memoryview(bytearray(1)))
        assert world.now() < 1
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        with pytest.raises(ConnectionRefusedError):
            await world.env("c").net.connect(stream.remote, None, credentials("c"))

    connected(credentials, dialler)


def test_what_waits_when_its_process_dies_does_not_come_back(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        returned: list[str] = []

        async def wait(name: str, call: Callable[[], Awaitable[object]]) -> None:
            with contextlib.suppress(Exception):
                await call()
            returned.append(name)

        env = world.env("a")
        listener = await world.env("b").net.listen(WILDCARD, credentials("b"))
        mine = await env.net.listen(WILDCARD, credentials("a"))
        socket = await env.net.bind_datagrams(WILDCARD)
        stream = await env.net.connect(Address(world.host("b"), 8711), None, credentials("a"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "serve", lambda: mine.serve(echo))
            nursery.start_soon(wait, "datagram", socket.receive)
            nursery.start_soon(wait, "read", lambda: stream.receive_into(memoryview(bytearray(1))))
            nursery.start_soon(wait, "write", lambda: stream.send_all(bytes(2 * WINDOW_BYTES)))
            await trio.sleep(5)
            world.crash("a")
            await trio.sleep(1000)
            assert returned == []
            nursery.cancel_scope.cancel()
        with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            await stream.send_all(b"x")
            raise AssertionError("a dead process sent something")
        await stream.aclose()
        await listener.aclose()

    run_simulation(scenario, 1)


def test_a_machine_without_power_falls_silent(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        await trio.sleep(1)
        world.power_off("b")
        await stream.send_all(b"anybody?")
        with trio.move_on_after(1000) as scope:
            await stream.receive_into(memoryview(bytearray(1)))
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            await world.env("c").net.connect(stream.remote, None, credentials("c"))
        world.env("b")  # it comes back, and knows nothing of the old stream
        await stream.send_all(b"and now?")
        await trio.sleep(1)
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await stream.send_all(b"x")

    connected(credentials, dialler)


def test_a_dead_process_reaches_neither_network_nor_disk(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        zombie = world.env("a")
        socket = await zombie.net.bind_datagrams(WILDCARD)
        other = await world.env("b").net.bind_datagrams(WILDCARD)
        with pytest.raises(LocalError, match="a is running"):
            world.env("a")
        world.crash("a")
        await socket.send(b"boo", Address(world.host("b"), 8711))
        assert await drain(socket, 10) == []
        with pytest.raises(OSError, match="dead"):
            await zombie.disk.write("state", b"boo")
        late = await zombie.net.bind_datagrams(Address("0.0.0.0", 9))
        await late.send(b"boo", Address(world.host("b"), 8711))
        with trio.move_on_after(10) as scope:
            await zombie.net.connect(Address(world.host("b"), 8711), None, credentials("a"))
        assert scope.cancelled_caught
        again = world.env("a")
        assert await again.disk.list("") == []
        assert again.secrets(16) != zombie.secrets(16)
        assert await drain(other, 5) == []

    run_simulation(scenario, 1)


def test_a_paused_machine_sends_and_receives_when_it_resumes(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        a, b, to_b = await two_sockets(world)
        to_a = Address(world.host("a"), 8711)
        world.pause("b")
        await a.send(b"to b", to_b)
        await b.send(b"to a", to_a)
        assert await drain(a, 60) == []
        world.resume("b")
        with trio.fail_after(1):
            assert (await b.receive())[0] == b"to b"
            assert (await a.receive())[0] == b"to a"

    run_simulation(scenario, 1, link=STEADY)


def test_a_stream_survives_a_pause_in_order(credentials: Members) -> None:
    async def dialler(world: World, stream: Stream) -> None:
        world.pause("b")
        await stream.send_all(b"one ")
        await trio.sleep(60)
        world.resume("b")
        await stream.send_all(b"two")
        assert await receive_exactly(stream, 7) == b"one two"

    connected(credentials, dialler, link=Link(delay=uniform(0.1, 1)))


def test_a_cancelled_connect_reaches_no_handler(credentials: Members) -> None:
    async def scenario(world: World) -> None:
        handled: list[Stream] = []

        async def handler(stream: Stream) -> None:
            handled.append(stream)

        listener = await world.env("b").net.listen(WILDCARD, credentials("b"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handler)
            with trio.move_on_after(0.15):
                await world.env("a").net.connect(Address(world.host("b"), 8711), None, credentials("a"))
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert handled == []

    run_simulation(scenario, 1, link=STEADY)


def test_computation_is_charged_in_virtual_time() -> None:
    async def scenario(world: World) -> None:
        env = world.env("a")
        assert await env.compute.run(divmod, 7, 2, cost=12.5) == (3, 1)
        assert env.clock.now() == 12.5

    run_simulation(scenario, 1)


def test_wall_clocks_may_be_wrong() -> None:
    async def scenario(world: World) -> None:
        right, wrong = world.env("a").clock, world.env("b", wall_skew=-86400.0).clock
        assert right.wall() - wrong.wall() == pytest.approx(86400)
        assert right.now() == wrong.now()

    run_simulation(scenario, 1)
