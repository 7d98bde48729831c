"""Sealed datagrams: authentic, for one receiver, once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.dht import seal
from gossipml.dht.seal import Drop, Dropped, Opened, Opener, Receiver, Sealer
from gossipml.ids import Address, NodeId

KEY = b"k" * 32
SID_A, SID_B = b"a" * 16, b"b" * 16
NODE_B = NodeId(b"B" * 20)
HERE = Address("10.0.0.2", 8711)
WALL = 1_700_000_000.0


def opener(started: float = WALL, sid: bytes = SID_B, node: NodeId = NODE_B) -> Opener:
    made = Opener(KEY, sid, node, started)
    made.set_addresses((Address("127.0.0.1", 8711), HERE))
    return made


def reason(result: Opened | Dropped) -> Drop | None:
    return result.reason if isinstance(result, Dropped) else None


RECEIVERS = [seal.session_receiver(SID_B), seal.node_receiver(NODE_B), seal.address_receiver(HERE)]


@pytest.mark.parametrize("receiver", RECEIVERS)
@given(body=st.binary(max_size=seal.MAX_BODY))
def test_a_body_comes_out_as_it_went_in(receiver: Receiver, body: bytes) -> None:
    datagram = Sealer(KEY, SID_A).seal(body, receiver, WALL)
    assert len(datagram) == len(body) + seal.OVERHEAD <= seal.MAX_DATAGRAM
    assert opener().open(datagram, WALL) == Opened(SID_A, receiver.form, body)


def test_a_body_that_does_not_fit_one_datagram_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Sealer(KEY, SID_A).seal(bytes(seal.MAX_BODY + 1), RECEIVERS[0], WALL)


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_a_datagram_opens_once(receiver: Receiver) -> None:
    datagram = Sealer(KEY, SID_A).seal(b"x", receiver, WALL)
    receiving = opener()
    assert reason(receiving.open(datagram, WALL)) is None
    assert reason(receiving.open(datagram, WALL)) is Drop.REPLAYED


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_no_datagram_opens_at_another_node(receiver: Receiver) -> None:
    datagram = Sealer(KEY, SID_A).seal(b"x", receiver, WALL)
    other = Opener(KEY, b"c" * 16, NodeId(b"C" * 20), WALL)
    other.set_addresses((Address("10.0.0.3", 8711),))
    assert reason(other.open(datagram, WALL)) is Drop.UNAUTHENTIC


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_nothing_from_before_a_restart_opens_after_it(receiver: Receiver) -> None:
    datagram = Sealer(KEY, SID_A).seal(b"x", receiver, WALL)
    restarted = opener(started=WALL + 1, sid=b"d" * 16)
    assert reason(restarted.open(datagram, WALL + 2)) in (Drop.UNAUTHENTIC, Drop.BEFORE_START)


def test_a_first_contact_from_before_a_restart_is_refused_also_when_its_sender_is_known_again() -> None:
    sender = Sealer(KEY, SID_A)
    captured = sender.seal(b"old", seal.node_receiver(NODE_B), WALL)
    fresh = sender.seal(b"new", seal.node_receiver(NODE_B), WALL + 3)
    restarted = opener(started=WALL + 2, sid=b"d" * 16)
    assert reason(restarted.open(fresh, WALL + 3)) is None
    assert reason(restarted.open(captured, WALL + 3)) is Drop.BEFORE_START


@given(st.permutations(range(40)))
def test_reordered_datagrams_open_in_any_order_and_each_once(order: list[int]) -> None:
    sender, receiving = Sealer(KEY, SID_A), opener()
    datagrams = [sender.seal(bytes((i,)), RECEIVERS[0], WALL) for i in range(40)]
    assert [reason(receiving.open(datagrams[i], WALL)) for i in order] == [None] * 40
    assert {reason(receiving.open(datagram, WALL)) for datagram in datagrams} == {Drop.REPLAYED}


def test_what_is_older_than_the_window_counts_as_seen() -> None:
    sender, receiving = Sealer(KEY, SID_A), opener()
    datagrams = [sender.seal(b"", RECEIVERS[0], WALL) for _ in range(seal.WINDOW + 1)]
    assert reason(receiving.open(datagrams[-1], WALL)) is None
    assert reason(receiving.open(datagrams[0], WALL)) is Drop.REPLAYED
    assert reason(receiving.open(datagrams[1], WALL)) is None


def test_a_jump_of_the_counter_over_the_whole_window_keeps_the_newest_seen() -> None:
    sender, receiving = Sealer(KEY, SID_A), opener()
    first = sender.seal(b"", RECEIVERS[0], WALL)
    sender._counter += 5 * seal.WINDOW
    far = sender.seal(b"", RECEIVERS[0], WALL)
    assert [reason(receiving.open(d, WALL)) for d in (first, far, far, first)] == [
        None,
        None,
        Drop.REPLAYED,
        Drop.REPLAYED,
    ]


@pytest.mark.parametrize(("skew", "expected"), [(-121, Drop.SKEWED), (-119, None), (119, None), (121, Drop.SKEWED)])
def test_authentic_datagrams_of_a_wrong_clock_are_told_apart(skew: float, expected: Drop | None) -> None:
    result = opener(started=WALL - 500).open(Sealer(KEY, SID_A).seal(b"", RECEIVERS[0], WALL + skew), WALL)
    assert reason(result) is expected
    if isinstance(result, Dropped):
        assert result.skew == pytest.approx(skew)


def test_our_own_datagrams_thrown_back_are_dropped() -> None:
    datagram = Sealer(KEY, SID_B).seal(b"", RECEIVERS[1], WALL)
    assert reason(opener().open(datagram, WALL)) is Drop.REFLECTED


def test_another_cookie_opens_nothing() -> None:
    for receiver in RECEIVERS:
        datagram = Sealer(b"other".ljust(32), SID_A).seal(b"", receiver, WALL)
        assert reason(opener().open(datagram, WALL)) is Drop.UNAUTHENTIC


@given(st.integers(0, 60), st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(position: int, bit: int) -> None:
    datagram = bytearray(Sealer(KEY, SID_A).seal(b"hello world!", RECEIVERS[0], WALL))
    datagram[position] ^= 1 << bit
    assert isinstance(opener().open(bytes(datagram), WALL), Dropped)


def test_garbage_of_any_size_is_dropped_and_nothing_is_remembered_of_it() -> None:
    rng, receiving = random.Random(1), opener()
    for _ in range(10_000):
        garbage = bytearray(rng.randbytes(rng.randrange(1400)))
        if garbage and rng.random() < 0.8:
            garbage[0] = rng.choice((1, 2, 3))
        assert isinstance(receiving.open(bytes(garbage), WALL), Dropped)
    assert len(receiving) == 0


@pytest.mark.parametrize("size", [0, 1, seal.OVERHEAD - 1, seal.MAX_DATAGRAM + 1, 65_507])
def test_a_datagram_of_an_impossible_size_is_dropped_before_anything_else(size: int) -> None:
    assert reason(opener().open(bytes(size), WALL)) is Drop.SIZE


def test_a_forgotten_sender_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "MAX_SIDS", 8)
    receiving = opener(started=WALL - 1000)
    victim = Sealer(KEY, SID_A)
    captured = [victim.seal(bytes((i,)), RECEIVERS[1], WALL + i / 100) for i in range(5)]
    for datagram in captured:
        assert reason(receiving.open(datagram, WALL + 1)) is None
    for i in range(8):  # eight others make it forget the victim
        others = Sealer(KEY, bytes((i,)) * 16)
        assert reason(receiving.open(others.seal(b"", RECEIVERS[1], WALL + 2), WALL + 2)) is None
    assert len(receiving) == 8
    assert {reason(receiving.open(datagram, WALL + 3)) for datagram in captured} == {Drop.REPLAYED}
    # The victim itself is heard again, and what it sent before still is not.
    assert reason(receiving.open(victim.seal(b"", RECEIVERS[1], WALL + 4), WALL + 4)) is None
    assert {reason(receiving.open(datagram, WALL + 4)) for datagram in captured} == {Drop.REPLAYED}
