"""What gossip does to a population: real state machines, vectors for models, no network and no clock."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossipml.ids import PeerId
from gossipml.peer.gossip import Gossip
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    LearnerReady,
    Merge,
    MergeDone,
    ReplyUpdate,
    Restored,
    RoundFinished,
    SendDone,
    SendUpdate,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.protocols import parse_protocol
from gossipml.peer.view import View

from .peers import DIGEST, contact, make_facts, make_update, peer_id


class Population:
    """N peers that exchange updates; messages arrive in random order, some never."""

    def __init__(self, n: int, seed: int, *, ages: list[float] | None = None, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.values: NDArray[np.float64] = np.random.Generator(np.random.PCG64(seed)).normal(size=(n, 4))
        self.ids = [peer_id(number) for number in range(1, n + 1)]
        self.index = {peer: number for number, peer in enumerate(self.ids)}
        self.peers: list[Gossip] = []
        for number in range(n):
            rng = random.Random(seed * 1000 + number)
            view = View(self.ids[number], rng)
            for other in range(1, n + 1):
                if other != number + 1:
                    view.introduced(contact(other), DIGEST, 0.0)
            gossip = Gossip(view, rng)
            gossip.handle(Restored(ages[number] if ages else 1000.0, 0), 0.0)
            gossip.handle(LearnerReady(make_facts()), 0.0)
            self.peers.append(gossip)
        self.lies: dict[int, NDArray[np.float64]] = {}
        self.snapshots: dict[int, tuple[int, NDArray[np.float64], float]] = {}
        self.refused = 0

    def round(self, samples: int = 0) -> None:
        """Everybody finishes a round at about the same time."""
        order = list(range(len(self.peers)))
        self.rng.shuffle(order)
        under_way: list[tuple[int, Action, tuple[NDArray[np.float64], float]]] = []
        for number in order:
            actions = self.peers[number].handle(RoundFinished(samples, 1), 0.0)
            under_way += [(number, action, self._says(number)) for action in actions]
        while under_way:
            sender, action, said = under_way.pop(self.rng.randrange(len(under_way)))
            assert isinstance(action, SendUpdate | ReplyUpdate)
            self.peers[sender].handle(SendDone(action.to, True, ""), 0.0)
            if self.rng.random() >= self.loss:
                to = self.index[action.to]
                under_way += [(to, reply, self._says(to)) for reply in self._arrive(sender, to, action, *said)]

    def _says(self, number: int) -> tuple[NDArray[np.float64], float]:
        """The model of the round and its age, encoded once for each version, as `Exchange` does it."""
        gossip = self.peers[number]
        if number not in self.snapshots or self.snapshots[number][0] != gossip.version:
            values = self.lies[number] if number in self.lies else self.values[number].copy()
            self.snapshots[number] = (gossip.version, values, gossip.age)
        return self.snapshots[number][1:]

    def _arrive(
        self, sender: int, to: int, action: SendUpdate | ReplyUpdate, values: NDArray[np.float64], age: float
    ) -> list[Action]:
        gossip, peer = self.peers[to], PeerId(self.ids[sender])
        actions = gossip.handle(UpdateOffered(peer, make_update(age, want=isinstance(action, SendUpdate))), 0.0)
        verdict, answers = actions[0], actions[1:]
        if not isinstance(verdict, Accept):
            self.refused += 1
            return [a for a in answers if isinstance(a, ReplyUpdate)]
        actions = gossip.handle(UpdateReceived(peer), 0.0)
        while merges := [a for a in actions if isinstance(a, Merge)]:
            [merge] = merges
            answers += [a for a in actions if isinstance(a, ReplyUpdate)]
            finite = bool(np.isfinite(values).all())
            distance = float(np.linalg.norm(values - self.values[to])) if finite else 0.0
            if finite:
                self.values[to] = (1 - merge.weight) * self.values[to] + merge.weight * values
            actions = gossip.handle(MergeDone(peer, finite, "" if finite else "not finite", distance), 0.0)
        return [a for a in answers if isinstance(a, ReplyUpdate)]

    def spread(self) -> float:
        return float(np.linalg.norm(self.values - self.values.mean(axis=0)))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 30), st.integers(0, 1000), st.sampled_from([0.0, 0.3]))
def test_averaging_contracts_and_keeps_the_mean(n: int, seed: int, loss: float) -> None:
    population = Population(n, seed, loss=loss)
    spread, mean = population.spread(), population.values.mean(axis=0)
    low, high = population.values.min(axis=0), population.values.max(axis=0)
    for _ in range(12):
        population.round()
        assert population.values.min() >= low.min() - 1e-9, "a mean lies within the hull"
        assert (population.values <= high + 1e-9).all()
    assert population.spread() < 0.01 * spread
    drift = float(np.linalg.norm(population.values.mean(axis=0) - mean))
    assert drift <= 2.0 * spread / n, "the consensus lies where the mean was, but for the noise of push"
    assert population.refused == 0


def test_the_spread_shrinks_by_more_than_half_in_each_round() -> None:
    population = Population(30, 3)
    for _ in range(8):
        before = population.spread()
        population.round()
        assert population.spread() < 0.5 * before


def test_a_newcomer_is_where_the_others_are_after_one_round() -> None:
    n = 10
    population = Population(n, 5, ages=[50_000.0] * (n - 1) + [0.0])
    population.values[:] = 1.0
    population.values[-1] = -50.0
    population.round(samples=10)
    assert np.abs(population.values[-1] - 1.0).max() < 6.0
    assert np.abs(population.values[:-1] - 1.0).max() == 0.0, "its stale model was refused"
    population.round(samples=10)
    assert np.abs(population.values - 1.0).max() < 1.5
    assert all(gossip.age >= 50_000 for gossip in population.peers)


def test_a_liar_that_sends_nan_ends_in_quarantine_and_leaves_no_trace() -> None:
    population = Population(10, 7)
    population.lies[0] = np.full(4, np.nan)
    for _ in range(15):
        population.round(samples=10)
    honest = population.values[1:]
    assert np.isfinite(honest).all()
    assert float(np.linalg.norm(honest - honest.mean(axis=0))) < 0.01
    records = [gossip.conduct.record(population.ids[0], 0.0) for gossip in population.peers[1:]]
    assert all(record.quarantined_until is not None for record in records)


def test_a_liar_about_its_age_does_not_make_honest_peers_stale() -> None:
    population = Population(10, 9)
    liar = population.peers[0]
    for _ in range(30):
        liar.ages.restore(2.0**53)
        population.round(samples=10)
    before = population.refused
    liar.ages.restore(2.0**53)
    population.round(samples=10)
    assert population.refused == before


@pytest.mark.parametrize("fanout", [1, 4])
def test_peers_of_different_speed_come_to_one_age(fanout: int) -> None:
    population = Population(8, 11, ages=[0.0] * 8)
    for gossip in population.peers:
        gossip.policy.protocol = parse_protocol(f"push:{fanout}")
    for _ in range(20):
        for number, gossip in enumerate(population.peers):
            gossip.ages.trained(1 + 200 * (number % 2))
        population.round()
    ages = [gossip.age for gossip in population.peers]
    assert min(ages) > 0.7 * max(ages)
