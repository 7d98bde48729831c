"""At which hours of the week a peer may train: `22:00-06:00`, `mon-fri 18:00-07:00, sat,sun 00:00-24:00`. No I/O.

A window belongs to the day on which it begins: that of `fri 18:00-07:00` ends on Saturday morning. The hours are
those of the wall clock where the peer is, so a night in which it is put forward or back is an hour shorter or longer.
Leaves out dates and holidays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from gossipml.errors import UserError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = 24 * 60  # minutes
MAX_TEXT = 500  # characters; a window for each day, and room to spare
EXAMPLE = "write for example 22:00-06:00, or mon-fri 18:00-07:00, sat-sun 00:00-24:00"

_HOURS = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})")
_DAYS = re.compile(r"([a-z]+)(?:\s*-\s*([a-z]+))?")


@dataclass(frozen=True)
class Window:
    """Hours of some days."""

    days: frozenset[int]
    """On which it begins; 0 is Monday."""
    begin: int
    """Minutes since midnight."""
    end: int
    """At most `begin`: of the next day."""

    def holds(self, weekday: int, minute: int) -> bool:
        if self.begin < self.end:
            return weekday in self.days and self.begin <= minute < self.end
        today = weekday in self.days and minute >= self.begin
        return today or ((weekday - 1) % 7 in self.days and minute < self.end)


@dataclass(frozen=True)
class Schedule:
    """Some windows, and how the user wrote them."""

    text: str
    windows: tuple[Window, ...]

    def allows(self, local: datetime) -> bool:
        """Whether the local time lies in a window."""
        return any(window.holds(local.weekday(), local.hour * 60 + local.minute) for window in self.windows)


def parse_schedule(text: str) -> Schedule:
    """The schedule that the text writes down; UserError when it is none."""
    if len(text) > MAX_TEXT:
        raise UserError(f"the schedule has {len(text)} characters, at most {MAX_TEXT} are read; {EXAMPLE}")
    shown = " ".join(text.split())
    windows: list[Window] = []
    days: frozenset[int] = frozenset()  # named so far, for the hours that follow: "mon, wed 18:00-20:00"
    for piece in shown.lower().split(","):
        names, hours = piece.strip(), None
        if found := _HOURS.search(piece):
            names, hours = piece[: found.start()].strip(), found
            if piece[found.end() :].strip():
                raise UserError(f"schedule {shown!r}: put a comma after {found[0]!r}; {EXAMPLE}")
        elif not names:
            raise UserError(f"schedule {shown!r} has nothing between two commas or at an end; {EXAMPLE}")
        if names:
            days |= _days(names, shown)
        if hours is not None:
            windows.append(_window(days or frozenset(range(7)), hours, shown))
            days = frozenset()
    if days:
        raise UserError(f"schedule {shown!r} ends with days without hours; 00:00-24:00 means all day; {EXAMPLE}")
    return Schedule(shown, tuple(windows))


def _days(names: str, shown: str) -> frozenset[int]:
    found = _DAYS.fullmatch(names)
    wanted = [name for name in found.groups() if name is not None] if found else [names]
    if any(name not in DAYS for name in wanted):
        raise UserError(
            f"schedule {shown!r}: {names!r} is no day, nor HH:MM-HH:MM; days are {' '.join(DAYS)}; {EXAMPLE}"
        )
    first, last = DAYS.index(wanted[0]), DAYS.index(wanted[-1])
    return frozenset((first + day) % 7 for day in range((last - first) % 7 + 1))


def _window(days: frozenset[int], hours: re.Match[str], shown: str) -> Window:
    ends = []
    for hour, minute in ((hours[1], hours[2]), (hours[3], hours[4])):
        minutes = int(hour) * 60 + int(minute)
        if int(minute) > 59 or minutes > DAY:
            raise UserError(f"schedule {shown!r}: {hour}:{minute} is not between 00:00 and 24:00; {EXAMPLE}")
        ends.append(minutes)
    begin, end = ends
    if begin in (end, DAY):
        raise UserError(f"schedule {shown!r}: {hours[0]} holds no time; all day is 00:00-24:00")
    return Window(days, begin, end)
