from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossipml.errors import UserError
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
    assert ClippingBound(clipping.norms).bound(7.0) == FACTOR * 2.0


def test_a_minority_of_liars_does_not_move_the_bound() -> None:
    clipping = ClippingBound()
    for exchange in range(3 * WINDOW):
        clipping.learn(1e6 if exchange % 3 == 0 else 1.0)
    assert clipping.bound(7.0) == FACTOR


def test_a_network_at_rest_can_still_move() -> None:
    clipping = ClippingBound([0.0] * WINDOW)
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
