"""When a peer lets its machine alone: on battery, while others need the CPU, outside its hours. No I/O.

Observations in, a reason to pause out. The policy does not flap: load counts smoothed, has to fall well below the limit
before training goes on, and a pause for it lasts a minute at least; a plug has to stay in for some seconds. What cannot
be observed (no battery, no figure for the load) is no reason to pause.

The load is what *others* use, so our own training neither starts a pause nor keeps one up. See `gossipml.daemon.usage`
for how it is measured, `gossipml.daemon.pausing` for who asks. Leaves out: the use of the GPU, keyboard and mouse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from gossipml.daemon.schedule import Schedule


@dataclass(frozen=True)
class IdleConfig:
    """What is a reason to pause; nothing is by default. All times in seconds."""

    pause_on_battery: bool = False
    pause_on_load: float | None = None
    """Per cent of the machine's whole CPU, used by others than this peer."""
    schedule: Schedule | None = None
    """When training is allowed; None: always."""
    look: float = 5.0
    """Between two looks: soon enough for a person; a look takes 1 to 6 ms with 110 processes (measured)."""
    smoothing: float = 15.0
    """Time constant of the load: starting a program is no reason yet, compiling one is (guess)."""
    resume_share: float = 0.7
    """Training goes on when the load is below this share of the limit ..."""
    least_pause: float = 60.0
    """... and the pause for it has lasted this long (guess: between two builds or two page loads)."""
    settle: float = 10.0
    """On mains for this long before training goes on: a plug with a bad contact (guess)."""

    @property
    def watches(self) -> bool:
        """Whether there is anything to look at."""
        return self.pause_on_battery or self.pause_on_load is not None or self.schedule is not None


@dataclass(frozen=True)
class Observation:
    """What the machine was seen doing; None: it cannot be told."""

    local: datetime
    """The wall clock of the place."""
    on_battery: bool | None = None
    load: float | None = None
    """Per cent of the whole CPU that others used since the last look."""


class IdlePolicy:
    """Decides at each observation whether to train."""

    def __init__(self, config: IdleConfig) -> None:
        self.config = config
        self._seen_at: float | None = None
        self._load: float | None = None  # smoothed
        self._loaded_since: float | None = None  # while paused for load
        self._battery_at: float | None = None  # last seen on battery, until on mains for long enough

    def decide(self, seen: Observation, now: float) -> str:
        """Why to pause, in words that follow "paused: "; empty to train."""
        reasons = [self._hours(seen), self._battery(seen, now), self._busy(seen, now)]
        self._seen_at = now
        return " and ".join(reason for reason in reasons if reason)

    def _hours(self, seen: Observation) -> str:
        schedule = self.config.schedule
        if schedule is None or schedule.allows(seen.local):
            return ""
        return f"outside its hours ({schedule.text})"

    def _battery(self, seen: Observation, now: float) -> str:
        if not self.config.pause_on_battery:
            return ""
        if seen.on_battery:
            self._battery_at = now
        elif self._battery_at is not None and now - self._battery_at >= self.config.settle:
            self._battery_at = None
        return "on battery" if self._battery_at is not None else ""

    def _busy(self, seen: Observation, now: float) -> str:
        config, limit = self.config, self.config.pause_on_load
        if limit is None:
            return ""
        if seen.load is not None:
            if self._load is None or self._seen_at is None:
                self._load = seen.load
            else:
                gain = 1.0 - math.exp(-max(0.0, now - self._seen_at) / config.smoothing)
                self._load += gain * (seen.load - self._load)
        load = self._load or 0.0
        if self._loaded_since is None:
            if load >= limit:
                self._loaded_since = now
        elif load < config.resume_share * limit and now - self._loaded_since >= config.least_pause:
            self._loaded_since = None
        return f"others use {limit:g} % of the CPU or more" if self._loaded_since is not None else ""
