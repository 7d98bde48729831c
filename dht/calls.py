"""Calls of one DHT node under way: sent, sent once more after the soft wait, given up after the hard wait.

No task waits for a call: its `done` is called in the turn in which the reply came, or the time was up, and may make
the next calls there. A lookup of forty datagrams is then one task that wakes once, at its end. One task keeps the
time of all calls, and of whoever else asks with `at`.

Whoever no longer wants an answer drops the call. What it leaves instead of dropping costs nothing more and still
tells the table who lives: the answer is heard, a silence is a miss.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import trio

from gossipml.dht.messages import NodeContact, Question
from gossipml.dht.node import Answered, DhtNode
from gossipml.env import Clock, Datagrams
from gossipml.ids import Address

log = logging.getLogger("gossipml.dht")

STALL = 0.1  # seconds; a timer that is later than this was kept waiting by our own process: hear first what has come

Done = Callable[[Answered | None], None]


class Timer:
    """What is to be called at some time, unless it is cancelled before."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


@dataclass(slots=True)
class _Call:
    to: NodeContact | Address
    done: Done
    gives_up: float
    timer: Timer


class Calls:
    """`begin` while `run` runs; each `done` is called exactly once, unless its call is dropped before."""

    def __init__(self, clock: Clock, node: DhtNode, hard_wait: float, on_lost: Callable[[NodeContact], None]) -> None:
        self._clock = clock
        self._node = node
        self._hard_wait = hard_wait
        self._on_lost = on_lost
        self._socket: Datagrams | None = None
        self._calls: dict[bytes, _Call] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()  # of timers for one moment
        self._sleeps_until = math.inf
        self._sleep = trio.CancelScope()  # ends when the next timer is due

    @property
    def running(self) -> bool:
        return self._socket is not None

    async def run(self, socket: Datagrams, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send through `socket` and keep the time until cancelled; then all calls under way fail."""
        self._socket = socket
        task_status.started()
        try:
            while True:
                now = self._clock.now()
                if self._next() < now - STALL:
                    await trio.sleep(STALL)
                    now = self._clock.now()
                while self._next() <= now:
                    callback = heapq.heappop(self._timers)[2].callback
                    if callback is not None:
                        callback()
                self._sleeps_until = self._next()
                self._sleep = trio.CancelScope(deadline=self._moment(self._sleeps_until))
                with self._sleep:
                    await trio.sleep_forever()
        finally:
            self._socket = None
            self._timers.clear()
            for number in list(self._calls):
                self._end(number, None)

    def begin(self, to: NodeContact | Address, question: Question, done: Done) -> bytes | None:
        """Ask one node; the number of the call. None when that is impossible now, and `done` is not called."""
        if self._socket is None:
            return None
        now = self._clock.now()
        asked = self._node.ask(to, question, now, self._clock.wall())
        if asked is None:
            return None
        number, datagram = asked
        timer = self.at(now + self._node.soft_wait, lambda: self._ask_again(number))
        self._calls[number] = _Call(to, done, now + self._hard_wait, timer)
        self.post(datagram, to.address if isinstance(to, NodeContact) else to)
        return number

    def drop(self, number: bytes) -> None:
        """Forget a call; its `done` is not called any more."""
        call = self._calls.pop(number, None)
        if call is not None:
            call.timer.cancel()
            self._node.forget(number)

    def answered(self, action: Answered) -> None:
        call = self._calls.pop(action.call, None)
        if call is not None:
            call.timer.cancel()
            call.done(action)

    def at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` at that time, if we still run and nobody cancels it."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        if when < self._sleeps_until:
            self._sleeps_until = when
            self._sleep.deadline = self._moment(when)  # an event would wake the task only to sleep again
        return timer

    def _moment(self, when: float) -> float:
        """What trio calls this time of ours."""
        return trio.current_time() + max(0.0, when - self._clock.now())

    def _next(self) -> float:
        """When the next timer is due. Most calls are answered before theirs: nobody wakes for those."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def post(self, data: bytes, to: Address) -> None:
        if self._socket is not None:
            try:
                self._socket.post(data, to)
            except OSError as error:  # no route, a full buffer: as good as lost
                log.debug("send to %s: %s", to, error)

    def _ask_again(self, number: bytes) -> None:
        call = self._calls.get(number)
        datagram = None if call is None else self._node.again(number, self._clock.wall())
        if call is not None and datagram is not None:
            address = call.to.address if isinstance(call.to, NodeContact) else call.to
            for repeated in (datagram, *self._node.older(number, self._clock.wall())):
                self.post(repeated, address)
            call.timer = self.at(call.gives_up, lambda: self._give_up(number))

    def _give_up(self, number: bytes) -> None:
        call = self._calls.get(number)
        if call is not None:
            if isinstance(call.to, NodeContact) and self._node.missed(call.to):
                self._on_lost(call.to)
            self._end(number, None)

    def _end(self, number: bytes, answered: Answered | None) -> None:
        call = self._calls.pop(number)
        call.timer.cancel()
        self._node.forget(number)
        call.done(answered)
