"""Members, strangers, single nodes joined by hand, and clusters on virtual time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import trio

from gossipml.dht.config import DhtConfig
from gossipml.dht.messages import NodeContact
from gossipml.dht.node import Action, Answered, DhtNode, Send
from gossipml.dht.records import Kind, Record, sign_record
from gossipml.dht.service import Dht
from gossipml.env import Credentials, Env
from gossipml.env.link import Link
from gossipml.env.simulated import World, run_simulation
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken

T = TypeVar("T")
PORT = 8711
WALL = 1_700_000_000.0


def make_credentials(name: str, network: str = "ours") -> Credentials:
    cookie = hashlib.sha256(network.encode()).digest()
    token = JoinToken(network_id=b"n" * 16, cookie=cookie, expires=0, addresses=())
    return Credentials(Identity(hashlib.sha256(name.encode()).digest()), NetworkKeys.from_token(token))


@pytest.fixture
def credentials() -> Callable[..., Credentials]:
    """`credentials(name, network="ours")`: the same for the same names."""
    return make_credentials


class Table:
    """Nodes without sockets: datagrams go from one to another by hand, at a time that stands still."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wall = WALL
        self.nodes: dict[Address, DhtNode] = {}
        self.wire: list[tuple[bytes, Address, Address]] = []
        """Every datagram delivered: data, from, to."""

    def node(self, name: str, address: Address, *, network: str = "ours", config: DhtConfig | None = None) -> DhtNode:
        """Start a node; at an address in use it takes the place of the one before, as a restart does."""
        member = make_credentials(name, network)
        rng = random.Random(f"{name}/{len(self.wire)}/{self.wall}")
        node = DhtNode(member.identity, member.keys, config or DhtConfig(), rng.randbytes, rng, self.wall)
        node.set_addresses((address,))
        self.nodes[address] = node
        return node

    def address_of(self, node: DhtNode) -> Address:
        return next(address for address, other in self.nodes.items() if other is node)

    def deliver(self, data: bytes, source: Address, to: Address) -> list[Action]:
        """Hand over one datagram; what the receiver wants done, its own sends not yet carried out."""
        self.wire.append((data, source, to))
        receiver = self.nodes.get(to)
        return receiver.receive(data, source, self.now, self.wall) if receiver is not None else []

    def ask(self, asker: DhtNode, to: NodeContact | Address, question: object) -> Answered | None:
        """A whole call: the request there, the reply back; once more as a first contact if there is none."""
        asked = asker.ask(to, question, self.now, self.wall)  # type: ignore[arg-type]
        assert asked is not None
        call, data = asked
        address = to if isinstance(to, Address) else to.address
        answered = self.exchange(asker, data, address)
        again = asker.again(call, self.wall)
        if answered is None and again is not None:
            answered = self.exchange(asker, again, address)
        asker.forget(call)
        return answered

    def exchange(self, asker: DhtNode, data: bytes, to: Address) -> Answered | None:
        source = self.address_of(asker)
        for action in self.deliver(data, source, to):
            if isinstance(action, Send):
                for reaction in self.deliver(action.data, to, action.to):
                    if isinstance(reaction, Answered):
                        return reaction
        return None


@pytest.fixture
def table() -> Table:
    return Table()


@dataclass
class Member:
    name: str
    env: Env
    credentials: Credentials
    dht: Dht
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Cluster:
    """Whole DHT nodes in a simulated world."""

    def __init__(self, world: World, nursery: trio.Nursery, config: DhtConfig) -> None:
        self.world = world
        self.members: list[Member] = []
        self._nursery = nursery
        self._config = config

    async def start(self, name: str, *, port: int = PORT, network: str = "ours", skew: float = 0.0) -> Member:
        """Boot a machine with a node that knows the first member's address."""
        boot = [Address(self.world.host(self.members[0].name), PORT)] if self.members else []
        env = self.world.env(name, wall_skew=skew)
        member_credentials = make_credentials(name, network)
        dht = Dht(
            env, member_credentials, local=Address(self.world.host(name), port), bootstrap=boot, config=self._config
        )
        member = Member(name, env, member_credentials, dht)
        await self._nursery.start(self._run, member)
        self.members.append(member)
        return member

    async def _run(self, member: Member, *, task_status: trio.TaskStatus[None]) -> None:
        with member.scope:
            await member.dht.run(task_status=task_status)

    async def grow(self, count: int, *, settle: float = 20.0) -> list[Member]:
        """`count` members, joined one after the other, all settled."""
        for index in range(count):
            await self.start(f"peer-{index}")
            await trio.sleep(0.1)
        await trio.sleep(settle)
        return list(self.members)

    def stop(self, member: Member) -> None:
        """Kill a member: from now on it is silent."""
        member.scope.cancel()
        self.world.crash(member.name)
        self.members.remove(member)

    def announcement(self, member: Member, key: bytes, value: bytes = b"here", *, seq: int = 1) -> Record:
        expires = int(member.env.clock.wall()) + 3600
        keys = member.credentials.keys
        return sign_record(
            member.credentials.identity, keys.network_id, Kind.ANNOUNCEMENT, key, seq=seq, expires=expires, value=value
        )


Scenario = Callable[[Cluster], Awaitable[T]]


@pytest.fixture
def simulate() -> Callable[..., object]:
    """`simulate(scenario, seed=1, link=None, config=None)`: run `scenario(cluster)` in a world of its own."""

    def run(scenario: Scenario[T], *, seed: int = 1, link: Link | None = None, config: DhtConfig | None = None) -> T:
        async def main(world: World) -> T:
            async with trio.open_nursery() as nursery:
                result = await scenario(Cluster(world, nursery, config or DhtConfig()))
                nursery.cancel_scope.cancel()
            return result

        return run_simulation(main, seed, link=link)

    return run
