"""What a peer does with the models that come in: by each rule, with liars among them, and parts of models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gossipml.models.arrays import A, can_compile
from gossipml.models.averaging import Coordinates
from gossipml.models.compression import MOST_FRAGMENTS, Form, parse_form, unpack_into
from gossipml.models.feedback import MOST_STATES, Outgoing
from gossipml.models.merge_rules import merge, parse_merge
from gossipml.models.merger import Merger, Places, compile_places, take_places, take_rows
from gossipml.models.merging import FACTOR, LEARNT, PLACES, pieces

Vector = NDArray[np.float32]
PAIRS = ("clipping", "age", "mean", "slerp")
TOGETHER = ("median", "trimmed-mean:1", "krum:1", "multi-krum:1")


def vectors(count: int, size: int = 40, seed: int = 0) -> list[Vector]:
    return list(np.random.RandomState(seed).normal(size=(count, size)).astype(np.float32))


def plain(rule: str, size: int = 40) -> Merger:
    return Merger(parse_merge(rule), Coordinates(size, size))


@pytest.mark.parametrize("rule", PAIRS)
def test_a_merge_lies_between_both_and_is_the_same_for_arrays_and_tensors(rule: str) -> None:
    x, m = vectors(2)
    tensor, own = torch.from_numpy(x.copy()), x.copy()
    report = plain(rule).take(own, m.copy(), 0.25)
    assert report.applied and report.distance == pytest.approx(float(np.linalg.norm(m - x)), rel=1e-5)
    assert plain(rule).take(tensor, torch.from_numpy(m.copy()), 0.25).applied
    assert tensor.numpy() == pytest.approx(own, abs=1e-6)
    if rule in ("age", "mean"):
        assert own == pytest.approx(0.75 * x + 0.25 * m, abs=1e-6)
    assert np.linalg.norm(own - m) < np.linalg.norm(x - m)


@pytest.mark.parametrize("rule", PAIRS)
@pytest.mark.parametrize("form", [Form(), Form(one_in=4), Form(fragment=1, fragments=4)], ids=lambda form: form.name)
def test_many_peers_at_once_come_to_what_each_comes_to_alone(rule: str, form: Form) -> None:
    coordinates = Coordinates(40, 36, ((38, 40),))
    mergers = [[Merger(parse_merge(rule), coordinates) for _ in range(5)] for _ in range(4)]
    alone, arrays = (np.abs(np.stack(vectors(5))) for _ in range(2))
    tensors = torch.from_numpy(arrays.copy())
    others: dict[int, A] = {1: arrays, 2: tensors}
    if can_compile() and rule != "slerp" and form.share == 1.0:
        others[3] = arrays.copy()
    for number in range(8):  # long enough that distances are known
        m = np.abs(np.stack(vectors(5, seed=number + 1)))
        if number == 5:
            m[1, 39] = -1.0  # a negative variance
        if number == 6:
            m[2], alone[3, 0] = 100.0, np.nan  # a stray, and our own fault
            for x in others.values():
                x[3, 0] = np.nan
        weights = list(np.linspace(0.1, 0.5, 5))
        one = [mergers[0][i].take(alone[i], m[i].copy(), weights[i], form) for i in range(5)]
        for place, x in others.items():
            models = torch.from_numpy(m.copy()) if place == 2 else m.copy()
            if place == 3:
                many = take_places(mergers[3], Places(x, range(5), m[::-1], range(4, -1, -1)), weights)
                assert np.array_equal(m, models), "models under way are everybody's"
            else:
                many = take_rows(mergers[place], x, models, weights, form)
            assert [(each.applied, each.fault, each.reason) for each in many] == [
                (each.applied, each.fault, each.reason) for each in one
            ]
            assert [each.distance for each in many] == pytest.approx([each.distance for each in one], rel=1e-5)
            assert np.asarray(x) == pytest.approx(alone, abs=1e-5, nan_ok=True)
        if number in (5, 6):
            assert not one[1 if number == 5 else 3].applied
        if number == 6:
            for x in (alone, *others.values()):
                x[3] = 1.0


@pytest.mark.skipif(not can_compile(), reason="without the extra `simulate`")
def test_what_was_compiled_beforehand_is_what_is_run() -> None:
    from gossipml.models import loops

    compile_places()
    before = [len(getattr(each, "signatures")) for each in (loops.compare, loops.approach)]  # noqa: B009 numba's
    x = torch.zeros(3, 40).numpy()
    take_places([plain("mean")], Places(x, [2], torch.ones(5, 40).numpy(), [4]), [0.5])
    assert x[2].tolist() == [0.5] * 40
    assert [len(getattr(each, "signatures")) for each in (loops.compare, loops.approach)] == before  # noqa: B009


@pytest.mark.parametrize("rule", TOGETHER)
def test_several_models_are_merged_by_the_rule(rule: str) -> None:
    x, *others = vectors(6)
    expected = merge(parse_merge(rule), np.stack([x, *others]))
    own, tensor = x.copy(), torch.from_numpy(x.copy())
    reports = plain(rule).take_together(own, others)
    assert [report.applied for report in reports] == [True] * 5
    assert own == pytest.approx(expected)
    plain(rule).take_together(tensor, [torch.from_numpy(other) for other in others])
    assert tensor.numpy() == pytest.approx(expected, abs=1e-6)


def test_too_few_models_change_nothing_and_are_nobodys_fault() -> None:
    x, *others = vectors(4)
    own = x.copy()
    reports = plain("krum:1").take_together(own, others)
    assert not any(report.applied or report.fault for report in reports)
    assert "needs 5 models, there are 4" in reports[0].reason
    assert np.array_equal(own, x)


def after_honest_exchanges(rule: str = "clipping", size: int = 40) -> tuple[Merger, Vector]:
    """A merger that knows neighbours one tenth of its norm away."""
    merger, x = plain(rule, size), np.ones(size, dtype=np.float32)
    for noise in vectors(2 * LEARNT, size):
        merger.take(x, x + np.float32(0.1) * noise, 0.0)
    return merger, x


def test_a_sign_flip_and_a_hundredfold_model_are_left_out_without_a_strike() -> None:
    for lie in (np.float32(-1), np.float32(100)):
        merger, x = after_honest_exchanges()
        report = merger.take(x, lie * x, 0.5)
        assert not report.applied and not report.fault
        assert "times as far from ours as usual" in report.reason
        assert (x == 1).all()


def test_a_model_somewhat_too_far_away_moves_us_by_the_bound() -> None:
    merger, x = after_honest_exchanges()
    usual = merger._bound.usual
    assert usual is not None
    before = x.copy()
    far = x + np.float32(3 * usual / 40**0.5)
    assert merger.take(x, far, 1.0).applied
    assert np.linalg.norm(x - before) == pytest.approx(FACTOR * usual, rel=1e-4)


def test_who_was_away_for_long_follows_as_soon_as_most_of_what_it_hears_is_far_away() -> None:
    merger, x = after_honest_exchanges()
    other = x + np.float32(2)
    refused = 0
    while not merger.take(x, other.copy(), 0.5).applied:
        refused += 1
    assert refused <= LEARNT * 2, "half of the distances that it remembers"
    for _ in range(10):
        merger.take(x, other.copy(), 0.5)
    assert np.linalg.norm(other - x) < 0.1 * np.linalg.norm(other)


def test_a_restart_or_a_loaded_version_is_followed_at_once() -> None:
    merger, x = after_honest_exchanges()
    merger.forget()
    assert merger.take(x, x + np.float32(0.9), 0.5).applied
    assert x[0] == pytest.approx(1.45)


def test_halves_of_a_network_that_were_apart_do_not_leave_each_other_out() -> None:
    merger, x = plain("clipping"), np.ones(40, dtype=np.float32)
    for _ in range(20):
        merger.take(x, x.copy(), 0.5)  # at rest: all agree
    assert merger.take(x, x + np.float32(0.4), 0.5).applied


def test_who_has_settled_goes_no_further_than_a_tenth_of_its_norm_until_its_next_step() -> None:
    merger, x = plain("clipping"), np.ones(40, dtype=np.float32)
    merger.settle()
    for _ in range(20):
        merger.take(x, x.copy(), 0.5)
    assert not merger.take(x, x + np.float32(0.4), 0.5).applied
    assert merger.take(x, x + np.float32(0.05), 0.5).applied
    merger.stepped()
    assert merger.take(x, x + np.float32(0.4), 0.5).applied


def test_halves_that_settled_apart_agree_once_half_of_what_they_hear_is_far_away() -> None:
    mergers, models = (
        [plain("clipping") for _ in range(8)],
        [np.full(40, 1 + 0.4 * (n % 2), np.float32) for n in range(8)],
    )
    for merger in mergers:
        merger.settle()
    rng = np.random.RandomState(1)
    for together in [0] * 8 * 20 + [1] * 8 * 100:
        one, other = rng.choice(8, 2, replace=False)
        if together or one % 2 == other % 2:
            mergers[one].take(models[one], models[other].copy(), 0.5)
    assert np.ptp([model[0] for model in models]) < 0.02


def test_peers_at_rest_come_to_agree_on_the_one_parameter_that_they_did_not_agree_on() -> None:
    merger, x = plain("clipping"), np.ones(40, dtype=np.float32)
    form = Form(one_in=8)
    for _ in range(20):
        merger.take(x, x.copy(), 0.5, form)  # parts in which all agree
    other = x.copy()
    other[7] += np.float32(0.3 * np.linalg.norm(x))  # 0.85 of our norm, were all parameters as far away
    for number in range(2000):
        merger.take(x, other.copy() if number % 8 == 0 else x.copy(), 0.5, form)
    assert x == pytest.approx(other, abs=0.05)


@pytest.mark.parametrize("lie", [-1.0, 100.0, 0.0])
def test_a_part_that_is_far_away_as_a_whole_is_left_out(lie: float) -> None:
    merger, x = after_honest_exchanges()
    part = x.copy()
    part[::4] = lie
    assert not merger.take(x, part, 0.5, Form(one_in=4)).applied
    assert (x == 1).all()


HALVES = [Form(fragment=number, fragments=2) for number in range(2)]


def after_honest_halves() -> tuple[Merger, Vector]:
    """A merger that knows the first half of what neighbours have as much nearer than the second as it is smaller."""
    merger, x = plain("clipping"), np.repeat(np.array([0.1, 1.0], np.float32), 20)
    for number, noise in enumerate(vectors(4 * LEARNT)):
        m = x.copy()
        here = slice(*HALVES[number % 2].stretch(40))
        m[here] += np.float32(0.1) * noise[here] * x[here]
        merger.take(x, m, 0.0, HALVES[number % 2])
    return merger, x


@pytest.mark.parametrize("half", [0, 1])
def test_a_fragment_may_be_as_far_away_as_is_usual_in_its_places_and_no_further(half: int) -> None:
    here = slice(*HALVES[half].stretch(40))
    for times, applied in ((0.4, True), (0.6, False), (-2.0, False), (100.0, False)):
        merger, x = after_honest_halves()
        m = x.copy()
        m[here] *= np.float32(1 + times)
        report = merger.take(x, m, 0.5, HALVES[half])
        assert report.applied == applied and not report.fault, times
        assert not applied or np.linalg.norm((m - x)[here]) > 0.5 * times * np.linalg.norm(x[here]), "clipped"


@pytest.mark.parametrize("honest", ["all", "one_in", "fragments"])
def test_who_alone_sends_other_fragments_is_held_to_what_others_sent(honest: str) -> None:
    merger, x = plain("clipping", 70), np.ones(70, dtype=np.float32)
    for number, noise in enumerate(vectors(8 * LEARNT, 70)):
        form = {"all": Form(), "one_in": Form(one_in=2), "fragments": HALVES[number % 2]}[honest]
        merger.take(x, x + np.float32(0.1) * noise, 0.1, form)
        lie = x.copy()
        odd = Form(fragment=number % 7, fragments=7)
        lie[slice(*odd.stretch(70))] *= -1
        report = merger.take(x, lie, 0.1, odd)
        assert number <= LEARNT or not report.applied
    assert (x > 0.5).all()


def test_places_cover_each_fragment_of_any_size() -> None:
    for parameters in (1, 3, 33, 64, 65, 1000):
        for fragments in range(2, MOST_FRAGMENTS + 1):
            for fragment in range(fragments):
                begin, end = Form(fragment=fragment, fragments=fragments).stretch(parameters)
                found = pieces(parameters, begin, end)
                assert [n for piece in found for n in range(piece.begin, piece.end)] == list(range(begin, end))
                assert [piece.place for piece in found] == sorted({piece.place for piece in found})
                assert all(piece.place < PLACES for piece in found)


def test_buffers_are_clipped_by_themselves_and_stay_variances() -> None:
    coordinates = Coordinates(14, 10, ((12, 14),))
    merger = Merger(parse_merge("clipping"), coordinates)
    x = np.concatenate([np.ones(10), [0, 0, 50, 50]]).astype(np.float32)
    for noise in vectors(2 * LEARNT, 14):
        m = x + np.float32(0.1) * noise
        merger.take(x, m, 0.0)
    poisoned = x.copy()
    poisoned[12:] = 1e6
    before = x.copy()
    assert merger.take(x, poisoned, 1.0).applied
    assert np.array_equal(x[:10], before[:10])
    assert 0 < np.linalg.norm(x[10:] - before[10:]) < 1.0, "no further than buffers usually are, not than weights are"
    negative = x.copy()
    negative[13] = -1
    report = merger.take(x, negative, 0.5)
    assert report.fault and "variance" in report.reason
    assert (x[12:] >= 0).all()


@pytest.mark.parametrize("rule", ["clipping", "age", "mean", "slerp", "trimmed-mean:1", "median", "krum:1"])
def test_finite_values_whose_squares_overflow_are_a_fault_and_leave_our_model_alone(rule: str) -> None:
    merger, x = plain(rule), np.ones(40, dtype=np.float32)
    huge = np.full(40, 1e20, dtype=np.float32)
    if merger.rule.needs == 1:
        reports = [merger.take(x, huge, 0.5)]
    else:
        reports = merger.take_together(x, [huge, *(x.copy() for _ in range(5))])
    assert reports[0].fault and "overflow" in reports[0].reason and math.isfinite(reports[0].distance)
    assert np.array_equal(x, np.ones(40))


def test_our_own_broken_parameters_are_nobodys_fault() -> None:
    x = np.full(40, np.nan, dtype=np.float32)
    report = plain("clipping").take(x, np.ones(40, dtype=np.float32), 0.5)
    assert not report.applied and not report.fault
    [report] = plain("median").take_together(x, [np.ones(40, dtype=np.float32)])
    assert not report.applied and not report.fault


# What is sent.


def send(outgoing: Outgoing, name: str, values: Vector) -> Vector:
    """What a receiver that has zeros reads."""
    form, body = parse_form(name), bytearray(1000)
    size = outgoing.pack_into(form, values, memoryview(body))
    read = np.zeros_like(values)
    unpack_into(form, body[:size], read)
    return read


def test_top_k_sends_in_turn_what_has_moved_and_misses_nothing() -> None:
    [values] = vectors(1, 100)
    outgoing, receiver = Outgoing(np.zeros(100, dtype=np.float32)), np.zeros(100, dtype=np.float32)
    for push in range(10):
        read = send(outgoing, "float32-top10", values)
        assert np.count_nonzero(read) == 10
        receiver[read != 0] = read[read != 0]
        assert np.count_nonzero(receiver) == 10 * (push + 1), "nothing twice before all have gone"
    assert np.array_equal(receiver, values)


def test_int4_sends_later_what_it_rounded_away() -> None:
    [values] = vectors(1, 100)
    outgoing = Outgoing(np.zeros(100, dtype=np.float32))
    first = send(outgoing, "int4", values)
    mean = np.mean([first, *(send(outgoing, "int4", values) for _ in range(49))], axis=0)
    assert np.abs(first - values).max() > 0.05
    assert np.abs(mean - values).max() < 0.02


def test_parameters_that_cannot_be_sent_leave_the_state_as_it_was() -> None:
    [values] = vectors(1, 100)
    broken = values.copy()
    broken[3] = np.nan
    for name in ("int4", "int8-top10"):
        outgoing, same = (Outgoing(np.zeros(100, dtype=np.float32)) for _ in range(2))
        with pytest.raises(Exception, match=r"finite|parameter is nan"):
            send(outgoing, name, broken)
        assert np.array_equal(send(outgoing, name, values), send(same, name, values))


def test_each_form_has_a_state_of_its_own_and_they_are_bounded() -> None:
    [values] = vectors(1, 100)
    outgoing = Outgoing(np.zeros(100, dtype=np.float32))
    first = send(outgoing, "float32-top10", values)
    assert np.array_equal(send(outgoing, "float32-top20", values) != 0, np.abs(values) >= np.sort(np.abs(values))[-20])
    assert not np.array_equal(send(outgoing, "float32-top10", values) != 0, first != 0)
    for percent in range(1, 40):
        send(outgoing, f"float32-top{percent}", values)
    assert len(outgoing._states) == MOST_STATES
