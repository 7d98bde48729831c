"""A fifth of the peers lie, and the others, with the default settings, come to what they would have come to anyway.

Real trainers and real gossip state machines on digits, split unevenly; messages in random order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from gossipml.config import PeerConfig
from gossipml.models.builtin import DigitsMlp
from gossipml.models.data import load_source
from gossipml.models.encoding import decode, encode
from gossipml.models.training import LocalTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "learning"))

from lockstep import Lie, Network, Setting  # the network of the learning benchmarks

PEERS, LIARS, ROUNDS, STEPS = 10, 2, 20, 8


def altered(change: float, noise: float = 0.0) -> Lie:
    """The liar's own parameters, times `change`, and noise of so many of their standard deviations."""
    rng = np.random.Generator(np.random.PCG64(1))

    def lie(trainer: LocalTrainer, body: bytes, encoding: str) -> bytes:
        values = decode(encoding, body, trainer.layout.size)
        drawn = rng.normal(size=len(values)).astype(np.float32)
        return encode(encoding, np.float32(change) * values + np.float32(noise) * values.std() * drawn)

    return lie


def not_a_number(trainer: LocalTrainer, body: bytes, encoding: str) -> bytes:
    return b"\xff" * len(body)  # the scales, read as numbers, are none


def stale() -> Lie:
    """The first thing that each liar ever sent, again and again, as if it were new."""
    first: dict[int, bytes] = {}

    def lie(trainer: LocalTrainer, body: bytes, encoding: str) -> bytes:
        return first.setdefault(id(trainer), body)

    return lie


LIES = {
    "nan": not_a_number,
    "sign flip": altered(-1),
    "x100": altered(100),
    "stale": stale(),
    "noise": altered(1, 3),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of so small a model wait for each other, otherwise, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def population(lie: Lie | None, options: PeerConfig) -> Network:
    network = Network(
        Setting(DigitsMlp(), load_source("digits"), PEERS, replace(options, local_steps=str(STEPS))), [lie] * LIARS
    )
    for _ in range(ROUNDS):
        network.round()
    network.settle(2)
    return network


@cache
def clean() -> float:
    network = population(None, PeerConfig(split="dirichlet:0.5", seed=3))
    return fmean(peer.trainer.evaluate().accuracy for peer in network.peers[LIARS:])


@pytest.mark.parametrize("name", LIES)
def test_a_fifth_of_liars_costs_less_than_two_points(name: str) -> None:
    network = population(LIES[name], PeerConfig(split="dirichlet:0.5", seed=3))
    found = fmean(network.served())
    print(f"{name}: {found:.3f}, without liars {clean():.3f}")
    assert clean() > 0.9
    assert found > clean() - 0.02
    records = [[peer.gossip.conduct.record(each, 0.0) for each in network._ids[:LIARS]] for peer in network.honest()]
    if name == "nan":
        assert all(record.strikes >= 3 and record.quarantined_until for each in records for record in each)
    else:
        assert not any(record.strikes for each in records for record in each), "whoever is only far away is no criminal"
    for peer in network.honest():
        honest = [peer.gossip.conduct.record(each, 0.0).strikes for each in network._ids[LIARS:]]
        assert not any(honest)


def test_a_plain_mean_would_not_hold() -> None:
    network = population(LIES["sign flip"], PeerConfig(split="dirichlet:0.5", seed=3, merge="age"))
    assert fmean(network.served()) < clean() - 0.05
