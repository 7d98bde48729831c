"""The iterative lookup of Kademlia as a state machine: whom to ask next, and who is nearest.

Section 2.3 of the paper without its rounds: `alpha` queries are under way; one that is slow (soft wait) gives its
place to another but may still answer; one that is silent (hard wait, the caller's) has failed. A `wide` lookup, which
has something for each of the `k`, asks all of them at once as soon as they are known. The lookup is done
when the `k` nearest of those that neither failed nor are slow have answered; with fewer than `k` answers the slow
ones get a little longer, so that a datagram sent a second time is waited for.

Against eclipse: an answer counts only when the caller has proof of the node id; one network (/24, /48) holds at
most two of the `k` places; a node for which several addresses are told is tried at another one when the first
is silent; the number of queries is bounded, whatever inventions the answers hold; and where more than `k` nodes are
within `reach` of the target, a distance within which far fewer are to be expected, ids have been ground, and up to
twice as many count, so that honest ones are among them. (S/Kademlia's disjoint paths, all into one list: a path
that liars have taken over adds their ids, and takes none away.)
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from gossipml.dht.messages import NodeContact
from gossipml.dht.routing import MAX_PER_NETWORK, K, Networks
from gossipml.ids import Address, NodeId

ALPHA = 3
MAX_CANDIDATES = 8 * K  # the nearest of those heard of; bounds memory and sorting
MAX_QUERIES = 6 * K  # an honest lookup among millions of nodes asks fewer
MAX_ADDRESSES = 3  # told for one node id
CROWD = 2  # times k nodes at most, where more than k are within reach
PATIENCE = 3  # soft waits until a slow node is late: one for the answer, one for that to the second datagram, one spare


class State(enum.Enum):
    NEW = "new"
    ASKED = "asked"
    SLOW = "slow"
    LATE = "late"
    ANSWERED = "answered"
    FAILED = "failed"


OUT = frozenset((State.SLOW, State.LATE, State.FAILED))  # who does not count now


@dataclass(slots=True)
class _Candidate:
    contact: NodeContact
    state: State = State.NEW
    soft: float = 0.0
    late: float = 0.0
    others: list[Address] = field(default_factory=list)
    tried: list[Address] = field(default_factory=list)


class Lookup:
    def __init__(
        self,
        target: bytes,
        own: NodeId,
        seeds: Iterable[NodeContact],
        networks: Networks,
        *,
        k: int = K,
        alpha: int = ALPHA,
        wide: bool = False,
        reach: int = 0,
    ) -> None:
        self.target = target
        self.queries = 0
        self._goal = int.from_bytes(target, "big")
        self._own = own
        self._networks = networks
        self._k = k
        self._alpha = alpha
        self._wide = wide
        self._reach = reach
        self._candidates: dict[NodeId, _Candidate] = {}
        self._under_way: dict[NodeId, _Candidate] = {}  # asked or slow
        self._cached: list[_Candidate] | None = None  # the window, until somebody enters or leaves it
        self._order: list[tuple[int, NodeId]] = []  # by distance
        for seed in seeds:
            self._hear_of(seed)

    def ask(self, now: float, soft_wait: float) -> list[NodeContact]:
        """Whom to query now; each is then answered or failed exactly once."""
        busy = 0
        for node, candidate in list(self._under_way.items()):
            if candidate.state is State.ASKED and now >= candidate.soft:
                candidate.state, self._cached = State.SLOW, None
            if candidate.state is State.SLOW and now >= candidate.late:
                candidate.state = State.LATE
                del self._under_way[node]
            busy += candidate.state is State.ASKED
        at_once = self._k if self._wide and self.settled else self._alpha
        chosen: list[NodeContact] = []
        if busy >= at_once:
            return chosen
        for candidate in self._window():
            if busy >= at_once or self.queries >= MAX_QUERIES:
                break
            if candidate.state is State.NEW:
                candidate.state, candidate.soft = State.ASKED, now + soft_wait
                candidate.late = now + PATIENCE * soft_wait
                candidate.tried.append(candidate.contact.address)
                self._under_way[candidate.contact.node] = candidate
                self.queries += 1
                busy += 1
                chosen.append(candidate.contact)
        return chosen

    @property
    def settled(self) -> bool:
        """Whether the nearest that is known has answered: it knows its neighbours, so the `k` nearest are known."""
        window = self._window()
        return bool(window) and window[0].state is State.ANSWERED

    def answered(self, contact: NodeContact, contacts: Iterable[NodeContact] = ()) -> None:
        """A queried node proved its id and told of others."""
        candidate = self._candidates.get(contact.node)
        if candidate is not None:
            self._under_way.pop(contact.node, None)
            if candidate.state is not State.ASKED or candidate.contact != contact:
                self._cached = None
            candidate.state, candidate.contact = State.ANSWERED, contact
        for other in contacts:
            candidate = self._candidates.get(other.node)
            if candidate is None or candidate.contact != other:  # most are told by everybody
                self._hear_of(other)

    def failed(self, contact: NodeContact) -> None:
        """A queried node is silent or could not prove its id; it may have another address."""
        candidate = self._candidates.get(contact.node)
        if candidate is None or candidate.state is State.ANSWERED:
            return
        self._under_way.pop(contact.node, None)
        self._cached = None
        if candidate.others:
            candidate.contact = NodeContact(contact.node, candidate.others.pop(0))
            candidate.state = State.NEW
        else:
            candidate.state = State.FAILED

    @property
    def done(self) -> bool:
        answered = 0
        for candidate in self._window():
            if candidate.state is State.ASKED or (candidate.state is State.NEW and self.queries < MAX_QUERIES):
                return False
            answered += candidate.state is State.ANSWERED
        return answered >= self._k or not any(c.state is State.SLOW for c in self._under_way.values())

    def next_deadline(self) -> float | None:
        """When a query becomes slow or late; None when none is under way."""
        return min((c.soft if c.state is State.ASKED else c.late for c in self._under_way.values()), default=None)

    def nearest(self) -> list[NodeContact]:
        """Those of the `k` nearest, and of whoever else is within reach, that answered; nearest first."""
        return [candidate.contact for candidate in self._window() if candidate.state is State.ANSWERED]

    def _window(self) -> list[_Candidate]:
        """The `k` nearest that may still count and whoever else is within reach, at most two a network."""
        if self._cached is not None:
            return self._cached
        window: list[_Candidate] = []
        taken: dict[str, int] = {}
        for distance, node in self._order:
            candidate = self._candidates[node]
            if candidate.state in OUT:
                continue
            group = self._networks.group(candidate.contact.address.host)
            if group is not None:
                if taken.get(group, 0) >= MAX_PER_NETWORK:
                    continue
                taken[group] = taken.get(group, 0) + 1
            if len(window) >= self._k and (distance > self._reach or len(window) >= CROWD * self._k):
                break
            window.append(candidate)
        self._cached = window
        return window

    def _hear_of(self, contact: NodeContact) -> None:
        if contact.node == self._own:
            return
        held = self._candidates.get(contact.node)
        if held is not None:
            self._other_address(held, contact.address)
            return
        distance = int.from_bytes(contact.node, "big") ^ self._goal
        if len(self._order) >= MAX_CANDIDATES and not self._make_room(distance):
            return
        self._cached = None
        self._candidates[contact.node] = _Candidate(contact)
        bisect.insort(self._order, (distance, contact.node))

    def _other_address(self, held: _Candidate, address: Address) -> None:
        if held.state is State.ANSWERED or address in (held.contact.address, *held.others, *held.tried):
            return
        if len(held.others) + len(held.tried) + 1 >= MAX_ADDRESSES:
            return
        if held.state is State.FAILED:
            self._cached = None
            held.contact, held.state = NodeContact(held.contact.node, address), State.NEW
        else:
            held.others.append(address)

    def _make_room(self, distance: int) -> bool:
        """Forget the farthest that was never asked, if it is farther than `distance`."""
        for index in range(len(self._order) - 1, -1, -1):
            far, node = self._order[index]
            if far <= distance:
                return False
            if self._candidates[node].state is State.NEW:
                self._cached = None
                del self._order[index], self._candidates[node]
                return True
        return False
