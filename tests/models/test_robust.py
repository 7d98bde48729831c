from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from gossipml.errors import LocalError, RemoteError
from gossipml.models.robust import (
    STRAY,
    centred_clipping,
    check_incoming,
    krum,
    krum_choice,
    median,
    strays,
    trimmed_mean,
)

Models = NDArray[np.float32]
LIES: dict[str, Callable[[Models], Models]] = {
    "sign flip": lambda honest: -honest[0],
    "x100": lambda honest: 100 * honest[0],
    "as large as can be": lambda honest: np.full_like(honest[0], 1e9),
    "inliers, together": lambda honest: honest.mean(0) + 1.5 * honest.std(0),  # Baruch et al. 2019
    "the mean of the honest against them": lambda honest: -3 * honest.mean(0),  # Xie et al. 2020
}


def with_liars(least: Callable[[int], int]) -> st.SearchStrategy[tuple[Models, int, list[int]]]:
    """A shuffled stack (K, P), f, and where the f liars are; half of the lies are any values, half known attacks."""

    @st.composite
    def draw(draw: st.DrawFn) -> tuple[Models, int, list[int]]:
        f = draw(st.integers(1, 3))
        count = draw(st.integers(least(f), least(f) + 3))
        size = draw(st.integers(1, 6))
        ordinary = st.floats(-100, 100, width=32)
        honest = draw(hnp.arrays(np.float32, (count - f, size), elements=ordinary))
        if draw(st.booleans()):
            lies = draw(hnp.arrays(np.float32, (f, size), elements=st.floats(-1e9, 1e9, width=32)))
        else:
            lies = np.stack([LIES[draw(st.sampled_from(sorted(LIES)))](honest)] * f)
        order = draw(st.permutations(range(count)))
        models = np.concatenate([honest, lies]).astype(np.float32)[order]
        return models, f, [place for place, number in enumerate(order) if number >= count - f]

    return draw()


def honest_of(models: Models, liars: list[int]) -> Models:
    return np.delete(models, liars, axis=0)


@settings(deadline=None)
@given(with_liars(lambda f: 2 * f + 1))
def test_trimmed_mean_and_median_stay_between_honest_values(case: tuple[Models, int, list[int]]) -> None:
    models, f, liars = case
    honest = honest_of(models, liars)
    slack = 1e-5 * np.abs(honest).max() + 1e-30
    for merged in (trimmed_mean(models, f), median(models)):
        assert (merged >= honest.min(0) - slack).all() and (merged <= honest.max(0) + slack).all()


@settings(deadline=None)
@given(with_liars(lambda f: 2 * f + 3), st.data())
def test_krum_chooses_near_an_honest_model(case: tuple[Models, int, list[int]], data: st.DataObject) -> None:
    models, f, liars = case
    count = len(models)
    honest = honest_of(models, liars).astype(np.float64)
    diameter = max((np.linalg.norm(a - b) for a, b in itertools.combinations(honest, 2)), default=0.0)
    bound = np.sqrt((count - f - 2) / (count - 2 * f - 1)) * diameter
    chosen = data.draw(st.integers(1, count - f - 2))
    for number in krum_choice(models, f, chosen):
        nearest = np.linalg.norm(honest - models[number].astype(np.float64), axis=1).min()
        assert nearest <= bound * 1.0001 + 1e-4
    merged = krum(models, f, chosen)
    assert np.linalg.norm(merged - honest.mean(0)) <= bound + diameter * 1.0001 + 1e-4


@settings(deadline=None)
@given(with_liars(lambda f: 2 * f + 1), st.floats(1e-3, 100), st.integers(1, 3))
def test_liars_move_centred_clipping_by_a_bounded_way(
    case: tuple[Models, int, list[int]], bound: float, iterations: int
) -> None:
    models, f, liars = case
    centre = np.zeros(models.shape[-1], dtype=np.float32)
    truthful = models.copy()
    truthful[liars] = honest_of(models, liars)[0]
    lied, true = (centred_clipping(stack, centre, bound, iterations=iterations) for stack in (models, truthful))
    assert np.linalg.norm(lied - true) <= 2 * f / len(models) * bound * iterations * 1.001 + 1e-5
    assert np.linalg.norm(lied) <= bound * iterations * 1.001


def test_the_mean_has_no_such_bound() -> None:
    """The property tests above would notice a rule that does nothing."""
    honest = np.random.RandomState(0).normal(size=(4, 5)).astype(np.float32)
    models = np.concatenate([honest, LIES["x100"](honest)[None]])
    merged = models.mean(0)
    assert (merged > honest.max(0)).any() or (merged < honest.min(0)).any()


def test_krum_is_what_the_paper_says() -> None:
    """Five points on a line, f = 1: scores are sums over the two nearest others."""
    models = np.array([[0.0], [1.0], [3.0], [3.5], [100.0]], dtype=np.float32)
    scores = [1 + 9, 1 + 4, 0.25 + 4, 0.25 + 6.25, 96.5**2 + 97**2]
    order = np.argsort(scores)
    assert krum_choice(models, 1, 2).tolist() == order[:2].tolist()
    assert krum(models, 1).tolist() == models[order[0]].tolist()
    assert krum(models, 1, 2).tolist() == models[order[:2]].mean(0).tolist()
    assert krum(torch.from_numpy(models), 1, 2).tolist() == models[order[:2]].mean(0).tolist()


def test_a_liar_far_away_does_not_cost_the_others_their_digits() -> None:
    honest = 1 + 1e-4 * np.random.RandomState(0).normal(size=(4, 1000)).astype(np.float32)
    models = np.concatenate([np.full((1, 1000), 1e9, dtype=np.float32), honest])
    exact = models.astype(np.float64)
    distances = ((exact[:, None] - exact[None]) ** 2).sum(-1)
    scores = np.sort(distances, -1)[:, 1:3].sum(-1)
    assert krum_choice(models, 1)[0] == scores.argmin()
    assert (krum(models, 1) == models[scores.argmin()]).all()
    assert np.abs(trimmed_mean(models, 1) - 1).max() < 1e-3


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.floats(-10, 10, width=32)))
def test_the_median_is_numpys(models: Models) -> None:
    assert median(models) == pytest.approx(np.median(models, axis=0), abs=1e-5)
    assert median(torch.from_numpy(models)).numpy() == pytest.approx(np.median(models, axis=0), abs=1e-5)


@settings(deadline=None)
@given(st.integers(1, 33), st.data())
def test_the_trimmed_mean_is_that_of_sorted_values(count: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (count - 1) // 2))
    models = np.random.RandomState(count).normal(size=(2, count, 300)).astype(np.float32)
    expected = np.sort(models, axis=1)[:, f : count - f].mean(1)
    assert trimmed_mean(models, f) == pytest.approx(expected, abs=1e-5)


def test_long_models_are_merged_in_slices_without_a_seam() -> None:
    models = np.random.RandomState(0).normal(size=(5, 150_001)).astype(np.float32)
    np.testing.assert_allclose(median(models), np.median(models, axis=0), atol=1e-6)
    np.testing.assert_allclose(trimmed_mean(models, 1), np.sort(models, axis=0)[1:4].mean(0), atol=1e-6)
    distances = ((models[:, None].astype(np.float64) - models[None]) ** 2).sum(-1)
    order = np.sort(distances, -1)[:, 1:3].sum(-1).argsort()
    assert krum_choice(models, 1, 2).tolist() == order[:2].tolist()
    np.testing.assert_allclose(krum(models, 1, 2), models[order[:2]].mean(0), atol=1e-6)


def test_fewer_models_than_the_proof_needs_are_refused() -> None:
    models = np.zeros((6, 3), dtype=np.float32)
    with pytest.raises(LocalError, match="trimmed mean against 3 liars needs 7 models or more, there are 6"):
        trimmed_mean(models, 3)
    with pytest.raises(LocalError, match="Krum against 2 liars needs 7 models"):
        krum(models, 2)
    with pytest.raises(LocalError):
        trimmed_mean(models, -1)
    for chosen in (0, 4):
        with pytest.raises(LocalError, match="chooses 1 to 3 of 6"):
            krum(models, 1, chosen)


def test_own_parameters_are_a_centre_that_honest_neighbours_move_whole() -> None:
    models = np.array([[0, 0], [2, 0], [0, 4]], dtype=np.float32)
    assert centred_clipping(models, models[0], 10.0).tolist() == pytest.approx([2 / 3, 4 / 3])
    ages = np.array([2, 1, 1])
    assert centred_clipping(models, models[0], 10.0, weights=ages).tolist() == pytest.approx([0.5, 1.0])


def test_what_comes_in_must_have_our_shape_and_type_and_be_finite() -> None:
    own = np.zeros(3, dtype=np.float32)
    check_incoming(own + 1, own)
    check_incoming(torch.ones(3), torch.zeros(3))
    for wrong, says in (
        (np.zeros(4, dtype=np.float32), r"shape \[4\]; the model here has \[3\]"),
        (np.zeros(3), "float64"),
        (np.array([0, np.nan, 0], dtype=np.float32), "not finite"),
        (np.array([np.inf, -np.inf, 0], dtype=np.float32), "not finite"),
    ):
        with pytest.raises(RemoteError, match=says), np.errstate(invalid="ignore"):
            check_incoming(wrong, own)


def test_who_is_many_bounds_away_strays() -> None:
    assert not strays(STRAY, 1.0) and strays(STRAY * 1.01, 1.0)
    assert strays(float("nan"), 1.0)
