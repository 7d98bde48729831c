"""`/v1/events`: server-sent events (WHATWG HTML, 9.2), from the node to one client.

`status` and `peers` come at once and then every second, with what `/v1/status` and `/v1/peers` answer (of the peers the
first MAX_PEERS); the others come when they happen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossipml import strict_json
from gossipml.api.ports import JSON, Event, Node

BEAT = 1.0  # seconds between two looks at the whole; they show, too, that the line still stands
MAX_PEERS = 200  # connected ones come first; all of them are in /v1/peers
RETRY = 2000  # milliseconds a browser waits before it connects again


class EventStream(Response):
    """Ends when the client leaves or the endpoint stops."""

    media_type = "text/event-stream"

    def __init__(self, node: Node, stopping: trio.Event) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._node = node
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        with self._node.subscribe() as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, self._stopping.wait, nursery.cancel_scope)
                    nursery.start_soon(_cancel_after, _until_gone(receive), nursery.cancel_scope)
                    await self._tell(events, say)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, events: AsyncIterator[Event], say: Callable[[bytes], Awaitable[None]]) -> None:
        beat = trio.current_time()
        await say(b"retry: %d\n\n" % RETRY)
        while True:
            if trio.current_time() >= beat:
                beat = trio.current_time() + BEAT
                peers: list[JSON] = [*self._node.peers()[:MAX_PEERS]]
                await say(encode(Event("status", self._node.status())) + encode(Event("peers", {"peers": peers})))
            event: Event | None = None
            with trio.move_on_at(beat):  # around the wait alone: half an event must not be sent
                event = await anext(events)
            if event is not None:
                await say(encode(event))


def encode(event: Event) -> bytes:
    # JSON escapes line ends, so the data is one line.
    return b"event: " + event.kind.encode() + b"\ndata: " + strict_json.dump(event.data) + b"\n\n"


def _until_gone(receive: Receive) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return wait


async def _cancel_after(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
