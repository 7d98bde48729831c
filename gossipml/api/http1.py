"""HTTP/1.1 connections for an ASGI application: h11 over trio streams.

RFC 9112 as far as h11 speaks it. Left out: TLS, HTTP/2, WebSockets and every other Upgrade (ignored, as the RFC
allows), absolute-form targets, and the Date header: the endpoint has no wall clock, and no answer may be cached.

Every wait has its limit, and a connection fails alone. When all places are taken, the connection that has waited
longest for its request to come makes room: idle and slow clients cannot keep others out.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import h11
import trio
from starlette.types import ASGIApp, Message, Scope

from gossipml.api import strict_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    connections: int = 256  # about 60 kB each
    head_bytes: int = 1 << 14  # request line and headers: what common servers allow
    head_seconds: float = 5.0  # from the first byte of a request to the end of its headers
    idle_seconds: float = 30.0  # without a request on an open connection
    body_seconds: float = 10.0  # for the whole of a body; 1 MiB takes 0.1 s on a bad link
    write_seconds: float = 10.0  # for the client to take one piece of an answer
    linger_seconds: float = 2.0  # for a client to read a refusal while it still sends its body
    drain_seconds: float = 3.0  # for answers under way when the endpoint stops


READ_SIZE = 1 << 16
LINGER_BYTES = 1 << 22  # of an unwanted body, thrown away so that the client sees the answer and no reset


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
                await connection.refuse(503, "all connections are taken; try again", ("retry-after", "1"))
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
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)
        self.gone = trio.Event()
        """The client takes nothing more."""
        self.has_place = True
        """Whether it counts among the open ones; not after it had to make room."""

    async def run(self) -> None:
        try:
            while not self.server.stopping.is_set():
                request = await self._receive_head()
                if request is None:
                    return
                await self._answer(request)
                if self.h11.our_state is not h11.DONE or self.h11.their_state is not h11.DONE:
                    break
                self.h11.start_next_cycle()
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint, f"this is not HTTP/1.1: {error}")
        await self.linger()

    async def read(self) -> None:
        """More bytes from the client into the parser; none is its end."""
        self.h11.receive_data(await self.stream.receive_some(READ_SIZE))

    async def write(self, *events: h11.Event) -> None:
        """Send, or note that the client is gone: an answer that nobody takes is no error of the application."""
        data = b"".join(self.h11.send(event) or b"" for event in events)
        if self.gone.is_set() or not data:
            return
        with trio.move_on_after(self.limits.write_seconds) as scope:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.gone.set()
        if scope.cancelled_caught:
            self.gone.set()

    async def refuse(self, status: int, sentence: str, *headers: tuple[str, str]) -> None:
        """An error of the connection itself, after which it closes; nothing when an answer has begun."""
        if self.h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = strict_json.dump({"error": sentence})
        head = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("connection", "close"),
            *headers,
        ]
        await self.write(h11.Response(status_code=status, headers=head), h11.Data(data=body), h11.EndOfMessage())

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

    async def _receive_head(self) -> h11.Request | None:
        """The next request; None when none came."""
        event = self.h11.next_event()
        if event is h11.NEED_DATA:
            if not self.h11.trailing_data[0] and not await self.server.wait_for_client(
                self, self.limits.idle_seconds, self.read
            ):
                return None

            async def read_head() -> None:
                nonlocal event
                while (event := self.h11.next_event()) is h11.NEED_DATA:
                    await self.read()

            if not await self.server.wait_for_client(self, self.limits.head_seconds, read_head):
                if self.has_place and not self.server.stopping.is_set():
                    await self.refuse(408, "the request did not come in time")
                    await self.linger()
                return None
        return event if isinstance(event, h11.Request) else None

    async def _answer(self, request: h11.Request) -> None:
        try:
            scope = self._scope(request)
        except ValueError as error:
            await self.refuse(400, str(error))
            return
        exchange = _Exchange(self, request)
        try:
            await self.server.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("the answer to %s %s broke off", scope["method"], scope["path"])
        # Nothing is sent when there was an answer.
        await self.refuse(500, "gossipml failed inside; its log says more: `gossipml peer logs`")

    def _scope(self, request: h11.Request) -> Scope:
        """The ASGI scope; ValueError with a sentence for a target that is no path."""
        raw_path, _, query = request.target.partition(b"?")
        if not raw_path.startswith(b"/"):
            raise ValueError(f"the target {raw_path[:80].decode('latin-1')!r} is no path; begin it with /")
        try:
            path = unquote_to_bytes(raw_path).decode()
        except UnicodeDecodeError:
            raise ValueError("the path is not UTF-8; write it as %XX of UTF-8") from None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode("ascii"),
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": self.stream.socket.getpeername()[:2],
            "server": self.stream.socket.getsockname()[:2],
        }


class _Exchange:
    """`receive` and `send` of one request."""

    def __init__(self, connection: _Connection, request: h11.Request) -> None:
        self._connection = connection
        self._is_head = request.method == b"HEAD"
        self._deadline = trio.current_time() + connection.limits.body_seconds
        self._start: Message | None = None
        self._over = False
        """Nothing more is sent: the answer is whole, or the connection gave one itself."""
        self._end_told = False
        names = {name for name, _ in request.headers}
        self._body_read = not names & {b"content-length", b"transfer-encoding"}
        if self._body_read:
            connection.h11.next_event()  # the end of the message, at once

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
            events: list[h11.Event] = []
            if self._start is not None:
                headers = list(self._start.get("headers", ()))
                if not self._body_read or self._connection.server.stopping.is_set():
                    headers.append((b"connection", b"close"))
                events.append(h11.Response(status_code=self._start["status"], headers=headers))
                self._start = None
            if message.get("body", b"") and not self._is_head:
                events.append(h11.Data(data=message["body"]))
            if not message.get("more_body", False):
                events.append(h11.EndOfMessage())
                self._over = True
            await self._connection.write(*events)

    async def _read_body(self) -> bytes | None:
        """The next piece of the body, empty at its end; None when it broke off."""
        connection = self._connection
        if connection.h11.they_are_waiting_for_100_continue:
            await connection.write(h11.InformationalResponse(status_code=100, headers=[]))
        with trio.move_on_at(self._deadline):
            try:
                while True:
                    match connection.h11.next_event():
                        case h11.Data(data=data):
                            return bytes(data)
                        case h11.EndOfMessage():
                            self._body_read = True
                            return b""
                    await connection.read()
            except h11.RemoteProtocolError as error:
                self._over = True
                await connection.refuse(400, f"the body is not as it was announced: {error}")
                return None
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._over = True
                connection.gone.set()
                return None
        self._over = True
        await connection.refuse(408, f"the body did not come within {connection.limits.body_seconds:g} s")
        return None

    async def _until_gone(self) -> None:
        """Wait until the client ends or resets the connection. Should it send its next request early, those bytes
        are kept, once, so that they stay bounded; from then on only a failing write tells."""
        connection = self._connection
        if not connection.h11.trailing_data[0] and not connection.gone.is_set():
            try:
                data = await connection.stream.receive_some(READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            connection.h11.receive_data(data)
        await connection.gone.wait()
