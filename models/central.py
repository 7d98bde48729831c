"""One process on all the data: what a network of peers is compared with. The same loop, the same settings.

`python -m gossipml.models.central MODEL SOURCE [EPOCHS]` prints the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import torch

from gossipml.errors import UserError
from gossipml.models.data import Dataset, load_source, prepare, take_part
from gossipml.models.partition import Part, Rule
from gossipml.models.registry import load_spec
from gossipml.models.spec import Spec
from gossipml.models.trainer import Evaluation
from gossipml.models.training import LocalTrainer

EPOCHS = 20  # digits-mlp gains nothing after 15
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
    epochs: float = EPOCHS,
    until: float | None = None,
    network_id: bytes = b"",
    seed: int = 0,
    every: int = ROUND,
) -> CentralResult:
    """Trains for `epochs`, or until the served test accuracy is `until`. Blocks.

    Looks at the accuracy `every` so many steps. Torch's number of threads is the caller's choice.
    """
    spec, data = prepare(spec, data)
    trainer = LocalTrainer(spec, take_part(data, Rule("iid"), Part(1, 1), seed), network_id=network_id, seed=seed)
    seconds = 0.0
    steps = max(1, round(epochs * trainer.sample_counts["train"] / trainer.batch))
    evaluation = trainer.evaluate()
    while trainer.steps < steps:
        start = time.perf_counter()
        trainer.begin_round()
        for _ in range(min(every, steps - trainer.steps)):
            trainer.step()
        trainer.end_round()
        seconds += time.perf_counter() - start
        if until is not None or trainer.steps >= steps:
            evaluation = trainer.evaluate()
        if until is not None and evaluation.accuracy >= until:
            break
    return CentralResult(evaluation.accuracy, seconds, trainer.steps, evaluation)


def main(arguments: list[str]) -> int:
    """0, and the result on standard output; 1 or 2, and a sentence on standard error."""
    if not 2 <= len(arguments) <= 3:
        print("usage: python -m gossipml.models.central MODEL SOURCE [EPOCHS]", file=sys.stderr)  # noqa: T201
        return 2
    torch.set_flush_denormal(True)  # as the worker does
    try:
        epochs = float(arguments[2]) if len(arguments) == 3 else float(EPOCHS)
        result = train_central(load_spec(arguments[0]), load_source(arguments[1]), epochs=epochs)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    report = {"accuracy": result.accuracy, "seconds": result.seconds, "steps": result.steps}
    print(json.dumps(report))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
