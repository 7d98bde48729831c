"""How many live replicas each version has, and mending what is lost.

Every holder of a version looks, from time to time, who else holds it: those whom the DHT lists, if they live. With
whom we have a session lives; the others are asked themselves, all their versions in one question. When fewer than R
do (or fewer than there are peers), members that do not hold it yet are asked to, in the order of rendezvous hashing by
the name (Thaler and Ravishankar 1998): so all versions of a name gather on one holder set (THREATS.md: pieces placed
independently are lost sooner). The first two of the live holders by that order ask at once; the others only when
nothing has helped.

Replicated are the newest versions of each name that this peer keeps, and pinned ones. The same look fetches the
latest version of the model that this peer trains or serves.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from gossipml.daemon.library import Library, name_of
from gossipml.env import Env
from gossipml.errors import RemoteError
from gossipml.ids import Contact, PeerId, short_peer_id
from gossipml.models.manifest import Manifest

log = logging.getLogger("gossipml.library")

ASKED_AT_ONCE = 8
ANSWER_SECONDS = 6.0  # for a dial, the handshake and the answer
ACTING = 2  # of the live holders ask others at once: one may be wrong about who is there
HAND_OVER_PAUSE = 0.3  # seconds between looks whether somebody has it
SPARE = 2  # times R: so many of those who are listed are looked at, lest some be gone
PATIENCE = 3  # counts without improvement, and every holder asks


@dataclass(frozen=True)
class ReplicationConfig:
    replicas: int = 12
    """R of THREATS.md: of 50 peers 25 may die at once, and a version is lost with a probability of 0.03 % (R = 10)."""
    look_seconds: float = 30.0
    """Between two looks for a new head, and for holders that were lost (guess)."""
    count_seconds: float = 120.0
    """Between two counts while nothing is missing and nobody was lost (guess)."""


def rendezvous(name: str, peers: Iterable[PeerId]) -> list[PeerId]:
    """The peers in the order in which they should hold a name, the same for everybody who knows the same peers."""
    key = hashlib.sha256(b"gossipml/v1/holders" + name.encode()).digest()
    return sorted(peers, key=lambda peer: hashlib.sha256(key + peer).digest())


class Replication:
    """Counts and mends the replicas of what this peer holds."""

    def __init__(
        self,
        env: Env,
        own: PeerId,
        library: Library,
        config: ReplicationConfig,
        *,
        members: Callable[[], list[Contact]],
        refresh: Callable[[], Awaitable[object]],
        is_lost: Callable[[PeerId], bool],
        is_met: Callable[[PeerId], bool],
    ) -> None:
        """`members`: the other peers of the network that can be reached, as far as they are known; `refresh` asks
        the network who they are; `is_lost`: whether a peer has failed to answer since we last met it; `is_met`:
        whether there is a session with it now."""
        self.config = config
        self.live: dict[bytes, list[Contact]] = {}
        """By version: the other peers that said so, at the last count."""
        self._env = env
        self._own = own
        self.library = library
        self._members = members
        self._refresh = refresh
        self._is_lost = is_lost
        self._is_met = is_met
        self._counted_for = 0
        self._poked = trio.Event()
        library.on_publish = self.poke
        self._short: dict[bytes, int] = {}  # counts in a row that found too few
        self._counted_at = -math.inf

    def poke(self) -> None:
        """Count soon: something has been published, or somebody was lost."""
        self._poked.set()

    def wanted(self) -> int:
        """Replicas that a version should have: R, or as many as there are peers."""
        return min(self.config.replicas, 1 + len(self._members()))

    def count(self, version: bytes) -> int | None:
        """Live replicas, our own with them; None before the first count."""
        live = self.live.get(version)
        return None if live is None else len(live) + 1

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            poked, self._poked = self._poked.is_set(), trio.Event()
            await self.library.tidy()
            await self.library.catch_up()
            if poked or self._should_count():
                await self.mend()
            with trio.move_on_after(self.config.look_seconds * self._env.rng.uniform(0.7, 1.3)):
                await self._poked.wait()

    def _should_count(self) -> bool:
        held = {version.version for version in self.library.store.versions()}
        return (
            self._env.clock.now() - self._counted_at >= self.config.count_seconds
            or self.wanted() != self._counted_for
            or not held <= set(self.live)
            or any(self._short.values())
            or any(self._is_lost(contact.peer) for contacts in self.live.values() for contact in contacts)
        )

    async def mend(self) -> None:
        """Count the replicas of what we hold, and ask others to hold what has too few."""
        self._counted_at = self._env.clock.now()
        if self.wanted() < self.config.replicas:
            await self._refresh()
        self._counted_for = self.wanted()
        kept = self.library.store.versions()
        self.live = await self.holders(kept)
        self._short = {version.version: self._short.get(version.version, 0) for version in kept}
        short: list[tuple[Manifest, int]] = []
        for version in kept:
            missing = self.wanted() - 1 - len(self.live[version.version])
            self._short[version.version] = self._short[version.version] + 1 if missing > 0 else 0
            if missing > 0 and self._is_our_turn(version):
                short.append((version, missing))
        if short:
            await self._refresh()
            async with trio.open_nursery() as nursery:
                for version, missing in short:
                    nursery.start_soon(self._recruit, version, missing)

    async def hand_over(self, version: Manifest, seconds: float) -> bool:
        """Whether somebody else holds the version whole, asked and waited for."""
        with trio.move_on_after(seconds):
            await self._refresh()
            await self._recruit(version, self.wanted() - 1)
            while not (await self.holders([version]))[version.version]:
                await trio.sleep(HAND_OVER_PAUSE)
            return True
        return False

    async def holders(self, versions: list[Manifest]) -> dict[bytes, list[Contact]]:
        """Who of the others holds each version whole: those that say so in the DHT and live, or say so now."""
        asked: dict[PeerId, tuple[Contact, list[Manifest]]] = {}
        live: dict[bytes, list[Contact]] = {version.version: [] for version in versions}
        for version in versions:
            for provider in await self.library.catalogue.replicas(version.version, SPARE * self.config.replicas):
                contact = provider.contact
                # A hundred holders that ask each other are ten thousand handshakes; most have a session anyway.
                if provider.complete and self._is_met(contact.peer):
                    live[version.version].append(contact)
                else:
                    asked.setdefault(contact.peer, (contact, []))[1].append(version)
        limiter = trio.CapacityLimiter(ASKED_AT_ONCE)

        async def ask(contact: Contact, listed: list[Manifest]) -> None:
            async with limiter:
                for version in await self._confirmed(contact, listed):
                    live[version.version].append(contact)

        async with trio.open_nursery() as nursery:
            for contact, listed in asked.values():
                nursery.start_soon(ask, contact, listed)
        return {version: sorted(contacts) for version, contacts in live.items()}

    async def _confirmed(self, contact: Contact, versions: list[Manifest]) -> list[Manifest]:
        """Those of the versions that the peer says it holds whole."""
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                answer = await self.library.swarm.holds(contact, [version.version for version in versions])
            except RemoteError as error:
                log.debug("%s does not answer for its versions: %s", short_peer_id(contact.peer), error)
                return []
            return [version for version, held in zip(versions, answer, strict=True) if held]
        return []

    def _is_our_turn(self, version: Manifest) -> bool:
        order = rendezvous(version.name, [self._own, *(contact.peer for contact in self.live[version.version])])
        return order.index(self._own) < ACTING or self._short[version.version] > PATIENCE

    async def _recruit(self, version: Manifest, missing: int) -> None:
        """Ask members to hold the version until enough have agreed, or all have been asked."""
        holding = {self._own, *(contact.peer for contact in self.live.get(version.version, []))}
        contacts = {contact.peer: contact for contact in self._members() if contact.peer not in holding}
        order = rendezvous(version.name, contacts)
        agreed = 0

        async def ask(contact: Contact) -> None:
            nonlocal agreed
            took = await self._ask(contact, version)
            agreed += took

        while order and agreed < missing:
            turn = min(missing - agreed, ASKED_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for peer in order[:turn]:
                    nursery.start_soon(ask, contacts[peer])
            del order[:turn]
        if agreed:
            log.info("%d more peers fetch %s: %d of %d held it", agreed, name_of(version), len(holding), self.wanted())

    async def _ask(self, contact: Contact, version: Manifest) -> bool:
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                refusal = await self.library.swarm.hold(contact, version.data)
            except RemoteError as error:
                refusal = str(error)
            if refusal:
                log.debug("%s does not take %s: %s", short_peer_id(contact.peer), name_of(version), refusal)
            return not refusal
        return False
