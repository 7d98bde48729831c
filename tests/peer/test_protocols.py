"""The gossip protocols by name, and the arithmetic of those with state: the property that makes each right."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.ids import PeerId
from gossipml.peer.fixed_graph import neighbours
from gossipml.peer.protocols import PROTOCOLS, parse_protocol
from gossipml.peer.push_sum import EPOCHS, MAX_CREDIT, MAX_WEIGHT, Mass, PushSum
from gossipml.peer.token_account import Strategy, TokenAccount, TokenConfig, proactive, reactive
from gossipml.peer.wire import Decoder, Ping, UpdateAck, decode_header, encode

from .peers import make_update, peer_id

# Names.


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_chosen_by_its_name_and_a_number(name: str) -> None:
    assert parse_protocol(name).name == name
    assert parse_protocol(f"{name}:6").name == f"{name}:6"
    assert parse_protocol(parse_protocol(f"{name}:6").name) == parse_protocol(f"{name}:6")


def test_the_default_is_epidemic_learning_with_four_receivers() -> None:
    protocol = parse_protocol("push")
    assert (protocol.fanout, protocol.wish, protocol.weighing, protocol.part) == (4, "unheard", "round", "whole")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("psuh", "did you mean 'push'?"),
        ("", "known are push, push-pull"),
        ("push:0", "takes 1 to 64 receivers, for example push:4"),
        ("push:65", "1 to 64"),
        ("push:", "1 to 64"),
        ("push:-1", "1 to 64"),
        ("push:²", "1 to 64"),
        ("partitioned:1", "2 to 64 fragments"),
        ("d-psgd:3", "even"),
    ],
)
def test_a_wrong_name_is_refused_with_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_protocol(text)
    assert says in str(error.value)


def test_any_n_fragments_in_turn_cover_the_model() -> None:
    protocol, rng = parse_protocol("partitioned:5"), random.Random(1)
    for first in range(7):
        names = {protocol.part_name(first + step, rng) for step in range(5)}
        assert names == {"-1of5", "-2of5", "-3of5", "-4of5", "-5of5"}


def test_each_sample_has_coordinates_of_its_own() -> None:
    protocol, rng = parse_protocol("sub-sampled:10"), random.Random(1)
    names = {protocol.part_name(0, rng) for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("-1in10-") and len(name) == len("-1in10-00000000") for name in names)


# Token accounts.

STRATEGIES: tuple[Strategy, ...] = ("proactive", "simple", "generalized", "randomized")


@given(st.sampled_from(STRATEGIES), st.integers(1, 12), st.integers(0, 2**32), st.floats(0, 0.8))
def test_no_more_messages_than_periods_and_capacity_and_never_a_debt(
    strategy: Strategy, capacity: int, seed: int, news: float
) -> None:
    rng = random.Random(seed)
    account = TokenAccount(TokenConfig(strategy, capacity, max(1, capacity // 2)))
    sent = [0]  # before each period
    for _ in range(60):
        count = int(account.period(rng))
        while rng.random() < news:
            count += account.spend(rng.random() < 0.5, rng)
        assert 0 <= account.tokens <= capacity
        sent.append(sent[-1] + count)
    for start in range(len(sent)):
        for end in range(start + 1, len(sent)):
            assert sent[end] - sent[start] <= (end - start) + capacity


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_peer_that_hears_nothing_falls_back_to_a_message_a_period(strategy: Strategy) -> None:
    rng = random.Random(3)
    account = TokenAccount(TokenConfig(strategy, 10, 5))
    for _ in range(200):
        account.period(rng)
    assert sum(account.period(rng) for _ in range(100)) >= 85


@pytest.mark.parametrize("strategy", ["simple", "generalized", "randomized"])
def test_news_is_answered_at_once_out_of_what_was_saved(strategy: Strategy) -> None:
    rng = random.Random(4)
    account = TokenAccount(TokenConfig(strategy, 20, 10))
    assert account.spend(True, rng) >= 1
    assert account.tokens < 20


def test_old_news_are_not_worth_a_token_to_the_randomized_account() -> None:
    account = TokenAccount(TokenConfig("randomized", 20, 10))
    assert account.spend(False, random.Random(5)) == 0
    assert account.tokens == 20


def test_the_expected_messages_are_those_of_the_paper() -> None:
    a = np.arange(0, 21)
    randomized = TokenConfig("randomized", 20, 10)
    assert np.allclose(proactive(randomized, a), np.clip((a - 9) / 11, 0, 1))
    assert np.allclose(reactive(randomized, a, 1), a / 10)
    generalized = TokenConfig("generalized", 20, 10)
    assert np.array_equal(proactive(generalized, a), 1.0 * (a >= 20))
    assert np.array_equal(reactive(generalized, a, 1), (9 + a) // 10)
    assert np.array_equal(reactive(generalized, a, 0), (9 + a) // 20)
    rng = random.Random(6)
    counts = []
    for _ in range(4000):
        account = TokenAccount(randomized)
        account.tokens = 13
        counts.append(account.spend(True, rng))
    assert set(counts) == {1, 2}
    assert abs(np.mean(counts) - 1.3) < 0.03, "rounded at random, without a bias"


# Push-sum.


@dataclass
class Under:
    """A message under way."""

    sender: int
    receiver: int
    mass: Mass
    z: float


class Peers:
    """Scalars for models; messages are lost, copied, overtaken."""

    def __init__(self, n: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.ids = [peer_id(number) for number in range(n)]
        self.sums = [PushSum() for _ in range(n)]
        self.z: NDArray[np.float64] = np.random.Generator(np.random.PCG64(seed)).normal(size=n)

    def push(self, sender: int, fanout: int) -> list[Under]:
        others = [number for number in range(len(self.ids)) if number != sender]
        receivers = self.rng.sample(others, fanout)
        masses = self.sums[sender].split([self.ids[receiver] for receiver in receivers], self.rng)
        return [Under(sender, r, mass, self.z[sender]) for r, mass in zip(receivers, masses, strict=True)]

    def take(self, message: Under) -> None:
        sums, sender = self.sums[message.receiver], self.ids[message.sender]
        credit = sums.credit(sender, message.mass)
        share = credit / (sums.weight + credit)
        self.z[message.receiver] += share * (message.z - self.z[message.receiver])
        sums.merged(sender, message.mass)

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.array([sums.weight for sums in self.sums])

    def under_way(self) -> float:
        """Weight that was sent and not yet taken, by the ledgers of both sides."""
        total = 0.0
        for number, sums in enumerate(self.sums):
            for receiver, sent in sums._sent.items():
                heard = self.sums[self.ids.index(receiver)]._heard.get(self.ids[number])
                total += sent.total - (heard.total if heard is not None and heard.epoch == sent.epoch else 0.0)
        return total


def test_every_push_leaves_the_sum_of_weighted_models_as_it_was_and_brings_them_together() -> None:
    peers = Peers(12, 1)
    mean = peers.z.mean()
    spread = [peers.z.std()]
    for _ in range(25):
        for sender in range(12):
            for message in peers.push(sender, 2):
                peers.take(message)
        assert peers.weights.sum() == pytest.approx(12)
        assert (peers.weights * peers.z).sum() == pytest.approx(12 * mean)
        spread.append(peers.z.std())
    assert spread[-1] < 1e-6 * spread[0]
    assert np.allclose(peers.z, mean), "one-way messages, and still the exact mean"


@given(st.integers(0, 2**32), st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0, 0.6))
def test_no_weight_is_lost_or_made_by_loss_copies_and_overtaking(
    seed: int, loss: float, copies: float, delay: float
) -> None:
    peers, under = Peers(5, seed), list[Under]()
    for _ in range(40):
        under += peers.push(peers.rng.randrange(5), peers.rng.randint(1, 3))
        peers.rng.shuffle(under)
        left = []
        for message in under:
            if peers.rng.random() < delay:
                left.append(message)
            elif peers.rng.random() >= loss:
                peers.take(message)
                if peers.rng.random() < copies:
                    left.append(message)
        under = left
        assert (peers.weights > 0).all()
        assert peers.weights.sum() + peers.under_way() == pytest.approx(5)


def test_what_was_lost_comes_with_the_next_message() -> None:
    ann, bob, rng = PushSum(), PushSum(), random.Random(1)
    for _ in range(3):
        ann.split([peer_id(2)], rng)  # lost
    assert ann.weight == pytest.approx(1 / 8)
    [mass] = ann.split([peer_id(2)], rng)
    bob.merged(peer_id(1), mass)
    assert bob.weight == pytest.approx(2 - 1 / 16)
    assert ann.weight + bob.weight == pytest.approx(2)


def test_what_was_refused_is_put_back_unless_a_newer_message_carries_it() -> None:
    ann, bob, rng = PushSum(), PushSum(), random.Random(1)
    [first] = ann.split([peer_id(2)], rng)
    ann.put_back(peer_id(2), first.total)
    ann.put_back(peer_id(2), first.total)
    assert ann.weight == 1.0
    [second] = ann.split([peer_id(2)], rng)
    [third] = ann.split([peer_id(2)], rng)
    ann.put_back(peer_id(2), second.total)
    assert ann.weight == 0.25, "the third brings the weight of the second"
    bob.merged(peer_id(1), third)
    assert ann.weight + bob.weight == 2.0


def test_a_restart_of_either_side_makes_no_weight() -> None:
    ann, bob, rng = PushSum(), PushSum(), random.Random(1)
    ann.met(peer_id(2), b"first")
    for _ in range(2):
        [mass] = ann.split([peer_id(2)], rng)
        bob.merged(peer_id(1), mass)
    assert bob.weight == 1.75
    ann.met(peer_id(2), b"first")  # another session with the same process
    [mass] = ann.split([peer_id(2)], rng)
    assert bob.credit(peer_id(1), mass) == 0.125
    bob = PushSum()
    ann.met(peer_id(2), b"second")
    [mass] = ann.split([peer_id(2)], rng)
    assert bob.credit(peer_id(1), mass) == 0.0625, "not all that was ever sent"
    bob.merged(peer_id(1), mass)
    ann = PushSum()
    [mass] = ann.split([peer_id(2)], rng)
    assert bob.credit(peer_id(1), mass) == 0.5


def test_one_message_gives_no_more_weight_than_a_bound_and_the_rest_comes_later() -> None:
    bob = PushSum()
    bob.merged(peer_id(1), Mass(9.0, 1))
    assert bob.weight == 1.0 + MAX_CREDIT
    bob.merged(peer_id(1), Mass(9.5, 1))
    assert bob.weight == 1.0 + 2 * MAX_CREDIT


@given(st.floats(0, MAX_WEIGHT), st.integers(0, EPOCHS - 1))
def test_mass_travels_exactly(total: float, epoch: int) -> None:
    update = replace(make_update(), mass=Mass(total, epoch))
    assert decode_header(encode(update)[4:]) == update
    ack = UpdateAck(3, False, "busy", total)
    assert decode_header(encode(ack)[4:]) == ack


@pytest.mark.parametrize(
    "mass",
    [[-0.1, 1], [MAX_WEIGHT * 2, 1], [1, 1], [1.0, EPOCHS], [1.0, -1], [1.0, True], [1.0, 1.0], [1.0], [], None, 1.0],
)
def test_a_mass_that_no_peer_can_have_is_refused(mass: object) -> None:
    fields = codec.as_map(codec.unpack(encode(make_update())[4:], limit=10_000))
    with pytest.raises(RemoteError, match="mass"):
        decode_header(codec.pack({**fields, "mass": mass}))


def test_an_update_without_a_body_is_a_question_or_an_error() -> None:
    question = replace(make_update(want=True), body_length=0)
    assert decode_header(encode(question)[4:]) == question
    decoder = Decoder(lambda update: None)
    events = []
    for byte in encode(question) + encode(Ping(7)):
        decoder.target()[:1] = bytes([byte])
        events.append(decoder.received(1))
    assert [event for event in events if event is not None] == [question, Ping(7)], "no body is waited for"
    with pytest.raises(RemoteError, match="bytes"):
        decode_header(encode(replace(question, reply_wanted=False))[4:])


# The fixed graph.


def mixing(ids: list[PeerId], cycles: int) -> NDArray[np.float64]:
    """W (N, N) as the peers work it out, each its own row."""
    matrix = np.zeros((len(ids), len(ids)))
    for row, own in enumerate(ids):
        for peer, weight in neighbours(own, set(ids) - {own}, cycles).items():
            matrix[row, ids.index(peer)] = weight
        matrix[row, row] = 1.0 - matrix[row].sum()
    return matrix


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 1000))
def test_the_matrix_is_doubly_stochastic_and_connected_whoever_is_there(n: int, cycles: int, seed: int) -> None:
    matrix = mixing([peer_id(1000 * seed + number) for number in range(n)], cycles)
    assert (matrix >= 0).all()
    assert np.array_equal(matrix, matrix.T), "each works out its own row and they agree"
    assert np.allclose(matrix.sum(0), 1)
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
    assert n == 1 or eigenvalues[-2] < 1 - 1e-9, "everything reaches everybody"


def test_four_neighbours_bring_a_hundred_peers_together_fast() -> None:
    matrix = mixing([peer_id(number) for number in range(100)], 2)
    assert ((matrix > 0).sum(1) <= 5).all()
    second = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-2]
    assert second < 0.93, "a ring of 100 with two neighbours has 0.9987"


def test_a_peer_that_leaves_moves_only_its_own_neighbours() -> None:
    ids = [peer_id(number) for number in range(40)]
    gone = ids[7]
    near = neighbours(gone, ids, 2)
    for own in ids:
        if own != gone and own not in near:
            assert neighbours(own, ids, 2) == neighbours(own, [peer for peer in ids if peer != gone], 2)
