"""The population engine: thousands of peers of one scenario in one tensor, with the daemon's own state machines.

`check` says before the start what would fail or surprise, `run` gives the rows of one variant with one seed. What
happens when: `population_engine`; training: `population_training`; merges: `population_merging`; the scenario's words:
`population_setting`; what gossip is compared with: `baselines`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from types import MappingProxyType

import numpy as np
import torch

from gossipml.models.averaging import Coordinates, coordinates_of
from gossipml.models.data import Dataset
from gossipml.models.flat import build_flat
from gossipml.models.merge_rules import parse_merge
from gossipml.models.spec import Sgd, Spec
from gossipml.simulations import baselines
from gossipml.simulations.byzantine import Liars
from gossipml.simulations.heap import few_collections
from gossipml.simulations.population_engine import TICKS, Counts, Learners, PopulationEngine
from gossipml.simulations.population_evaluation import Judge
from gossipml.simulations.population_memory import Memory, check_memory, estimate
from gossipml.simulations.population_merging import Mixer, spread
from gossipml.simulations.population_setting import (
    Vectors,
    device_of,
    gossip_config,
    graph_drawer,
    liars_of,
    links_of,
    model_and_data,
    pace_of,
    parts_of,
    presence_of,
)
from gossipml.simulations.population_training import Threads, Trainees
from gossipml.simulations.population_view import World
from gossipml.simulations.result import Progress, Row
from gossipml.simulations.scenario import Scenario

NETWORK = b"simulation"  # of the start that all peers share
SERVED_MOST = 20  # peers whose served model is kept and measured: memory and time for a mean


def check(scenario: Scenario, device: str) -> list[str]:
    """See `result.Engine`."""
    where = device_of(device)
    warnings = []
    if scenario.vector:
        size = scenario.vector
        check_memory(estimate(scenario.peers, size, optimiser_copies=0, samples=0), scenario.peers, where)
    else:
        spec, data = model_and_data(scenario.model, scenario.data, scenario.train)
        parts_of(data, scenario.split, scenario.peers, scenario.seeds[0])
        check_memory(_memory(scenario, spec, data), scenario.peers, where)
    if not scenario.baseline:
        drawer = graph_drawer(scenario, scenario.seeds[0])
        if drawer is not None and (parts := drawer(0).parts()) > 1:
            warnings.append(
                f"the {scenario.topology.kind} graph is not connected: it has {parts} parts, which never hear of each "
                "other; more neighbours, or another seed, may join them"
            )
        if drawer is not None and scenario.protocol.startswith("d-psgd"):
            warnings.append(
                "d-psgd lays its own rings over the peers that one can send to: on a sparse topology use merge-update"
            )
        presence_of(scenario, scenario.seeds[0])
        links_of(scenario, scenario.seeds[0])
    return warnings


def run(scenario: Scenario, seed: int, device: str) -> Iterator[Row | Progress]:
    """See `result.Engine`."""
    where = device_of(device)
    threads = Threads(where)
    with threads.open():
        if scenario.baseline:
            yield from _run_baseline(scenario, seed, where, threads)
        else:
            yield from _run_gossip(scenario, seed, where, threads)


def _run_gossip(scenario: Scenario, seed: int, device: torch.device, threads: Threads) -> Iterator[Row | Progress]:
    liars = liars_of(scenario, seed)
    learners: Learners
    watcher: Watcher
    if scenario.vector:
        learners = Vectors(threads.helpers.memory(scenario.peers, scenario.vector), seed)
        coordinates = Coordinates(scenario.vector, scenario.vector)
        watcher = Watcher(scenario, seed, None)
        epochs = [0] * scenario.peers
    else:
        trainees, judge, coordinates = population(scenario, seed, device, threads)
        if scenario.byzantine.kind == "label-flip":
            spec, _ = model_and_data(scenario.model, scenario.data, scenario.train)
            most = len(spec.labels) - 1
            trainees.replace_targets(liars, lambda targets: most - targets)
        learners, watcher = trainees, Watcher(scenario, seed, judge)
        epochs = [trainees.epoch_steps(peer) for peer in range(scenario.peers)]
    start = learners.x[0].clone() if scenario.vector == 0 else torch.zeros_like(learners.x[0])
    drawer = graph_drawer(scenario, seed)
    world = World([True] * scenario.peers, links_of(scenario, seed), drawer(0) if drawer else None)
    watched: Sequence[int] = [] if scenario.vector else watcher.watched[:SERVED_MOST]
    if _averages(scenario) == scenario.peers:
        watched = range(scenario.peers)
    rule = parse_merge(scenario.merge or "clipping")
    mixer = Mixer(learners.x, start, coordinates, rule, threads.helpers, watched=watched, doubtful=bool(liars))
    engine = PopulationEngine(
        learners,
        mixer,
        world,
        pace_of(scenario, epochs, seed),
        gossip_config(scenario, learners.layout),
        seed=seed,
        tick=scenario.round_seconds / TICKS,
        presence=presence_of(scenario, seed),
        redraw=drawer if scenario.topology.every else None,
        redraw_seconds=scenario.topology.every * scenario.round_seconds,
        lies=_liars(scenario, liars, learners.x, seed),
    )
    honest = [peer for peer in range(scenario.peers) if peer not in set(liars)]

    def row(seconds: float) -> Row:
        there = [peer for peer in honest if world.up[peer]]
        return watcher.row(seconds, learners.x, there, engine.counts, mixer.served)

    threads.helpers.begin()
    yield row(0.0)
    step = scenario.evaluate_every * scenario.round_seconds
    looks = max(1, math.ceil(scenario.seconds / step - 1e-9))
    with few_collections():
        for look in range(1, looks + 1):
            until = min(look * step, scenario.seconds)
            for now in engine.run(until):
                yield Progress(now / scenario.round_seconds)
            yield row(until)


def _liars(scenario: Scenario, liars: Sequence[int], x: torch.Tensor, seed: int) -> Liars | None:
    if not liars:
        return None
    return Liars(scenario.byzantine.kind, liars, x, factor=scenario.byzantine.factor, seed=seed)


def _run_baseline(scenario: Scenario, seed: int, device: torch.device, threads: Threads) -> Iterator[Row | Progress]:
    whole = scenario.baseline == "central"
    trainees, judge, _ = population(scenario, seed, device, threads, whole=whole)
    watcher = Watcher(scenario, seed, judge)
    rounds = baselines.rounds(scenario, trainees, seed)
    peers = range(1 if whole else scenario.peers)
    yield watcher.row(0.0, trainees.x, peers, Counts())
    for number, counts in enumerate(rounds, 1):
        yield Progress(number)
        if number % scenario.evaluate_every == 0 or number == scenario.rounds:
            yield watcher.row(number * scenario.round_seconds, trainees.x, peers, counts)


def population(
    scenario: Scenario, seed: int, device: torch.device, threads: Threads, *, whole: bool = False
) -> tuple[Trainees, Judge, Coordinates]:
    """The peers of a scenario before their first round, and who measures them; `whole`: one with all their data."""
    spec, data = model_and_data(scenario.model, scenario.data, scenario.train)
    check_memory(_memory(scenario, spec, data), scenario.peers, device)
    parts = parts_of(data, scenario.split, scenario.peers, seed)
    if whole:
        parts = [np.concatenate(parts)]
    trainees = Trainees(spec, data, parts, seed=seed, network_id=NETWORK, device=device, threads=threads)
    flat, _ = build_flat(spec, NETWORK, device, trains=False)
    return trainees, Judge(spec, data, flat, device, threads), coordinates_of(flat.module)


def _memory(scenario: Scenario, spec: Spec, data: Dataset) -> Memory:
    flat, layout = build_flat(spec, NETWORK, torch.device("cpu"), trains=False)
    asked = spec.optimiser(flat.module.parameters())
    copies = asked.has_velocity if isinstance(asked, Sgd) else 3  # gradient and two moments
    values = math.prod(spec.inputs[0].shape[1:])
    samples = 4 * values * (len(data.train) + len(data.test))
    delay = scenario.network.seconds / scenario.round_seconds
    return estimate(
        scenario.peers,
        layout.size,
        optimiser_copies=copies,
        samples=samples,
        delay_rounds=delay,
        averages=_averages(scenario),
    )


def _averages(scenario: Scenario) -> int:
    """Of how many peers averages over time are kept: where training ends, what each serves depends on all of them."""
    if scenario.vector:
        return 0
    return scenario.peers if scenario.settle else min(SERVED_MOST, scenario.peers)


class Watcher:
    """Makes rows."""

    def __init__(self, scenario: Scenario, seed: int, judge: Judge | None) -> None:
        self._scenario, self._seed, self._judge = scenario, seed, judge
        chosen = scenario.evaluate_peers or scenario.peers
        self.watched = sorted(Random(f"watched {seed}").sample(range(scenario.peers), chosen))

    def row(
        self,
        seconds: float,
        x: torch.Tensor,
        there: Sequence[int],
        counts: Counts,
        served: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> Row:
        """`there` are the peers of the row; `served` what those that are watched serve."""
        scenario, peers = self._scenario, self._scenario.peers
        row = Row(
            variant=scenario.chosen or scenario.protocol,
            seed=self._seed,
            round=seconds / scenario.round_seconds,
            seconds=seconds,
            updates=counts.updates,
            bytes=counts.bytes / peers,
            messages=counts.messages / peers,
            alive=len(there),
        )
        if not there:
            return row
        centre, distance, variance = spread(x, there)
        found: dict[str, float] = {"consensus": distance, "variance": variance}
        if self._judge is not None:
            watched = sorted(set(there).intersection(self.watched)) if len(x) > 1 else list(there)
            scores = self._judge.scores(x, watched) if watched else []
            accuracies = [accuracy for accuracy, _ in scores]
            if accuracies:
                found |= {
                    "accuracy": statistics.fmean(accuracies),
                    "accuracy_std": statistics.pstdev(accuracies),
                    "accuracy_min": min(accuracies),
                    "accuracy_max": max(accuracies),
                    "loss": statistics.fmean(loss for _, loss in scores),
                }
            found["accuracy_average"] = self._judge.score(centre)[0]
            averages = [served[peer] for peer in watched if peer in served][:SERVED_MOST]
            if averages:
                scores = self._judge.scores(torch.stack(averages), range(len(averages)))
                found["accuracy_served"] = statistics.fmean(accuracy for accuracy, _ in scores)
        return Row(**{**vars(row), **found})
