"""When peers are there: late joiners, sessions of random length, and what a trace file says.

A peer that goes keeps its model, as a machine that is switched off keeps its disk, and goes on with it when it comes
back; what was under way to it is lost. Random sessions are exponential, as in Rhea, Geels, Roscoe, Kubiatowicz:
Handling churn in a DHT (USENIX 2004), and begin in the steady state: a peer is there at the start with probability
up / (up + down).

Peers that a trace (`traces`) does not name are always there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from gossipml.errors import UserError

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


def from_trace(times: dict[int, list[tuple[float, float]]], peers: int) -> Presence:
    """What `traces.read_presence` has read."""
    first = [True] * peers
    changes = []
    for peer, stretches in times.items():
        first[peer] = stretches[0][0] == 0.0
        for start, stop in stretches:
            changes += [Change(start, peer, True)] if start > 0 else []
            changes += [Change(stop, peer, False)] if math.isfinite(stop) else []
    return Presence(first, sorted(changes))
