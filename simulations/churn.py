"""When peers are there: late joiners, sessions of random length, and what a trace file says.

A peer that goes keeps its model, as a machine that is switched off keeps its disk, and goes on with it when it comes
back; what was under way to it is lost. Random sessions are exponential, as in Rhea, Geels, Roscoe, Kubiatowicz:
Handling churn in a DHT (USENIX 2004), and begin in the steady state: a peer is there at the start with probability
up / (up + down).

A trace is a CSV file of `peer,from,to`, in seconds: the peer is there in that time. Peers that it does not name are
always there. Intervals of one peer must not overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from gossipml.errors import UserError

MAX_TRACE = 64 << 20  # bytes
MAX_CHANGES = 20_000_000  # bounds what a mean session of a millisecond would allocate


@dataclass(frozen=True, order=True)
class Change:
    """The peer comes (`up`) or goes."""

    seconds: float
    peer: int
    up: bool


@dataclass(frozen=True)
class Presence:
    """Who is there at 0, and all changes after it, in order."""

    first: list[bool]
    changes: list[Change]


def always(peers: int) -> Presence:
    return Presence([True] * peers, [])


def exponential(peers: int, up: float, down: float, until: float, rng: Random) -> Presence:
    """Sessions of `up` seconds on average, absences of `down`."""
    if not (up > 0 and down > 0):
        raise UserError(f"mean times there and away must be above 0 seconds, not {up} and {down}")
    if peers * until / min(up, down) > MAX_CHANGES:
        raise UserError(
            f"sessions of {min(up, down)} seconds for {until:.0f} seconds are too many changes; lengthen them"
        )
    first, changes = [], []
    for peer in range(peers):
        here = rng.random() < up / (up + down)
        first.append(here)
        now = 0.0
        while (now := now - math.log(1.0 - rng.random()) * (up if here else down)) < until:
            here = not here
            changes.append(Change(now, peer, here))
    return Presence(first, sorted(changes))


def joining_late(presence: Presence, joins: dict[int, float]) -> Presence:
    """The same, but nobody of `joins` is there before its second."""
    first = [here and peer not in joins for peer, here in enumerate(presence.first)]
    kept = [change for change in presence.changes if change.seconds > joins.get(change.peer, -1.0)]
    for peer, seconds in joins.items():
        before = [change for change in presence.changes if change.peer == peer and change.seconds <= seconds]
        if before[-1].up if before else presence.first[peer]:
            kept.append(Change(seconds, peer, True))
    return Presence(first, sorted(kept))


def read_trace(path: Path, peers: int) -> Presence:
    """UserError names the line that is wrong, and what would be right."""
    try:
        if path.stat().st_size > MAX_TRACE:
            raise UserError(f"the churn trace {str(path)!r} is larger than {MAX_TRACE >> 20} MiB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the churn trace {str(path)!r} cannot be read: {error}") from None
    intervals: dict[int, list[tuple[float, float, int]]] = {}
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.partition("#")[0].split(",")]
        if words == [""] or (number == 1 and words[0] == "peer"):
            continue
        try:
            peer, start, stop = int(words[0]), float(words[1]), float(words[2])
            right = len(words) == 3 and 0 <= peer < peers and 0 <= start < stop  # NaN compares false
        except (ValueError, IndexError):
            right = False
        if not right:
            raise UserError(
                f"{path}, line {number}: {line.strip()[:60]!r}; write peer,from,to: a peer from 0 to {peers - 1} and "
                "two times in seconds, the first the lesser"
            )
        intervals.setdefault(peer, []).append((start, stop, number))
    first = [True] * peers
    changes = []
    for peer, times in intervals.items():
        times.sort()
        first[peer] = times[0][0] == 0.0
        for (_, stop, _), (start, _, number) in pairwise(times):
            if start < stop:
                raise UserError(
                    f"{path}, line {number}: peer {peer} is already there until {stop:g} s; let it go first"
                )
        for start, stop, _ in times:
            changes += [Change(start, peer, True)] if start > 0 else []
            changes += [Change(stop, peer, False)] if math.isfinite(stop) else []
    return Presence(first, sorted(changes))
