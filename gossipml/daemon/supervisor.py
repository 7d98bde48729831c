"""Keeps the long-lived parts of the daemon running: a crash restarts that part and never ends another.

A part is an async function that reports readiness through `task_status` and then runs until cancelled. When
it raises, or returns, it starts again after a capped, growing pause; what went wrong is logged and shown by
the health probe. A UserError is the exception: restarting cannot mend what the user has to change, so the
part stays down with that sentence (and, before its first readiness, ends the start of the daemon).
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from gossipml.env import Clock
from gossipml.errors import UserError

log = logging.getLogger("gossipml.supervisor")

FIRST_PAUSE = 0.5  # seconds; a crash at start is often a race that a moment heals
LAST_PAUSE = 60.0  # seconds; a part that cannot run costs one attempt a minute
CALM = 120.0  # seconds of running after which earlier crashes are forgiven
RED = 3  # crashes in a row that turn the health probe red


@dataclass
class PartHealth:
    """How one part fares."""

    running: bool = False
    crashes: int = 0
    """Crashes since the part last ran calmly."""
    problem: str = ""
    """What went wrong last, in a sentence; empty when nothing did."""

    @property
    def ok(self) -> bool:
        return self.crashes < RED and (self.running or not self.problem or self.crashes > 0)


@dataclass
class Supervisor:
    """The parts of one daemon and their health."""

    clock: Clock
    rng: random.Random
    parts: dict[str, PartHealth] = field(default_factory=dict)

    def problems(self) -> list[str]:
        return [f"{name}: {part.problem}" for name, part in self.parts.items() if part.problem and not part.ok]

    @asynccontextmanager
    async def running(self, name: str, part: Callable[..., Awaitable[object]]) -> AsyncIterator[Any]:
        """Have `part` run during the block: nested blocks start outside in and stop inside out.

        Gives what the part reports by its first `task_status.started(value)`.
        """
        async with trio.open_nursery() as nursery:
            yield await nursery.start(self.run, name, part)
            nursery.cancel_scope.cancel()

    async def run(
        self,
        name: str,
        part: Callable[..., Awaitable[object]],
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run `part(task_status=...)` until cancelled, again after each crash.

        What the part reports by its first `task_status.started(value)` is passed on. Before that, a UserError
        is raised to the caller; afterwards nothing is.
        """
        health = self.parts.setdefault(name, PartHealth())
        first = _FirstStart(task_status)
        while True:
            begun = self.clock.now()
            try:
                async with trio.open_nursery() as nursery:
                    value = await nursery.start(part)
                    health.running = True
                    first.started(value)
                raise RuntimeError("ended by itself")
            except Exception as error:
                health.running = False
                mistake = _user_error(error)
                if mistake is not None:
                    health.problem = str(mistake)
                    if not first.done:
                        raise mistake from None
                    log.error("%s stopped: %s", name, mistake)
                    await trio.sleep_forever()
                if self.clock.now() - begun > CALM:
                    health.crashes = 0
                health.crashes += 1
                health.problem = _sentence(error)
                pause = min(LAST_PAUSE, FIRST_PAUSE * 2 ** (health.crashes - 1)) * self.rng.uniform(0.8, 1.2)
                log.error("%s crashed (%s); starting it again in %.1f s", name, health.problem, pause, exc_info=error)
            await trio.sleep(pause)


class _FirstStart:
    """Passes the first readiness on and swallows those of restarts."""

    def __init__(self, task_status: trio.TaskStatus[object]) -> None:
        self._task_status = task_status
        self.done = False

    def started(self, value: object) -> None:
        if not self.done:
            self.done = True
            self._task_status.started(value)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _user_error(error: BaseException) -> UserError | None:
    return next((leaf for leaf in _leaves(error) if isinstance(leaf, UserError)), None)


def _sentence(error: BaseException) -> str:
    leaf = _leaves(error)[0]
    return f"{type(leaf).__name__}: {leaf}" if str(leaf) else type(leaf).__name__
