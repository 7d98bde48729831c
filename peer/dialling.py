"""Dials: of known contacts, and of addresses where nobody is known yet; each once at a time, in a task of its own.

What is to be sent to a peer that is being dialled waits here until its session is open.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from gossipml.env import Credentials, Env, Stream
from gossipml.errors import RemoteError
from gossipml.ids import Address, PeerId
from gossipml.peer.link import Link, Parcel
from gossipml.peer.view import View

log = logging.getLogger("gossipml.peer")

MAX_STRANGERS = 16  # as many addresses as a token has


class Host(Protocol):
    """Who keeps the sessions: the mesh."""

    def has_session(self, peer: PeerId) -> bool:
        """Whether there is an open one, or the peer is ourselves."""

    async def run_link(self, stream: Stream, *, dialled: bool) -> Link:
        """The whole life of a session; returns the link when it is over."""

    def deliver(self, peer: PeerId, parcel: Parcel, *, dial: bool = True) -> None:
        """Queue it on the peer's session, dialling for one if need be."""

    def dialled(self, peer: PeerId, link: Link | None) -> None:
        """A dial has come to its end, and so has the session that it led to, if it did."""

    def note(self, peer: PeerId, text: str) -> None:
        """For people to see."""


class Dialling:
    """`nursery` is where its tasks run; without one nobody is dialled."""

    def __init__(
        self, env: Env, credentials: Credentials, view: View, host: Host, *, most: int, seconds: float
    ) -> None:
        """At most so many at once; seconds for one address, handshake included."""
        self.nursery: trio.Nursery | None = None
        self.strangers: dict[Address, str] = {}
        """Addresses where somebody answered who is no member as we are, and what is wrong; the latest of them."""
        self._env = env
        self._credentials = credentials
        self._view = view
        self._host = host
        self._most = most
        self._seconds = seconds
        self._waiting: dict[PeerId, list[Parcel]] = {}
        self._doors: set[Address] = set()

    @property
    def contacts(self) -> int:
        """Being dialled, or with the session that came of it."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """How many more may be dialled."""
        return max(0, self._most - len(self._waiting) - len(self._doors))

    def dial(self, peer: PeerId, parcel: Parcel | None = None) -> None:
        """A known contact, unless that is under way; then send the parcel."""
        if peer in self._waiting:
            if parcel is not None:
                self._waiting[peer].append(parcel)
        elif self.nursery is not None:
            self._waiting[peer] = [] if parcel is None else [parcel]
            self.nursery.start_soon(self._dial, peer)

    def take(self, peer: PeerId) -> list[Parcel]:
        """What has waited for a session with the peer, which is open now."""
        return self._waiting.pop(peer, [])

    def knock(self, addresses: list[Address]) -> None:
        """At addresses without a known peer."""
        for address in addresses[: max(0, self._most - len(self._doors))]:
            if address not in self._doors and self.nursery is not None:
                self._doors.add(address)
                self.nursery.start_soon(self._knock, address)

    async def _dial(self, peer: PeerId) -> None:
        entry, parcels = self._view.get(peer), self._waiting[peer]
        link: Link | None = None
        try:
            for address in entry.contact.addresses if entry else ():
                stream = await self._connect(address, peer)
                if stream is not None:
                    link = await self._host.run_link(stream, dialled=True)
                    break
        finally:
            if self._waiting.get(peer) is parcels:
                del self._waiting[peer]
            for parcel in parcels:  # a refused duplicate means that there is a session to send it on
                self._host.deliver(peer, parcel, dial=False)
        self._host.dialled(peer, link)

    async def _knock(self, address: Address) -> None:
        try:
            stream = await self._connect(address, None)
            self._view.door_failed(address, self._env.clock.now())  # until its hello has come
            if stream is None:
                return
            if self._host.has_session(stream.peer_id):
                self._view.door_opened(address)
                await stream.aclose()
                return
        finally:
            self._doors.discard(address)
        await self._host.run_link(stream, dialled=True)

    async def _connect(self, address: Address, expected: PeerId | None) -> Stream | None:
        try:
            with trio.fail_after(self._seconds):
                stream = await self._env.net.connect(address, expected, self._credentials)
            self.strangers.pop(address, None)
            return stream
        except (OSError, RemoteError, trio.TooSlowError) as error:
            what = str(error) or type(error).__name__
            if isinstance(error, RemoteError) and self.strangers.get(address) != what:
                log.warning("no session with %s: %s", address, what)
                self.strangers[address] = what
                while len(self.strangers) > MAX_STRANGERS:
                    del self.strangers[next(iter(self.strangers))]
            log.debug("dialling %s failed: %s", address, what)
            if expected is not None:
                self._host.note(expected, f"dialling {address}: {what}")
            return None
