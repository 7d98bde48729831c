"""HTTP/1.1 connections for an ASGI application: httptools (llhttp, the parser of Node.js) over trio streams.

RFC 9112 as far as llhttp speaks it, strictly. Left out: TLS, HTTP/2, WebSockets and every other Upgrade (ignored, as
the RFC allows: the request is answered and the connection closed), absolute-form targets, and the Date header: the
endpoint has no wall clock, and no answer may be cached.

Every wait has its limit, and a connection fails alone. When all places are taken, the connection that has waited
longest for its request to come makes room: idle and slow clients cannot keep others out.
"""

from __future__ import annotations

import http
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

import httptools
import trio
from starlette.types import ASGIApp, Message, Scope

from gossipml import strict_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    connections: int = 2048  # about 20 kB each
    head_bytes: int = 1 << 14  # request line and headers: what common servers allow
    head_seconds: float = 5.0  # from the first byte of a request to the end of its headers
    idle_seconds: float = 30.0  # without a request on an open connection
    body_seconds: float = 10.0  # for the whole of a body; 16 MiB take 1.3 s at 100 Mbit/s
    write_seconds: float = 10.0  # for the client to take one piece of an answer
    linger_seconds: float = 2.0  # for a client to read a refusal while it still sends its body
    drain_seconds: float = 3.0  # for answers under way when the endpoint stops


READ_SIZE = 1 << 16
HEAD_READ = 1 << 14  # while no body is awaited: bounds how many requests sent ahead are parsed at once
LINGER_BYTES = 1 << 22  # of an unwanted body, thrown away so that the client sees the answer and no reset
PHRASES = {status.value: status.phrase.encode() for status in http.HTTPStatus}


@dataclass(frozen=True)
class _Head:
    """Request line and headers."""

    method: bytes
    target: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    """Names in lower case."""
    keep_alive: bool
    """The client may send another request on this connection."""
    upgrade: bool

    @property
    def has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        )

    @property
    def waits(self) -> bool:
        """Whether the client waits for a word before it sends the body (RFC 9110, 10.1.1)."""
        return self.version == "1.1" and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self.headers
        )


class _End:
    """Of a message."""


@dataclass(frozen=True)
class _Broken:
    """What the client sent is no HTTP, and nothing after it can be understood."""

    status: int
    sentence: str


_Event: TypeAlias = "_Head | bytes | _End | _Broken"


class _Parser:
    """Bytes in, `events` out. Everything that was fed is parsed at once, so feed little."""

    def __init__(self, head_bytes: int) -> None:
        self.events: deque[_Event] = deque()
        self.in_head = False
        """Some of a head has come, and not all of it."""
        self.broken = False
        self._limit = head_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._since = 0  # bytes since the last event: of a head, of a chunk's frame, of trailers
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_done = False

    def feed(self, data: bytes) -> None:
        if self.broken:
            return
        self._since += len(data)
        before = len(self.events)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break(400, "another protocol was asked for, which is not spoken here")
        except httptools.HttpParserError as error:
            self._break(400, str(error) or type(error).__name__)
        if len(self.events) > before:
            self._since = 0
        elif self._since > self._limit and not self.broken:
            self._break(431, f"the headers are over the limit of {self._limit} bytes")

    def end(self) -> None:
        """The client sends nothing more."""
        if self.in_head or (self._head_done and not self.broken):
            self._break(400, "the client ended before it was whole")
        self.broken = True

    def _break(self, status: int, sentence: str) -> None:
        self.broken, self.in_head = True, False
        self.events.append(_Broken(status, sentence))

    # Called by httptools

    def on_message_begin(self) -> None:
        self.in_head, self._head_done = True, False
        self._target, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # trailers are dropped
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.in_head, self._head_done = False, True
        head = _Head(
            parser.get_method(), self._target, parser.get_http_version(), self._headers,
            parser.should_keep_alive(), parser.should_upgrade(),
        )  # fmt: skip
        self.events.append(head)

    def on_body(self, body: bytes) -> None:
        self.events.append(body)

    def on_message_complete(self) -> None:
        self._head_done = False
        self.events.append(_End())


class Server:
    """Serves connections with one application."""

    def __init__(self, app: ASGIApp, limits: Limits, stopping: trio.Event) -> None:
        self.app = app
        self.limits = limits
        self.stopping = stopping
        self.open = 0
        self._waiting: dict[_Connection, trio.CancelScope] = {}

    async def handle(self, stream: trio.SocketStream) -> None:
        """Answer the requests of one connection until it ends. Raises nothing but cancellation."""
        connection = _Connection(self, stream)
        all_busy = self.open - len(self._waiting) >= self.limits.connections
        if self.open >= self.limits.connections:
            self._make_room()
        self.open += 1
        try:
            if all_busy:
                await connection.refuse(503, "all connections are taken; try again", (b"retry-after", b"1"))
                await connection.linger()
            else:
                await connection.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the client went away
        except Exception:
            log.exception("an HTTP connection failed")
        finally:
            self.open -= connection.has_place
            with trio.CancelScope(shield=True):  # a plain socket closes at once
                await stream.aclose()

    def _make_room(self) -> bool:
        """Whether a connection that waits for its client could be cut off; its place is free at once."""
        for connection, scope in self._waiting.items():
            del self._waiting[connection]
            connection.has_place = False
            self.open -= 1
            scope.cancel()
            return True
        return False

    def cancel_waiting(self) -> None:
        """End the connections that have no request under way; at the stop."""
        while self._make_room():
            pass

    async def wait_for_client(
        self, connection: _Connection, seconds: float, read: Callable[[], Awaitable[None]]
    ) -> bool:
        """Run `read`, cut off after `seconds` or when the place is needed; whether it came to its end."""
        with trio.move_on_after(seconds) as scope:
            self._waiting[connection] = scope
            try:
                await read()
            finally:
                self._waiting.pop(connection, None)
        return not scope.cancelled_caught


class _Connection:
    def __init__(self, server: Server, stream: trio.SocketStream) -> None:
        self.server = server
        self.limits = server.limits
        self.stream = stream
        self.parser = _Parser(server.limits.head_bytes)
        self.gone = trio.Event()
        """The client takes nothing more."""
        self.has_place = True
        """Whether it counts among the open ones; not after it had to make room."""
        self.answer_begun = False
        """To the request under way."""
        self._peer, self._own = stream.socket.getpeername()[:2], stream.socket.getsockname()[:2]

    async def run(self) -> None:
        while not self.server.stopping.is_set():
            match await self._receive_head():
                case None:
                    return
                case _Broken(status, sentence):
                    await self.refuse(status, f"this is not HTTP/1.1: {sentence}")
                    break
                case head:
                    if not await self._answer(head):
                        break
        await self.linger()

    async def read(self) -> None:
        """More bytes from the client into the parser; none is its end."""
        data = await self.stream.receive_some(READ_SIZE if self.parser._head_done else HEAD_READ)
        if data:
            self.parser.feed(data)
        else:
            self.parser.end()

    async def next_event(self) -> _Event | None:
        """None at the client's end."""
        while not self.parser.events:
            if self.parser.broken:
                return None
            await self.read()
        return self.parser.events.popleft()

    async def write(self, data: bytes) -> None:
        """Send, or note that the client is gone: an answer that nobody takes is no error of the application."""
        if self.gone.is_set() or not data:
            return
        with trio.move_on_after(self.limits.write_seconds) as scope:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.gone.set()
        if scope.cancelled_caught:
            self.gone.set()

    async def refuse(self, status: int, sentence: str, *headers: tuple[bytes, bytes]) -> None:
        """An error of the connection itself, after which it closes; nothing when an answer has begun."""
        if self.answer_begun:
            return
        self.answer_begun = True
        body = strict_json.dump({"error": sentence})
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            (b"connection", b"close"),
            *headers,
        ]
        await self.write(_head_bytes(status, head) + body)

    async def linger(self) -> None:
        """Say that nothing more comes, and throw away what the client still sends, within bounds: closing with
        bytes unread would reset the connection and take the answer with it (RFC 9112, 9.6)."""

        async def discard() -> None:
            left = LINGER_BYTES
            while left > 0 and (data := await self.stream.receive_some(READ_SIZE)):
                left -= len(data)

        if not self.gone.is_set():
            await self.stream.send_eof()
            await self.server.wait_for_client(self, self.limits.linger_seconds, discard)

    async def _receive_head(self) -> _Head | _Broken | None:
        """The next request; None when none came."""
        self.answer_begun = False
        parser = self.parser
        is_idle = not parser.events and not parser.in_head and not parser.broken
        if is_idle and not await self.server.wait_for_client(self, self.limits.idle_seconds, self.read):
            return None
        if not parser.events and not parser.broken:

            async def read_head() -> None:
                while not parser.events and not parser.broken:
                    await self.read()

            if not await self.server.wait_for_client(self, self.limits.head_seconds, read_head):
                if self.has_place and not self.server.stopping.is_set():
                    await self.refuse(408, "the request did not come in time")
                    await self.linger()
                return None
        event = parser.events.popleft() if parser.events else None
        assert event is None or isinstance(event, _Head | _Broken)  # a message begins with its head
        return event

    async def _answer(self, head: _Head) -> bool:
        """Whether another request may follow."""
        try:
            scope = self._scope(head)
        except ValueError as error:
            await self.refuse(400, str(error))
            return False
        exchange = _Exchange(self, head)
        try:
            await self.server.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("the answer to %s %s broke off", scope["method"], scope["path"])
        # Nothing is sent when there was an answer.
        await self.refuse(500, "gossipml failed inside; its log says more: `gossipml peer logs`")
        return exchange.is_whole

    def _scope(self, head: _Head) -> Scope:
        """The ASGI scope; ValueError with a sentence for what cannot be answered."""
        raw_path, _, query = head.target.partition(b"?")
        if not raw_path.startswith(b"/"):
            raise ValueError(f"the target {raw_path[:80].decode('latin-1')!r} is no path; begin it with /")
        if head.upgrade and head.has_body:
            raise ValueError("no other protocol is spoken here; send the body without the Upgrade header")
        try:
            path = (unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path).decode()
        except UnicodeDecodeError:
            raise ValueError("the path is not UTF-8; write it as %XX of UTF-8") from None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method.decode("ascii"),
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": head.headers,
            "client": self._peer,
            "server": self._own,
        }


class _Exchange:
    """`receive` and `send` of one request."""

    def __init__(self, connection: _Connection, head: _Head) -> None:
        self._connection = connection
        self._head = head
        self._deadline = trio.current_time() + connection.limits.body_seconds
        self._start: Message | None = None
        self._chunked = False
        self._keep_alive = head.keep_alive and not head.upgrade
        self._over = False
        """Nothing more is sent: the answer is whole, or the connection gave one itself."""
        self._end_told = False
        self._body_read = not head.has_body
        if self._body_read and connection.parser.events and isinstance(connection.parser.events[0], _End):
            connection.parser.events.popleft()
        self._waits = head.waits and not self._body_read

    @property
    def is_whole(self) -> bool:
        """Request and answer have come to their end, and the connection is as before."""
        return self._over and self._body_read and self._keep_alive and not self._connection.gone.is_set()

    async def receive(self) -> Message:
        if self._end_told:
            await self._until_gone()
            return {"type": "http.disconnect"}
        body = b"" if self._body_read else await self._read_body()
        if body is None:
            self._end_told = True
            return {"type": "http.disconnect"}
        self._end_told = self._body_read
        return {"type": "http.request", "body": body, "more_body": not self._body_read}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body" and not self._over:
            data = b""
            if self._start is not None:
                data = self._begin(self._start)
                self._start = None
            body, last = message.get("body", b""), not message.get("more_body", False)
            if self._head.method != b"HEAD":
                data += b"%x\r\n%b\r\n" % (len(body), body) if self._chunked and body else body
                data += b"0\r\n\r\n" if self._chunked and last else b""
            self._over = last
            await self._connection.write(data)

    def _begin(self, start: Message) -> bytes:
        self._connection.answer_begun = True
        self._keep_alive &= self._body_read and not self._connection.server.stopping.is_set()
        headers = list(start.get("headers", ()))
        if not any(name == b"content-length" for name, _ in headers):
            self._chunked = self._head.version == "1.1"
            self._keep_alive &= self._chunked  # an HTTP/1.0 client knows the end by our closing
            headers += [(b"transfer-encoding", b"chunked")] if self._chunked else []
        if not self._keep_alive:
            headers.append((b"connection", b"close"))
        elif self._head.version == "1.0":
            headers.append((b"connection", b"keep-alive"))
        return _head_bytes(start["status"], headers)

    async def _read_body(self) -> bytes | None:
        """The next piece of the body, empty at its end; None when it broke off."""
        connection = self._connection
        if self._waits and not connection.parser.events:
            await connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._waits = False
        with trio.move_on_at(self._deadline):
            try:
                match await connection.next_event():
                    case bytes() as body:
                        return body
                    case _End():
                        self._body_read = True
                        return b""
                    case event:
                        why = event.sentence if isinstance(event, _Broken) else "the client ended before it was whole"
                        await connection.refuse(400, f"the body is not as it was announced: {why}")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                connection.gone.set()
            self._over = True
            return None
        self._over = True
        await connection.refuse(408, f"the body did not come within {connection.limits.body_seconds:g} s")
        return None

    async def _until_gone(self) -> None:
        """Wait until the client ends or resets the connection. Should it send its next request early, that is
        kept, once, so that it stays bounded; from then on only a failing write tells."""
        connection = self._connection
        if not connection.parser.events and not connection.gone.is_set():
            try:
                await connection.read()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if connection.parser.broken:
                return
        await connection.gone.wait()


def _head_bytes(status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (status, PHRASES.get(status, b""))]
    lines += [name + b": " + value for name, value in headers]
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1:
        raise ValueError("an answer's header holds a line end")
    return head
