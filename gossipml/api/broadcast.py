"""Events for any number of watchers, none of whom can hold up the one who tells.

Each watcher has a bounded queue. A slow one loses its oldest events and finds an event `lost` with their number
in place of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import trio

from gossipml.api.ports import Event, Overloaded

QUEUE = 256  # events of a busy minute; about 100 kB a watcher
MAX_WATCHERS = 16  # pages and commands of one person; bounds memory


class Broadcast:
    """The daemon holds one: `publish` here, and `subscribe` is the `Node.subscribe` of the endpoint."""

    def __init__(self, queue: int = QUEUE, max_watchers: int = MAX_WATCHERS) -> None:
        self._queue = queue
        self._max_watchers = max_watchers
        self._watchers: set[_Watcher] = set()

    def publish(self, event: Event) -> None:
        """Tell every watcher; never waits."""
        for watcher in self._watchers:
            watcher.put(event)

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[Event]]:
        """Events from now on. Raises Overloaded beyond the bound on watchers."""
        if len(self._watchers) >= self._max_watchers:
            raise Overloaded(
                f"{len(self._watchers)} clients watch the events already, the most that may; close one of them",
                retry_after=10,
            )
        watcher = _Watcher(self._queue)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


class _Watcher:
    def __init__(self, bound: int) -> None:
        self._events: deque[Event] = deque(maxlen=bound)
        self._lost = 0
        self._arrived = trio.Event()

    def put(self, event: Event) -> None:
        self._lost += len(self._events) == self._events.maxlen
        self._events.append(event)
        self._arrived.set()

    def __aiter__(self) -> _Watcher:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            self._arrived = trio.Event()
            await self._arrived.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return Event("lost", {"events": lost})
        return self._events.popleft()
