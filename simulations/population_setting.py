"""From a scenario to the parts of a population: model and data, graph, network, presence, pace, liars.

Everything that is drawn is drawn from the seed and the purpose, so that two variants with one seed have the same data,
the same slow peers, the same liars.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch

from gossipml.config import PeerConfig
from gossipml.daemon import exchange_rules
from gossipml.errors import UserError
from gossipml.models.compression import parse_choice
from gossipml.models.compression_auto import choose
from gossipml.models.data import Dataset, load_source, prepare
from gossipml.models.partition import Indices, Part, hold_out, parse_rule, split_indices
from gossipml.models.registry import load_spec
from gossipml.models.spec import Sgd, Spec
from gossipml.models.trainer import Layout
from gossipml.peer.gossip import GossipConfig
from gossipml.peer.protocols import parse_protocol
from gossipml.simulations import churn, network, topology
from gossipml.simulations.network import Cut, Links
from gossipml.simulations.population_engine import Pace
from gossipml.simulations.scenario import Scenario, Train
from gossipml.simulations.topology import Graph
from gossipml.simulations.traces import read_delays, read_presence


def device_of(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; take --device cpu")
    return torch.device(name)


@lru_cache(1)  # all variants and seeds of a scenario have the same
def model_and_data(model: str, source: str, train: Train) -> tuple[Spec, Dataset]:
    """As a daemon has them, with the scenario's settings of training."""
    spec = load_spec(model)
    source = source or spec.data
    if not source:
        raise UserError(f'the model {model!r} has no data of its own; name some in the scenario: data = "digits"')
    spec, data = prepare(spec, load_source(source))
    return _trained_as(spec, train), data


def _trained_as(spec: Spec, train: Train) -> Spec:
    changed = copy.copy(spec)
    if train.batch:
        setattr(changed, "batch", train.batch)  # noqa: B010 a Spec promises to be read, not written
    if train.own_optimiser:
        rate, momentum, decay = train.learning_rate, train.momentum, train.weight_decay

        def optimiser(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer | Sgd:
            if train.optimiser == "adam":
                return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
            return Sgd(rate, momentum, decay)

        setattr(changed, "optimiser", optimiser)  # noqa: B010 the same
    return changed


def parts_of(data: Dataset, split: str, peers: int, seed: int) -> list[Indices]:
    """What each peer trains on: its part without the share that a daemon holds out for validation."""
    parts = split_indices(data.train.targets, data.classes, parse_rule(split), peers, seed)
    return [hold_out(part, Part(number, peers), seed)[0] for number, part in enumerate(parts, 1)]


class Vectors:
    """The model `vector:P`: P values a peer, drawn from a normal distribution, and nothing to train."""

    def __init__(self, x: torch.Tensor, seed: int) -> None:
        """`x` (N, P) is the place for them."""
        self.x = x
        peers, size = x.shape
        x.copy_(torch.randn(peers, size, generator=torch.Generator().manual_seed(seed)))
        self.layout = Layout(f"vector:{size}", "vector", size)

    def batch(self, peer: int) -> int:
        return 0

    def train(self, peers: Sequence[int], steps: Sequence[int]) -> list[int]:
        return []


def gossip_config(scenario: Scenario, layout: Layout) -> GossipConfig:
    """As a daemon has it with the same options. `auto` is chosen once: all links of a scenario are alike."""
    form = parse_choice(scenario.compression)
    if form is None:
        seconds = scenario.round_seconds / max(1, parse_protocol(scenario.protocol).fanout)
        form = choose(scenario.network.bandwidth or None, seconds, layout.size, exact=layout.buffers)
    compression = f"{form.values}-of{form.fragments}" if form.fragments > 1 else form.name
    options = PeerConfig(protocol=scenario.protocol, merge=scenario.merge or "clipping", compression=compression)
    return exchange_rules.gossip_config(options)


def graph_drawer(scenario: Scenario, seed: int) -> Callable[[int], Graph] | None:
    """The n-th graph of the topology; None where everybody may send to everybody."""
    kind, peers, own = scenario.topology.kind, scenario.peers, scenario.topology
    if kind in ("peer-sampling", "complete"):
        return None

    def draw(number: int) -> Graph:
        place = seed * 1_000_003 + number
        match kind:
            case "ring":
                return topology.ring(peers)
            case "torus":
                return topology.torus(peers)
            case "k-regular":
                return topology.regular(peers, own.degree, place)
            case "small-world":
                return topology.small_world(peers, own.degree, own.probability, place)
            case "erdos-renyi":
                return topology.erdos_renyi(peers, own.probability, place)
            case "scale-free":
                return topology.scale_free(peers, own.degree, place)
            case _:
                return topology.edge_list(Path(own.file).expanduser(), peers)

    return draw


def links_of(scenario: Scenario, seed: int) -> Links:
    own = scenario.network
    match own.delay:
        case "none":
            delay = network.fixed(0.0)
        case "fixed":
            delay = network.fixed(own.seconds)
        case "uniform":
            delay = network.uniform((1 - own.spread) * own.seconds, (1 + own.spread) * own.seconds)
        case "heavy-tailed":
            delay = network.heavy_tailed(own.seconds, own.spread)
        case _:
            delay = network.from_trace(read_delays(own.file).tolist())
    cuts = []
    for partition in scenario.partition:
        ends = np.rint(np.cumsum(partition.groups)[:-1] * scenario.peers).astype(int)
        group = np.searchsorted(ends, np.arange(scenario.peers), side="right")
        cuts.append(Cut(partition.start, partition.end, group.tolist()))
    bandwidth = [own.bandwidth] * scenario.peers if own.bandwidth else ()
    return Links(Random(f"network {seed}"), delay=delay, loss=own.loss, bandwidth=bandwidth, cuts=cuts)


def presence_of(scenario: Scenario, seed: int) -> churn.Presence:
    peers, own = scenario.peers, scenario.churn
    if own.file:
        presence = churn.from_trace(read_presence(own.file, peers), peers)
    elif own.up:
        presence = churn.exponential(peers, own.up, own.down, scenario.seconds, Random(f"churn {seed}"))
    else:
        presence = churn.always(peers)
    late = round(scenario.late.share * peers)
    if not late or not scenario.late.seconds:
        return presence
    return churn.joining_late(presence, dict.fromkeys(range(peers - late, peers), scenario.late.seconds))


def pace_of(scenario: Scenario, steps: Sequence[int], seed: int) -> Pace:
    """`steps`: of one pass over each peer's data."""
    rng, own, train = Random(f"pace {seed}"), scenario.compute, scenario.train
    seconds = []
    for _ in range(scenario.peers):
        match own.speed:
            case "same":
                speed = 1.0
            case "uniform":
                speed = 1 - own.spread + 2 * own.spread * rng.random()
            case _:
                speed = rng.lognormvariate(0.0, own.spread)
        seconds.append(scenario.round_seconds / speed)
    starts = [0.0 if own.together else -rng.random() * each for each in seconds]
    wanted = [train.steps or max(1, round(train.epochs * each)) if each else 0 for each in steps]
    ends = scenario.training_seconds if scenario.settle else math.inf
    return Pace(seconds, wanted, starts, scenario.churn.misses, ends)


def liars_of(scenario: Scenario, seed: int) -> list[int]:
    count = round(scenario.byzantine.share * scenario.peers)
    return sorted(Random(f"liars {seed}").sample(range(scenario.peers), count))
