"""Virtual time for trio: hours pass in seconds, and two runs with one seed do the same in the same order.

trio's own `MockClock` jumps to the next deadline whenever every task is blocked. `VirtualTime` hooks into
that jump with a heap of plain calls (a datagram arrives, a chunk of a stream arrives), so that a message
costs one heap entry and one task switch instead of a task, a cancel scope and three turns of the loop.

`deterministic` removes trio's own randomness. It leaves alone what a program does to itself: iteration over
a set of text or bytes depends on PYTHONHASHSEED, and threads depend on the machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from typing import Any, cast

import trio
import trio.testing

# Private parts of trio (Hypothesis's support uses the same); test_virtual_time.py notices a change.
from trio._core import _run as trio_run

from gossipml.errors import LocalError

POLL_TURNS = 100  # of the loop: milliseconds


class VirtualTime:
    """The clock of the trio run in which it is made, and the calls that are due on it."""

    def __init__(self) -> None:
        clock = trio.lowlevel.current_clock()
        if not isinstance(clock, trio.testing.MockClock) or clock.rate or clock.autojump_threshold:
            raise LocalError("a simulated world needs a run with MockClock(autojump_threshold=0); use run_simulation")
        if "_autojump" in vars(clock):
            raise LocalError("this trio run has a simulated world already; one run holds one world")
        # And trio would read the real clock at every turn to find that it does not count.
        vars(clock).update(_autojump=self._advance, current_time=self.now, deadline_to_sleep_time=self._until)
        self._clock: Any = clock  # Any: private parts
        self._runner: Any = cast(Any, trio_run.GLOBAL_RUN_CONTEXT.runner)
        self._runner.io_manager = _RarePolls(self._runner.io_manager)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._sequence = itertools.count()

    def now(self) -> float:
        now: float = self._clock._virtual_base
        return now

    def _until(self, deadline: float) -> float:
        return deadline - self.now()

    def call_at(self, time: float, function: Callable[..., None], *args: object) -> None:
        """Call `function(*args)` at a virtual time, outside of any task: it may wake tasks, not raise."""
        heapq.heappush(self._heap, (time, next(self._sequence), function, args))

    def _advance(self) -> None:
        # trio calls this when every task is blocked, just before it takes up the tasks that are runnable.
        heap, clock, runner = self._heap, self._clock, self._runner
        while not runner.runq:
            deadline = runner.deadlines.next_deadline()
            if heap and heap[0][0] <= deadline:
                time, _, function, args = heapq.heappop(heap)
                # Set, not added: a sum of differences would drift from the times in the heap.
                clock._virtual_base = max(time, clock._virtual_base)
                function(*args)
            elif deadline < math.inf:
                clock._virtual_base = max(deadline, clock._virtual_base)
                runner.deadlines.expire(clock._virtual_base)  # now, and not after one more turn of the loop
            else:
                return


class _RarePolls:
    """What trio asks for events of the system: in a simulated world there are none but Ctrl-C, and asking takes as long
    as many a task."""

    def __init__(self, manager: Any) -> None:  # Any: private parts
        self._manager = manager
        self._turns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def get_events(self, timeout: float) -> Any:
        self._turns += 1
        return () if self._turns % POLL_TURNS else self._manager.get_events(timeout)

    def process_events(self, events: Any) -> None:
        if events:
            self._manager.process_events(events)


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Make the trio runs inside the block schedule their tasks in an order that depends on `seed` alone.

    trio shuffles each batch of runnable tasks, and sets ordered by memory address (children of a nursery,
    tasks of a cancel scope, deadlines that fall together) decide in which order tasks enter the batch. With
    this switch trio sorts the batch by the age of the tasks first, and shuffles it with a generator that can
    be seeded. That covers every such set, because waking a task only ever adds it to the batch.
    """
    module: Any = trio_run
    switch, generator = module._ALLOW_DETERMINISTIC_SCHEDULING, module._r
    module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = True, _Shuffler(seed)
    try:
        yield
    finally:
        module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = switch, generator


class _Shuffler(random.Random):
    """Most batches are one task, for which the library does all it does for many."""

    def shuffle(self, x: MutableSequence[Any]) -> None:
        if len(x) > 1:
            super().shuffle(x)
