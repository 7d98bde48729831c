"""Peers for the tests: ids, a learner made of numpy, meshes on the simulated network."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import trio
from numpy.typing import NDArray

from gossipml.env import Credentials, Env, Handler, Stream
from gossipml.env.simulated import World
from gossipml.identity import Identity
from gossipml.ids import Address, Contact, PeerId
from gossipml.keys import NetworkKeys
from gossipml.orders import NetworkKey
from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.gossip_events import ModelFacts
from gossipml.peer.mesh import Mesh, MeshConfig
from gossipml.peer.view import View
from gossipml.peer.wire import Body, Decoder, Hello, Message, Profile, Update, encode
from gossipml.token import JoinToken

PORT = 8711
DIGEST = hashlib.sha256(b"layout").hexdigest()
OTHER_DIGEST = hashlib.sha256(b"another layout").hexdigest()
SIZE = 8
NETWORK = NetworkKey(b"k" * 32)


def peer_id(number: int) -> PeerId:
    return PeerId(hashlib.sha256(str(number).encode()).digest())


def contact(number: int, *, model: str = "digits", host: str | None = None) -> Contact:
    address = Address(host or f"10.0.{number >> 8}.{number & 255}", PORT)
    return Contact(peer_id(number), (address,), model, f"peer{number}")


def make_facts(size: int = SIZE, *, digest: str = DIGEST, model: str = "digits") -> ModelFacts:
    return ModelFacts(model, digest, size, lambda encoding: 4 * size if encoding == "float32" else None)


def make_update(age: float = 100.0, *, size: int = SIZE, digest: str = DIGEST, want: bool = False) -> Update:
    return Update("digits", digest, "float32", size, 4 * size, age, 1, want, False)


def make_profile(name: str = "ann", *, model: str = "digits", digest: str = DIGEST) -> Profile:
    return Profile(name, model, digest, PORT, (Address("10.0.0.1", PORT),))


def make_credentials(name: str, network: str = "ours") -> Credentials:
    cookie = hashlib.sha256(network.encode()).digest()
    token = JoinToken(network_id=NETWORK.network_id, cookie=cookie, expires=0, addresses=())
    return Credentials(Identity(hashlib.sha256(name.encode()).digest()), NetworkKeys.from_token(token))


@dataclass(frozen=True)
class Outcome:
    applied: bool
    reason: str
    distance: float
    fault: bool = False


class VectorLearner:
    """A flat vector that merges as a trainer does: refuses what is not finite, then averages."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self.snapshots = 0
        self.merges: list[tuple[float, bool]] = []
        self.settles = 0

    async def snapshot(self, encoding: str) -> bytes:
        assert encoding == "float32"
        self.snapshots += 1
        await trio.sleep(0.001)
        return self.values.tobytes()

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> Outcome:
        await trio.sleep(0.001)
        values = np.frombuffer(update, dtype=np.float32)
        applied = bool(np.isfinite(values).all())
        self.merges.append((weight, applied))
        if not applied:
            return Outcome(False, "not finite", 0.0, fault=True)
        distance = float(np.linalg.norm(values - self.values))
        self.values = ((1 - weight) * self.values + weight * values).astype(np.float32)
        return Outcome(True, "", distance)

    async def settle(self) -> None:
        self.settles += 1

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> list[Outcome]:
        """The mean of all."""
        outcomes = []
        for number, (update, encoding) in enumerate(updates):
            outcomes.append(await self.merge(update, encoding, 1 / (2 + number)))
        return outcomes


@dataclass
class Peer:
    """A mesh on one simulated machine."""

    name: str
    env: Env
    credentials: Credentials
    mesh: Mesh
    learner: VectorLearner
    address: Address
    scope: trio.CancelScope

    @property
    def id(self) -> PeerId:
        return self.mesh.own

    @property
    def contact(self) -> Contact:
        return Contact(self.id, (self.address,), "digits", self.name)

    async def round(self, samples: int = 100) -> None:
        await self.mesh.gossip_round(samples, self.mesh.gossip.round + 1)


class Cluster:
    """Starts and stops meshes in a world."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery

    async def start(
        self,
        name: str,
        *,
        value: float = 0.0,
        size: int = SIZE,
        model: str = "digits",
        digest: str = DIGEST,
        attach: bool = True,
        config: MeshConfig | None = None,
        gossip: GossipConfig | None = None,
        credentials: Credentials | None = None,
        streams: Mapping[str, Handler] | None = None,
    ) -> Peer:
        env = self.world.env(name)
        credentials = credentials or make_credentials(name)
        listener = await env.net.listen(Address("0.0.0.0", PORT), credentials)
        address = Address(self.world.host(name), PORT)
        machine = Gossip(
            View(credentials.identity.peer_id, env.rng),
            env.rng,
            replace(gossip or GossipConfig(), encoding="float32"),
        )
        profile = Profile(name, "", "", PORT, (address,))
        mesh = Mesh(env, credentials, profile, listener, gossip=machine, config=config, streams=streams)
        learner = VectorLearner(np.full(size, value, dtype=np.float32))
        scope = trio.CancelScope()
        peer = Peer(name, env, credentials, mesh, learner, address, scope)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await mesh.run(task_status)

        if attach and model:
            mesh.attach(learner, make_facts(size, digest=digest, model=model))
        await self.nursery.start(run)
        return peer

    def crash(self, peer: Peer) -> None:
        self.world.crash(peer.name)
        peer.scope.cancel()


@asynccontextmanager
async def cluster(world: World) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        yield Cluster(world, nursery)
        nursery.cancel_scope.cancel()


async def introduce(*peers: Peer) -> None:
    """Everybody gets to know everybody, and sessions open."""
    for peer in peers:
        peer.mesh.learn(other.contact for other in peers)
    await trio.sleep(5)


class RawPeer:
    """A member that speaks the wire format by hand, well or badly."""

    def __init__(self, stream: Stream, peer: PeerId) -> None:
        self.stream = stream
        self.id = peer
        self.heard: list[Message | Body] = []
        self.ended = False
        self._decoder = Decoder(lambda update: update.body_length)

    @classmethod
    async def dial(
        cls, world: World, name: str, to: Peer, *, profile: Profile | None = None, boot: bytes = b"rawpeer."
    ) -> RawPeer:
        """Connect, say hello; the answer is the first of `heard`."""
        env = world.env(name)
        credentials = make_credentials(name)
        stream = await env.net.connect(to.address, to.id, credentials)
        raw = cls(stream, credentials.identity.peer_id)
        if profile is not None:
            await raw.say(Hello(1, 1, boot, profile))
            await raw.listen(1)
        return raw

    async def say(self, message: Message, body: bytes = b"") -> None:
        await self.stream.send_all(encode(message), body)

    async def listen(self, events: int) -> list[Message | Body]:
        """Read until that many more messages have come, or the stream ends."""
        wanted = len(self.heard) + events
        while len(self.heard) < wanted and not self.ended:
            try:
                count = await self.stream.receive_into(self._decoder.target())
            except trio.BrokenResourceError:
                count = 0
            if count == 0:
                self.ended = True
                break
            event = self._decoder.received(count)
            if event is not None:
                self.heard.append(event)
                if isinstance(event, Update):
                    self._decoder.discard_body()
        return self.heard

    async def listen_for(self, seconds: float) -> list[Message | Body]:
        """Everything that comes within that time."""
        before = len(self.heard)
        with trio.move_on_after(seconds):
            await self.listen(1_000_000)
        return self.heard[before:]
