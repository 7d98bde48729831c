"""What is served: few merges at first, then the last thirtieth of them; when training is over, what all agree on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossipml.models.over_time import ALONE_SHARE, DECAY, LEAST_SHARE, MERGE_SHARE, OverTime


def moved(average: OverTime, share: float = 1.0, merges: int = 1) -> float:
    """How much of x one more merge brings in; training goes on."""
    average.stepped()
    before = float(average.vector[0])
    x = torch.full_like(average.vector, before + 1.0)
    average.merged(x, share, merges)
    return float(average.vector[0]) - before


def test_x_counts_less_and_less_down_to_a_least_share() -> None:
    average = OverTime(torch.zeros(3, dtype=torch.float64))
    assert moved(average) == pytest.approx(MERGE_SHARE)
    for _ in range(499):
        moved(average)
    assert moved(average) == pytest.approx((1 + DECAY) / (500 + 1 + DECAY))
    average.begin(torch.zeros(3), 1e6)
    assert moved(average) == pytest.approx(LEAST_SHARE)


def test_a_part_of_a_model_counts_as_its_square_root_and_several_models_as_several() -> None:
    average = OverTime(torch.zeros(3, dtype=torch.float64))
    assert moved(average, share=0.25) == pytest.approx(0.5 * MERGE_SHARE)
    assert average.seen == 0.5
    assert moved(average, merges=3) == pytest.approx(1 - (1 - MERGE_SHARE) ** 3)
    assert average.seen == 3.5


def test_noise_of_the_last_thirtieth_is_taken_away() -> None:
    rng, average = np.random.default_rng(1), OverTime(torch.zeros(1000))
    for number in range(1, 2001):
        average.stepped()
        average.merged(torch.from_numpy(rng.normal(2000 - number, 1.0, 1000)).float())
    lag, noise = float(average.vector.mean()), float(average.vector.std())
    assert 0.7 < lag / (2000 / (1 + DECAY)) < 1.3
    assert noise < 0.2


def test_a_peer_alone_averages_its_own_rounds() -> None:
    average = OverTime(torch.zeros(1))
    average.alone(torch.ones(1))
    assert float(average.vector) == pytest.approx(ALONE_SHARE)
    assert average.seen == 1


def test_when_nobody_trains_any_more_x_becomes_the_average_and_the_average_what_becomes_of_x() -> None:
    average, x = OverTime(torch.zeros(2)), torch.ones(2)
    average.merged(x)
    average.settle(x)
    assert torch.equal(x, average.vector)
    assert float(x[0]) == pytest.approx(MERGE_SHARE)
    x += 5
    average.merged(x, share=0.25)
    assert torch.equal(x, average.vector)
    average.stepped()
    average.merged(x + 1)
    assert 0 < float(average.vector[0] - x[0]) < 0.2
