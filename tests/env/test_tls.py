"""Streams over mutual TLS, on real loopback sockets: who gets through, what arrives, how it ends."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from gossipml.env import GOSSIP, PROTOCOLS, SWARM, Credentials, Env, Handler, Listener, Stream
from gossipml.env.tls import tls_context
from gossipml.errors import RemoteError
from gossipml.ids import Address

pytestmark = pytest.mark.real

Members = Callable[..., Credentials]
LOOPBACK = Address("127.0.0.1", 0)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = await stream.receive_into(view)
        assert count, f"the stream ended {len(view)} bytes early"
        view = view[count:]
    return bytes(data)


async def echo(stream: Stream) -> None:
    buffer = memoryview(bytearray(100_003))
    while count := await stream.receive_into(buffer):
        await stream.send_all(buffer[:count])


@contextlib.asynccontextmanager
async def serving(env: Env, who: Credentials, handler: Handler) -> AsyncIterator[Listener]:
    listener = await env.net.listen(LOOPBACK, who)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handler)
            yield listener
            nursery.cancel_scope.cancel()
        await listener.aclose()


async def assert_member_can_talk(env: Env, listener: Listener, who: Credentials) -> None:
    with trio.fail_after(5):
        stream = await env.net.connect(listener.local, None, who)
        await stream.send_all(b"still there?")
        assert await receive_exactly(stream, 12) == b"still there?"
        await stream.aclose()


async def test_both_sides_learn_the_proven_id_of_the_other(real: Env, credentials: Members) -> None:
    alice, bob = credentials("alice"), credentials("bob")
    seen: list[Stream] = []

    async def handler(stream: Stream) -> None:
        seen.append(stream)
        await echo(stream)

    async with serving(real, alice, handler) as listener:
        stream = await real.net.connect(listener.local, alice.identity.peer_id, bob)
        await stream.send_all(b"hello, ", bytearray(b"wor"), memoryview(b"ld"), b"")
        assert await receive_exactly(stream, 12) == b"hello, world"
        assert stream.peer_id == alice.identity.peer_id
        assert stream.remote == listener.local
        assert seen[0].peer_id == bob.identity.peer_id
        assert seen[0].remote.host == "127.0.0.1"
        await stream.aclose()


@pytest.mark.parametrize(("server", "client"), [("ours", "theirs"), ("theirs", "ours")])
async def test_another_token_is_refused_with_a_sentence_and_the_listener_goes_on(
    real: Env, credentials: Members, caplog: pytest.LogCaptureFixture, server: str, client: str
) -> None:
    async with serving(real, credentials("alice", server), echo) as listener:
        with pytest.raises(RemoteError, match="is not a member of this network or holds another token"):
            await real.net.connect(listener.local, None, credentials("bob", client))
        await assert_member_can_talk(real, listener, credentials("carol", server))
    refusals = [record for record in caplog.records if "refused a connection" in record.getMessage()]
    assert [record.levelname for record in refusals] == ["WARNING"]
    assert "another token" in refusals[0].getMessage()


async def test_a_peer_other_than_the_one_expected_is_refused(real: Env, credentials: Members) -> None:
    async with serving(real, credentials("alice"), echo) as listener:
        with pytest.raises(RemoteError, match=r"not .* as expected"):
            await real.net.connect(listener.local, credentials("carol").identity.peer_id, credentials("bob"))


async def test_a_peer_that_dials_itself_learns_it(real: Env, credentials: Members) -> None:
    async def never(stream: Stream) -> None:
        raise AssertionError("the handler saw ourselves")

    async with serving(real, credentials("alice"), never) as listener:
        with pytest.raises(RemoteError, match="is this peer itself"):
            await real.net.connect(listener.local, None, credentials("alice"))


async def test_both_sides_know_the_protocol_that_the_dialler_chose(real: Env, credentials: Members) -> None:
    async def name_it(stream: Stream) -> None:
        await stream.send_all(stream.protocol.encode())

    async with serving(real, credentials("alice"), name_it) as listener:
        for protocol in (*PROTOCOLS, SWARM, GOSSIP):
            stream = await real.net.connect(listener.local, None, credentials("bob"), protocol)
            assert stream.protocol == protocol
            assert await receive_exactly(stream, len(protocol)) == protocol.encode()
            await stream.aclose()
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        assert stream.protocol == GOSSIP
        await stream.aclose()
        with pytest.raises(RemoteError, match="speaks no protocol of ours"):
            await real.net.connect(listener.local, None, credentials("bob"), "gossipml-other/1")


async def test_nobody_there_is_an_oserror(real: Env, credentials: Members) -> None:
    listener = await real.net.listen(LOOPBACK, credentials("alice"))
    await listener.aclose()
    with pytest.raises(ConnectionRefusedError):
        await real.net.connect(listener.local, None, credentials("bob"))


async def test_a_listener_that_speaks_something_else_is_a_remote_error(real: Env, credentials: Members) -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, http, 0)
        address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        with pytest.raises(RemoteError, match="is no gossipml peer"):
            await real.net.connect(address, None, credentials("bob"))
        nursery.cancel_scope.cancel()


def stranger_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([GOSSIP])
    return context


def old_tls_context(member: Credentials) -> ssl.SSLContext:
    context = tls_context(member, server=False)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def other_protocol_context(member: Credentials) -> ssl.SSLContext:
    context = tls_context(member, server=False)
    context.set_alpn_protocols(["gossipml/999"])
    return context


def forged_context(stranger: Credentials) -> ssl.SSLContext:
    """A certificate of a network of its own, and no care about ours."""
    context = tls_context(stranger, server=False)
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize("kind", ["no certificate", "another authority", "TLS 1.2", "another protocol"])
async def test_tls_that_is_not_ours_never_reaches_the_handler(real: Env, credentials: Members, kind: str) -> None:
    contexts = {
        "no certificate": stranger_context(),
        "another authority": forged_context(credentials("mallory", "theirs")),
        "TLS 1.2": old_tls_context(credentials("mallory")),
        "another protocol": other_protocol_context(credentials("mallory")),
    }
    handled = []

    async def handler(stream: Stream) -> None:
        handled.append(stream.peer_id)
        await echo(stream)

    def attempt(address: Address) -> bytes:
        """Blocking TLS of the standard library, as a stranger has it."""
        with (
            socket.create_connection(address, timeout=5) as raw,
            contexts[kind].wrap_socket(raw) as secure,
        ):
            secure.sendall(b"let me in")
            return secure.recv(100)

    async with serving(real, credentials("alice"), handler) as listener:
        with contextlib.suppress(OSError):  # ssl.SSLError among them
            assert await trio.to_thread.run_sync(attempt, listener.local) == b""
        assert handled == []
        await assert_member_can_talk(real, listener, credentials("bob"))
        assert handled == [credentials("bob").identity.peer_id]


async def test_64_mib_come_back_unchanged_in_odd_pieces(real: Env, credentials: Members) -> None:
    data = random.Random(1).randbytes(1 << 20) * 64
    pieces = random.Random(2)

    async with serving(real, credentials("alice"), echo) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))

        async def send() -> None:
            view = memoryview(data)
            while view:
                cut = pieces.choice([1, 7, 16_384, 16_385, 99_991, 262_144, 3_000_001])
                await stream.send_all(view[:cut], view[cut : cut + 3])
                view = view[cut + 3 :]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received = bytearray(len(data))
            rest = memoryview(received)
            while rest:
                count = await stream.receive_into(rest[: pieces.choice([1, 5, 16_383, 70_000, 1_000_003])])
                assert count
                rest = rest[count:]
        assert received == data
        await stream.aclose()


async def test_both_sides_send_at_once_without_waiting_for_each_other(real: Env, credentials: Members) -> None:
    """More than all buffers hold goes both ways: whoever reads only after it has sent would block for ever."""
    size = 16 << 20
    there, back = random.Random(3).randbytes(size), random.Random(4).randbytes(size)
    got: dict[str, bytes] = {}

    async def talk(stream: Stream, name: str, data: bytes) -> None:
        async def receive() -> None:
            got[name] = await receive_exactly(stream, size)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            nursery.start_soon(receive)

    async def handler(stream: Stream) -> None:
        await talk(stream, "alice", back)
        await stream.receive_into(memoryview(bytearray(1)))  # until the other side closes

    async with serving(real, credentials("alice"), handler) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        await talk(stream, "bob", there)
        await stream.aclose()
    assert got == {"alice": there, "bob": back}


async def test_what_is_posted_leaves_at_once_and_its_rest_before_what_is_sent_next(
    real: Env, credentials: Members
) -> None:
    go, content = trio.Event(), random.Random(1).randbytes(60_000)
    received = bytearray()

    async def read_late(stream: Stream) -> None:
        buffer = memoryview(bytearray(1 << 16))

        def came(count: int) -> bool:
            received.extend(buffer[:count])
            return count > 0

        await stream.serve(lambda: buffer[:12], lambda count: came(count) and len(received) < 12)
        await go.wait()
        await stream.serve(lambda: buffer, came)

    async with serving(real, credentials("alice"), read_late) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        assert stream.post(b"hello, ", memoryview(b"world"))
        assert not stream.post(bytes(1 << 20)), "that is not small"
        posted = 0
        while not stream.unsent:
            assert stream.post(content)
            posted += 1
        assert not stream.post(b"out of turn")
        go.set()
        await stream.send_all()
        assert stream.post(b"the ")
        await stream.send_all(b"end")
        await stream.aclose()
        with trio.fail_after(10):
            while len(received) < 12 + posted * len(content) + 7:
                await trio.sleep(0.01)
        assert bytes(received) == b"hello, world" + posted * content + b"the end"
        assert not stream.post(b"closed")


async def test_a_cancelled_send_breaks_the_stream_and_a_cancelled_receive_does_not(
    real: Env, credentials: Members
) -> None:
    ends: list[str] = []
    was_cancelled = trio.Event()

    async def handler(stream: Stream) -> None:
        with trio.move_on_after(0.05) as scope:
            await stream.receive_into(memoryview(bytearray(10)))
        assert scope.cancelled_caught
        was_cancelled.set()
        assert await receive_exactly(stream, 5) == b"hello"
        try:
            await stream.send_all(b"go on")
            await trio.sleep(0.3)  # reads nothing: the sender fills the socket and is cancelled
            await receive_exactly(stream, 64 << 20)
        except trio.BrokenResourceError:
            ends.append("broken")

    async with serving(real, credentials("alice"), handler) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        await was_cancelled.wait()
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"go on"
        with trio.move_on_after(0.1) as scope:
            await stream.send_all(bytes(64 << 20))
        assert scope.cancelled_caught
        with pytest.raises(trio.BrokenResourceError, match="cancelled in the middle"):
            await stream.send_all(b"and now for something else")
        await stream.aclose()
        with trio.fail_after(5):
            while not ends:
                await trio.sleep(0.01)
    assert ends == ["broken"]


async def test_a_model_under_way_is_not_in_memory_twice(real: Env, credentials: Members) -> None:
    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async with serving(real, credentials("alice"), silent) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        model = bytes(64 << 20)
        tracemalloc.start()
        try:
            with trio.move_on_after(0.2):
                await stream.send_all(model)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        await stream.aclose()


async def test_closing_ends_the_other_side_in_good_order(real: Env, credentials: Members) -> None:
    async def handler(stream: Stream) -> None:
        await stream.send_all(b"bye")

    async with serving(real, credentials("alice"), handler) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        assert await receive_exactly(stream, 3) == b"bye"
        assert await stream.receive_into(memoryview(bytearray(1))) == 0
        assert await stream.receive_into(memoryview(bytearray(1))) == 0
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_into(memoryview(bytearray(1)))


async def test_a_connection_cut_without_goodbye_is_not_an_end(real: Env, credentials: Members) -> None:
    """Whoever can cut the wire must not be able to make a short message look whole."""

    async with serving(real, credentials("alice"), echo) as listener:
        relay = socket.socket()
        relay.bind(("127.0.0.1", 0))
        relay.listen()

        connected = threading.Event()

        def cut_after_handshake() -> None:
            near, _ = relay.accept()
            with near, socket.create_connection(listener.local) as far:
                for sock in (near, far):
                    sock.settimeout(0.05)
                while not connected.is_set():
                    for source, target in ((near, far), (far, near)):
                        with contextlib.suppress(TimeoutError):
                            target.sendall(source.recv(65536))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, cut_after_handshake)
            address = Address("127.0.0.1", relay.getsockname()[1])
            stream = await real.net.connect(address, None, credentials("bob"))
            connected.set()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_into(memoryview(bytearray(10)))
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        await stream.aclose()
        relay.close()


async def test_closing_wakes_the_task_that_reads(real: Env, credentials: Members) -> None:
    async with serving(real, credentials("alice"), echo) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_into(memoryview(bytearray(1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.05)
            await stream.aclose()


async def test_two_readers_or_two_writers_are_a_mistake(real: Env, credentials: Members) -> None:
    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async with serving(real, credentials("alice"), silent) as listener:
        stream = await real.net.connect(listener.local, None, credentials("bob"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_into, memoryview(bytearray(1)))
            nursery.start_soon(stream.send_all, bytes(64 << 20))
            await trio.sleep(0.1)
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_into(memoryview(bytearray(1)))
            with pytest.raises(trio.BusyResourceError):
                await stream.send_all(b"x")
            nursery.cancel_scope.cancel()
        await stream.aclose()


def test_the_context_accepts_members_alone(credentials: Members) -> None:
    for server in (True, False):
        context = tls_context(credentials("alice"), server=server)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert len(context.get_ca_certs()) == 1  # ours, and none of the system's


def test_the_key_gets_to_openssl_without_memfd_too(credentials: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert tls_context(credentials("alice"), server=True).get_ca_certs()
