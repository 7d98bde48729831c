"""What strangers, floods and failing handlers may not do to a listener. Real loopback sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gossipml.env import Credentials, Env, Listener, Stream
from gossipml.env.connections import LOG_BURST, HandshakeLimits
from gossipml.env.real import real_env
from gossipml.errors import UserError
from gossipml.ids import Address

pytestmark = pytest.mark.real

Members = Callable[..., Credentials]
LOOPBACK = Address("127.0.0.1", 0)


async def greet(stream: Stream) -> None:
    await stream.send_all(b"welcome")


async def assert_welcome(env: Env, listener: Listener, who: Credentials, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        stream = await env.net.connect(listener.local, None, who)
        buffer = bytearray(7)
        count = await stream.receive_into(memoryview(buffer))
        assert buffer[:count] == b"welcome"[:count] and count
        await stream.aclose()


async def test_garbage_is_dropped_and_members_still_join(
    real: Env, credentials: Members, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    handled: list[Stream] = []

    async def handler(stream: Stream) -> None:
        handled.append(stream)
        await greet(stream)

    chunks = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 300, os.urandom(500), b"", b"\x15"]
    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, handler)
        for number in range(100):
            with contextlib.suppress(OSError):
                stranger = await trio.open_tcp_stream("127.0.0.1", listener.local.port)
                async with stranger:
                    await stranger.send_all(chunks[number % len(chunks)])
                    await stranger.send_eof()
                    with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
                        while await stranger.receive_some():  # an alert at most
                            pass
        assert handled == []
        await assert_welcome(real, listener, credentials("bob"))
        nursery.cancel_scope.cancel()
    await listener.aclose()
    lines = [record for record in caplog.records if record.name == "gossipml.env.connections"]
    assert 0 < len(lines) <= LOG_BURST  # strangers cannot fill the log


async def test_hundreds_of_half_open_connections_do_not_keep_members_out(tmp_path: Path, credentials: Members) -> None:
    limits = HandshakeLimits(seconds=1.0, pending=64, per_loopback=32)
    env = real_env(tmp_path, limits=limits)
    listener = await env.net.listen(LOOPBACK, credentials("alice"))
    slow: list[socket.socket] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, greet)
            for _ in range(300):
                slow.append(socket.create_connection(listener.local))
                slow[-1].send(b"\x16")  # one byte of a handshake, and then nothing
            await trio.sleep(0.1)
            assert len(listener._pending) <= limits.per_loopback  # type: ignore[attr-defined]
            for name in ("bob", "carol", "dave"):
                await assert_welcome(env, listener, credentials(name))
            with trio.fail_after(5):  # the deadline takes the rest
                while listener._pending:  # type: ignore[attr-defined]
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    finally:
        for sock in slow:
            sock.close()
    await listener.aclose()


async def test_the_newest_handshake_pushes_out_the_oldest_of_its_own_address(
    tmp_path: Path, credentials: Members
) -> None:
    env = real_env(tmp_path, limits=HandshakeLimits(seconds=30.0, per_loopback=2))
    listener = await env.net.listen(LOOPBACK, credentials("alice"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, greet)
        streams = []
        for _ in range(3):
            streams.append(await trio.open_tcp_stream("127.0.0.1", listener.local.port))
            await trio.sleep(0.05)
        with trio.fail_after(2):
            assert await streams[0].receive_some() == b""  # dropped
        for stream in streams[1:]:
            with trio.move_on_after(0.05) as scope:
                await stream.receive_some()
            assert scope.cancelled_caught  # still waiting
        nursery.cancel_scope.cancel()
    for stream in streams:
        await stream.aclose()
    await listener.aclose()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        trio.BrokenResourceError("gone"),
        ExceptionGroup("several", [KeyError("x"), OSError("y")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_exception_of_the_handler_ends_that_connection_alone(
    real: Env, credentials: Members, error: Exception
) -> None:
    calls = 0

    async def handler(stream: Stream) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error
        await greet(stream)

    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, handler)
        first = await real.net.connect(listener.local, None, credentials("bob"))
        assert await first.receive_into(memoryview(bytearray(1))) == 0
        await first.aclose()
        await assert_welcome(real, listener, credentials("bob"))
        nursery.cancel_scope.cancel()
    await listener.aclose()


async def test_cancelling_serve_ends_the_sessions_with_a_goodbye(real: Env, credentials: Members) -> None:
    async def forever(stream: Stream) -> None:
        await trio.sleep_forever()

    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, forever)
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    with trio.fail_after(2):
        assert await stream.receive_into(memoryview(bytearray(1))) == 0
    await stream.aclose()
    await listener.aclose()


async def test_closing_the_listener_ends_serve(real: Env, credentials: Members) -> None:
    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, greet)
            await trio.sleep(0.05)
            await listener.aclose()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of descriptors to reach")
async def test_running_out_of_descriptors_delays_and_does_not_kill(
    real: Env, credentials: Members, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    with socket.socket() as early:
        bob = credentials("bob")
        early.connect(("127.0.0.1", listener.local.port))  # waits in the backlog
        spare = os.open(os.devnull, os.O_RDONLY)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.serve, greet)
                await trio.sleep(0.3)  # accept fails over and over
                assert "cannot accept connections" in caplog.text
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await assert_welcome(real, listener, bob)
                nursery.cancel_scope.cancel()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(spare)
    await listener.aclose()


async def test_a_port_in_use_names_the_port_and_the_remedy(real: Env, credentials: Members) -> None:
    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    with pytest.raises(UserError, match=rf"TCP port {listener.local.port} .* in use.*--listen"):
        await real.net.listen(listener.local, credentials("bob"))
    await listener.aclose()
    again = await real.net.listen(listener.local, credentials("alice"))  # free again at once
    assert again.local == listener.local
    await again.aclose()


async def test_an_address_of_another_machine_is_refused_with_a_remedy(real: Env, credentials: Members) -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is no address of this machine"):
        await real.net.listen(Address("192.0.2.1", 0), credentials("alice"))
