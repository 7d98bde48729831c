"""How long a round of training is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio

from gossipml.daemon.learner import LearnerConfig
from gossipml.env.simulated import World, run_simulation
from gossipml.models.trainer import RoundReport
from gossipml.models.tuning import LocalSteps
from gossipml.simulations.cluster import Cluster
from gossipml.simulations.numpy_trainer import Descent, NumpyTrainer


def rounds_of(monkeypatch: pytest.MonkeyPatch, config: LearnerConfig, loss: Callable[[int], float]) -> list[int]:
    """Steps of the rounds that a peer alone trains in 100 virtual seconds; round n has the loss `loss(n)`."""
    rounds: list[int] = []
    train = NumpyTrainer.train

    async def record(self: NumpyTrainer, steps: int, encoding: str = "") -> RoundReport:
        report = await train(self, steps, encoding)
        rounds.append(steps)
        return RoundReport(report.steps, report.samples, 7 * report.seconds, report.work, loss(len(rounds) - 1))

    monkeypatch.setattr(NumpyTrainer, "train", record)

    async def scenario(world: World) -> None:
        async with Cluster.of(world, peers=1, config=config, descent=Descent(batch=1)):  # an epoch is 200 steps
            await trio.sleep(100)

    run_simulation(scenario, seed=1)
    return rounds


def test_rounds_get_shorter_with_the_root_of_the_loss_but_not_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(round_seconds=1.0, shortest_round=0.3, least_round=0.0)
    rounds = rounds_of(monkeypatch, config, lambda n: 2.0 / (n + 1))
    assert rounds[0] == config.first_steps
    assert rounds[1] == 100, "a step works 0.01 s, however long it takes on the clock"
    for number, steps in enumerate(rounds[2:12], 2):
        assert steps == pytest.approx(100 * max(0.3, math.sqrt(1 / number)), abs=1)
    assert rounds[20] == 30


def test_rounds_never_grow_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(round_seconds=1.0, least_round=0.0)
    for loss in (lambda n: 1.0 + n, lambda n: 0.0, lambda n: -1.0 - n):
        assert set(rounds_of(monkeypatch, config, loss)[1:]) == {100}


def test_a_round_of_a_share_of_an_epoch_takes_as_many_steps_from_the_first_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(local_steps=LocalSteps(epochs=0.15), least_round=0.05)
    assert set(rounds_of(monkeypatch, config, lambda n: 2.0 / (n + 1))) == {30}
