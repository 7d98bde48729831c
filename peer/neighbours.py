"""What a mesh tells people and programs: counters, and one line for each peer that we have met."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gossipml.ids import Address, PeerId
from gossipml.peer.conduct import Record
from gossipml.peer.failure import Health
from gossipml.peer.link import Link, Traffic
from gossipml.peer.view import Entry


@dataclass
class Stats:
    """What has happened so far; only ever grows."""

    sessions_opened: int = 0
    sessions_accepted: int = 0
    """Of those, the ones that the other side dialled: they show that others reach us."""
    sessions_closed: int = 0
    dials_failed: int = 0
    updates_sent: int = 0
    updates_failed: int = 0
    updates_dropped: int = 0
    """Because an earlier one to the same peer was still waiting."""
    updates_received: int = 0
    updates_refused: int = 0
    merges: int = 0
    merges_refused: int = 0
    faults: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    """Of all sessions, those under way and those ended."""


NeighbourState = Literal["connected", "suspect", "lost", "refused", "quarantined", "known"]


@dataclass(frozen=True)
class NeighbourInfo:
    """One peer as we see it, for people and for `GET /v1/peers`."""

    peer: PeerId
    name: str
    model: str
    address: Address | None
    state: NeighbourState
    reason: str
    """Why it is refused, lost or in quarantine; its last answer to an update otherwise."""
    age: float | None
    """The last that it claimed."""
    bytes_sent: int
    bytes_received: int
    last_seen: float | None
    """Monotonic seconds."""
    strikes: int
    """In all."""
    strike_reason: str
    """Of the last one."""
    quarantined_until: float | None
    """Monotonic seconds."""


def describe(
    entry: Entry,
    link: Link | None,
    health: Health,
    record: Record,
    age: float | None,
    traffic: Traffic,
    note: str,
    now: float,
) -> NeighbourInfo:
    """What is to be told about a contact."""
    state, reason = _state(entry, link, health), note
    if record.quarantined_until is not None:
        state, reason = "quarantined", f"{record.reason}; for {record.quarantined_until - now:.0f} s more"
    elif entry.refused:
        state, reason = "refused", entry.refused
    contact = entry.contact
    return NeighbourInfo(
        peer=contact.peer,
        name=contact.name,
        model=contact.model,
        address=next(iter(contact.addresses), link.stream.remote if link else None),  # where it listens
        state=state,
        reason=reason,
        age=age,
        bytes_sent=traffic.sent,
        bytes_received=traffic.received,
        last_seen=link.heard_at if link else entry.last_seen,
        strikes=record.strikes,
        strike_reason=record.reason,
        quarantined_until=record.quarantined_until,
    )


def _state(entry: Entry, link: Link | None, health: Health) -> NeighbourState:
    if health is Health.SUSPECT:
        return "suspect"
    if link is not None:
        return "connected"
    return "lost" if health is Health.LOST else "known"
