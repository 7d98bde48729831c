"""One peer, put together: DHT, directory, mesh, learner, each a supervised part, nested in the order of their need.

Everything outside is reached through `Env`, so the simulator runs this very object on virtual time. What a real
process adds around it (home, log, HTTP endpoint, worker process) is in `gossipml.daemon.run`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from gossipml.daemon.contacts import load_contacts, save_contacts
from gossipml.daemon.learner import Learner, LearnerConfig, Progress
from gossipml.daemon.orders import Orders
from gossipml.daemon.supervisor import Supervisor
from gossipml.dht.config import DhtConfig
from gossipml.dht.directory import Announcement, Directory
from gossipml.dht.service import Dht
from gossipml.env import Credentials, Env, Listener
from gossipml.errors import UserError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Address
from gossipml.models.trainer import Trainer
from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.mesh import Mesh, MeshConfig
from gossipml.peer.view import View
from gossipml.peer.wire import Profile

log = logging.getLogger("gossipml.node")

FREE_PORT_TRIES = 20  # a free TCP port is rarely taken for UDP
LOOK_SECONDS = (1.0, 300.0)  # between looks into the directory: while alone, and later
SAVE_CONTACTS_SECONDS = 30.0
LEAVE_SECONDS = 2.0  # for telling the DHT that we go


@dataclass(frozen=True)
class NodeConfig:
    """What a peer needs to know to run, beside its identity and the keys of its network."""

    name: str
    listen: Address
    trains: bool = True
    """False: only a member of the network that passes contacts and records on."""
    first_contacts: tuple[Address, ...] = ()
    """From the join token."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    gossip: GossipConfig = field(default_factory=GossipConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dht: DhtConfig = field(default_factory=DhtConfig)


class Node:
    """A running peer. `open_trainer` gives the model in training, anew after each crash of it."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        config: NodeConfig,
        open_trainer: Callable[[], AbstractAsyncContextManager[Trainer]],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.env = env
        self.credentials = credentials
        self.config = config
        self.supervisor = Supervisor(env.clock, env.rng)
        self.learner = Learner(env, open_trainer, config.learner, on_progress)
        self.view = View(credentials.identity.peer_id, env.rng)
        self.gossip = Gossip(self.view, env.rng, config.gossip)
        self.addresses: tuple[Address, ...] = ()
        """Where others may reach us."""
        self._local = config.listen
        self._dht: Dht | None = None
        self._directory: Directory | None = None
        self._mesh: Mesh | None = None
        self._said: Announcement | None = None

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
        orders = Orders(self.env, self.credentials.membership)
        await orders.load()
        async with self._sockets() as listener:
            first = self.config.first_contacts
            saved = await load_contacts(self.env.disk)
            self._mesh = Mesh(
                self.env,
                self.credentials,
                self._profile(),
                listener,
                gossip=self.gossip,
                config=self.config.mesh,
                on_orders=orders.changed,
            )
            self._mesh.learn(saved)
            self._mesh.bootstrap(a for a in first if a not in self.addresses)
            self.dht.add_bootstrap((*first, *(address for contact in saved for address in contact.addresses)))
            self._directory = Directory(self.env, self.dht, self.credentials)
            async with running("dht", self.dht.run), running("directory", self._directory.run):
                self._announce()
                async with (
                    running("gossip", self._mesh.run),
                    running("orders", partial(orders.run, self._mesh.order)),
                    running("discovery", self._discover),
                ):
                    if self.config.trains:
                        async with running("learner", self._learn):
                            yield
                    else:
                        yield
                await self._leave()

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
        pause, saved_at = LOOK_SECONDS[0], self.env.clock.now()
        while True:
            self._announce()
            profile = self.mesh.profile
            if profile.digest:
                self.mesh.learn(await self.directory.providers(profile.model))
            else:
                self.mesh.learn(await self.directory.members())
            if self.env.clock.now() - saved_at >= SAVE_CONTACTS_SECONDS or pause == LOOK_SECONDS[0]:
                saved_at = self.env.clock.now()
                await save_contacts(self.env.disk, self.mesh.contacts())
            lonely = not self.mesh.links()
            pause = LOOK_SECONDS[0] if lonely else min(2 * pause, LOOK_SECONDS[1])
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
