"""Events: every watcher gets them, none can hold up the teller."""

from __future__ import annotations

import pytest
import trio

from gossipml.api.broadcast import Broadcast
from gossipml.api.ports import Event, Overloaded


def event(number: int) -> Event:
    return Event("round", {"round": number})


async def test_watchers_get_every_event_in_order() -> None:
    told = Broadcast()
    with told.subscribe() as one, told.subscribe() as two:
        told.publish(event(1))
        told.publish(event(2))
        assert [await anext(one), await anext(one)] == [await anext(two), await anext(two)] == [event(1), event(2)]


async def test_a_slow_watcher_loses_the_oldest_and_is_told_how_many() -> None:
    told = Broadcast(queue=2)
    with told.subscribe() as slow:
        for number in range(5):
            told.publish(event(number))
        assert await anext(slow) == Event("lost", {"events": 3})
        assert [await anext(slow), await anext(slow)] == [event(3), event(4)]
        told.publish(event(5))
        assert await anext(slow) == event(5)


async def test_a_wait_that_was_cut_off_loses_nothing(autojump_clock: trio.abc.Clock) -> None:
    told = Broadcast()
    with told.subscribe() as watcher:
        with trio.move_on_after(1) as scope:
            await anext(watcher)
        assert scope.cancelled_caught
        told.publish(event(1))
        assert await anext(watcher) == event(1)


async def test_an_event_wakes_who_waits(autojump_clock: trio.abc.Clock) -> None:
    told = Broadcast()

    async def tell() -> None:
        await trio.sleep(1)
        told.publish(event(1))

    with told.subscribe() as watcher:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            assert await anext(watcher) == event(1)


def test_watchers_are_bounded_and_leave_their_place() -> None:
    told = Broadcast(max_watchers=1)
    with told.subscribe(), pytest.raises(Overloaded, match="1 clients watch"), told.subscribe():
        pass
    with told.subscribe():
        told.publish(event(1))
