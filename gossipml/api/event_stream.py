"""`/v1/events`: server-sent events (WHATWG HTML, 9.2), from the node to one client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossipml.api import strict_json
from gossipml.api.ports import Event, Node

KEEPALIVE = 15.0  # seconds of silence after which a comment shows that the line still stands
RETRY = 2000  # milliseconds a browser waits before it connects again


class EventStream(Response):
    """Begins with an event `status`; ends when the client leaves or the endpoint stops."""

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
                await say(b"retry: %d\n\n" % RETRY + encode(Event("status", self._node.status())))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, self._stopping.wait, nursery.cancel_scope)
                    nursery.start_soon(_cancel_after, _until_gone(receive), nursery.cancel_scope)
                    while True:
                        with trio.move_on_after(KEEPALIVE) as silence:
                            event = await anext(events)
                        await say(b": still here\n\n" if silence.cancelled_caught else encode(event))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


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
