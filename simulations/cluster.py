"""Whole peers of the daemon in one process, on the virtual network and clock: where protocol faults are hunted.

Every peer is a `gossipml.daemon.node.Node`, the object that a real process runs; only `Env` and the trainer are
of the simulation. Faults come from the `World`: loss, delay, partition, crash, power loss.

    async def scenario(world: World) -> None:
        async with Cluster.of(world, peers=20) as cluster:
            await trio.sleep(600)
            cluster.crash("peer-3")
            await trio.sleep(60)
            await cluster.start("peer-3")

    run_simulation(scenario, seed=1)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import trio

from gossipml.daemon.learner import LearnerConfig, Progress
from gossipml.daemon.node import Node, NodeConfig
from gossipml.daemon.orders import FOLDER, order_name
from gossipml.daemon.pausing import Observe
from gossipml.daemon.replication import ReplicationConfig
from gossipml.env import Credentials, write_atomic
from gossipml.env.simulated import World
from gossipml.identity import SEED_SIZE, Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.models.merge_rules import MergeRule, parse_merge
from gossipml.models.trainer import Trainer
from gossipml.orders import NETWORK_SEED_SIZE, NetworkKey, Order
from gossipml.peer.failure import FailureConfig
from gossipml.peer.mesh import MeshConfig
from gossipml.simulations.numpy_trainer import Descent, NumpyTrainer, Points, make_points
from gossipml.token import COOKIE_SIZE, JoinToken

PORT = 8711
CONTACTS = 2  # addresses in the token
SLOW_ROUNDS = LearnerConfig(round_seconds=5.0, least_round=10.0, evaluate_seconds=60.0, save_seconds=30.0)
"""Rounds of ten virtual seconds."""
PATIENT = MeshConfig(failure=FailureConfig(silence=60.0, answer=10.0, suspicion=20.0))
"""Heartbeats every minute, not every five seconds: they would be nine tenths of what is simulated."""
SELDOM = ReplicationConfig(look_seconds=120.0, count_seconds=600.0)
"""For the same reason."""

BASE = NodeConfig(name="", listen=Address("0.0.0.0", PORT), mesh=PATIENT, replication=SELDOM)


@dataclass
class Member:
    """One peer of the cluster, running or not."""

    name: str
    identity: Identity
    points: Points
    trains: bool = True
    speed: float = 1.0
    """A machine of speed 2 takes half the time for a step, and for the shortest round."""
    descent: Descent | None = None
    observe: Observe | None = None
    """What its machine does; see `NodeConfig.idle`."""
    node: Node | None = None
    trainer: NumpyTrainer | None = None
    scope: trio.CancelScope | None = None


@dataclass
class Cluster:
    """Peers of one network in a `World`. Use as `async with Cluster.of(world, peers=20) as cluster`."""

    world: World
    network_key: NetworkKey
    token: JoinToken
    """What peers join with that start without HOME/keys; to be replaced after a rotation."""
    config: LearnerConfig
    members: dict[str, Member]
    nursery: trio.Nursery
    base: NodeConfig
    merge: MergeRule

    @classmethod
    @asynccontextmanager
    async def of(
        cls,
        world: World,
        *,
        peers: int,
        config: LearnerConfig = SLOW_ROUNDS,
        contacts: int = CONTACTS,
        base: NodeConfig | None = None,
        merge: str = "clipping",
        parts: Sequence[Points] | None = None,
        descent: Descent | None = None,
        speeds: Sequence[float] | None = None,
        late: int = 0,
    ) -> AsyncIterator[Cluster]:
        """A running cluster of `peer-0` ...; the token names the first `contacts` of them.

        parts: the data of each peer, else generated points; speeds: of each peer, 1 being `config` and `descent`;
        late: peers, the last ones, that are not started yet.
        """
        rng = world.rng("cluster")
        names = [f"peer-{index}" for index in range(peers)]
        members = {
            name: Member(name, Identity(rng.randbytes(SEED_SIZE)), points, speed=speed, descent=descent)
            for name, points, speed in zip(
                names, parts or make_points(world.seed, peers), speeds or [1.0] * peers, strict=True
            )
        }
        first = tuple(Address(world.host(name), PORT) for name in names[:contacts])
        network_key = NetworkKey(rng.randbytes(NETWORK_SEED_SIZE))
        token = JoinToken(network_key.network_id, rng.randbytes(COOKIE_SIZE), 0, first)
        async with trio.open_nursery() as nursery:
            cluster = cls(world, network_key, token, config, members, nursery, base or BASE, parse_merge(merge))
            for name in names[: peers - late]:
                await cluster.start(name)
            yield cluster
            nursery.cancel_scope.cancel()

    async def join(self, name: str, *, parts: int, trains: bool = True) -> None:
        """A new machine with a peer of its own, whose data is one of `parts`; the first ones get into the token."""
        rng = self.world.rng(f"join {name}")
        points = make_points(self.world.seed, parts)[len(self.members) % parts]
        self.members[name] = Member(name, Identity(rng.randbytes(SEED_SIZE)), points, trains)
        if len(self.token.addresses) < CONTACTS:
            address = Address(self.world.host(name), PORT)
            self.token = replace(self.token, addresses=(*self.token.addresses, address))
        await self.start(name)

    async def start(self, name: str) -> None:
        """Boot a machine and its peer, for the first time or after a crash."""
        await self.nursery.start(self._run, self.members[name])

    def crash(self, name: str) -> None:
        """`kill -9`: what was written is there at the next start, everything else is not."""
        self._cancel(name)
        self.world.crash(name)

    def power_off(self, name: str) -> None:
        """As `crash`, and what was not synced is lost, too."""
        self._cancel(name)
        self.world.power_off(name)

    async def leave_order(self, name: str, order: Order) -> None:
        """Leave an order of the network key in the home of a peer, as the command line does."""
        await write_atomic(self.world.disk(name), f"{FOLDER}/{order_name(order)}", order.raw)

    def running(self) -> list[Member]:
        return [member for member in self.members.values() if member.node is not None]

    def accuracies(self) -> list[float]:
        """Last measured test accuracy of each running peer, in the order of their names; 0 before the first."""
        evaluations = [member.node.learner.progress.evaluation for member in self.running() if member.node]
        return [evaluation.accuracy if evaluation else 0.0 for evaluation in evaluations]

    def spread(self) -> float:
        """Root mean square distance of the running peers' parameters from their mean, relative to its norm."""
        parameters = np.stack([member.trainer.parameters for member in self.running() if member.trainer])  # (N, P)
        mean = parameters.mean(0)
        distances = np.linalg.norm(parameters - mean, axis=1)
        return float(np.sqrt((distances**2).mean()) / np.linalg.norm(mean))

    def _cancel(self, name: str) -> None:
        member = self.members[name]
        assert member.scope is not None, f"{name} is not running"
        member.scope.cancel()  # first, so that no part sees its socket close and restarts
        member.node = member.trainer = member.scope = None

    async def _run(self, member: Member, *, task_status: trio.TaskStatus[None]) -> None:
        env = self.world.env(member.name)
        config = replace(
            self.base,
            name=member.name,
            first_contacts=self.token.addresses,
            learner=replace(self.config, least_round=self.config.least_round / member.speed),
            trains=member.trains,
        )
        credentials = Credentials(member.identity, NetworkKeys.from_token(self.token))

        descent = member.descent or Descent()
        descent = replace(descent, seconds=descent.seconds / member.speed)

        @asynccontextmanager
        async def open_trainer() -> AsyncIterator[Trainer]:
            trainer = NumpyTrainer(env, member.points, descent, train=member.trains, merge=self.merge)
            member.trainer = trainer
            yield trainer

        def on_progress(progress: Progress) -> None:
            evaluation = progress.evaluation
            accuracy = round(1e6 * evaluation.accuracy) if evaluation else 0
            self.world.note(f"progress {progress.state}", member.name, "", progress.round, accuracy)

        with trio.CancelScope() as scope:
            node = Node(env, credentials, config, open_trainer, on_progress, member.observe)
            member.scope, member.node = scope, node
            async with node.running():
                task_status.started()
                await trio.sleep_forever()
