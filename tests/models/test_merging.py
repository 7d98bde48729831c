from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import nn

from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.averaging import (
    MAX_COUNTER,
    Coordinates,
    age_weighted_mean,
    check_variances,
    coordinates_of,
    mean,
    merge_counters,
    shares,
)
from gossipml.models.flat import FlatModule
from gossipml.models.merge_rules import MergeRule, merge, parse_merge
from gossipml.models.merging import (
    FACTOR,
    FLOOR,
    LEARNT,
    WINDOW,
    ClippingBound,
    check_weight,
    clipped_difference,
    is_finite,
)
from gossipml.models.slerp import slerp


def test_a_short_difference_is_merged_whole() -> None:
    x, m = np.zeros(4, dtype=np.float32), np.array([3, 4, 0, 0], dtype=np.float32)
    difference, length = clipped_difference(x, m, 10.0)
    assert difference.tolist() == [3, 4, 0, 0] and length == 5


def test_a_long_difference_keeps_its_direction_and_loses_its_length() -> None:
    x, m = np.zeros(4, dtype=np.float32), np.array([300, 400, 0, 0], dtype=np.float32)
    difference, length = clipped_difference(x, m, 1.0)
    assert length == 500
    assert difference == pytest.approx(np.array([0.6, 0.8, 0, 0]))


def test_equal_parameters_merge_to_themselves() -> None:
    x = np.ones(4, dtype=np.float32)
    difference, length = clipped_difference(x, x, 0.0)
    assert length == 0 and not difference.any()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.floats(0.01, 100))
def test_all_peers_at_once_equal_each_alone(peers: int, size: int, bound: float) -> None:
    random = np.random.RandomState(size)
    x, m = random.normal(size=(2, peers, size)).astype(np.float32)
    bounds = np.full(peers, bound, dtype=np.float32)
    together, lengths = clipped_difference(x, m, bounds)
    tensors, _ = clipped_difference(torch.from_numpy(x), torch.from_numpy(m), torch.from_numpy(bounds))
    for peer in range(peers):
        alone, length = clipped_difference(x[peer], m[peer], bounds[peer])
        assert together[peer] == pytest.approx(alone, rel=1e-5)
        assert tensors[peer].numpy() == pytest.approx(alone, rel=1e-5)
        assert lengths[peer] == pytest.approx(length)


def test_the_bound_is_the_own_norm_and_then_learnt() -> None:
    clipping = ClippingBound()
    for _ in range(LEARNT - 1):
        clipping.learn(2.0)
    assert clipping.bound(7.0) == 7.0
    clipping.learn(2.0)
    assert clipping.bound(7.0) == FACTOR * 2.0
    assert clipping.usual == 2.0
    wide = ClippingBound(4.0)
    for _ in range(LEARNT):
        wide.learn(2.0)
    assert wide.bound(7.0) == 8.0


def test_a_minority_of_liars_does_not_move_the_bound() -> None:
    clipping = ClippingBound()
    for exchange in range(3 * WINDOW):
        clipping.learn(1e6 if exchange % 3 == 0 else 1.0)
    assert clipping.bound(7.0) == FACTOR


def test_a_network_at_rest_can_still_move() -> None:
    clipping = ClippingBound()
    for _ in range(WINDOW):
        clipping.learn(0.0)
    assert clipping.bound(100.0) == FLOOR * 100.0


def test_finiteness_and_weights() -> None:
    assert is_finite(np.ones(3, dtype=np.float32)) and is_finite(torch.ones(3))
    for bad in (np.nan, np.inf, -np.inf):
        assert not is_finite(np.array([1, bad], dtype=np.float32))
        assert not is_finite(torch.tensor([1, bad]))
        with pytest.raises(UserError, match="from 0 to 1"):
            check_weight(float(bad))
    for weight in (-0.1, 1.1):
        with pytest.raises(UserError):
            check_weight(weight)
    check_weight(0.0)
    check_weight(1.0)


# Means.


def stack(peers: int, models: int, size: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.RandomState(seed).normal(size=(peers, models, size)).astype(np.float32)


def vectors(size: int) -> st.SearchStrategy[NDArray[np.float32]]:
    return hnp.arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32))


ALL_RULES = ["mean", "age", "slerp", "trimmed-mean:1", "median", "krum:1", "multi-krum:1", "clipping"]


@pytest.mark.parametrize("text", ALL_RULES)
@settings(deadline=None)
@given(vectors(7), st.integers(5, 8))
def test_the_merge_of_equal_models_is_that_model(text: str, model: NDArray[np.float32], count: int) -> None:
    models = np.broadcast_to(model, (count, len(model)))
    merged = merge(parse_merge(text), models, ages=np.arange(count), bound=1.0)
    assert merged == pytest.approx(model, rel=2e-6, abs=1e-30)
    assert merged.dtype == np.float32


@pytest.mark.parametrize("text", ALL_RULES)
def test_every_merge_is_the_same_for_one_for_all_and_for_tensors(text: str) -> None:
    models, ages, bounds = stack(3, 6, 50), np.arange(1, 19).reshape(3, 6), np.array([1.0, 5.0, 50.0])
    rule = parse_merge(text)
    together = merge(rule, models, ages=ages, bound=bounds)
    tensors = merge(rule, torch.from_numpy(models), ages=torch.from_numpy(ages), bound=torch.from_numpy(bounds))
    assert together.shape == tensors.shape == (3, 50)
    assert together.dtype == np.float32 and tensors.dtype == torch.float32
    for peer in range(3):
        alone = merge(rule, models[peer], ages=ages[peer], bound=bounds[peer])
        assert together[peer] == pytest.approx(alone, rel=1e-5, abs=1e-6)
        assert tensors[peer].numpy() == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("text", ALL_RULES)
def test_no_merge_changes_what_it_is_given(text: str) -> None:
    models = stack(1, 6, 20)[0]
    before = models.copy()
    merge(parse_merge(text), models, ages=np.ones(6), bound=0.5)
    assert (models == before).all()


@pytest.mark.parametrize("text", ALL_RULES)
@settings(deadline=None)
@given(hnp.arrays(np.float32, (5, 6), elements=st.floats(2.0**-17, 1e3, width=32)))
def test_positive_variances_stay_positive(text: str, variances: NDArray[np.float32]) -> None:
    models = np.concatenate([stack(1, 5, 10)[0], variances], axis=-1)
    coordinates = Coordinates(16, 10, ((10, 16),))
    merged = merge(parse_merge(text), models, ages=np.ones(5), bound=1.0, coordinates=coordinates)
    assert (merged[10:] > 0).all()
    assert (merged[10:] <= variances.max(0) * 1.00001).all() and (merged[10:] >= variances.min(0) * 0.99999).all()


def test_the_mean_weighs_by_age() -> None:
    models = np.array([[0, 0], [4, 8]], dtype=np.float32)
    assert mean(models).tolist() == [2, 4]
    assert age_weighted_mean(models, np.array([1000, 3000])).tolist() == [3, 6]
    assert age_weighted_mean(models, np.array([0, 0])).tolist() == [2, 4], "nobody has seen anything"
    assert shares(np.array([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0.5, 0.5]]
    for wrong in ([1, -1], [1, np.nan], [1, np.inf]):
        with pytest.raises(LocalError, match="finite and at least 0"):
            mean(models, np.array(wrong))


def test_counters_take_the_maximum_and_hostile_ones_are_refused() -> None:
    counters = np.array([[3, 9, 4], [0, 0, 0]])
    assert merge_counters(counters).tolist() == [9, 0]
    assert merge_counters(torch.from_numpy(counters)).tolist() == [9, 0]
    for wrong in (-1, MAX_COUNTER * 2):
        with pytest.raises(RemoteError, match="counter"):
            merge_counters(np.array([1, wrong]))


def test_coordinates_of_a_module_are_those_of_its_flat_vector() -> None:
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(5)
    module = nn.Sequential(nn.Linear(3, 4), norms[0], nn.Linear(4, 5), norms[1])
    found = coordinates_of(module)
    flat = FlatModule(module, torch.device("cpu"))
    assert (found.size, found.parameters) == (flat.size, flat.parameter_count)
    assert found.buffers == 18
    for number, (start, stop) in enumerate(found.variances):
        flat.vector[start:stop] = 5.0 + number
    for number, layer in enumerate(norms):
        assert layer.running_var is not None and layer.running_mean is not None
        assert layer.running_var.tolist() == [5.0 + number] * layer.num_features and not layer.running_mean.any()


def test_a_negative_variance_is_refused() -> None:
    coordinates = Coordinates(6, 2, ((4, 6),))
    check_variances(np.array([-1, -1, -1, -1, 0, 1], dtype=np.float32), coordinates)
    with pytest.raises(RemoteError, match=r"variance of -0\.5"):
        check_variances(torch.tensor([[0, 0, 0, 0, 0, -0.5]]), coordinates)
    check_variances(np.zeros(6, dtype=np.float32), Coordinates(6, 6))


# SLERP.


@settings(deadline=None)
@given(vectors(5), vectors(5), st.floats(0, 1))
def test_slerp_keeps_the_norm_and_is_symmetric(x: NDArray[np.float32], m: NDArray[np.float32], w: float) -> None:
    lengths = [float(np.linalg.norm(v.astype(np.float64))) for v in (x, m)]
    assume(all(length > 1e-3 for length in lengths))
    cosine = float(x.astype(np.float64) @ m) / (lengths[0] * lengths[1])
    merged = slerp(x, m, w)
    assert np.linalg.norm(merged) == pytest.approx((1 - w) * lengths[0] + w * lengths[1], rel=2e-3)
    if cosine > -0.99:
        assert merged == pytest.approx(slerp(m, x, 1 - w), abs=2e-4 * max(lengths))


@settings(deadline=None)
@given(vectors(6), vectors(6), st.floats(0.1, 0.9))
def test_slerp_lies_on_the_arc_between_both(x: NDArray[np.float32], m: NDArray[np.float32], w: float) -> None:
    x, m = (v / np.float32(max(float(np.linalg.norm(v)), 1e-3)) for v in (x, m))
    assume(min(np.linalg.norm(x), np.linalg.norm(m)) > 0.9 and -0.9 < x @ m < 0.9)
    merged = slerp(x, m, w)
    whole = np.arccos(np.clip(x @ m, -1, 1))
    assert np.arccos(np.clip(x @ merged, -1, 1)) == pytest.approx(w * whole, abs=1e-3)
    assert np.arccos(np.clip(m @ merged, -1, 1)) == pytest.approx((1 - w) * whole, abs=1e-3)


def test_slerp_where_there_is_no_arc() -> None:
    x = np.array([3, 4], dtype=np.float32)
    assert slerp(x, -2 * x, 0.25).tolist() == pytest.approx([3.75, 5]), "opposite: the nearer one, with the norm"
    assert slerp(x, -2 * x, 0.75).tolist() == pytest.approx([-5.25, -7])
    assert slerp(x, 0 * x, 0.25).tolist() == [2.25, 3], "no direction: straight"
    assert slerp(0 * x, x, 0.25).tolist() == [0.75, 1]
    assert slerp(0 * x, 0 * x, 0.5).tolist() == [0, 0]
    assert slerp(x, 3 * x, 0.5).tolist() == pytest.approx([6, 8]), "the same direction: straight"
    assert slerp(x, np.array([-4, 3], dtype=np.float32), 0.5).tolist() == pytest.approx([-(0.5**0.5), 7 * 0.5**0.5])


def test_slerp_interpolates_buffers_in_a_straight_line() -> None:
    x, m = np.array([1, 0, 2, 8], dtype=np.float32), np.array([0, 1, 4, 0], dtype=np.float32)
    merged = slerp(x, m, 0.5, parameters=2)
    assert merged.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 3, 4])


def test_long_vectors_are_merged_in_slices_without_a_seam() -> None:
    models = stack(1, 5, 200_003)[0]
    np.testing.assert_allclose(mean(models, np.ones(5)), models.mean(0), atol=1e-6)
    x, m = models[0].astype(np.float64), models[1].astype(np.float64)
    lengths = float(np.linalg.norm(x)), float(np.linalg.norm(m))
    angle = float(np.arccos(x @ m / lengths[0] / lengths[1]))
    middle = (x / lengths[0] + m / lengths[1]) * np.sin(angle / 2) / np.sin(angle) * sum(lengths) / 2
    np.testing.assert_allclose(slerp(models[0], models[1], 0.5), middle, atol=1e-4)


# By name.


def test_merges_are_chosen_by_name() -> None:
    assert parse_merge("krum:2") == MergeRule("krum", 2) and parse_merge("krum:2").needs == 7
    assert parse_merge("trimmed-mean:1").needs == 3 and parse_merge("median").needs == 3
    assert parse_merge("age").needs == 1
    for wrong, says in (
        (
            "average",
            "no merge 'average'; did you mean 'age'. choose mean, age, slerp, median, clipping, trimmed-mean:1",
        ),
        ("krum", "say how many models may lie"),
        ("krum:0", "from 1 to 1000"),
        ("krum:1001", "from 1 to 1000"),
        ("mean:1", "no merge"),
        ("", "no merge"),
        ("median\n", "no merge"),
    ):
        with pytest.raises(UserError, match=says):
            parse_merge(wrong)


@pytest.mark.parametrize("text", ["trimmed-mean:2", "krum:1", "multi-krum:1"])
def test_too_few_models_are_not_merged(text: str) -> None:
    with pytest.raises(LocalError, match="needs 5 models, there are 4; wait for more"):
        merge(parse_merge(text), stack(1, 4, 3)[0])


def test_clipping_needs_its_bound() -> None:
    with pytest.raises(LocalError, match="bound"):
        merge(parse_merge("clipping"), stack(1, 4, 3)[0])


def test_clipping_keeps_the_type() -> None:
    difference, _ = clipped_difference(np.zeros(3, np.float32), np.ones(3, np.float32), np.float32(0.5))
    assert difference.dtype == np.float32
