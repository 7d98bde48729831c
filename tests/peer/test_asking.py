"""Whom to ask for a prediction, and when another one: stepped by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from gossipml.ids import PeerId
from gossipml.peer import asking as a

A, B, C = (PeerId(bytes([n]) * 32) for n in range(3))


def answerers(seed: int = 1) -> a.Answerers:
    return a.Answerers(random.Random(seed))


def learnt(*seconds: float) -> a.Hedging:
    hedging = a.Hedging()
    for one in seconds or [0.1] * 100:
        hedging.learn("m", one)
    return hedging


def asking(
    known: a.Answerers | None = None, hedging: a.Hedging | None = None, begun: float = 0.0, until: float = 30.0
) -> a.Asking:
    return a.Asking("m", known or answerers(), hedging or learnt(), begun, until)


def peer_of(actions: list[a.Action]) -> PeerId:
    (action,) = actions
    assert isinstance(action, a.AskPeer)
    return action.peer


# Choice of two.


def test_of_two_the_one_that_should_answer_first_is_chosen() -> None:
    known = answerers()
    known.answered(A, seconds=1.0, load=9, now=0.0)  # 0.1 s each
    known.answered(B, seconds=0.2, load=0, now=0.0)
    assert known.expected(A, 0.0) == pytest.approx(1.0) and known.expected(B, 0.0) == pytest.approx(0.2)
    assert {known.choose([A, B], 0.0) for _ in range(20)} == {B}
    for _ in range(9):
        known.asked(B)
    assert {known.choose([A, B], 0.0) for _ in range(20)} == {A}, "what is under way counts at once"


def test_who_was_slow_once_is_tried_again_later() -> None:
    known = answerers()
    known.answered(A, seconds=4.0, load=0, now=0.0)  # it had to load the model
    for now in range(100):
        known.answered(B, seconds=0.1, load=0, now=float(now))
        if known.choose([A, B], now) == A:
            break
    assert 10 < now < 60


def test_load_spreads_over_equals_and_the_loaded_one_gets_least() -> None:
    known, peers = answerers(), [PeerId(bytes([n]) * 32) for n in range(8)]
    for peer in peers:
        known.answered(peer, seconds=0.1 if peer != peers[0] else 4.0, load=0, now=0.0)
    chosen: Counter[PeerId] = Counter()
    for _ in range(800):
        choice = known.choose(peers, 0.0)
        assert choice is not None
        known.asked(choice)
        chosen[choice] += 1
        if sum(chosen.values()) % 8 == 0:
            for other in peers:  # they answer, and their queues are empty again
                while known._of(other).under_way:
                    known.left(other)
    assert chosen[peers[0]] == 0 or chosen[peers[0]] < 20
    assert max(chosen.values()) < 2 * min(chosen[peer] for peer in peers[1:])


def test_who_failed_is_left_out_for_a_while_longer_each_time_and_forgiven_with_an_answer() -> None:
    known = answerers()
    known.answered(B, 0.1, 0, 0.0)
    known.answered(A, 0.1, 0, 0.0)
    known.failed(A, 0.0)
    assert {known.choose([A, B], 0.4) for _ in range(20)} == {B}
    assert {known.choose([A, B], 0.6) for _ in range(20)} == {A, B}
    known.failed(A, 0.6)
    assert {known.choose([A, B], 1.5) for _ in range(20)} == {B}
    assert known.choose([A], 1.5) == A, "better than nobody"
    known.answered(A, 0.1, 0, 1.5)
    known.answered(B, 0.1, 0, 1.5)
    assert {known.choose([A, B], 1.5) for _ in range(20)} >= {A}
    assert known.choose([], 0.0) is None


# Hedging.


def test_the_delay_is_the_95th_percentile_of_the_answers_before() -> None:
    hedging = a.Hedging()
    assert hedging.delay("m") == a.FIRST_DELAY
    for n in range(1, 101):
        hedging.learn("m", n / 100)
    assert hedging.delay("m") == pytest.approx(0.95)
    assert hedging.delay("other") == a.FIRST_DELAY
    assert learnt(*[1e-4] * 50).delay("m") == a.LEAST_DELAY


def test_a_slow_answer_is_asked_of_another_peer_and_the_first_answer_counts() -> None:
    one = asking()
    first = peer_of(one.begin([A, B]))
    assert one.next_deadline() == pytest.approx(0.1)
    assert one.handle(a.Tick(), 0.05) == []
    second = peer_of(one.handle(a.Tick(), 0.1))
    assert {first, second} == {A, B} and one.extra == 1
    assert one.handle(a.Answered(second, 0), 0.15) == []
    one.end(0.15)
    assert one.answerers._of(first).under_way == one.answerers._of(second).under_way == 0


def test_a_dead_peer_is_not_asked_because_another_is_slow() -> None:
    known = answerers()
    known.failed(A, 0.0)
    one = asking(known)
    assert peer_of(one.begin([A, B])) == B
    assert one.handle(a.Tick(), 0.1) == [] and one.extra == 0


def test_no_more_than_a_tenth_is_asked_twice_however_slow_all_are() -> None:
    class Fixed(a.Hedging):
        def delay(self, model: str) -> float:
            return 0.1

    known, hedging = answerers(), Fixed()
    extra = 0
    for n in range(1000):
        one = asking(known, hedging, begun=float(n), until=1e9)
        one.begin([A, B])
        one.handle(a.Tick(), n + 0.2)
        extra += one.extra
        one.handle(a.Answered(next(iter(one._asked)), 0), n + 0.3)
        one.end(n + 0.3)
    assert 90 <= extra <= 100 + a.EXTRA_BURST


def test_a_peer_without_any_answer_for_long_is_as_good_as_dead_whatever_the_share() -> None:
    hedging = learnt()
    while hedging.take():
        pass
    one = asking(hedging=hedging)
    first = peer_of(one.begin([A, B]))
    assert one.handle(a.Tick(), 0.1) == [], "the share is used up"
    second = peer_of(one.handle(a.Tick(), one.next_deadline()))
    assert second != first
    assert {one.answerers.choose([A, B], a.LATE_SECONDS) for _ in range(20)} == {second}
    one.handle(a.Answered(first, 0), 1.1)  # it lives after all
    one.end(1.2)
    assert one.answerers._of(first).failures == 0


# Failures.


def test_when_a_peer_dies_the_next_is_asked_at_once() -> None:
    one = asking()
    first = peer_of(one.begin([A, B, C]))
    second = peer_of(one.handle(a.Failed(first, "broken"), 0.01))
    third = peer_of(one.handle(a.Failed(second, "busy"), 0.02))
    assert {first, second, third} == {A, B, C} and (one.again, one.extra) == (2, 0)


def test_when_all_failed_it_looks_for_others_and_asks_everybody_again() -> None:
    one = asking()
    peer_of(one.begin([A]))
    assert one.handle(a.Failed(A, "broken"), 0.01) == [a.Look()]
    assert one.next_deadline() == pytest.approx(0.06)
    assert peer_of(one.handle(a.Found((A, B)), 0.02)) == B, "somebody new is asked without waiting"
    assert one.handle(a.Failed(B, "broken"), 0.03) == [a.Look()]
    assert peer_of(one.handle(a.Tick(), one.next_deadline())) in (A, B)


def test_it_gives_up_when_nobody_answers_for_long() -> None:
    one, now = asking(), 0.0
    actions = one.begin([A])
    asked = 0
    while not isinstance(actions[-1], a.GiveUp):
        match actions[-1]:
            case a.AskPeer(peer):
                asked += 1
                actions = one.handle(a.Failed(peer, "broken"), now)
            case a.Look():
                assert one.handle(a.Found((A,)), now) == []
                now = one.next_deadline()
                actions = one.handle(a.Tick(), now)
    assert actions == [a.GiveUp(False)] and a.PATIENCE <= now <= a.PATIENCE + 2 and asked < 25


def test_the_clients_time_ends_it_too() -> None:
    one = asking(until=3.0)
    one.begin([A])
    assert one.handle(a.Tick(), 3.0) == [a.GiveUp(False)]


def test_nobody_has_it_only_when_all_say_so_after_a_look() -> None:
    one = asking()
    assert one.begin([]) == [a.Look()]
    assert one.handle(a.Found(()), 0.1) == [a.GiveUp(True)]
    one = asking()
    first = peer_of(one.begin([A, B]))
    second = peer_of(one.handle(a.Failed(first, "unknown"), 0.01))
    assert one.handle(a.Failed(second, "unknown"), 0.02) == [a.Look()]
    one.handle(a.Found((A, B)), 0.03)
    assert one.handle(a.Tick(), one.next_deadline()) == [a.GiveUp(True)]
    one = asking()
    first = peer_of(one.begin([A, B]))
    second = peer_of(one.handle(a.Failed(first, "unknown"), 0.01))
    assert one.handle(a.Failed(second, "broken"), 0.02) == [a.Look()]
    one.handle(a.Found((A, B)), 0.03)
    assert peer_of(one.handle(a.Tick(), one.next_deadline())) == second, "it may have it"
