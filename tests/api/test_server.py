"""The endpoint on real sockets: starting, stopping, slow, broken and hostile clients."""

from __future__ import annotations

import json
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from gossipml.api.http1 import Limits
from gossipml.api.ports import JSON
from gossipml.api.server import ApiConfig, serve
from gossipml.errors import UserError
from gossipml.ids import Address

from .fake_node import FakeNode

pytestmark = pytest.mark.real

ANY_PORT = Address("127.0.0.1", 0)
LIMITS = Limits(
    connections=8,
    head_seconds=0.3,
    idle_seconds=5,
    body_seconds=0.3,
    write_seconds=0.3,
    linger_seconds=0.5,
    drain_seconds=0.4,
)
WATCH = b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n"
ALIVE = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@asynccontextmanager
async def serving(node: FakeNode | None = None, limits: Limits = LIMITS) -> AsyncIterator[Address]:
    """An endpoint that is alive at the beginning and at the end."""
    async with trio.open_nursery() as nursery:
        bound: Address = await nursery.start(serve, node or FakeNode(), ApiConfig(ANY_PORT, limits=limits))
        with trio.fail_after(20):
            yield bound
            assert (await talk(bound, ALIVE)).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


async def talk(to: Address, *pieces: bytes, pause: float = 0.0, end: bool = False) -> bytes:
    """Send the pieces and read until the server closes."""
    stream = await trio.open_tcp_stream(to.host, to.port)
    async with stream:
        for piece in pieces:
            try:
                await stream.send_all(piece)
            except trio.BrokenResourceError:
                break
            await trio.sleep(pause)
        if end:
            await stream.send_eof()
        return await read_all(stream)


async def read_all(stream: trio.SocketStream) -> bytes:
    answer = b""
    with trio.fail_after(10):
        async for data in stream:
            answer += data
    return answer


def post(body: bytes, length: int | None = None, more: str = "") -> bytes:
    announced = len(body) if length is None else length
    head = f"POST /predict/xor HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{more}"
    return f"{head}content-length: {announced}\r\n\r\n".encode() + body


def status_and_error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    value: dict[str, JSON] = json.loads(body)
    assert isinstance(value["error"], str)
    return int(head.split()[1]), value["error"]


# Requests


async def test_one_connection_takes_many_requests() -> None:
    ask = b"GET /predict/xor?a=0&b=1 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    async with serving() as to:
        answer = await talk(to, ask, ask * 2 + post(b"[1, 1]"), ALIVE)
    assert answer.count(b"HTTP/1.1 200") == 5
    assert answer.count(b'"result":1') == 3
    assert answer.count(b'"result":0') == 1


async def test_a_request_is_understood_however_it_is_cut() -> None:
    whole = post(b"[0, 1]") + ALIVE
    rng = random.Random(1)
    async with serving() as to:
        for _ in range(10):
            cuts = sorted(rng.sample(range(1, len(whole)), rng.randint(1, 20)))
            pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            answer = await talk(to, *pieces, pause=0.001)
            assert answer.count(b"HTTP/1.1 200") == 2, pieces


async def test_head_has_no_body_and_keeps_the_connection() -> None:
    async with serving() as to:
        answer = await talk(to, b"HEAD /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", ALIVE)
    first, second = answer.split(b"\r\n\r\n")[:2]
    assert b"content-length: 36" in first.lower()
    assert second.startswith(b"HTTP/1.1 200")


async def test_an_http_1_0_client_gets_its_answer_and_the_end() -> None:
    async with serving() as to:
        assert b" 200 " in await talk(to, b"GET /healthz HTTP/1.0\r\nhost: localhost\r\n\r\n")
        assert b" 400 " in await talk(to, b"GET /healthz HTTP/1.0\r\n\r\n")


async def test_a_client_that_ends_its_side_still_gets_the_answer() -> None:
    async with serving() as to:
        answer = await talk(to, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", end=True)
    assert answer.startswith(b"HTTP/1.1 200")


async def test_expect_100_continue_is_answered_when_the_body_is_wanted() -> None:
    async with serving() as to, await trio.open_tcp_stream(to.host, to.port) as stream:
        await stream.send_all(post(b"", 6, "expect: 100-continue\r\nconnection: close\r\n"))
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 100")
        await stream.send_all(b"[0, 1]")
        assert b'"result":1' in await read_all(stream)


async def test_a_chunked_body_is_read() -> None:
    head = b"POST /predict/xor HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    async with serving() as to:
        answer = await talk(to, head + b"transfer-encoding: chunked\r\n\r\n3\r\n[0,\r\n", b"2\r\n1]\r\n0\r\n\r\n")
        assert b'"result":1' in answer
        answer = await talk(to, head + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
        assert status_and_error(answer)[0] == 400


@pytest.mark.parametrize("target", ["http://localhost/healthz", "*", "evil.example:443", "/%ff", "/%c3"])
async def test_a_target_that_is_no_path_is_refused(target: str) -> None:
    async with serving() as to:
        answer = await talk(to, f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    assert status_and_error(answer)[0] == 400


async def test_a_dot_path_is_not_walked() -> None:
    async with serving() as to:
        answer = await talk(to, b"GET /predict/%2e%2e%2fv1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert status_and_error(answer)[0] == 404


async def test_another_protocol_is_not_taken_up() -> None:
    upgrade = "connection: upgrade\r\nupgrade: h2c\r\n"
    async with serving() as to:
        answer = await talk(to, f"GET /healthz HTTP/1.1\r\nhost: localhost\r\n{upgrade}\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200")
        status, error = status_and_error(await talk(to, post(b"[0, 1]", more=upgrade)))
        assert (status, "Upgrade" in error) == (400, True)


async def test_trailers_and_chunk_extensions_without_end_are_cut_off() -> None:
    head = b"POST /predict/xor HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(limits=replace(LIMITS, body_seconds=10)) as to:
        for start in (b"1;", b"0\r\nx: "):
            answer = await talk(to, head + start, *[b"a" * 20_000] * 4, pause=0.01)
            assert status_and_error(answer)[0] in (400, 415)


# Bodies that are not as announced


async def test_a_body_shorter_than_announced_is_400_when_the_client_ends() -> None:
    node = FakeNode()
    async with serving(node) as to:
        status, error = status_and_error(await talk(to, post(b"[0, 1]", 60), end=True))
    assert (status, "not as it was announced" in error) == (400, True)
    assert not node.asked


async def test_a_body_shorter_than_announced_is_408_when_the_client_waits() -> None:
    node = FakeNode()
    async with serving(node) as to:
        status, error = status_and_error(await talk(to, post(b"[0, 1]", 60)))
    assert (status, "within 0.3 s" in error) == (408, True)
    assert not node.asked


async def test_a_body_longer_than_announced_ends_the_connection_after_its_answer() -> None:
    async with serving() as to:
        answer = await talk(to, post(b"[0, 1]garbage\r\n\r\n", 6))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"result":1' in answer
    assert answer.count(b"HTTP/1.1 400") == 1


@pytest.mark.parametrize("length", ["5, 6", "5\r\ncontent-length: 6", "+5", "-1", "5x", "9" * 30])
async def test_a_length_that_is_none_is_refused(length: str) -> None:
    node = FakeNode()
    request = f"POST /predict/xor HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n[0, 1]"
    async with serving(node) as to:
        assert status_and_error(await talk(to, request.encode()))[0] in (400, 413)
    assert not node.asked


async def test_a_huge_body_is_refused_at_once_and_the_answer_arrives() -> None:
    async with serving() as to:
        answer = await talk(to, post(b"", 20_000_000), *[b"x" * 100_000] * 30)
    assert status_and_error(answer) == (413, "the body is over the limit of 16777216 bytes; send less at once")


# Slow clients


async def test_a_head_byte_by_byte_is_cut_off() -> None:
    async with serving() as to:
        answer = await talk(to, *[bytes([byte]) for byte in ALIVE], pause=0.02)
    assert status_and_error(answer)[0] == 408


async def test_a_body_byte_by_byte_is_cut_off_in_all_and_not_per_byte() -> None:
    async with serving() as to:
        started = trio.current_time()
        answer = await talk(to, post(b"", 100), *[b"["] * 40, pause=0.02)
        assert status_and_error(answer)[0] == 408
        assert trio.current_time() - started < 3


async def test_an_endless_head_is_refused() -> None:
    async with serving() as to:
        answer = await talk(to, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 20_000)
    assert status_and_error(answer)[0] == 431


async def test_idle_and_slow_connections_make_room_for_others() -> None:
    async with serving(limits=replace(LIMITS, head_seconds=60, idle_seconds=60)) as to:
        streams = [await trio.open_tcp_stream(to.host, to.port) for _ in range(30)]
        for stream in streams:
            await stream.send_all(b"GET /he" if stream is streams[0] else b"")
        for _ in range(20):
            assert (await talk(to, ALIVE)).startswith(b"HTTP/1.1 200")
        for stream in streams:
            await stream.aclose()


async def test_when_every_connection_works_the_next_is_503() -> None:
    node = FakeNode(hold=trio.Event())
    async with serving(node) as to, trio.open_nursery() as nursery:
        for _ in range(LIMITS.connections):
            nursery.start_soon(talk, to, post(b"[0, 1]", more="connection: close\r\n"))
        while len(node.asked) < LIMITS.connections:
            await trio.sleep(0.01)
        status, error = status_and_error(await talk(to, b""))
        assert (status, "connections" in error) == (503, True)
        assert node.hold is not None
        node.hold.set()


async def test_a_client_that_does_not_read_loses_its_place() -> None:
    rows: list[dict[str, JSON]] = [{"name": "x" * 1000}] * 3000
    async with serving(FakeNode(peer_rows=rows)) as to:
        lazy = []
        for _ in range(LIMITS.connections):
            stream = await trio.open_tcp_stream(to.host, to.port)
            await stream.send_all(b"GET /v1/peers HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3)
            lazy.append(stream)
        await trio.sleep(0.6)
        assert (await talk(to, ALIVE)).startswith(b"HTTP/1.1 200")
        for stream in lazy:
            await stream.aclose()


# Hostile clients

HOSTILE: Sequence[bytes] = [
    b"\x00\xff" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: !!!!a\r\nconnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-key: a\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-extensions: permessage-deflate;\xff=1\r\n\r\n" + b"\xff" * 40,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nho st: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n",
    b"CONNECT evil:1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"\r\n" * 5000,
    b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_bytes_end_their_connection_alone(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as to:
        answer = await talk(to, data, end=True)
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in answer
        assert b"101 " not in answer
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_mutated_requests_end_their_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(2)
    async with serving() as to:
        for _ in range(150):
            data = bytearray(post(b'{"inputs": [[0, 1]]}') + ALIVE)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            answer = await talk(to, bytes(data), end=True)
            assert b"HTTP/1.1 500" not in answer, bytes(data)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_client_that_resets_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    node = FakeNode(hold=trio.Event())
    async with serving(node) as to:
        for data in (
            b"",
            b"GET /he",
            post(b"[0,", 6),
            post(b"[0, 1]"),
            b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n",
        ):
            stream = await trio.open_tcp_stream(to.host, to.port)
            await stream.send_all(data)
            await trio.sleep(0.05)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        assert node.hold is not None
        node.hold.set()
        await trio.sleep(0.05)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_bug_ends_in_500_and_the_endpoint_lives(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeNode(failure=RuntimeError("boom"))) as to:
        status, error = status_and_error(await talk(to, post(b"[0, 1]", more="connection: close\r\n")))
    assert (status, "peer logs" in error) == (500, True)
    assert "boom" in caplog.text


# Starting


async def test_a_port_in_use_is_a_users_error_with_the_remedy() -> None:
    async with serving() as to:
        with pytest.raises(UserError, match=rf"port {to.port} at 127.0.0.1 is in use.*--api 127.0.0.1:"):
            await serve(FakeNode(), ApiConfig(to))


async def test_an_address_of_another_machine_is_a_users_error() -> None:
    config = ApiConfig(Address("192.0.2.1", 8710), api_key="k" * 32)
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is not an address of this machine"):
        await serve(FakeNode(), config)


def test_other_machines_are_let_in_with_a_key_alone() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(UserError, match="would be open to other machines"):
            ApiConfig(Address(host, 8710))
        assert ApiConfig(Address(host, 8710), api_key="k" * 16).api_key
    with pytest.raises(UserError, match="the API key has 15 characters; it needs 16"):
        ApiConfig(api_key="k" * 15)
    assert "kkkk" not in repr(ApiConfig(api_key="k" * 16))


async def test_with_a_wildcard_address_the_one_reached_is_the_host() -> None:
    config = ApiConfig(Address("0.0.0.0", 0), api_key="k" * 32, limits=LIMITS)
    async with trio.open_nursery() as nursery:
        bound: Address = await nursery.start(serve, FakeNode(), config)
        here = Address("127.0.0.1", bound.port)
        key = b"connection: close\r\nauthorization: Bearer " + b"k" * 32
        for host, status in ((str(here), b"200"), ("127.0.0.1", b"200"), (f"0.0.0.0:{bound.port}", b"421")):
            answer = await talk(here, b"GET /healthz HTTP/1.1\r\nhost: " + host.encode() + b"\r\n" + key + b"\r\n\r\n")
            assert answer.split()[1] == status
        nursery.cancel_scope.cancel()


async def test_ipv6_loopback_is_served() -> None:
    async with trio.open_nursery() as nursery:
        try:
            bound: Address = await nursery.start(serve, FakeNode(), ApiConfig(Address("::1", 0), limits=LIMITS))
        except UserError:
            pytest.skip("this machine has no IPv6")
        request = f"GET /healthz HTTP/1.1\r\nhost: {bound}\r\nconnection: close\r\n\r\n"
        assert (await talk(bound, request.encode())).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


# Stopping


async def test_at_the_stop_answers_under_way_are_finished_and_nothing_new_is_taken() -> None:
    node = FakeNode(hold=trio.Event())
    answers: list[bytes] = []

    async def ask(data: bytes) -> None:
        answers.append(await talk(bound, data))

    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(
                serve, node, ApiConfig(ANY_PORT, limits=replace(LIMITS, drain_seconds=5))
            )
            clients.start_soon(ask, post(b"[0, 1]"))
            clients.start_soon(ask, WATCH)
            clients.start_soon(ask, b"")  # idle
            while not node.asked or not node.broadcast._watchers:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
                with pytest.raises(OSError, match="all attempts to connect"):
                    await trio.open_tcp_stream(bound.host, bound.port)
                assert node.hold is not None
                node.hold.set()
        assert trio.current_effective_deadline() == float("inf")
    idle, events, prediction = sorted(answers, key=lambda answer: (b"result" in answer, len(answer)))
    assert idle == b""
    assert events.endswith(b"0\r\n\r\n")  # the stream has its proper end
    assert b'"result":1' in prediction
    assert b"connection: close" in prediction.lower()


async def test_at_the_stop_what_hangs_is_cut_off() -> None:
    node = FakeNode(hold=trio.Event())
    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve, node, ApiConfig(ANY_PORT, limits=LIMITS))
            clients.start_soon(talk, bound, post(b"[0, 1]"))
            while not node.asked:
                await trio.sleep(0.01)
            started = trio.current_time()
            nursery.cancel_scope.cancel()
        assert 0.3 < trio.current_time() - started < 3


async def test_the_port_is_free_after_the_stop() -> None:
    async with serving() as to:
        pass
    async with trio.open_nursery() as nursery:
        assert await nursery.start(serve, FakeNode(), ApiConfig(to, limits=LIMITS)) == to
        nursery.cancel_scope.cancel()
