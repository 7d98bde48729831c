"""Swarms on the simulated network: contents that are made up piece by piece, shelves, peers, and a rude one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from gossipml.env import SWARM, Credentials, Env, Stream
from gossipml.env.simulated import World
from gossipml.errors import RemoteError
from gossipml.ids import Address, Contact, PeerId
from gossipml.peer import swarm_wire as w
from gossipml.peer.swarm import Swarm, SwarmConfig

from .peers import PORT, make_credentials

KB = 1024

T = TypeVar("T")


def made_up(name: str, index: int, length: int) -> bytes:
    """The bytes of a piece: cheap to make, and different for each piece and content."""
    seed = hashlib.sha256(f"{name}/{index}".encode()).digest()
    return (seed * (length // len(seed) + 1))[:length]


class FakeHasher:
    """Makes sure that the swarm tells it of every byte."""

    def __init__(self, piece: bytearray) -> None:
        self._piece = piece
        self.there = 0

    def arrived(self, count: int) -> None:
        self.there += count
        assert 0 <= count <= self.there <= len(self._piece)


class FakeContent:
    """A content that remembers which pieces it has, and makes them up when they are read."""

    def __init__(self, name: str, size: int, piece_length: int, have: Iterable[int] | None = None) -> None:
        """`have` is everything when it is left out."""
        self.name = name
        self.root = hashlib.sha256(name.encode()).digest()
        self.size = size
        self.piece_length = piece_length
        self.count = -(-size // piece_length)
        self.held = set(range(self.count) if have is None else have)
        self.corrupt: set[int] = set()
        self.writes: list[int] = []
        self.reads: list[int] = []
        self.finished = False
        self.failure: Exception | None = None
        """What the next write raises."""
        self.seconds = 0.001
        """What reading or writing a piece takes."""

    @property
    def complete(self) -> bool:
        return len(self.held) == self.count

    def length(self, index: int) -> int:
        return min(self.piece_length, self.size - index * self.piece_length)

    def have(self) -> bytes:
        return w.write_bits(sum(1 << index for index in self.held), self.count)

    async def read(self, index: int) -> bytes | None:
        await trio.sleep(self.seconds)
        if index in self.corrupt:
            self.held.discard(index)
        if index not in self.held:
            return None
        self.reads.append(index)
        return made_up(self.name, index, self.length(index))

    def hasher(self, piece: bytearray) -> FakeHasher:
        return FakeHasher(piece)

    async def write(self, index: int, data: bytearray, hasher: FakeHasher) -> bool:
        assert hasher.there == len(data)
        await trio.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        if data != made_up(self.name, index, self.length(index)):
            return False
        self.writes.append(index)
        self.held.add(index)
        return True

    async def finish(self) -> None:
        await trio.sleep(self.seconds)
        assert self.complete
        self.finished = True


class FakeShelf:
    def __init__(self) -> None:
        self.contents: dict[bytes, FakeContent] = {}
        self.layers: dict[bytes, bytes] = {}
        self.manifests: dict[bytes, bytes] = {}
        self.held: set[bytes] = set()
        self.asked_to_hold: list[tuple[PeerId, bytes]] = []

    def put(self, content: FakeContent) -> FakeContent:
        self.contents[content.root] = content
        return content

    async def content(self, root: bytes) -> FakeContent | None:
        return self.contents.get(root)

    async def layer(self, root: bytes) -> bytes | None:
        return self.layers.get(root)

    async def manifest(self, version: bytes) -> bytes | None:
        return self.manifests.get(version)

    def holds(self, version: bytes) -> bool:
        return version in self.held

    async def hold(self, peer: PeerId, manifest: bytes) -> str:
        self.asked_to_hold.append((peer, manifest))
        return "" if manifest.startswith(b"good") else "no room"


@dataclass
class Node:
    """A swarm on one simulated machine."""

    name: str
    env: Env
    credentials: Credentials
    swarm: Swarm
    shelf: FakeShelf
    contact: Contact
    scope: trio.CancelScope
    faults: list[tuple[PeerId, str]] = field(default_factory=list)
    accepted: int = 0

    @property
    def id(self) -> PeerId:
        return self.credentials.identity.peer_id


class Swarms:
    """Starts and stops swarms in a world."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.nodes: dict[str, Node] = {}

    async def start(self, name: str, config: SwarmConfig | None = None) -> Node:
        env, credentials, shelf = self.world.env(name), make_credentials(name), FakeShelf()
        listener = await env.net.listen(Address("0.0.0.0", PORT), credentials)
        faults: list[tuple[PeerId, str]] = []
        swarm = Swarm(
            env, credentials, shelf, config, on_fault=lambda peer, reason: faults.append((peer, reason)), port=PORT
        )
        contact = Contact(credentials.identity.peer_id, (Address(self.world.host(name), PORT),), "", name)
        node = Node(name, env, credentials, swarm, shelf, contact, trio.CancelScope(), faults)

        async def serve(stream: Stream) -> None:
            assert stream.protocol == SWARM
            node.accepted += 1
            await swarm.serve(stream)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with node.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(listener.serve, serve)
                    await nursery.start(swarm.run)
                    task_status.started()

        await self.nursery.start(run)
        self.nodes[name] = node
        return node

    def crash(self, node: Node) -> None:
        self.world.crash(node.name)
        node.scope.cancel()


@asynccontextmanager
async def swarms(world: World) -> AsyncIterator[Swarms]:
    async with trio.open_nursery() as nursery:
        yield Swarms(world, nursery)
        nursery.cancel_scope.cancel()


def known(*contacts: Contact) -> Callable[[], Awaitable[list[Contact]]]:
    """Providers that are always the same."""

    async def providers() -> list[Contact]:
        await trio.lowlevel.checkpoint()
        return list(contacts)

    return providers


class RudeOwner:
    """A member that listens and answers with whatever the test makes it say."""

    def __init__(self, world: World, name: str, act: Callable[[RudeOwner, Stream], Awaitable[None]]) -> None:
        self.env = world.env(name)
        self.credentials = make_credentials(name)
        self.contact = Contact(self.credentials.identity.peer_id, (Address(world.host(name), PORT),), "", name)
        self.streams = 0
        self.heard: list[w.FromDialler] = []
        self._act = act

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = await self.env.net.listen(Address("0.0.0.0", PORT), self.credentials)

        async def handle(stream: Stream) -> None:
            self.streams += 1
            with contextlib.suppress(RemoteError, trio.BrokenResourceError):  # the other side has had enough
                await self._act(self, stream)

        task_status.started()
        await listener.serve(handle)

    async def hear(self, stream: Stream) -> w.FromDialler:
        message = await hear(stream, w.from_dialler)
        self.heard.append(message)
        return message


async def hear(stream: Stream, decode: Callable[[bytearray], T]) -> T:
    """The next message on a stream, without a body."""
    length = bytearray(4)
    await fill(stream, length)
    header = bytearray(w.read_length(length))
    await fill(stream, header)
    return decode(header)


async def fill(stream: Stream, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        count = await stream.receive_into(view)
        if count == 0:
            raise RemoteError("the stream has ended")
        view = view[count:]


async def offer(owner: RudeOwner, stream: Stream, content: FakeContent) -> None:
    """Answer an open: everything is there."""
    assert isinstance(await owner.hear(stream), w.Open)
    await stream.send_all(w.encode(w.Bits(content.count)), content.have())


async def ask_raw(world: World, name: str, to: Contact) -> Stream:
    """A stream on which the test asks by hand."""
    env = world.env(name)
    return await env.net.connect(to.addresses[0], to.peer, make_credentials(name), SWARM)
