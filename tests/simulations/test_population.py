"""The population against separate peers, against itself, and against what is known of averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

from gossipml.errors import UserError
from gossipml.models.arrays import can_compile
from gossipml.models.averaging import Coordinates
from gossipml.models.data import take_part
from gossipml.models.merge_rules import parse_merge
from gossipml.models.partition import Part, parse_rule
from gossipml.models.training import LocalTrainer
from gossipml.peer.gossip import Gossip
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    Asked,
    AskUpdate,
    LearnerReady,
    Merge,
    MergeDone,
    ModelFacts,
    RoundFinished,
    Send,
    SendDone,
    SendRefused,
    SendUpdate,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.protocols import PROTOCOLS
from gossipml.peer.wire import Update
from gossipml.simulations import baselines, population
from gossipml.simulations.network import Links, fixed
from gossipml.simulations.population_engine import PopulationEngine
from gossipml.simulations.population_helpers import Helpers
from gossipml.simulations.population_merging import Merging, Mixer
from gossipml.simulations.population_pool import Pool
from gossipml.simulations.population_setting import (
    device_of,
    gossip_config,
    model_and_data,
    pace_of,
    presence_of,
)
from gossipml.simulations.population_training import Threads, Trainees, order_seed
from gossipml.simulations.population_view import PeerView, World
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Byzantine, Churn, Compute, Late, Network, Partition, Scenario, Topology, Train

ROUNDS = 4
SMALL = Scenario("small", peers=6, rounds=ROUNDS, split="dirichlet:0.5", train=Train(steps=3))
DISTURBED = replace(
    SMALL,
    peers=12,
    rounds=6,
    split="labels:3",
    network=Network("heavy-tailed", 2.0, 1.0, loss=0.2, bandwidth=2000.0),
    compute=Compute("log-normal", 0.5, together=False),
    churn=Churn(up=40.0, down=10.0, misses=0.05),
    late=Late(0.2, 15.0),
    byzantine=Byzantine("nan", 0.2),
    partition=(Partition(20.0, 40.0),),
)


def rows(scenario: Scenario, seed: int = 1) -> list[Row]:
    return [each for each in population.run(scenario, seed, "cpu") if isinstance(each, Row)]


def same(first: list[Row], second: list[Row]) -> bool:
    """Bit for bit; NaN is NaN."""
    return [str(row) for row in first] == [str(row) for row in second]


# Separate peers.


@dataclass
class Peer:
    """One peer by itself: the trainer and the state machine that a daemon has."""

    trainer: LocalTrainer
    gossip: Gossip
    bodies: dict[bytes, tuple[Update, bytes]]
    kept: tuple[int, dict[str, tuple[bytes, float, int]]] = (-1, {})


class SeparatePeers:
    """N trainers and state machines on a perfect network, one call after the other."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        spec, data = model_and_data(scenario.model, scenario.data, scenario.train)
        links = Links(Random(0), delay=fixed(0.0))
        self.world = World([True] * scenario.peers, links)
        self.steps = scenario.train.steps
        self.peers: list[Peer] = []
        self.queue: list[tuple[int, int, Update, bytes]] = []
        self.merges = self.messages = 0
        for number in range(scenario.peers):
            part = take_part(data, parse_rule(scenario.split), Part(number + 1, scenario.peers), seed)
            trainer = LocalTrainer(spec, part, network_id=population.NETWORK, seed=order_seed(seed, number))
            rng = Random(f"gossip {seed} {number}")
            self.config = gossip_config(scenario, trainer.layout)
            gossip = Gossip(PeerView(self.world, number, rng), rng, self.config)
            facts = ModelFacts(trainer.layout.model, trainer.layout.digest, trainer.layout.size, trainer.snapshot_size)
            gossip.handle(LearnerReady(facts), 0.0)
            self.peers.append(Peer(trainer, gossip, {}))

    def round(self) -> None:
        finished = []
        for peer in self.peers:
            peer.trainer.begin_round()
            for _ in range(self.steps):
                peer.trainer.step()
            peer.trainer.end_round()
        for number, peer in enumerate(self.peers):
            count = self.steps * peer.trainer.batch
            finished.append((number, peer.gossip.handle(RoundFinished(count, peer.gossip.round + 1), 0.0)))
        self.go_on(finished)
        while self.queue:
            arrived, self.queue = self.queue, []
            inboxes: dict[int, list[tuple[int, int, Update, bytes]]] = {}
            for message in arrived:
                inboxes.setdefault(message[1], []).append(message)
            while inboxes:
                self.go_on([(to, self.received(*inbox.pop(0))) for to, inbox in inboxes.items()])
                inboxes = {to: inbox for to, inbox in inboxes.items() if inbox}

    def received(self, sender: int, to: int, update: Update, body: bytes) -> list[Action]:
        gossip, name = self.peers[to].gossip, self.world.ids[sender]
        if not update.body_length:
            return gossip.handle(Asked(name, update), 0.0)
        verdict, *rest = gossip.handle(UpdateOffered(name, update), 0.0)
        if not isinstance(verdict, Accept):
            if update.mass is not None:
                self.peers[sender].gossip.handle(SendRefused(self.world.ids[to], update.mass.total), 0.0)
            return rest
        self.peers[to].bodies[name] = update, body
        return [*rest, *gossip.handle(UpdateReceived(name), 0.0)]

    def go_on(self, actions: list[tuple[int, list[Action]]]) -> None:
        """All that follows, the sends of all before the merges of all."""
        while actions:
            for number, wanted in actions:
                for action in wanted:
                    if not isinstance(action, Merge):
                        self.send(number, action)  # type: ignore[arg-type]  # a perfect network quarantines nobody
            after = []
            for number, wanted in actions:
                peer = self.peers[number]
                for action in wanted:
                    if isinstance(action, Merge):
                        update, body = peer.bodies.pop(action.sender)
                        report = peer.trainer.merge(body, update.encoding, action.weight)
                        self.merges += report.applied
                        done = MergeDone(action.sender, report.applied, report.reason, report.distance, report.fault)
                        after.append((number, peer.gossip.handle(done, 0.0)))
            actions = after

    def send(self, number: int, action: Send) -> None:
        peer, gossip, layout = self.peers[number], self.peers[number].gossip, self.peers[number].trainer.layout
        asks = isinstance(action, AskUpdate)
        encoding = self.config.encoding if isinstance(action, AskUpdate) else self.config.encoding + action.part
        if peer.kept[0] != gossip.version:
            peer.kept = gossip.version, {}
        if encoding not in peer.kept[1] and not asks:
            peer.kept[1][encoding] = peer.trainer.snapshot(encoding), gossip.age, gossip.round
        body, age, round_ = peer.kept[1].get(encoding, (b"", gossip.age, gossip.round))
        wanted = asks or (isinstance(action, SendUpdate) and action.reply_wanted)
        mass = action.mass if isinstance(action, SendUpdate) else None
        update = Update(
            layout.model, layout.digest, encoding, layout.size, len(body), age, round_, wanted, False, mass=mass
        )
        self.messages += not asks
        gossip.handle(SendDone(action.to, True, ""), 0.0)
        self.queue.append((number, self.world.number[action.to], update, body))

    @property
    def x(self) -> torch.Tensor:
        exact = [peer.trainer.snapshot("float32") for peer in self.peers]
        return torch.stack([torch.frombuffer(bytearray(body), dtype=torch.float32) for body in exact])

    @property
    def averages(self) -> torch.Tensor:
        return torch.stack([peer.trainer._average for peer in self.peers])


def together(scenario: Scenario, seed: int, merge: str = "clipping") -> tuple[PopulationEngine, Trainees, Mixer]:
    device = device_of("cpu")
    threads = Threads(device, 1)
    trainees, _, coordinates = population.population(scenario, seed, device, threads)
    epochs = [trainees.epoch_steps(peer) for peer in range(scenario.peers)]
    watched, rule = range(scenario.peers), parse_merge(merge)
    mixer = Mixer(trainees.x, trainees.first, coordinates, rule, threads.helpers, watched=watched)
    engine = PopulationEngine(
        trainees,
        mixer,
        World([True] * scenario.peers, Links(Random(0), delay=fixed(0.0))),
        pace_of(scenario, epochs, seed),
        gossip_config(scenario, trainees.layout),
        seed=seed,
        tick=scenario.round_seconds / 10,
        presence=presence_of(scenario, seed),
    )
    return engine, trainees, mixer


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_population_does_what_separate_peers_do_step_for_step(protocol: str) -> None:
    scenario = replace(SMALL, protocol=protocol, compression="float32")
    apart = SeparatePeers(scenario, 3)
    engine, trainees, _ = together(scenario, 3)
    for number in range(1, ROUNDS + 1):
        apart.round()
        for _ in engine.run(number * scenario.round_seconds):
            pass
        assert (engine.counts.messages, engine.counts.merges) == (apart.messages, apart.merges)
        assert [peer.age for peer in engine.peers] == [peer.gossip.age for peer in apart.peers]
        assert float((trainees.x - apart.x).abs().max()) < 1e-4
    assert apart.merges > 0


@pytest.mark.parametrize("compression", ["int8", "float16", "int4", "int8-top10", "int8-of4"])
def test_it_does_so_in_every_compression(compression: str) -> None:
    scenario = replace(SMALL, compression=compression)
    apart = SeparatePeers(scenario, 4)
    engine, trainees, mixer = together(scenario, 4)
    for _ in range(ROUNDS):
        apart.round()
    for _ in engine.run(scenario.seconds):
        pass
    assert engine.counts.merges == apart.merges > 0
    assert float((trainees.x - apart.x).abs().max()) < 2e-3  # a value between two steps may fall to either side
    served = torch.stack([mixer.served[peer] for peer in range(scenario.peers)])
    assert float((served - apart.averages).abs().max()) < 2e-3


@pytest.mark.parametrize("compression", ["float32", "int8-of4", "int8-top10"])
@pytest.mark.parametrize("merge", ["clipping", "mean", "slerp"])
def test_merges_of_many_at_once_as_on_a_gpu_are_those_of_one_after_the_other(compression: str, merge: str) -> None:
    ends = []
    for one_by_one, in_loops in ((True, can_compile()), (True, False), (False, False)):
        scenario = replace(SMALL, compression=compression, merge=merge)
        engine, trainees, mixer = together(scenario, 4, merge)
        mixer._one_by_one, mixer._in_loops = one_by_one, in_loops and merge != "slerp"
        mixer._most = 4
        for _ in engine.run(scenario.seconds):
            pass
        assert engine.counts.merges > 0
        ends.append((trainees.x.clone(), torch.stack([mixer.served[peer] for peer in range(scenario.peers)])))
    for others in ends[1:]:
        for one, other in zip(ends[0], others, strict=True):
            assert torch.allclose(one, other, atol=1e-4 if compression == "float32" else 2e-3)


# Itself.


def test_the_same_seed_gives_the_same_result_bit_for_bit() -> None:
    assert same(rows(DISTURBED), rows(DISTURBED))
    assert not same(rows(DISTURBED), rows(DISTURBED, seed=2))


def test_two_threads_give_the_same_result_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(device: torch.device) -> Threads:
        return Threads(device, 2)

    monkeypatch.setattr(population, "Threads", threads)
    scenario = replace(SMALL, peers=40, split="iid", rounds=3)
    first = rows(scenario)
    assert all(same(first, rows(scenario)) for _ in range(3))


def test_torch_has_its_own_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    rows(replace(SMALL, rounds=1))
    assert torch.get_num_threads() == before


# What is known of averaging.


def test_averaging_without_training_brings_vectors_together_and_keeps_their_mean() -> None:
    found = rows(Scenario("vectors", peers=64, rounds=12, model="vector:50", protocol="push-pull:1", merge="mean",
                          compression="float32"))  # fmt: skip
    assert found[0].variance == pytest.approx(1.0, rel=0.1)
    assert found[-1].variance < 1e-3 * found[0].variance
    assert math.isnan(found[-1].accuracy)


def test_when_training_is_over_peers_agree_on_the_mean_of_their_models() -> None:
    train = Train(steps=10)
    scenario = replace(SMALL, peers=20, protocol="push-pull:1", settle=30.0, evaluate_every=ROUNDS, train=train)
    _, trained, settled = rows(scenario)
    assert (trained.round, settled.round) == (ROUNDS, ROUNDS + 3)
    assert trained.updates == settled.updates == 20 * ROUNDS
    assert settled.consensus < 0.05 * trained.consensus
    assert settled.accuracy == pytest.approx(trained.accuracy_average, abs=0.02)
    assert settled.accuracy_served == pytest.approx(settled.accuracy, abs=0.02)
    assert settled.messages > trained.messages


def test_a_peer_that_comes_back_while_the_others_settle_trains_no_more() -> None:
    scenario = replace(DISTURBED, byzantine=Byzantine(), settle=60.0, churn=Churn(up=20.0, down=20.0, misses=0.05))
    found = rows(scenario)
    assert found[-1].updates == found[scenario.rounds].updates
    assert found[-1].messages > found[scenario.rounds].messages


def test_missed_rounds_and_absences_count_in_who_is_there() -> None:
    base = Scenario("vectors", peers=100, rounds=10, model="vector:4")
    assert all(row.alive == 100 for row in rows(base))
    missing = [row.alive for row in rows(replace(base, churn=Churn(misses=0.3)))]
    assert all(50 < alive < 90 for alive in missing)
    away = [row.alive for row in rows(replace(base, churn=Churn(up=30.0, down=30.0)))]
    assert all(30 < alive < 70 for alive in away)
    late = [row.alive for row in rows(replace(base, late=Late(0.4, 45.0)))]
    assert late == [60] * 5 + [100] * 6


def test_a_partition_keeps_groups_apart_until_it_heals() -> None:
    base = Scenario("vectors", peers=40, rounds=20, model="vector:50", protocol="push-pull:2", merge="mean")
    cut = rows(replace(base, partition=(Partition(0.0, 100.0, (0.5, 0.5)),)))
    whole = rows(base)
    assert cut[9].variance > 5 * whole[9].variance
    assert cut[20].variance < 0.01 * cut[9].variance


def test_messages_take_their_delay_and_lost_ones_do_not_arrive() -> None:
    base = Scenario("vectors", peers=30, rounds=6, model="vector:20", protocol="merge-update:1")
    assert rows(base)[1].variance < 0.95 * rows(base)[0].variance
    slow = rows(replace(base, network=Network("fixed", 25.0)))
    assert slow[2].variance == slow[0].variance  # sent at 10 s, there at 35 s
    assert slow[4].variance < slow[0].variance
    lost = rows(replace(base, network=Network(loss=1.0)))
    assert lost[-1].variance == lost[0].variance
    assert lost[-1].messages == 6.0
    narrow = rows(replace(base, network=Network(bandwidth=4.0)))  # int8: a scale and 20 bytes
    assert narrow[1].variance == narrow[0].variance
    assert narrow[-1].variance < narrow[0].variance


@pytest.mark.parametrize("topology", [Topology("ring"), Topology("torus"), Topology("scale-free", 2, every=2)])
def test_on_a_graph_only_neighbours_are_sent_to(topology: Topology) -> None:
    base = Scenario("vectors", peers=36, rounds=8, model="vector:50", protocol="push-pull:1", merge="mean")
    mixed, sparse = rows(base), rows(replace(base, topology=topology))
    assert sparse[-1].variance > 2 * mixed[-1].variance
    assert sparse[-1].variance < 0.5 * sparse[0].variance


@pytest.mark.parametrize("kind", ["nan", "sign-flip", "scale", "noise", "zero", "stale", "inliers", "silent"])
def test_liars_of_each_kind_do_not_carry_the_honest_away(kind: str) -> None:
    found = rows(replace(SMALL, peers=12, rounds=8, split="iid", byzantine=Byzantine(kind, 0.2), protocol="push:3"))
    assert found[-1].alive == 10, "rows are about honest peers"
    assert found[-1].accuracy > 0.5
    assert found[-1].consensus < 1.0


def test_flipped_labels_are_the_liars_own() -> None:
    honest = rows(replace(SMALL, rounds=6, split="iid", protocol="local"))
    lying = rows(replace(SMALL, rounds=6, split="iid", protocol="push:2", byzantine=Byzantine("label-flip", 0.34)))
    assert lying[-1].accuracy > honest[0].accuracy
    assert lying[-1].alive == 4


@pytest.mark.parametrize("merge", ["mean", "age", "slerp", "clipping", "median", "trimmed-mean:1", "krum:1"])
def test_every_merge_rule_learns(merge: str) -> None:
    found = rows(replace(SMALL, rounds=10, peers=10, split="iid", merge=merge, protocol="push:4"))
    assert found[-1].accuracy > 0.5


def test_other_optimisers_learn_too() -> None:
    found = rows(replace(SMALL, split="iid", train=Train(steps=5, optimiser="adam", learning_rate=0.01)))
    assert found[-1].accuracy > found[0].accuracy + 0.3


# Baselines.


def test_baselines_stand_in_the_order_that_theory_gives() -> None:
    compared = ("local", "central", "fedavg", "allreduce")
    scenario = replace(SMALL, peers=10, rounds=8, split="labels:2", protocol="push:4", baselines=compared)
    last = {}
    for variant in scenario.variants():
        *_, last[variant.chosen] = rows(variant)
    assert last["central"].accuracy > last["allreduce"].accuracy > last["local"].accuracy
    assert last["fedavg"].accuracy > last["local"].accuracy
    assert last["push:4"].accuracy > last["local"].accuracy
    assert last["local"].bytes == 0 < last["fedavg"].bytes < last["allreduce"].bytes
    assert last["allreduce"].consensus < 1e-6


def test_averaging_after_each_step_is_a_mean_of_gradients() -> None:
    scenario = replace(SMALL, peers=4, split="iid")
    device = device_of("cpu")
    trainees, apart = (population.population(scenario, 1, device, Threads(device, 1))[0] for _ in range(2))
    *_, _counts = baselines.rounds(replace(scenario, protocol="allreduce", rounds=1, train=Train(steps=1)), trainees, 1)
    apart.train(range(4), [1] * 4)
    gradient = (apart.first - apart.x).mean(0)  # of the first step, times the learning rate
    assert torch.allclose(trainees.x, (apart.first - gradient).expand(4, -1), atol=1e-6)


# Bad input.


def test_too_many_peers_for_the_memory_are_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError, match=r"at most \d+ peers fit"):
        population.check(replace(SMALL, model="vector:100000000", peers=100_000, train=Train()), "cpu")


def test_a_graph_in_parts_is_warned_of() -> None:
    [warning] = population.check(replace(SMALL, topology=Topology("erdos-renyi", probability=0.0)), "cpu")
    assert "6 parts" in warning
    assert population.check(replace(SMALL, topology=Topology("ring")), "cpu") == []


def test_progress_is_told_between_rows() -> None:
    kinds = [type(each).__name__ for each in population.run(SMALL, 1, "cpu")]
    assert kinds[0] == kinds[-1] == "Row"
    assert "Progress" in kinds


def test_rows_under_way_are_put_and_taken_wherever_their_blocks_are() -> None:
    pool = Pool(2, lambda number: torch.zeros(2, 3))
    numbers = pool.take(5)
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    mixed = [4, 1, 3, 0]
    pool.put(mixed, torch.arange(12.0).view(4, 3))
    assert torch.equal(pool.row(3), torch.tensor([6.0, 7.0, 8.0]))
    assert torch.equal(pool.rows(mixed), torch.arange(12.0).view(4, 3))
    assert torch.equal(pool.rows([3, 4]), torch.tensor([[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]]))
    assert not pool.row(2).any()
    pool.use(numbers[0])
    pool.drop(numbers[0])
    assert pool.used == 5
    pool.drop(numbers[0])
    assert pool.take(1) == [numbers[0]]


def test_a_lie_in_parts_of_a_model_lands_where_parts_are_and_is_refused_when_it_is_no_number() -> None:
    size, helpers = 200, Helpers(1, device_of("cpu"))
    x = torch.stack([torch.arange(size, dtype=torch.float32), torch.ones(size)])
    mixer = Mixer(x, torch.zeros(size), Coordinates(size, size), parse_merge("mean"), helpers, doubtful=True)
    form, before = "int8-top10", x[1].clone()
    [row] = mixer.copy([0], form)
    mixer.overwrite(row, torch.full((size,), -7.0))
    [report] = mixer.merge([Merging(1, row, form, 0.5)])
    assert report.applied
    assert torch.equal((x[1] != before).nonzero().flatten(), torch.arange(180, 200)), "the twenty that moved most"
    assert torch.equal(x[1, 180:], torch.full((20,), -3.0))
    [row] = mixer.copy([0], form)
    mixer.overwrite(row, torch.full((size,), float("nan")))
    before = x[1].clone()
    assert mixer.merge([Merging(1, row, form, 0.5)])[0].fault
    assert torch.equal(x[1], before)
