"""A lookup under way: the state machine of `lookup`, its calls, and the moment when it is over.

Each answer is heard in the turn in which it came, and the next nodes are asked there. When a search is over what was
asked and has not answered is left to itself: it still tells the table who lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from gossipml.dht.calls import Calls, Timer
from gossipml.dht.lookup import Lookup
from gossipml.dht.messages import Answer, Found, Got, NodeContact, Question, Stored
from gossipml.dht.node import Answered
from gossipml.env import Clock


class Search:
    """Asks `question(contact)`; `heard` sees each answer and may end the search by True."""

    def __init__(
        self,
        lookup: Lookup,
        calls: Calls,
        clock: Clock,
        soft_wait: Callable[[], float],
        question: Callable[[NodeContact], Question],
        heard: Callable[[NodeContact, Answer], bool] = lambda contact, answer: False,
    ) -> None:
        self.lookup = lookup
        self._calls = calls
        self._clock = clock
        self._soft_wait = soft_wait
        self._question = question
        self._heard = heard
        self._over = trio.Event()
        self._under_way: set[bytes] = set()
        self._wakes_at = math.inf
        self._timer: Timer | None = None

    async def run(self) -> None:
        """Return when the search is over. Cancelled, it drops its calls."""
        self._step()
        try:
            await self._over.wait()
        except trio.Cancelled:
            self._finish()
            for number in self._under_way:
                self._calls.drop(number)
            raise

    def _step(self) -> None:
        lookup = self.lookup
        asking = True
        while asking and not self._over.is_set():
            asking = False
            for contact in lookup.ask(self._clock.now(), self._soft_wait()):
                if not self._ask(contact):
                    lookup.failed(contact)
                    asking = True
            if lookup.done:
                self._finish()
        deadline = lookup.next_deadline()
        if not self._over.is_set() and deadline is not None and deadline < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at = deadline
            self._timer = self._calls.at(deadline, self._wake)

    def _finish(self) -> None:
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()

    def _ask(self, contact: NodeContact) -> bool:
        number: bytes | None = None

        def done(answered: Answered | None) -> None:
            if number is not None:
                self._under_way.discard(number)
            self._answered(contact, answered)

        number = self._calls.begin(contact, self._question(contact), done)
        if number is not None:
            self._under_way.add(number)
        return number is not None

    def _wake(self) -> None:
        self._wakes_at = math.inf
        if not self._over.is_set():
            self._step()

    def _answered(self, contact: NodeContact, answered: Answered | None) -> None:
        if self._over.is_set():
            return
        if answered is None:
            self.lookup.failed(contact)
        else:
            answer = answered.answer
            told = answer.contacts if isinstance(answer, Found | Got | Stored) else ()
            self.lookup.answered(contact, told)
            if self._heard(contact, answer):
                self._finish()
                return
        self._step()
