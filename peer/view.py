"""Which peers we know of, which of them are worth a dial, and a uniform sample of them.

Contacts come from the DHT, the join token, the saved file, samples that neighbours attach to their updates, and
from sessions. All but the last are hints: only a dial proves a peer id. Sampling neighbours' samples keeps the
view close to uniform over the network (Jelasity, Voulgaris, Guerraoui, Kermarrec, van Steen: Gossip-based peer
sampling, 2007). Pure: time and randomness are passed in. Leaves out: liveness of open sessions
(`gossipml.peer.failure`), dialling (`gossipml.peer.mesh`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gossipml.ids import MAX_CONTACT_ADDRESSES, Address, Contact, PeerId

T = TypeVar("T")


class Rng(Protocol):
    """What protocols need of `random.Random`, which they do not import."""

    def random(self) -> float: ...

    def sample(self, population: Sequence[T], k: int) -> list[T]: ...


@dataclass(frozen=True)
class ViewConfig:
    capacity: int = 512
    """Contacts kept: a uniform sample this large is as good as the whole network, at about 1 kB each (guess)."""
    backoff: float = 1.0
    """Seconds after the first failed dial; doubles each time (as TCP and gRPC do)."""
    backoff_most: float = 300.0
    """A peer that comes back is dialled again within five minutes, if it does not dial first (guess)."""
    backoff_refused: float = 600.0
    """After a refusal that only a person can mend: another specification, another version (guess)."""
    give_up: int = 8
    """Failed dials after which a contact that never answered is forgotten: about four minutes (guess)."""
    saved: int = 64
    """Contacts written to disk: enough for one to be alive after most of a network has moved (guess)."""


@dataclass
class Entry:
    """One contact and what came of dialling it."""

    contact: Contact
    digest: str = ""
    """The layout that it said it trains; empty while it has not said."""
    connected: bool = False
    proven: bool = False
    """It has completed a hello with us, in this life of ours."""
    last_seen: float | None = None
    failures: int = 0
    retry_at: float = 0.0
    refused: str = ""
    """Why one of us refused the other, when it was for a reason that lasts."""
    order: int = field(default=0, compare=False)
    """Counts up with each contact learnt: ties are broken by it, never by the order of a hash."""


@dataclass
class Door:
    """An address behind which nobody is known yet: from a token, or typed by a person."""

    failures: int = 0
    retry_at: float = 0.0


MAX_DOORS = 64  # a token carries 16 addresses


class View:
    """The contacts of one peer."""

    def __init__(self, own: PeerId, rng: Rng, config: ViewConfig | None = None) -> None:
        self.config = config or ViewConfig()
        self._own = own
        self._rng = rng
        self._entries: dict[PeerId, Entry] = {}
        self._doors: dict[Address, Door] = {}
        self._banned: frozenset[PeerId] = frozenset()
        self._count = 0

    @property
    def own(self) -> PeerId:
        return self._own

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._entries

    def get(self, peer: PeerId) -> Entry | None:
        return self._entries.get(peer)

    def entries(self) -> list[Entry]:
        """All contacts, oldest first."""
        return list(self._entries.values())

    def ban(self, peers: Iterable[PeerId]) -> None:
        """Forget these peers, for good."""
        self._banned = frozenset(peers)
        for peer in self._banned:
            self._entries.pop(peer, None)

    # Learning of contacts.

    def learn(self, contacts: Iterable[Contact]) -> list[PeerId]:
        """Take in hints; which peers were new to us. What a peer said itself is not overwritten by a hint."""
        new = []
        for contact in contacts:
            if contact.peer == self._own or contact.peer in self._banned or not contact.addresses:
                continue
            entry = self._entries.get(contact.peer)
            if entry is None:
                if self._make_room(proven=False):
                    self._add(contact)
                    new.append(contact.peer)
                continue
            known = entry.contact
            fresh = any(address not in known.addresses for address in contact.addresses)
            if entry.proven and not fresh and not entry.failures:
                continue
            if entry.failures:  # where we look, it is not: try the news first
                addresses = (*contact.addresses, *known.addresses)
            else:
                addresses = (*known.addresses, *contact.addresses)
            entry.contact = known._replace(addresses=_distinct(addresses))
            if not entry.proven:
                entry.contact = entry.contact._replace(model=contact.model, name=contact.name)
            if fresh and entry.failures and not entry.connected and not entry.refused:
                entry.retry_at = 0.0  # a new address deserves a try at once, but counts on
        return new

    def knock(self, addresses: Iterable[Address]) -> None:
        """Addresses to dial without knowing who answers."""
        for address in addresses:
            if address not in self._doors and len(self._doors) < MAX_DOORS:
                self._doors[address] = Door()

    def introduced(self, contact: Contact, digest: str, now: float) -> None:
        """A peer has completed a hello: what it says of itself replaces every hint."""
        entry = self._entries.get(contact.peer)
        if entry is None:
            self._make_room(proven=True)
            entry = self._add(contact)
        addresses = _distinct((*contact.addresses, *entry.contact.addresses))
        entry.contact = contact._replace(addresses=addresses)
        entry.digest = digest
        entry.connected = entry.proven = True
        entry.last_seen = now
        entry.failures, entry.retry_at, entry.refused = 0, 0.0, ""

    def profiled(self, contact: Contact, digest: str) -> None:
        """A connected peer has changed what it says of itself."""
        entry = self._entries.get(contact.peer)
        if entry is not None:
            entry.contact, entry.digest = contact, digest

    def seen(self, peer: PeerId, now: float) -> None:
        entry = self._entries.get(peer)
        if entry is not None:
            entry.last_seen = now

    def left(self, peer: PeerId, now: float) -> None:
        """A session has ended in order: not a failure, but no reason to dial again at once."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.connected = False
            entry.retry_at = max(entry.retry_at, now + self._jittered(self.config.backoff))

    def failed(self, peer: PeerId, now: float) -> None:
        """A dial or a session has failed: try again later and later; forget who never answered."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.connected = False
        entry.failures += 1
        entry.retry_at = now + self._backoff(entry.failures)
        if not entry.proven and entry.failures >= self.config.give_up:
            del self._entries[peer]

    def refused(self, peer: PeerId, reason: str, now: float) -> None:
        """One of us refused the other for a reason that lasts."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.connected = False
            entry.refused = reason
            entry.retry_at = now + self._jittered(self.config.backoff_refused)

    def put_off(self, peer: PeerId, until: float) -> None:
        """Do not dial before then."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.retry_at = max(entry.retry_at, until)

    def door_failed(self, address: Address, now: float) -> None:
        door = self._doors.get(address)
        if door is not None:
            door.failures += 1
            door.retry_at = now + self._backoff(door.failures)

    def door_opened(self, address: Address) -> None:
        """Somebody answered there and is a contact now, or it is ourselves."""
        self._doors.pop(address, None)

    # Choosing.

    def sample(self, k: int, model: str, digest: str, now: float, *, without: Collection[PeerId] = ()) -> list[PeerId]:
        """At most k peers of `fit`, uniformly at random."""
        fit = self.fit(model, digest, now, without=without)
        return self._rng.sample(fit, min(k, len(fit)))

    def fit(self, model: str, digest: str, now: float, *, without: Collection[PeerId] = ()) -> list[PeerId]:
        """The peers that train the same model and are connected or worth a dial."""
        return [
            peer
            for peer, entry in self._entries.items()
            if entry.contact.model == model
            and (
                entry.digest == digest != ""  # "": it does not know its layout yet
                if entry.connected
                else entry.digest in ("", digest) and self._dialable(entry, now)
            )
            and peer not in without
        ]

    def to_dial(self, k: int, model: str, now: float) -> list[PeerId]:
        """At most k unconnected peers worth a dial: those of our model first, within that at random."""
        if k <= 0:
            return []
        fit = [e for e in self._entries.values() if not e.connected and self._dialable(e, now)]
        same = [e.contact.peer for e in fit if model and e.contact.model == model]
        rest = [e.contact.peer for e in fit if not (model and e.contact.model == model)]
        return [*self._rng.sample(same, len(same)), *self._rng.sample(rest, len(rest))][:k]

    def doors(self, now: float) -> list[Address]:
        """Addresses without a known peer that are due for a dial."""
        return [address for address, door in self._doors.items() if door.retry_at <= now]

    def contacts(self, k: int, peers: Iterable[PeerId]) -> tuple[Contact, ...]:
        """Of a sample of k of these peers those that are connected now, for a neighbour's view."""
        known = list(peers)
        entries = [self._entries.get(peer) for peer in self._rng.sample(known, min(k, len(known)))]
        return tuple(entry.contact for entry in entries if entry and entry.connected and entry.contact.addresses)

    def export(self) -> list[Contact]:
        """The contacts worth saving: who answered, the latest first, then hints."""
        ranked = sorted(
            (e for e in self._entries.values() if e.contact.addresses),
            key=lambda e: (not e.connected, not e.proven, e.failures, -(e.last_seen or 0.0), e.order),
        )
        return [entry.contact for entry in ranked[: self.config.saved]]

    def next_retry(self) -> float | None:
        """When the next unconnected contact or address becomes worth a dial."""
        times = [e.retry_at for e in self._entries.values() if not e.connected and e.contact.addresses]
        times.extend(door.retry_at for door in self._doors.values())
        return min(times, default=None)

    def _dialable(self, entry: Entry, now: float) -> bool:
        return bool(entry.contact.addresses) and entry.retry_at <= now

    def _add(self, contact: Contact) -> Entry:
        self._count += 1
        entry = Entry(contact._replace(addresses=_distinct(contact.addresses)), order=self._count)
        self._entries[contact.peer] = entry
        return entry

    def _make_room(self, *, proven: bool) -> bool:
        """Whether there is room for one more; hints never push out a peer that has proven itself.

        Otherwise one member could fill our view with names that it made up (an eclipse).
        """
        if len(self._entries) < self.config.capacity:
            return True
        victims = [e for e in self._entries.values() if not e.connected and (proven or not e.proven)]
        if not victims:
            return proven  # all are connected: their number is bounded by the sessions
        worst = max(victims, key=lambda e: (not e.proven, e.failures, -(e.last_seen or 0.0), -e.order))
        del self._entries[worst.contact.peer]
        return True

    def _backoff(self, failures: int) -> float:
        return self._jittered(min(self.config.backoff * 2.0 ** min(failures - 1, 30), self.config.backoff_most))

    def _jittered(self, seconds: float) -> float:
        """Between half and all of it, so that peers that failed together do not retry together."""
        return seconds * (0.5 + 0.5 * self._rng.random())


def _distinct(addresses: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(addresses))[:MAX_CONTACT_ADDRESSES]
