"""One process on all the data: what a network of peers is compared with. The same loop, the same settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossipml.models.data import Dataset, check_fit, take_part
from gossipml.models.partition import Part, Rule
from gossipml.models.spec import Spec
from gossipml.models.trainer import Evaluation
from gossipml.models.training import LocalTrainer

ROUND = 100  # steps between two looks at the accuracy


@dataclass(frozen=True)
class CentralResult:
    """`seconds` is time spent training: evaluations are not counted."""

    accuracy: float
    seconds: float
    steps: int
    evaluation: Evaluation


def train_central(
    spec: Spec,
    data: Dataset,
    *,
    epochs: float = 20,
    until: float | None = None,
    network_id: bytes = b"",
    seed: int = 0,
    clock: Callable[[], float],
) -> CentralResult:
    """Trains for `epochs`, or until the served test accuracy is `until`. Blocks.

    Torch's number of threads is the caller's choice; `clock` gives seconds (`time.perf_counter`).
    """
    check_fit(spec, data)
    trainer = LocalTrainer(spec, take_part(data, Rule("iid"), Part(1, 1), seed), network_id=network_id, seed=seed)
    seconds = 0.0
    steps = max(1, round(epochs * trainer.sample_counts["train"] / trainer.batch))
    evaluation = trainer.evaluate()
    while trainer.steps < steps:
        start = clock()
        trainer.begin_round()
        for _ in range(min(ROUND, steps - trainer.steps)):
            trainer.step()
        trainer.end_round()
        seconds += clock() - start
        if until is not None or trainer.steps >= steps:
            evaluation = trainer.evaluate()
        if until is not None and evaluation.accuracy >= until:
            break
    return CentralResult(evaluation.accuracy, seconds, trainer.steps, evaluation)
