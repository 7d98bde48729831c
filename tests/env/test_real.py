"""The real environment: datagrams, addresses, disk, threads."""

from __future__ import annotations

import errno
import socket
import threading
import time
from pathlib import Path

import pytest
import trio

from gossipml.env import Env, sockets, write_atomic
from gossipml.env.real import real_env
from gossipml.env.sockets import RealDatagrams, from_sockaddr, to_sockaddr
from gossipml.errors import LocalError, UserError
from gossipml.ids import Address

pytestmark = pytest.mark.real

LOOPBACK = Address("127.0.0.1", 0)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


async def test_datagrams_arrive_with_the_address_to_answer(real: Env) -> None:
    a, b = await real.net.bind_datagrams(LOOPBACK), await real.net.bind_datagrams(LOOPBACK)
    with trio.fail_after(5):
        await a.send(b"ping", b.local)
        assert await b.receive() == (b"ping", a.local)
        await b.send(b"", a.local)
        assert await a.receive() == (b"", b.local)
    await a.aclose()
    await b.aclose()


@needs_ipv6
async def test_datagrams_over_ipv6(real: Env) -> None:
    a = await real.net.bind_datagrams(Address("::1", 0))
    with trio.fail_after(5):
        await a.send(b"to myself", a.local)
        assert await a.receive() == (b"to myself", a.local)
    await a.aclose()


@needs_ipv6
async def test_the_ipv6_wildcard_speaks_ipv4_too_and_shows_plain_addresses(real: Env) -> None:
    dual, v4 = await real.net.bind_datagrams(Address("::", 0)), await real.net.bind_datagrams(LOOPBACK)
    with trio.fail_after(5):
        await v4.send(b"hello", Address("127.0.0.1", dual.local.port))
        data, sender = await dual.receive()
        assert (data, sender) == (b"hello", v4.local)
        await dual.send(b"back", sender)
        assert (await v4.receive())[0] == b"back"
    await dual.aclose()
    await v4.aclose()


async def test_what_the_network_refuses_is_an_oserror(real: Env) -> None:
    a = await real.net.bind_datagrams(LOOPBACK)
    with pytest.raises(OSError, match="IPv4 socket cannot reach"):
        await a.send(b"x", Address("::1", 9))
    with pytest.raises(OSError) as caught:
        await a.send(bytes(70_000), Address("127.0.0.1", 9))
    assert caught.value.errno == errno.EMSGSIZE
    await a.aclose()


class FlakySocket:
    """A UDP socket that reports ICMP errors before it delivers."""

    def __init__(self, errors: list[OSError]) -> None:
        self.errors = errors

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int]]:
        if self.errors:
            raise self.errors.pop(0)
        return b"at last", ("127.0.0.1", 6)


async def test_receive_survives_errors_about_earlier_datagrams(
    real: Env, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    refused = [ConnectionRefusedError(111, "refused"), ConnectionResetError(10054, "reset")]
    flaky = await real.net.bind_datagrams(LOOPBACK)
    assert isinstance(flaky, RealDatagrams)
    with monkeypatch.context() as patch:
        patch.setattr(flaky, "_socket", FlakySocket([*refused, OSError(100, "down")]))
        assert await flaky.receive() == (b"at last", Address("127.0.0.1", 6))
    await flaky.aclose()


async def test_a_burst_of_datagrams_leaves_others_their_turn(real: Env) -> None:
    a, b = await real.net.bind_datagrams(LOOPBACK), await real.net.bind_datagrams(LOOPBACK)
    for number in range(100):
        a.post(b"%d" % number, b.local)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert [(await b.receive())[0] for _ in range(100)] == [b"%d" % number for number in range(100)]
            nursery.cancel_scope.cancel()
    assert turns > 3
    await a.aclose()
    await b.aclose()


async def test_closing_wakes_the_receiver(real: Env) -> None:
    a = await real.net.bind_datagrams(LOOPBACK)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await a.receive()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.sleep(0.02)
            await a.aclose()


async def test_a_udp_port_in_use_names_the_port_and_the_remedy(real: Env) -> None:
    a = await real.net.bind_datagrams(LOOPBACK)
    with pytest.raises(UserError, match=rf"UDP port {a.local.port} .* in use.*--listen"):
        await real.net.bind_datagrams(a.local)
    await a.aclose()


def test_mapped_and_scoped_addresses_are_shown_plain() -> None:
    assert from_sockaddr(("::ffff:192.0.2.7", 5, 0, 0)) == Address("192.0.2.7", 5)
    assert from_sockaddr(("fe80::1%eth0", 5, 0, 2)) == Address("fe80::1", 5)
    assert to_sockaddr(Address("192.0.2.7", 5), socket.AF_INET6) == ("::ffff:192.0.2.7", 5)


def test_a_bound_address_is_its_own(real: Env) -> None:
    assert real.net.own_addresses(Address("192.0.2.7", 5)) == (Address("192.0.2.7", 5),)


class Routes:
    """Stands in for the socket module: which of our addresses the routing table would choose."""

    AF_INET, AF_INET6, SOCK_DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM

    def __init__(self, routes: dict[int, str]) -> None:
        self.routes = routes

    def socket(self, family: int, kind: int) -> Routes:
        if family not in self.routes:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        self.family = family
        return self

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def connect(self, address: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return (self.routes[self.family], 1)


@pytest.mark.parametrize(
    ("bound", "routes", "expected"),
    [
        ("0.0.0.0", {socket.AF_INET: "192.168.1.5"}, ["192.168.1.5"]),
        ("0.0.0.0", {socket.AF_INET: "192.168.1.5", socket.AF_INET6: "2001:db8::5"}, ["192.168.1.5"]),
        ("::", {socket.AF_INET: "10.1.1.1", socket.AF_INET6: "2001:db8::5"}, ["2001:db8::5", "10.1.1.1"]),
        ("::", {socket.AF_INET: "10.1.1.1", socket.AF_INET6: "fe80::5"}, ["10.1.1.1"]),
        ("0.0.0.0", {socket.AF_INET: "127.0.0.1"}, ["127.0.0.1"]),
        ("0.0.0.0", {}, ["127.0.0.1"]),
    ],
)
def test_a_wildcard_stands_for_the_addresses_that_others_reach(
    monkeypatch: pytest.MonkeyPatch, bound: str, routes: dict[int, str], expected: list[str]
) -> None:
    monkeypatch.setattr(sockets, "stdlib_socket", Routes(routes))
    assert sockets.own_addresses(Address(bound, 8711)) == tuple(Address(host, 8711) for host in expected)


async def test_disk_round_trip(real: Env, tmp_path: Path) -> None:
    disk = real.disk
    await write_atomic(disk, "state/ages", b"one", private=True)
    await write_atomic(disk, "state/ages", b"two", private=True)
    assert await disk.read("state/ages", limit=10) == b"two"
    assert await disk.list("state") == ["ages"]
    assert await disk.list("") == ["state"]
    assert await disk.list("missing") == []
    assert (tmp_path / "state" / "ages").read_bytes() == b"two"
    assert await disk.write_at("models/part", 2, b"cd", check=lambda part: part == b"cd")
    assert not await disk.write_at("models/part", 0, b"xx", check=lambda part: part == b"ab")
    assert await disk.read_at("models/part", 1, 9) == b"\0cd"
    assert (await disk.size("models/part"), await disk.size("models/none")) == (4, None)
    assert await disk.free() > 0
    await disk.remove("state/ages")
    with pytest.raises(FileNotFoundError):
        await disk.read("state/ages", limit=10)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "c:x", "a\0b", "a/", "x" * 600]
)
async def test_paths_that_could_leave_the_home_are_refused(real: Env, path: str) -> None:
    for call in (
        real.disk.read(path, limit=1),
        real.disk.write(path, b""),
        real.disk.remove(path),
        real.disk.rename("a", path),
        real.disk.rename(path, "a"),
        real.disk.fsync(path),
    ):
        with pytest.raises(LocalError, match="not a plain relative path"):
            await call


async def test_computation_runs_off_the_event_loop(real: Env) -> None:
    assert await real.compute.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await real.compute.run(divmod, 1, 0, cost=5.0)


async def test_clock_rng_and_secrets(tmp_path: Path) -> None:
    env, again = real_env(tmp_path, seed=7), real_env(tmp_path, seed=7)
    assert env.rng.random() == again.rng.random()
    assert env.secrets(16) != env.secrets(16)
    assert abs(env.clock.wall() - time.time()) < 5
    before = env.clock.now()
    assert env.clock.now() >= before
