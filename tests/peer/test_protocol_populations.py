"""What each gossip protocol does to a population: real state machines, vectors for models, no network and no clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    Asked,
    AskUpdate,
    Forget,
    LearnerReady,
    Merge,
    MergeDone,
    MergeTogether,
    ModelFacts,
    Quarantine,
    Refuse,
    ReplyUpdate,
    Restored,
    RoundFinished,
    SendDone,
    SendRefused,
    SendUpdate,
    Settle,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.protocols import PROTOCOLS, parse_protocol, part_of
from gossipml.peer.push_sum import Mass
from gossipml.peer.view import View
from gossipml.peer.wire import Update

from .peers import DIGEST, contact, peer_id

SIZE = 16
WHOLE = ("push", "push-pull", "pull", "merge-update", "update-merge", "push-sum", "token-account", "d-psgd")


def places(encoding: str) -> NDArray[np.bool_]:
    """Which of the SIZE parameters a body holds."""
    fragment, share = part_of(encoding)
    count = round(1 / share)
    if fragment:
        number = int(fragment[1:].split("of")[0]) - 1
        chosen: NDArray[np.bool_] = np.arange(SIZE) // (SIZE // count) == number
        return chosen
    if count > 1:
        rng = np.random.Generator(np.random.PCG64(int(encoding[-8:], 16)))
        chosen = np.zeros(SIZE, dtype=np.bool_)
        chosen[rng.permutation(SIZE)[: SIZE // count]] = True
        return chosen
    return np.ones(SIZE, dtype=np.bool_)


def facts() -> ModelFacts:
    return ModelFacts("digits", DIGEST, SIZE, lambda encoding: 4 * int(places(encoding).sum()))


@dataclass
class Message:
    sender: int
    to: int
    update: Update
    values: NDArray[np.float64]


class Population:
    """N peers; messages arrive in random order. A lost one is in doubt for its sender, as when a session breaks."""

    def __init__(self, protocol: str, n: int, seed: int, *, loss: float = 0.0, incoming: int = 1000) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.values: NDArray[np.float64] = np.random.Generator(np.random.PCG64(seed)).normal(size=(n, SIZE))
        self.ids = [peer_id(number) for number in range(1, n + 1)]
        self.peers: list[Gossip] = []
        config = GossipConfig(
            protocol=parse_protocol(protocol),
            encoding="float32",
            incoming=incoming,
            outgoing=1000,
            weight_least=0.0,
            weight_most=1.0,
        )
        for number in range(n):
            rng = random.Random(seed * 1000 + number)
            view = View(self.ids[number], rng)
            for other in range(n):
                if other != number:
                    view.introduced(contact(other + 1), DIGEST, 0.0)
            gossip = Gossip(view, rng, config)
            gossip.handle(Restored(1000.0, 0), 0.0)
            gossip.handle(LearnerReady(facts()), 0.0)
            self.peers.append(gossip)
        self.messages = 0
        self.questions = 0
        self.refused = 0
        self.under_way: list[Message] = []
        self.waiting: dict[tuple[int, int], Message] = {}  # by receiver and sender

    def round(self, *, training: int = 0) -> None:
        """Everybody finishes a round at about the same time; then all messages arrive."""
        order = list(range(len(self.peers)))
        self.rng.shuffle(order)
        for number in order:
            self._go_on(number, self.peers[number].handle(RoundFinished(training, 1), 0.0))
        while self.under_way:
            self._arrive(self.under_way.pop(self.rng.randrange(len(self.under_way))))

    def _go_on(self, number: int, actions: list[Action]) -> None:
        """Send and merge until there is nothing left to do."""
        while True:
            merges = [action for action in actions if isinstance(action, Merge)]
            for action in actions:
                assert not isinstance(action, Accept | Refuse | Quarantine | MergeTogether | Forget | Settle)
                if not isinstance(action, Merge):
                    self._say(number, action)
            if not merges:
                return
            [merge] = merges
            message = self.waiting.pop((number, self.ids.index(merge.sender)))
            difference = (message.values - self.values[number]) * places(message.update.encoding)
            self.values[number] += merge.weight * difference
            distance = float(np.linalg.norm(difference))
            actions = self.peers[number].handle(MergeDone(merge.sender, True, "", distance), 0.0)

    def _say(self, number: int, action: SendUpdate | ReplyUpdate | AskUpdate) -> None:
        gossip, peer = self.peers[number], self.ids.index(action.to)
        asks = isinstance(action, AskUpdate)
        encoding = "float32" + ("" if isinstance(action, AskUpdate) else action.part)
        update = Update(
            "digits", DIGEST, encoding, SIZE, 0 if asks else 4 * int(places(encoding).sum()), gossip.age, 1,
            asks or (isinstance(action, SendUpdate) and action.reply_wanted), isinstance(action, ReplyUpdate),
            mass=action.mass if isinstance(action, SendUpdate) else None,
        )  # fmt: skip
        self.questions += asks
        self.messages += not asks
        lost = self.rng.random() < self.loss
        gossip.handle(SendDone(action.to, not lost, "", in_doubt=lost), 0.0)
        if not lost:
            self.under_way.append(Message(number, peer, update, self.values[number].copy()))

    def _arrive(self, message: Message) -> None:
        gossip, sender = self.peers[message.to], self.ids[message.sender]
        if not message.update.body_length:
            self._go_on(message.to, gossip.handle(Asked(sender, message.update), 0.0))
            return
        verdict, *rest = gossip.handle(UpdateOffered(sender, message.update), 0.0)
        if isinstance(verdict, Refuse):
            assert not verdict.fault, verdict.reason
            self.refused += 1
            if message.update.mass is not None:
                self.peers[message.sender].handle(SendRefused(self.ids[message.to], message.update.mass.total), 0.0)
            self._go_on(message.to, rest)
            return
        self.waiting[message.to, message.sender] = message
        self._go_on(message.to, gossip.handle(UpdateReceived(sender), 0.0))

    @property
    def spread(self) -> float:
        return float(np.linalg.norm(self.values - self.values.mean(axis=0)))


# All of them.


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_brings_the_peers_together(name: str) -> None:
    population = Population(name, 12, 1)
    before, mean = population.spread, population.values.mean(axis=0)
    for _ in range(60):
        population.round()
    assert population.spread < 1e-3 * before
    assert np.abs(population.values.mean(axis=0) - mean).max() < 1.2, "somewhere among where they were"
    assert population.refused < 0.2 * population.messages


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_does_so_with_a_third_of_all_messages_lost(name: str) -> None:
    population = Population(name, 12, 2, loss=1 / 3)
    before = population.spread
    for _ in range(90):
        population.round()
    assert population.spread < 1e-3 * before


@pytest.mark.parametrize("name", PROTOCOLS)
def test_two_peers_are_enough(name: str) -> None:
    population = Population(name, 2, 3)
    before = population.spread
    for _ in range(60):
        population.round()
    assert population.spread < 1e-2 * before


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_peer_alone_sends_nothing_and_lives(name: str) -> None:
    population = Population(name, 1, 4)
    for _ in range(3):
        population.round(training=100)
    assert population.messages == population.questions == 0
    assert population.peers[0].age == 1300


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if not name.startswith("token")])
def test_bytes_of_a_round_are_those_of_so_many_models(name: str) -> None:
    population = Population(name, 20, 5)
    protocol = parse_protocol(name)
    population.round()
    expected = {"push": 2 * 4, "push-pull": 2 * 2}.get(name, protocol.fanout)  # nobody was heard before: answers, too
    assert population.messages == pytest.approx(20 * expected, rel=0.25)
    population.messages = 0
    population.round()
    assert population.messages <= 20 * (2 if name == "push-pull" else 1.7 if name == "push" else 1) * protocol.fanout


# Each one's own property.


def test_push_pull_leaves_the_mean_as_it_was() -> None:
    population = Population("push-pull:1", 16, 6)
    mean = population.values.mean(axis=0)
    before = population.spread
    for number in range(16 * 6):  # one pair after the other, as in the paper
        gossip = population.peers[number % 16]
        population._go_on(number % 16, gossip.handle(RoundFinished(0, number), 0.0))
        [push] = population.under_way
        while population.under_way:
            population._arrive(population.under_way.pop(0))
        for met in (gossip, population.peers[push.to]):
            met.ages.begin_round()  # or a second meeting in a round would count less
        assert np.allclose(population.values.mean(axis=0), mean)
    assert population.spread < 0.1 * before


def test_a_pull_costs_no_model_until_it_is_answered_and_one_state_is_given_once() -> None:
    population = Population("pull:3", 8, 7)
    ann = population.peers[0]
    actions = ann.handle(RoundFinished(0, 1), 0.0)
    assert [type(action) for action in actions] == [AskUpdate] * 3
    question = Update("digits", DIGEST, "float32", SIZE, 0, 1000.0, 1, True, False)
    bob = population.ids[1]
    ann.handle(SendDone(bob, True, ""), 0.0)
    assert ann.handle(Asked(bob, question), 0.0) == [ReplyUpdate(bob)]
    ann.handle(SendDone(bob, True, ""), 0.0)
    assert ann.handle(Asked(bob, question), 0.0) == [], "the same model again"
    ann.handle(RoundFinished(0, 2), 0.0)
    ann.handle(SendDone(bob, True, ""), 0.0)
    assert ann.handle(Asked(bob, question), 0.0) == [ReplyUpdate(bob)]


def test_a_question_about_another_model_gets_no_answer() -> None:
    ann = Population("pull", 3, 8).peers[0]
    other = Update("digits", "0" * 64, "float32", SIZE, 0, 1000.0, 1, True, False)
    assert ann.handle(Asked(peer_id(2), other), 0.0) == []


def test_update_merge_merges_at_the_end_of_the_round_and_sends_the_merge() -> None:
    gossip = Population("update-merge", 4, 9).peers[0]
    update = Update("digits", DIGEST, "float32", SIZE, 4 * SIZE, 1000.0, 1, False, False)
    ann, bob = peer_id(2), peer_id(3)
    for sender in (ann, bob):
        assert gossip.handle(UpdateOffered(sender, update), 0.0) == [Accept(sender)]
        assert gossip.handle(UpdateReceived(sender), 0.0) == [], "the round is not over"
    [first] = gossip.handle(RoundFinished(10, 1), 0.0)
    assert isinstance(first, Merge)
    version = gossip.version
    [second] = gossip.handle(MergeDone(ann, True, "", 1.0), 0.0)
    assert isinstance(second, Merge)
    [push] = gossip.handle(MergeDone(bob, True, "", 1.0), 0.0)
    assert isinstance(push, SendUpdate)
    assert gossip.version > version, "what is sent is the merge"


def test_merge_update_weighs_two_models_by_their_ages() -> None:
    gossip = Population("merge-update", 4, 10).peers[0]
    for sender in (peer_id(2), peer_id(3)):
        update = Update("digits", DIGEST, "float32", SIZE, 4 * SIZE, 3003.0, 1, False, False)
        gossip.handle(UpdateOffered(sender, update), 0.0)
        [merge] = gossip.handle(UpdateReceived(sender), 0.0)
        assert isinstance(merge, Merge)
        assert merge.weight == pytest.approx(3004 / (gossip.age + 1 + 3004))
        gossip.handle(MergeDone(sender, True, "", 1.0), 0.0)
        assert gossip.age == 3003


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**20), st.floats(0.0, 0.5), st.integers(1, 8))
def test_push_sum_keeps_weight_and_weighted_sum_whatever_is_lost_or_refused(
    seed: int, loss: float, incoming: int
) -> None:
    population = Population("push-sum", 8, seed, loss=loss, incoming=incoming)
    initial = population.values.mean(axis=0)
    for _ in range(15):
        population.round()
        weights = np.array([gossip.policy.push_sum.weight for gossip in population.peers if gossip.policy.push_sum])
        assert (weights > 0).all()
        if loss:
            assert weights.sum() <= 8 + 1e-9
        else:
            assert weights.sum() == pytest.approx(8)
            assert np.allclose((weights[:, None] * population.values).sum(axis=0), 8 * initial)
    population.loss = 0.0
    for _ in range(60):
        population.round()
    weights = np.array([gossip.policy.push_sum.weight for gossip in population.peers if gossip.policy.push_sum])
    assert weights.sum() == pytest.approx(8, rel=1e-6), "what was lost has come with later messages"


def test_push_sum_comes_to_the_mean_of_all_where_plain_push_comes_to_another_one() -> None:
    errors = {}
    for name in ("push:1", "push-sum:1"):
        population = Population(name, 16, 11)
        mean = population.values.mean(axis=0)
        for _ in range(60):
            population.round()
        errors[name] = np.abs(population.values - mean).max()
    assert errors["push-sum:1"] < 1e-6
    assert errors["push:1"] > 0.01


def test_push_sum_and_other_protocols_refuse_each_other_and_say_why() -> None:
    summing, pushing = (Population(name, 3, 12).peers[0] for name in ("push-sum", "push"))
    plain = Update("digits", DIGEST, "float32", SIZE, 4 * SIZE, 1000.0, 1, False, False)
    weighted = Update("digits", DIGEST, "float32", SIZE, 4 * SIZE, 1000.0, 1, False, False, mass=Mass(0.5, 1))
    for gossip, update in ((summing, plain), (pushing, weighted)):
        [refusal] = gossip.handle(UpdateOffered(peer_id(2), update), 0.0)
        assert isinstance(refusal, Refuse)
        assert not refusal.fault
        assert "the same --protocol" in refusal.reason


@pytest.mark.parametrize("strategy", ["randomized", "generalized", "simple", "proactive"])
def test_a_token_account_keeps_the_rate_of_every_peer(strategy: str) -> None:
    capacity, rounds = 6, 30
    population = Population(f"token-account-{strategy}:{capacity}".replace("-randomized", ""), 10, 13)
    sent = np.zeros((rounds + 1, 10), dtype=int)
    say, turn = population._say, 0

    def count(number: int, action: SendUpdate | ReplyUpdate | AskUpdate) -> None:
        sent[turn, number] += 1
        say(number, action)

    population._say = count  # type: ignore[method-assign]
    for _ in range(rounds):
        turn += 1
        population.round(training=10)
    total = sent.cumsum(axis=0)
    for start in range(rounds):
        for end in range(start + 1, rounds + 1):
            assert (total[end] - total[start] <= end - start + capacity).all()
    assert total[-1].sum() > 0.5 * rounds * 10, "it is near its rate, too"


def test_news_travel_faster_with_a_token_account_than_with_one_message_a_round() -> None:
    heard = {}
    for name in ("token-account-proactive", "token-account"):
        counts = []
        for seed in range(5):
            population = Population(name, 60, 20 + seed)
            population.values[:] = 0.0
            population.values[0] = 1.0
            for _ in range(3):
                population.round(training=10)
            counts.append(int((np.abs(population.values[:, 0]) > 0).sum()))
        heard[name] = np.mean(counts)
    assert heard["token-account"] > 1.5 * heard["token-account-proactive"]


def test_fragments_reach_every_parameter_and_each_is_averaged_by_itself() -> None:
    population = Population("partitioned:4", 12, 14)
    touched = np.zeros(SIZE, dtype=np.bool_)
    before = population.values.copy()
    population.round()
    touched |= (population.values != before).any(axis=0)
    assert touched.all(), "four fragments in turn are the whole model"
    for gossip in population.peers:
        assert gossip.age == pytest.approx(1000.0)


def test_a_newcomer_is_as_old_as_the_parameters_it_has_heard_of() -> None:
    gossip = Population("partitioned:4", 4, 15).peers[0]
    gossip.handle(Restored(0.0, 0), 0.0)
    ages = [gossip.age]
    for number, part in enumerate(("-1of4", "-2of4", "-3of4")):
        update = Update("digits", DIGEST, "float32" + part, SIZE, SIZE, 1000.0, 1, False, False)
        gossip.handle(UpdateOffered(peer_id(2), update), 0.0)
        [merge] = gossip.handle(UpdateReceived(peer_id(2)), 0.0)
        assert isinstance(merge, Merge)
        assert merge.weight > 0.99, f"fragment {number} is new here, whatever came of the others"
        gossip.handle(MergeDone(peer_id(2), True, "", 1.0), 0.0)
        ages.append(gossip.age)
    assert ages == pytest.approx([0.0, 250.0, 437.5, 578.125])


def test_samples_have_no_favourites() -> None:
    counts = np.zeros(SIZE)
    rng = random.Random(16)
    protocol = parse_protocol("sub-sampled:4")
    for _ in range(4000):
        counts += places("float32" + protocol.part_name(0, rng))
    assert np.abs(counts / 4000 - 0.25).max() < 0.03


def test_d_psgd_multiplies_by_a_doubly_stochastic_matrix() -> None:
    population = Population("d-psgd", 20, 17)
    mean = population.values.mean(axis=0)
    for _ in range(30):
        before = population.spread
        population.round()
        assert population.spread < before
    assert population.refused == 0
    assert np.abs(population.values - mean).max() < 1.0
    assert population.spread < 1e-2


def test_d_psgd_sends_to_the_same_neighbours_each_round() -> None:
    gossip = Population("d-psgd", 20, 18).peers[0]
    rounds = []
    for number in range(5):
        actions = gossip.handle(RoundFinished(10, number), 0.0)
        receivers = [action.to for action in actions if isinstance(action, SendUpdate)]
        for peer in receivers:
            gossip.handle(SendDone(peer, True, ""), 0.0)
        rounds.append(receivers)
    assert len(rounds[0]) == 4
    assert all(receivers == rounds[0] for receivers in rounds)
