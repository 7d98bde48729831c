"""Whether a peer may train just now: asked by its user, or decided by the policy of `gossipml.daemon.idle`.

The two are apart: what the user paused stays so until the user says otherwise, whatever the machine does, and lifting
that pause does not overrule the policy. The node keeps a pause by the user over restarts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from gossipml.daemon.idle import IdleConfig, IdlePolicy, Observation
from gossipml.env import Clock

Observe = Callable[[], Awaitable[Observation]]
"""Looks at the machine. `gossipml.daemon.usage.Observer`, or of a simulation."""


class Pausing:
    """The reasons why a peer does not train. Without `observe` only its user gives any."""

    def __init__(self, clock: Clock, config: IdleConfig | None = None, observe: Observe | None = None) -> None:
        self._clock = clock
        self._policy = IdlePolicy(config or IdleConfig())
        self._observe = observe if self._policy.config.watches else None
        self._asked: str | None = None
        self._found = ""
        self.changed = trio.Event()
        """Set, and replaced, when the reason changes: take it before you look at the reason."""

    @property
    def reason(self) -> str:
        """Why not to train, in words that follow "paused: "; empty to train."""
        return " and ".join(reason for reason in (self._asked, self._found) if reason)

    def pause(self, reason: str = "by its user") -> None:
        """Do not train until `resume`."""
        self._set(reason or "by its user", self._found)

    def resume(self) -> str:
        """Lift what `pause` did; the reason that is left, if the machine gives one."""
        self._set(None, self._found)
        return self._found

    async def look(self) -> None:
        """Look at the machine once."""
        if self._observe is not None:
            seen = await self._observe()
            self._set(self._asked, self._policy.decide(seen, self._clock.now()))

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while self._observe is not None:
            await trio.sleep(self._policy.config.look)
            await self.look()

    def _set(self, asked: str | None, found: str) -> None:
        before, self._asked, self._found = self.reason, asked, found
        if self.reason != before:
            self.changed.set()
            self.changed = trio.Event()
