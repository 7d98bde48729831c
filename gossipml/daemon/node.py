"""One peer, put together: store, DHT, mesh, swarm, library, learner, each a supervised part, nested in the order of
their need.

Everything outside is reached through `Env`, so the simulator runs this very object on virtual time. What a real
process adds around it (home, log, HTTP endpoint, worker process) is in `gossipml.daemon.run`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from gossipml.daemon.contacts import load_contacts, save_contacts
from gossipml.daemon.follower import Follower
from gossipml.daemon.idle import IdleConfig
from gossipml.daemon.learner import Learner, LearnerConfig, Progress
from gossipml.daemon.library import Library
from gossipml.daemon.orders import Orders
from gossipml.daemon.pausing import Observe, Pausing
from gossipml.daemon.replication import Replication, ReplicationConfig
from gossipml.daemon.shelf import LibraryShelf
from gossipml.daemon.supervisor import Supervisor
from gossipml.dht.catalogue import TTL as HELD_SECONDS
from gossipml.dht.catalogue import Catalogue
from gossipml.dht.config import DhtConfig
from gossipml.dht.directory import TTL as HERE_SECONDS
from gossipml.dht.directory import Announcement, Directory
from gossipml.dht.service import Dht
from gossipml.env import SWARM, Credentials, Env, Listener, write_atomic
from gossipml.errors import UserError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Address, Contact, PeerId
from gossipml.models.store import Store, StoreConfig
from gossipml.models.trainer import Trainer
from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.lan import Lan
from gossipml.peer.mesh import Mesh, MeshConfig
from gossipml.peer.swarm import Swarm
from gossipml.peer.swarm_ports import SwarmConfig
from gossipml.peer.view import View
from gossipml.peer.wire import Profile

log = logging.getLogger("gossipml.node")

FREE_PORT_TRIES = 20  # a free TCP port is rarely taken for UDP
SAVE_CONTACTS_SECONDS = 30.0
PAUSED_FILE = "state/paused"  # there as long as the user wants no training
MET_AT_ONCE = 16  # peers in a look into the directory: twice the sessions that are kept; they tell of others
LEAVE_SECONDS = 2.0  # for telling the DHT that we go


@dataclass(frozen=True)
class NodeConfig:
    """What a peer needs to know to run, beside its identity and the keys of its network."""

    name: str
    listen: Address
    trains: bool = True
    """False: serves the newest published version, and holds models for others as everybody does."""
    first_contacts: tuple[Address, ...] = ()
    """From the join token."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    idle: IdleConfig = field(default_factory=IdleConfig)
    gossip: GossipConfig = field(default_factory=GossipConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dht: DhtConfig = field(default_factory=DhtConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    replication: ReplicationConfig = field(default_factory=ReplicationConfig)
    look_seconds: tuple[float, float] = (1.0, 300.0)
    """Between looks into the directory: while alone, and later (guess)."""
    here_seconds: float = HERE_SECONDS
    """How long a peer that was killed stays listed as a member; what it says is repeated three times in this time."""
    held_seconds: float = HELD_SECONDS
    """The same of what it holds."""
    watch_seconds: float = 2.0
    """Between looks for orders in the home: a person waits for it; a look into an empty folder costs 50 us."""
    lan: bool = False
    """Find peers by beacons on the local network."""


class Node:
    """A running peer. `open_trainer` gives the model in training, anew after each crash of it."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        config: NodeConfig,
        open_trainer: Callable[[], AbstractAsyncContextManager[Trainer]],
        on_progress: Callable[[Progress], None] = lambda progress: None,
        observe: Observe | None = None,
    ) -> None:
        """Without `observe` nothing of what `config.idle` says is seen, and training pauses only when asked to."""
        self.env = env
        self.credentials = credentials
        self.config = config
        self.supervisor = Supervisor(env.clock, env.rng)
        self.mistake: UserError | None = None
        """Why the peer cannot do what it was started for, which its user has to change: `mistaken` is set then."""
        self.mistaken = trio.Event()
        self._open_trainer = open_trainer
        self._has_trainer = False
        self._on_progress = on_progress
        self._observe = observe
        self.view = View(credentials.identity.peer_id, env.rng)
        self.gossip = Gossip(self.view, env.rng, config.gossip)
        self.addresses: tuple[Address, ...] = ()
        """Where others may reach us."""
        self._local = config.listen
        self._dht: Dht | None = None
        self._directory: Directory | None = None
        self._mesh: Mesh | None = None
        self._said: Announcement | None = None
        self._learner: Learner | Follower | None = None
        self._replication: Replication | None = None
        self.lan: Lan | None = None
        """Running when the configuration asks for it."""

    @property
    def learner(self) -> Learner | Follower:
        assert self._learner is not None, "the node is not running"
        return self._learner

    @property
    def replication(self) -> Replication:
        assert self._replication is not None, "the node is not running"
        return self._replication

    @property
    def library(self) -> Library:
        return self.replication.library

    @property
    def dht(self) -> Dht:
        assert self._dht is not None, "the node is not running"
        return self._dht

    @property
    def directory(self) -> Directory:
        assert self._directory is not None, "the node is not running"
        return self._directory

    @property
    def mesh(self) -> Mesh:
        assert self._mesh is not None, "the node is not running"
        return self._mesh

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The peer runs during the block. UserError when its port is in use."""
        running = self.supervisor.running
        store = Store(self.env.disk, self.env.compute, self.config.store)
        await store.open()
        orders = Orders(self.env, self.credentials.membership, self.config.watch_seconds)
        await orders.load()
        async with self._sockets() as listener:
            first = self.config.first_contacts
            saved = await load_contacts(self.env.disk)
            self._directory = directory = Directory(self.env, self.dht, self.credentials, ttl=self.config.here_seconds)
            held = self.config.held_seconds
            catalogue = Catalogue(self.env, self.dht, directory.publisher, self.credentials, ttl=held)
            swarm = self._swarm(store, catalogue)
            self._mesh = Mesh(
                self.env, self.credentials, self._profile(), listener, gossip=self.gossip, config=self.config.mesh,
                streams={SWARM: swarm.serve}, on_orders=orders.changed,
            )  # fmt: skip
            self._learner = self._make_learner()
            if isinstance(self._learner, Learner) and await self.env.disk.size(PAUSED_FILE) is not None:
                self._learner.pause()
            self._mesh.learn(saved)
            self._mesh.bootstrap(a for a in first if a not in self.addresses)
            self.dht.add_bootstrap((*first, *(address for contact in saved for address in contact.addresses)))
            async with running("dht", self.dht.run), running("directory", directory.run):
                self._announce()
                async with (
                    running("gossip", self._mesh.run),
                    running("orders", partial(orders.run, self._mesh.order)),
                    running("discovery", self._discover),
                    running("swarm", swarm.run),
                    running("library", self.library.run),
                    running("replication", self.replication.run),
                    running("learner", self._learn),
                    self._running_lan(),
                ):
                    yield
                catalogue.leave()
                await self._leave()

    def _swarm(self, store: Store, catalogue: Catalogue) -> Swarm:
        """The swarm, and around it the library and the replication."""
        env, credentials, config = self.env, self.credentials, self.config
        shelf = LibraryShelf(store)
        swarm = Swarm(env, credentials, shelf, config.swarm, on_fault=self._blame, port=self._local.port)
        library = shelf.library = Library(
            env, credentials, store, catalogue, swarm, config.store,
            addresses=lambda: self.addresses, meet_others=self.dht.wait_for_contacts,
            sees_far=lambda: self.dht.nodes >= self.dht.k,
        )  # fmt: skip
        own = credentials.identity.peer_id
        self._replication = Replication(
            env, own, library, config.replication,
            members=self._members, refresh=self.directory.members, is_lost=self._is_lost, is_met=self._is_met,
        )  # fmt: skip
        return swarm

    @asynccontextmanager
    async def _running_lan(self) -> AsyncIterator[None]:
        if not self.config.lan:
            yield
            return

        def describe() -> tuple[str, str]:
            return self.mesh.profile.model, self.mesh.profile.name

        def on_contact(contact: Contact) -> None:
            self.mesh.learn([contact])
            self.dht.add_bootstrap(contact.addresses)

        self.lan = Lan(self.env, self.credentials, self._local, on_contact, describe=describe)
        async with self.supervisor.running("lan", self.lan.run):
            yield

    def _make_learner(self) -> Learner | Follower:
        if self.config.trains:
            pausing = Pausing(self.env.clock, self.config.idle, self._observe)
            return Learner(self.env, self._trainer, self.config.learner, self._on_progress, self.replication, pausing)
        return Follower(self._trainer, self.library, self._on_progress)

    @asynccontextmanager
    async def _trainer(self) -> AsyncIterator[Trainer]:
        """A trainer; a first one that cannot be had for a mistake of the user's is `mistake`."""
        try:
            async with self._open_trainer() as trainer:
                self._has_trainer = True
                yield trainer
        except UserError as error:
            if not self._has_trainer:
                self.mistake = error
                self.mistaken.set()
            raise

    async def pause(self) -> None:
        """Train no more until `resume`, over restarts too. UserError for a peer that trains nothing."""
        self._trains().pause()
        await write_atomic(self.env.disk, PAUSED_FILE, b"")

    async def resume(self) -> str:
        """Train again; the reason why not yet, if the machine gives one: that passes by itself."""
        left = self._trains().resume()
        with suppress(FileNotFoundError):
            await self.env.disk.remove(PAUSED_FILE)
        return left

    def _trains(self) -> Learner:
        if not isinstance(self.learner, Learner):
            raise UserError("this peer trains nothing (--no-train), so there is nothing to pause or resume")
        return self.learner

    def _members(self) -> list[Contact]:
        """The other peers of the network that have not failed to answer, as far as they are known here."""
        entries = {entry.contact.peer: entry for entry in self.view.entries()}
        members = {contact.peer: contact for contact in self.directory.known()}
        members |= {peer: entry.contact for peer, entry in entries.items() if entry.connected}
        return [
            contact
            for peer, contact in sorted(members.items())
            if (entry := entries.get(peer)) is None or entry.connected or not (entry.failures or entry.refused)
        ]

    def _is_lost(self, peer: PeerId) -> bool:
        entry = self.view.get(peer)
        return entry is not None and not entry.connected and entry.failures > 0

    def _is_met(self, peer: PeerId) -> bool:
        entry = self.view.get(peer)
        return entry is not None and entry.connected

    def _blame(self, peer: PeerId, reason: str) -> None:
        """A peer broke the rules of the swarm: that counts as a strike in gossip, too."""
        self.mesh.blame(peer, reason)

    @asynccontextmanager
    async def _sockets(self) -> AsyncIterator[Listener]:
        """The TCP listener and the DHT on one port number, which is found when it is left open."""
        wanted = self.config.listen
        for attempt in range(FREE_PORT_TRIES):
            listener = await self.env.net.listen(wanted, self.credentials)
            local = listener.local
            try:
                probe = await self.env.net.bind_datagrams(local)
                await probe.aclose()
                break
            except UserError:
                await listener.aclose()
                if wanted.port or attempt == FREE_PORT_TRIES - 1:
                    raise
        try:
            self._local = local
            self.addresses = self.env.net.own_addresses(local)[:MAX_CONTACT_ADDRESSES]
            self._dht = Dht(self.env, self.credentials, local=local, config=self.config.dht)
            yield listener
        finally:
            with trio.CancelScope(shield=True):
                await listener.aclose()

    async def _learn(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.learner.run(self.mesh, task_status=task_status)

    async def _discover(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Bring those whom the DHT knows into the view, eagerly while we are alone; save who is worth meeting."""
        task_status.started()
        first, last = self.config.look_seconds
        pause, saved_at = first, self.env.clock.now()
        while True:
            self._announce()
            profile = self.mesh.profile
            if profile.digest:
                self.mesh.learn(await self.directory.providers(profile.model, enough=MET_AT_ONCE))
            else:
                self.mesh.learn(await self.directory.members(enough=MET_AT_ONCE))
            if self.env.clock.now() - saved_at >= SAVE_CONTACTS_SECONDS or pause == first:
                saved_at = self.env.clock.now()
                await save_contacts(self.env.disk, self.mesh.contacts())
            lonely = not self.mesh.links()
            pause = first if lonely else min(2 * pause, last)
            await trio.sleep(pause * self.env.rng.uniform(0.8, 1.2))

    def _announce(self) -> None:
        """Say in the DHT where we are and what we train; said only when it is news."""
        profile = self.mesh.profile
        said = Announcement(self.addresses, profile.model, profile.digest, profile.name)
        if said != self._said:
            self._said = said
            self.directory.announce(said)

    async def _leave(self) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(LEAVE_SECONDS):
            await self.directory.leave()

    def _profile(self) -> Profile:
        """Without a model: which one it is the worker says once it has built it."""
        return Profile(self.config.name, "", "", self._local.port, self.addresses)
