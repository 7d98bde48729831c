"""The discrete engine: the daemon's own peers, whole, on the virtual network and clock; for up to some hundred.

Every peer runs its DHT, its store, its mesh and its learner (`cluster`); what is left out is TLS, whose result is
asserted, and torch: the model is softmax regression in numpy with the settings of the model `logistic`, so that one
scenario with that model runs on both engines. A round is `round_seconds` of virtual time for a peer of speed 1, of
which `BUSY` is training.

The virtual world runs in a thread of its own, because an engine is an iterator and a trio run is not.
"""

from __future__ import annotations

import math
import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import trio

from gossipml.config import PeerConfig
from gossipml.daemon.exchange_rules import gossip_config
from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.releases import ReleaseConfig
from gossipml.daemon.replication import ReplicationConfig
from gossipml.dht.config import DhtConfig
from gossipml.env.link import Delay, Link, fixed, heavy_tailed, uniform
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import UserError
from gossipml.models.data import load_source, prepare
from gossipml.models.dataset import Rows
from gossipml.models.partition import parse_rule, split_indices
from gossipml.models.registry import load_spec
from gossipml.models.spec import Sgd
from gossipml.models.store import StoreConfig
from gossipml.peer.failure import FailureConfig
from gossipml.peer.mesh import MeshConfig
from gossipml.simulations.cluster import BASE, Cluster, Member
from gossipml.simulations.heap import few_collections
from gossipml.simulations.numpy_trainer import Descent, Points, Vector, evaluate_all
from gossipml.simulations.result import Progress, Row
from gossipml.simulations.scenario import Partition, Scenario
from gossipml.simulations.traces import read_delays, read_presence

MODEL = "logistic"
MOST_PEERS = 500  # of whole daemons in one process: 60 MB and some ten events a second each
QUIET = replace(
    BASE,
    mesh=MeshConfig(upkeep=30.0, failure=FailureConfig(silence=1200.0, answer=30.0, suspicion=60.0)),
    dht=DhtConfig(k=8, quiet_after=1800.0, refresh_after=7200.0, upkeep_interval=300.0),
    replication=ReplicationConfig(look_seconds=600.0, count_seconds=1800.0),
    store=StoreConfig(keep_last=2),
    look_seconds=(120.0, 3600.0),
    here_seconds=7200.0,
    held_seconds=7200.0,
    watch_seconds=600.0,
)
"""Rounds are a thousand times longer than in earnest, so heartbeats, pings, looks and counts are rarer, too, or they
would be nine tenths of what is simulated; answers of the DHT are still a third of it (measured). k of the DHT is that
of BEP 5; 20 is for networks of which half dies. All of it stands in docs/simulator.md."""
HINT_ROUNDS = 20  # between two times that a neighbour is told of other peers; in earnest a second, a few rounds
BUSY = 0.5  # share of a round that is training; the rest waits for the round to end


_Item = Row | Progress | BaseException | None


def check(scenario: Scenario, device: str) -> list[str]:
    """See `result.Engine`."""
    refused = [
        (scenario.peers > MOST_PEERS, f"peers {scenario.peers} is above {MOST_PEERS}"),
        (scenario.model != MODEL, f"model {scenario.model!r} is not {MODEL!r}, the one that it trains"),
        (bool(scenario.vector) or not scenario.data, "data is not given; digits, for example, comes along"),
        (bool(scenario.baseline), f"{scenario.protocol!r} is no gossip protocol"),
        (scenario.topology.kind != "peer-sampling", f"topology {scenario.topology.kind!r} is not the daemon's"),
        (
            scenario.churn.misses > 0,
            "churn.misses is given: whole peers miss no rounds; give churn.up and down",
        ),
        (scenario.settle > 0, "settle is given: its daemons train to the end"),
        (scenario.byzantine.share > 0, "the daemon does not lie"),
        (scenario.train.optimiser == "adam", "train.optimiser 'adam' is not the trainer's; it descends by SGD"),
        (device == "cuda", "device 'cuda': its trainer runs on the CPU"),
    ]
    for wrong, why in refused:
        if wrong:
            raise UserError(f"the discrete engine cannot run {scenario.chosen!r}: {why}; use the population engine")
    gossip_config(_exchange(scenario))
    _delay(scenario)
    if scenario.churn.file:
        read_presence(scenario.churn.file, scenario.peers)
    return []


def run(scenario: Scenario, seed: int, device: str = "cpu") -> Iterator[Row | Progress]:
    """See `result.Engine`."""
    items: queue.Queue[_Item] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=_simulate, args=(scenario, seed, items.put, stop), name="simulation")
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class _Stopped(Exception):
    """Nobody wants more rows."""


def _simulate(scenario: Scenario, seed: int, put: Callable[[_Item], None], stop: threading.Event) -> None:
    try:
        parts, descent = _problem(scenario, seed)
        watched = _Watched(scenario, seed, parts, descent, put, stop)
        with few_collections():
            run_simulation(watched.run, seed, link=_link(scenario), traced=False)
    except BaseException as error:
        if not (isinstance(error, _Stopped) or stop.is_set()):
            put(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
    put(None)


@dataclass
class _Watched:
    """One simulation, and the tasks that trouble and watch it."""

    scenario: Scenario
    seed: int
    parts: list[Points]
    descent: Descent
    put: Callable[[_Item], None]
    stop: threading.Event
    past: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Updates, bytes and messages of earlier lives of peers that crashed."""

    async def run(self, world: World) -> None:
        scenario = self.scenario
        late = round(scenario.late.share * scenario.peers)
        gossip = replace(gossip_config(_exchange(scenario)), contacts_seconds=HINT_ROUNDS * scenario.round_seconds)
        opened = Cluster.of(
            world,
            peers=scenario.peers,
            config=_learner(scenario),
            base=replace(QUIET, gossip=gossip),
            merge=_exchange(scenario).merge,
            parts=self.parts,
            descent=self.descent,
            speeds=_speeds(scenario, world.rng("speeds")),
            late=late,
        )
        async with opened as cluster, trio.open_nursery() as nursery:
            names = list(cluster.members)
            nursery.start_soon(self._let_join, cluster, names[len(names) - late :])
            for name in names if scenario.churn.up else ():
                nursery.start_soon(self._churn, cluster, name)
            if scenario.churn.file:
                for peer, times in read_presence(scenario.churn.file, scenario.peers).items():
                    nursery.start_soon(self._follow, cluster, names[peer], times)
            for partition in scenario.partition:
                nursery.start_soon(self._part, world, names, partition)
            await self._watch(cluster)
            nursery.cancel_scope.cancel()
            for member in cluster.running():  # nobody watches any more how each takes leave of all others
                cluster.crash(member.name)

    async def _watch(self, cluster: Cluster) -> None:
        scenario = self.scenario
        for round in range(scenario.rounds + 1):
            await _sleep_until(cluster.world, round * scenario.round_seconds)
            if self.stop.is_set():
                raise _Stopped
            if round % scenario.evaluate_every == 0 or round == scenario.rounds:
                self.put(self._row(cluster, round))
            else:
                self.put(Progress(round))

    def _row(self, cluster: Cluster, round: int) -> Row:
        running = [member for member in cluster.running() if member.trainer is not None and member.trains]
        counts = np.array([self._counts(member) for member in cluster.members.values()])
        row = Row(
            self.scenario.chosen,
            self.seed,
            float(round),
            cluster.world.now(),
            updates=int(counts[:, 0].sum()),
            bytes=float(counts[:, 1].mean()),
            messages=float(counts[:, 2].mean()),
            alive=len(running),
        )
        if not running:
            return row
        x = np.stack([member.trainer.parameters for member in running if member.trainer])  # (N, P)
        mean = x.mean(0)
        accuracies, losses = evaluate_all(np.vstack([x, mean]), self.parts[0])
        own = accuracies[:-1]
        square = float(((x - mean) ** 2).mean(0).sum())
        return replace(
            row,
            accuracy=float(own.mean()),
            accuracy_std=float(own.std()),
            accuracy_min=float(own.min()),
            accuracy_max=float(own.max()),
            accuracy_average=float(accuracies[-1]),
            loss=float(losses[:-1].mean()),
            consensus=math.sqrt(square) / (float(np.linalg.norm(mean)) or 1.0),
            variance=square / x.shape[1],
        )

    def _counts(self, member: Member) -> tuple[int, int, int]:
        """Updates, bytes and messages of all lives of a peer."""
        updates, size, messages = self.past.get(member.name, (0, 0, 0))
        if member.node is not None:
            stats = member.node.mesh.stats
            updates += member.trainer.rounds if member.trainer is not None else 0
            size += stats.traffic.sent
            messages += stats.updates_sent
        return updates, size, messages

    # Trouble.

    def _crash(self, cluster: Cluster, name: str) -> None:
        member = cluster.members[name]
        if member.node is not None:
            self.past[name] = self._counts(member)
            cluster.crash(name)

    async def _let_join(self, cluster: Cluster, names: list[str]) -> None:
        await _sleep_until(cluster.world, self.scenario.late.seconds)
        for name in names:
            if cluster.members[name].node is None:
                await cluster.start(name)

    async def _churn(self, cluster: Cluster, name: str) -> None:
        churn, rng = self.scenario.churn, cluster.world.rng(f"churn {name}")
        while True:
            await trio.sleep(rng.expovariate(1 / churn.up))
            self._crash(cluster, name)
            await trio.sleep(rng.expovariate(1 / churn.down))
            await cluster.start(name)

    async def _follow(self, cluster: Cluster, name: str, times: list[tuple[float, float]]) -> None:
        for start, end in times:
            if cluster.world.now() < start:
                self._crash(cluster, name)
                await _sleep_until(cluster.world, start)
                await cluster.start(name)
            await _sleep_until(cluster.world, end)
        self._crash(cluster, name)

    async def _part(self, world: World, names: list[str], partition: Partition) -> None:
        await _sleep_until(world, partition.start)
        ends = [round(share * len(names)) for share in np.cumsum(partition.groups)]
        world.partition(*(names[begin:end] for begin, end in zip([0, *ends], ends, strict=False)))
        await _sleep_until(world, partition.end)
        world.heal()


def _exchange(scenario: Scenario) -> PeerConfig:
    merge = scenario.merge or PeerConfig.merge
    return PeerConfig(protocol=scenario.protocol, merge=merge, compression=scenario.compression)


async def _sleep_until(world: World, time: float) -> None:
    await trio.sleep(max(0.0, time - world.now()))


def _problem(scenario: Scenario, seed: int) -> tuple[list[Points], Descent]:
    """The data of each peer as the model sees it, and the model's own way down unless the scenario has another."""
    spec, data = prepare(load_spec(scenario.model), load_source(scenario.data))
    width = math.prod(data.train.inputs.shape[1:])

    def seen(inputs: Rows) -> Vector:
        return np.ascontiguousarray(spec.ingest(np.asarray(inputs[:])).reshape(-1, width), np.float32)

    inputs, test = seen(data.train.inputs), seen(data.test.inputs)
    targets, test_targets = data.train.targets.astype(np.int64), data.test.targets.astype(np.int64)
    indices = split_indices(targets, data.classes, parse_rule(scenario.split), scenario.peers, seed)
    parts = [Points(inputs[part], targets[part], test, test_targets, data.classes) for part in indices]
    train, own = scenario.train, spec.optimiser([])
    assert isinstance(own, Sgd), "the model descends by SGD"
    sgd = Sgd(train.learning_rate, train.momentum, train.weight_decay) if train.own_optimiser else own
    batch = train.batch or spec.batch
    steps = train.steps or max(1, round(train.epochs * np.mean([len(part) for part in indices]) / batch))
    seconds = BUSY * scenario.round_seconds / steps
    return parts, Descent(batch, sgd.learning_rate, sgd.momentum, sgd.weight_decay, steps, seconds)


def _learner(scenario: Scenario) -> LearnerConfig:
    """One epoch, of as many steps as the scenario says, a round; the rest is rare, as rounds are long."""
    return LearnerConfig(
        round_seconds=1e9,  # that is, an epoch
        least_round=scenario.round_seconds,
        first_steps=1 << 30,
        evaluate_seconds=scenario.round_seconds,  # else all would publish in the moment of the first look
        save_seconds=5 * scenario.round_seconds,
        last_save_seconds=0.0,  # they are killed, at the end too
        release_look_seconds=scenario.round_seconds,
        releases=ReleaseConfig(seconds=60 * scenario.round_seconds, first_seconds=5 * scenario.round_seconds),
    )


def _speeds(scenario: Scenario, rng: random.Random) -> list[float]:
    compute = scenario.compute
    match compute.speed:
        case "uniform":
            return [rng.uniform(1 - compute.spread, 1 + compute.spread) for _ in range(scenario.peers)]
        case "log-normal":
            return [rng.lognormvariate(0.0, compute.spread) for _ in range(scenario.peers)]
    return [1.0] * scenario.peers


def _link(scenario: Scenario) -> Link:
    network = scenario.network
    return Link(delay=_delay(scenario), loss=network.loss, bandwidth=network.bandwidth or math.inf)


def _delay(scenario: Scenario) -> Delay:
    network = scenario.network
    match network.delay:
        case "uniform":
            return uniform((1 - network.spread) * network.seconds, (1 + network.spread) * network.seconds)
        case "heavy-tailed":
            return heavy_tailed(network.seconds, network.spread)
        case "trace":
            delays = read_delays(network.file).tolist()
            return lambda rng: delays[int(rng.random() * len(delays))]
    return fixed(network.seconds)
