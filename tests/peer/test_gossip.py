"""The gossip state machine, stepped by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.ids import PeerId
from gossipml.peer.conduct import ConductConfig
from gossipml.peer.gossip import Gossip, GossipConfig
from gossipml.peer.gossip_events import (
    Accept,
    Action,
    Forget,
    LearnerGone,
    LearnerReady,
    Merge,
    MergeDone,
    MergeFailed,
    MergeTogether,
    Misbehaved,
    Quarantine,
    Refuse,
    ReplyUpdate,
    Restored,
    RoundFinished,
    SendDone,
    SendUpdate,
    Settle,
    Tick,
    TrainingFinished,
    TrainingResumed,
    UpdateLost,
    UpdateOffered,
    UpdateReceived,
)
from gossipml.peer.view import View
from gossipml.peer.wire import Update

from .peers import DIGEST, OTHER_DIGEST, contact, make_facts, make_update, peer_id

ANN, BOB, EVE = peer_id(1), peer_id(2), peer_id(3)


def make_gossip(
    peers: int = 3, *, age: float = 100.0, ready: bool = True, config: GossipConfig | None = None
) -> Gossip:
    rng = random.Random(7)
    view = View(peer_id(0), rng)
    for number in range(1, peers + 1):
        view.introduced(contact(number), DIGEST, 0.0)
    gossip = Gossip(view, rng, config)
    gossip.handle(Restored(age, 5), 0.0)
    if ready:
        gossip.handle(LearnerReady(make_facts()), 0.0)
    return gossip


def offer(gossip: Gossip, sender: PeerId, update: Update, now: float = 0.0) -> list[Action]:
    return gossip.handle(UpdateOffered(sender, update), now)


def take(gossip: Gossip, sender: PeerId, age: float, now: float = 0.0) -> float:
    """Let an update come in whole and be merged; its weight."""
    assert offer(gossip, sender, make_update(age), now) == [Accept(sender)]
    [merge] = gossip.handle(UpdateReceived(sender), now)
    assert isinstance(merge, Merge)
    assert merge.sender == sender
    assert gossip.handle(MergeDone(sender, True, "", 1.0), now) == []
    return merge.weight


def merged(gossip: Gossip, sender: PeerId, *, rests: bool, applied: bool = True) -> list[Action]:
    """What comes of the merge of an update of a peer that rests, or trains."""
    assert offer(gossip, sender, replace(make_update(), rests=rests)) == [Accept(sender)]
    assert isinstance(gossip.handle(UpdateReceived(sender), 0.0)[0], Merge)
    return gossip.handle(MergeDone(sender, applied, "" if applied else "left out", 1.0), 0.0)


def refusal(actions: list[Action]) -> Refuse:
    assert isinstance(actions[0], Refuse)
    return actions[0]


def receivers(actions: list[Action]) -> list[PeerId]:
    assert all(isinstance(action, SendUpdate) for action in actions)
    return [action.to for action in actions if isinstance(action, SendUpdate)]


# Pushing.


def test_a_round_is_pushed_to_four_random_peers() -> None:
    gossip = make_gossip(20)
    seen = set()
    for number in range(50):
        chosen = receivers(gossip.handle(RoundFinished(10, number), 0.0))
        assert len(set(chosen)) == 4
        seen.update(chosen)
        for peer in chosen:
            gossip.handle(SendDone(peer, True, ""), 0.0)
    assert seen == {peer_id(n) for n in range(1, 21)}
    assert gossip.age == 600
    assert gossip.round == 49


def test_a_round_is_pushed_to_all_when_there_are_few() -> None:
    gossip = make_gossip(2)
    assert sorted(receivers(gossip.handle(RoundFinished(10, 1), 0.0))) == sorted([ANN, BOB])


def test_nobody_is_sent_a_second_update_while_the_first_is_under_way() -> None:
    gossip = make_gossip(2)
    gossip.handle(RoundFinished(10, 1), 0.0)
    gossip.handle(SendDone(ANN, True, ""), 0.0)
    assert receivers(gossip.handle(RoundFinished(10, 2), 1.0)) == [ANN]
    gossip.handle(SendDone(BOB, False, "too slow"), 2.0)
    gossip.handle(SendDone(ANN, True, ""), 2.0)
    assert len(receivers(gossip.handle(RoundFinished(10, 3), 3.0))) == 2


def test_nothing_is_pushed_before_the_model_is_loaded() -> None:
    gossip = make_gossip(ready=False)
    assert gossip.handle(RoundFinished(10, 1), 0.0) == []
    gossip.handle(LearnerReady(make_facts()), 0.0)
    assert len(receivers(gossip.handle(RoundFinished(10, 2), 0.0))) == 3


# Judging a header.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"digest": OTHER_DIGEST}, "layout"),
        ({"model": "other"}, "model 'other'"),
        ({"parameters": 9}, "9 parameters"),
        ({"body_length": 31}, "31 bytes"),
        ({"body_length": 2**43}, "bytes"),
        ({"encoding": "int3"}, "unknown encoding"),
        ({"age": math.nan}, "age nan"),
        ({"age": math.inf}, "age inf"),
        ({"age": -1.0}, "age -1"),
        ({"age": 2.0**60}, "age"),
    ],
)
def test_a_header_that_contradicts_us_is_refused_before_any_arithmetic(change: dict[str, object], says: str) -> None:
    gossip = make_gossip()
    verdict = refusal(offer(gossip, EVE, replace(make_update(), **change)))  # type: ignore[arg-type]
    assert verdict.fault
    assert says in verdict.reason
    assert gossip.age == 100
    assert gossip.ages.claim(EVE) is None
    assert gossip.handle(UpdateReceived(EVE), 0.0) == []
    assert gossip.conduct.record(EVE, 0.0).strikes == 1


def test_a_peer_without_a_learner_refuses_without_blame() -> None:
    gossip = make_gossip(ready=False)
    assert refusal(offer(gossip, ANN, make_update())) == Refuse(ANN, "not ready", fault=False)
    assert gossip.conduct.record(ANN, 0.0).strikes == 0


def test_a_stale_update_is_refused_without_blame_and_answered_with_ours() -> None:
    gossip = make_gossip(age=10_000)
    actions = offer(gossip, ANN, make_update(100, want=True))
    assert refusal(actions) == Refuse(ANN, "stale: age 100 is 9900 behind", fault=False)
    assert actions[1:] == [ReplyUpdate(ANN)]
    assert gossip.conduct.record(ANN, 0.0).strikes == 0
    assert len(offer(gossip, BOB, make_update(100))) == 1, "who does not wish for an answer gets none"


def test_what_is_stale_scales_with_the_neighbourhood() -> None:
    gossip = make_gossip(age=10_000)
    for number in (10, 11, 12):  # were our own age wrong, everybody honest would seem stale
        offer(gossip, peer_id(number), make_update(1_000))
    assert offer(gossip, ANN, make_update(900)) == [Accept(ANN)]
    assert "stale" in refusal(offer(gossip, BOB, make_update(400))).reason


def test_a_few_rounds_behind_is_never_stale() -> None:
    gossip = make_gossip(age=0)
    gossip.handle(RoundFinished(100, 1), 0.0)
    gossip.handle(RoundFinished(100, 2), 0.0)
    assert offer(gossip, ANN, make_update(0)) == [Accept(ANN)]


def test_updates_beyond_the_room_for_them_are_refused_as_busy() -> None:
    gossip = make_gossip(config=GossipConfig(incoming=2))
    assert offer(gossip, ANN, make_update()) == [Accept(ANN)]
    assert refusal(offer(gossip, ANN, make_update())).reason == "busy", "one at a time from each"
    assert offer(gossip, BOB, make_update()) == [Accept(BOB)]
    assert refusal(offer(gossip, EVE, make_update())).reason == "busy"
    gossip.handle(UpdateLost(BOB), 0.0)
    assert offer(gossip, EVE, make_update()) == [Accept(EVE)]


def test_room_is_bounded_in_bytes_but_never_nothing() -> None:
    gossip = make_gossip(config=GossipConfig(incoming_bytes=1))
    assert offer(gossip, ANN, make_update()) == [Accept(ANN)]
    assert refusal(offer(gossip, BOB, make_update())).reason == "busy"


# Averaging.


@given(st.integers(0, 10_000), st.lists(st.integers(5_000, 20_000), min_size=1, max_size=20))
def test_within_a_round_models_are_averaged_exactly_by_age(own: int, ages: list[int]) -> None:
    gossip = make_gossip(age=own, config=GossipConfig(weight_least=0.0, weight_most=1.0))
    share: dict[str, float] = {"own": 1.0}  # what each model contributes to ours
    for number, age in enumerate(ages, 100):
        if not isinstance(offer(gossip, peer_id(number), make_update(age))[0], Accept):
            continue
        [merge] = gossip.handle(UpdateReceived(peer_id(number)), 0.0)
        assert isinstance(merge, Merge)
        share = {name: part * (1 - merge.weight) for name, part in share.items()}
        share[str(number)] = merge.weight
        gossip.handle(MergeDone(peer_id(number), True, "", 1.0), 0.0)
    counted = {str(n): float(age) for n, age in enumerate(ages, 100) if str(n) in share}
    # A claim counts up to the lead over the others; with these ages that bites only for a small own age.
    if all(age <= 4 * min(ages) for age in ages):
        total = own + 1 + sum(age + 1 for age in counted.values())
        assert share["own"] == pytest.approx((own + 1) / total)
        for name, claimed in counted.items():
            assert share[name] == pytest.approx((claimed + 1) / total)
        assert gossip.age == max(own, *ages)


def test_two_new_models_count_the_same() -> None:
    gossip = make_gossip(age=0)
    assert take(gossip, ANN, 0) == pytest.approx(1 / 2)
    assert take(gossip, BOB, 0) == pytest.approx(1 / 3)
    assert take(gossip, EVE, 0) == pytest.approx(1 / 4)
    assert gossip.age == 0


def test_a_new_round_begins_a_new_mean() -> None:
    gossip = make_gossip(age=100)
    take(gossip, ANN, 100)
    gossip.handle(RoundFinished(0, 6), 0.0)
    assert take(gossip, BOB, 100) == pytest.approx(1 / 2)


def test_a_newcomer_takes_a_neighbours_model_almost_whole() -> None:
    gossip = make_gossip(age=0)
    assert take(gossip, ANN, 100_000) == 0.9
    assert gossip.age == 100_000
    assert take(gossip, BOB, 100_000) == pytest.approx(1 / 2, abs=0.01)


def test_the_weight_has_a_lower_bound() -> None:
    gossip = make_gossip(age=100)
    weights = [take(gossip, peer_id(number), 100) for number in range(100, 200)]
    assert weights[0] == pytest.approx(1 / 2)
    assert weights[-1] == 0.02


def test_a_liar_with_a_huge_age_counts_a_bounded_multiple_of_the_others() -> None:
    gossip = make_gossip(age=1_000)
    take(gossip, ANN, 1_000)
    take(gossip, BOB, 1_000)
    gossip.handle(RoundFinished(0, 6), 0.0)
    assert take(gossip, EVE, 2.0**53) == pytest.approx(4 / 5, abs=0.001)
    assert gossip.age == 4_000


def test_a_flood_of_updates_gains_only_the_logarithm() -> None:
    gossip = make_gossip(age=100)
    honest = take(gossip, ANN, 100)
    own = 1.0 - honest
    for _ in range(20):
        weight = take(gossip, EVE, 100)
        own *= 1 - weight
    assert 1 / (2 + sum(1 / n for n in range(1, 21))) == pytest.approx(own, abs=0.02)


def test_our_model_counts_less_after_long_isolation_but_never_nothing() -> None:
    gossip = make_gossip(age=1_000)
    for number in range(12):
        gossip.handle(RoundFinished(0, number), 0.0)
    assert take(gossip, ANN, 1_000) == pytest.approx(2 / 3, abs=0.05)
    gossip = make_gossip(age=1_000)
    for number in range(1_000):
        gossip.handle(RoundFinished(0, number), 0.0)
    assert take(gossip, ANN, 1_000) == pytest.approx(4 / 5, abs=0.01)


def test_merges_happen_one_after_another_in_the_order_of_arrival() -> None:
    gossip = make_gossip(age=0)
    for sender in (ANN, BOB, EVE):
        offer(gossip, sender, make_update(0))
    assert gossip.handle(UpdateReceived(BOB), 0.0) == [Merge(BOB, 1 / 2)]
    assert gossip.handle(UpdateReceived(EVE), 0.0) == []
    assert gossip.handle(UpdateReceived(ANN), 0.0) == []
    assert gossip.handle(MergeDone(EVE, True, "", 1.0), 0.0) == [], "not the one that is being merged"
    assert gossip.handle(MergeDone(BOB, True, "", 1.0), 0.0) == [Merge(EVE, 1 / 3)]
    # One that fails on our side, or is refused, leaves no mass behind.
    assert gossip.handle(MergeFailed(EVE), 0.0) == [Merge(ANN, 1 / 3)]
    assert gossip.conduct.record(EVE, 0.0).strikes == 0
    assert gossip.handle(MergeDone(ANN, False, "not finite", 0.0), 0.0) == []
    assert gossip.conduct.record(ANN, 0.0).strikes == 1
    assert take(gossip, peer_id(9), 0) == pytest.approx(1 / 3)


def test_models_that_wait_to_be_merged_together_are_let_go_once_they_are_stale() -> None:
    gossip = make_gossip(age=100, config=GossipConfig(stack=2))
    assert offer(gossip, ANN, make_update(100)) == [Accept(ANN)]
    assert gossip.handle(UpdateReceived(ANN), 0.0) == [], "one is not enough; and then Ann goes away"
    forgotten = [gossip.handle(RoundFinished(100, number), number) for number in range(6, 20)]
    assert [Forget(ANN) in actions for actions in forgotten].count(True) == 1
    assert not any(isinstance(action, MergeTogether) for actions in forgotten for action in actions)
    for sender in (BOB, EVE):
        assert offer(gossip, sender, make_update(gossip.age), 20.0) == [Accept(sender)]
    assert gossip.handle(UpdateReceived(BOB), 20.0) == []
    assert gossip.handle(UpdateReceived(EVE), 20.0) == [MergeTogether((BOB, EVE))]


def test_a_stale_model_that_is_being_merged_is_not_let_go() -> None:
    gossip = make_gossip(age=100, config=GossipConfig(stack=2))
    for sender in (ANN, BOB):
        offer(gossip, sender, make_update(100))
        gossip.handle(UpdateReceived(sender), 0.0)
    [*_, merge] = gossip.handle(RoundFinished(100, 6), 1.0)
    assert merge == MergeTogether((ANN, BOB))
    later = [action for number in range(7, 30) for action in gossip.handle(RoundFinished(100, number), number)]
    assert not any(isinstance(action, Forget) for action in later)
    gossip.handle(MergeDone(ANN, True, "", 1.0), 30.0)
    gossip.handle(MergeDone(BOB, True, "", 1.0), 30.0)
    assert [gossip.conduct.record(sender, 30.0).strikes for sender in (ANN, BOB)] == [0, 0]


def test_a_refused_model_does_not_lift_our_age() -> None:
    gossip = make_gossip(age=100)
    offer(gossip, EVE, make_update(500))
    gossip.handle(UpdateReceived(EVE), 0.0)
    gossip.handle(MergeDone(EVE, False, "not finite", 0.0), 0.0)
    assert gossip.age == 100


def test_a_learner_that_goes_away_takes_its_waiting_updates_along() -> None:
    gossip = make_gossip()
    offer(gossip, ANN, make_update())
    offer(gossip, BOB, make_update())
    gossip.handle(UpdateReceived(ANN), 0.0)
    gossip.handle(LearnerGone(), 0.0)
    assert not gossip.expects(BOB)
    assert gossip.handle(UpdateReceived(BOB), 0.0) == []
    assert gossip.handle(MergeFailed(ANN), 0.0) == []
    gossip.handle(LearnerReady(make_facts()), 0.0)
    assert 0 < take(gossip, ANN, 100) < 1


# Answers.


def test_an_idle_receiver_answers_before_it_merges_and_once_a_round() -> None:
    gossip = make_gossip()
    offer(gossip, ANN, make_update(want=True))
    answer, merge = gossip.handle(UpdateReceived(ANN), 0.0)
    assert answer == ReplyUpdate(ANN)
    assert isinstance(merge, Merge)
    gossip.handle(MergeDone(ANN, True, "", 1.0), 0.0)
    gossip.handle(SendDone(ANN, True, ""), 0.0)
    offer(gossip, ANN, make_update(want=True))
    [again] = gossip.handle(UpdateReceived(ANN), 0.0)
    assert isinstance(again, Merge), "our model has not changed enough to be sent again"
    gossip.handle(MergeDone(ANN, True, "", 1.0), 0.0)
    for peer in receivers(gossip.handle(RoundFinished(1, 6), 0.0)):
        gossip.handle(SendDone(peer, True, ""), 0.0)
    offer(gossip, ANN, make_update(want=True))
    assert gossip.handle(UpdateReceived(ANN), 0.0)[0] == ReplyUpdate(ANN)


def test_a_busy_receiver_does_not_answer() -> None:
    gossip = make_gossip(peers=3, config=GossipConfig(outgoing=3))
    assert len(gossip.handle(RoundFinished(1, 6), 0.0)) == 3
    offer(gossip, peer_id(9), make_update(want=True))
    [merge] = gossip.handle(UpdateReceived(peer_id(9)), 0.0)
    assert isinstance(merge, Merge)


def test_a_peer_that_is_being_sent_to_needs_no_answer() -> None:
    gossip = make_gossip()
    gossip.handle(RoundFinished(1, 6), 0.0)
    offer(gossip, ANN, make_update(want=True))
    [merge] = gossip.handle(UpdateReceived(ANN), 0.0)
    assert isinstance(merge, Merge)


def test_an_answer_is_encoded_anew_after_many_merges() -> None:
    gossip = make_gossip(config=GossipConfig(refresh=3))
    version = gossip.version
    take(gossip, ANN, 100)
    take(gossip, BOB, 100)
    assert gossip.version == version
    take(gossip, EVE, 100)
    assert gossip.version == version + 1


# Conduct.


def test_three_strikes_lead_to_quarantine_for_a_while() -> None:
    gossip = make_gossip(peers=3)
    bad = make_update(digest=OTHER_DIGEST)
    assert len(offer(gossip, EVE, bad, 0.0)) == 1
    assert len(offer(gossip, EVE, bad, 1.0)) == 1
    [_, quarantine] = offer(gossip, EVE, bad, 2.0)
    assert isinstance(quarantine, Quarantine)
    assert (quarantine.peer, quarantine.until) == (EVE, 602.0)
    assert refusal(offer(gossip, EVE, make_update(), 3.0)) == Refuse(EVE, "quarantined", fault=False)
    assert EVE not in receivers(gossip.handle(RoundFinished(1, 6), 4.0))
    record = gossip.conduct.record(EVE, 4.0)
    assert (record.strikes, record.quarantined_until) == (3, 602.0)
    assert offer(gossip, EVE, make_update(), 602.0) == [Accept(EVE)]


def test_a_second_quarantine_is_longer_and_old_strikes_are_forgotten() -> None:
    gossip = make_gossip(config=GossipConfig(conduct=ConductConfig(strikes=2, memory=100, quarantine=50)))
    assert gossip.handle(Misbehaved(EVE, "garbage"), 0.0) == []
    assert gossip.handle(Misbehaved(EVE, "garbage"), 150.0) == [], "the first is forgotten"
    assert gossip.handle(Misbehaved(EVE, "garbage"), 160.0) == [Quarantine(EVE, 210.0, "garbage")]
    assert gossip.handle(Misbehaved(EVE, "garbage"), 161.0) == [], "it is there already"
    gossip.handle(Misbehaved(EVE, "garbage"), 211.0)
    assert gossip.handle(Misbehaved(EVE, "garbage"), 212.0) == [Quarantine(EVE, 312.0, "garbage")]


def test_records_of_conduct_are_bounded() -> None:
    gossip = make_gossip()
    for number in range(1_000):
        gossip.handle(Misbehaved(peer_id(number), "garbage"), 0.0)
    assert sum(gossip.conduct.record(peer_id(n), 0.0).strikes for n in range(1_000)) == 256


# After training.


def finished(config: GossipConfig | None = None) -> Gossip:
    gossip = make_gossip(config=config)
    gossip.handle(RoundFinished(10, 6), 0.0)
    for number in (1, 2, 3):
        gossip.handle(SendDone(peer_id(number), True, ""), 0.0)
    assert gossip.next_deadline() is None
    gossip.handle(TrainingFinished(), 10.0)
    return gossip


def tick(gossip: Gossip, distance: float | None) -> list[PeerId]:
    """One tick in which a merge of that distance has happened before."""
    now = gossip.next_deadline()
    assert now is not None
    if distance is not None:
        assert offer(gossip, ANN, make_update(gossip.age), now - 0.01) == [Accept(ANN)]
        gossip.handle(UpdateReceived(ANN), now - 0.01)
        gossip.handle(MergeDone(ANN, True, "", distance), now - 0.01)
    due = gossip.next_deadline()
    assert due is not None
    chosen = receivers(gossip.handle(Tick(), due))
    for peer in chosen:
        gossip.handle(SendDone(peer, True, ""), due)
    return chosen


def test_a_finished_peer_goes_on_averaging() -> None:
    gossip = finished()
    due = gossip.next_deadline()
    assert due is not None
    assert 10.75 <= due <= 11.25
    assert gossip.handle(Tick(), due - 0.01) == []
    assert len(receivers(gossip.handle(Tick(), due))) == 3
    following = gossip.next_deadline()
    assert following is not None
    assert following > due


def test_each_tick_begins_a_new_mean() -> None:
    gossip = finished()
    assert take(gossip, ANN, 110) == pytest.approx(1 / 2)
    assert take(gossip, BOB, 110) == pytest.approx(1 / 3)
    tick(gossip, None)
    assert take(gossip, EVE, 110) == pytest.approx(1 / 2)


def test_ticks_slow_down_when_the_neighbourhood_agrees_and_speed_up_for_a_straggler() -> None:
    gossip = finished()
    for distance in (10.0, 5.0, 2.5, 1.2, 0.6, 0.3):
        tick(gossip, distance)
    assert gossip.interval == 1.0, "still approaching"
    for _ in range(20):
        tick(gossip, 0.3)
    assert gossip.interval == 30.0
    tick(gossip, 8.0)
    assert gossip.interval == 1.0


def test_a_model_that_is_sent_in_tenths_has_ten_ticks_to_approach() -> None:
    gossip = finished(GossipConfig(encoding="int8-top10"))
    for number in range(60):
        tick(gossip, 10.0 * 0.97**number)  # by 3 % a tick, 26 % in ten
    assert gossip.interval == 1.0, "still approaching"
    for _ in range(10):
        tick(gossip, 10.0 * 0.97**60)
    assert gossip.interval == 1.0, "less than before, in the mean of ten ticks"
    for _ in range(20):
        tick(gossip, 10.0 * 0.97**60)
    assert gossip.interval == 1.5**2


def test_ticks_slow_down_for_a_lonely_peer() -> None:
    gossip = finished()
    for _ in range(20):
        tick(gossip, None)
    assert gossip.interval == 30.0


def test_rounding_is_no_disturbance() -> None:
    gossip = finished()
    for distance in (10.0, 1.0, 0.0, *[0.0] * 20):
        tick(gossip, distance)
    assert gossip.interval == 30.0
    tick(gossip, 0.01)
    assert gossip.interval == 30.0


def test_training_again_ends_the_ticks() -> None:
    gossip = finished()
    gossip.handle(RoundFinished(1, 7), 11.0)
    assert gossip.next_deadline() is None
    assert gossip.handle(Tick(), 100.0) == []


def test_ticks_wait_for_the_learner() -> None:
    gossip = make_gossip(ready=False)
    gossip.handle(TrainingFinished(), 0.0)
    assert gossip.next_deadline() is None
    gossip.handle(LearnerReady(make_facts()), 50.0)
    due = gossip.next_deadline()
    assert due is not None
    assert 50.75 <= due <= 51.25


def test_a_restored_age_is_bounded() -> None:
    gossip = make_gossip(age=1e300)
    assert gossip.age == 2.0**53
    gossip.handle(RoundFinished(10, 1), 0.0)
    assert gossip.age == 2.0**53


# The round of the neighbourhood.


def test_the_neighbourhoods_round_is_that_which_half_of_it_has_reached() -> None:
    gossip = make_gossip()
    assert gossip.neighbourhood_round == 0
    for sender, round_ in ((ANN, 40), (BOB, 50)):
        offer(gossip, sender, replace(make_update(), round=round_))
    assert gossip.neighbourhood_round == 40
    offer(gossip, EVE, replace(make_update(), round=2**40))  # one liar moves nothing beyond the others
    assert gossip.neighbourhood_round == 50
    offer(gossip, ANN, replace(make_update(), round=60))
    assert gossip.neighbourhood_round == 60


def test_a_faulty_header_says_nothing_of_rounds() -> None:
    gossip = make_gossip()
    offer(gossip, ANN, replace(make_update(digest=OTHER_DIGEST), round=40))
    assert gossip.neighbourhood_round == 0


def test_who_pushes_by_itself_is_not_asked_for_its_model() -> None:
    gossip = make_gossip()
    first = gossip.handle(RoundFinished(10, 6), 0.0)
    assert [action.reply_wanted for action in first if isinstance(action, SendUpdate)] == [True] * 3
    for action in first:
        assert isinstance(action, SendUpdate)
        gossip.handle(SendDone(action.to, True, ""), 0.0)
    take(gossip, ANN, 100.0)
    wanted = {
        action.to: action.reply_wanted
        for action in gossip.handle(RoundFinished(10, 7), 1.0)
        if isinstance(action, SendUpdate)
    }
    assert wanted == {ANN: False, BOB: True, EVE: True}


# When nobody trains any more.


def test_the_model_settles_once_when_it_has_merged_some_of_peers_that_rest_too() -> None:
    gossip = make_gossip(2)
    gossip.handle(RoundFinished(10, 6), 0.0)
    most = gossip.config.settled
    assert [merged(gossip, ANN, rests=True) for _ in range(most)] == [[]] * most, "we train"
    gossip.handle(TrainingFinished(), 0.0)
    assert gossip.rests
    assert [merged(gossip, BOB, rests=False) for _ in range(most)] == [[]] * most, "they train"
    assert merged(gossip, ANN, rests=True, applied=False) == []
    assert [merged(gossip, ANN, rests=True) for _ in range(most - 1)] == [[]] * (most - 1)
    before = gossip.version
    assert merged(gossip, BOB, rests=True) == [Settle()]
    assert gossip.version > before, "what is sent next is another model"
    assert [merged(gossip, ANN, rests=True) for _ in range(most)] == [[]] * most, "once"


def test_a_model_that_has_settled_is_hardly_moved_by_one_that_has_not() -> None:
    gossip = make_gossip(2)
    gossip.handle(TrainingFinished(), 0.0)

    def weight(sender: PeerId, *, rests: bool, settled: bool) -> float:
        assert offer(gossip, sender, replace(make_update(), rests=rests, settled=settled)) == [Accept(sender)]
        (merge,) = gossip.handle(UpdateReceived(sender), 0.0)
        assert isinstance(merge, Merge)
        gossip.handle(MergeDone(sender, True, "", 1.0), 0.0)
        gossip.handle(Tick(), gossip.next_deadline() or 0.0)  # the next one is the first of its round, too
        return merge.weight

    usual = [weight(ANN, rests=True, settled=False) for _ in range(gossip.config.settled)]
    assert gossip.has_settled
    assert weight(BOB, rests=True, settled=True) == pytest.approx(usual[0])
    for rests in (True, False):
        assert weight(BOB, rests=rests, settled=False) == pytest.approx(gossip.config.unsettled * usual[0])
    gossip.handle(RoundFinished(10, 6), 0.0)
    assert weight(BOB, rests=False, settled=False) > 0.1


@pytest.mark.parametrize("end", [RoundFinished(10, 6), TrainingResumed()])
def test_a_pause_that_ends_is_forgotten(end: RoundFinished | TrainingResumed) -> None:
    gossip = make_gossip(2)
    gossip.handle(TrainingFinished(), 0.0)
    for _ in range(gossip.config.settled - 1):
        assert merged(gossip, ANN, rests=True) == []
    gossip.handle(end, 0.0)
    assert not gossip.rests
    assert gossip.next_deadline() is None, "rounds push, no ticks"
    gossip.handle(TrainingFinished(), 0.0)
    assert merged(gossip, ANN, rests=True) == []
