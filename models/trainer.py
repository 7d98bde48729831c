"""What the daemon asks of whoever trains: the `Trainer` interface and the values that cross it.

Three implementations: a worker process with torch (`gossipml.daemon.worker`), and for simulations and tests a
small numpy model on the virtual clock. The daemon itself never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Layout:
    """What two peers must have in common to average their parameters."""

    model: str
    digest: str
    """SHA-256, in hexadecimal, of the specification: name, parameter names, shapes and dtypes."""
    size: int
    """Length of the flat float32 parameter vector."""
    buffers: int = 0
    """How many values at its end are buffers; they go with every update, whatever part of the rest it holds."""


@dataclass(frozen=True)
class RoundReport:
    """One round of local training."""

    steps: int
    samples: int
    seconds: float
    """On the clock."""
    work: float
    """Seconds of the processor, where that is what steps cost: the same however many others want it."""
    loss: float
    snapshot: bytes = field(default=b"", repr=False)
    """The parameters at its end, encoded as was asked; empty when they were not asked for, or are too large to come
    with the report."""


@dataclass(frozen=True)
class MergeReport:
    """What became of one incoming update."""

    applied: bool
    reason: str
    """Why it was refused, in a few words; empty when applied."""
    distance: float
    """L2 norm of the difference between the update and our parameters, before clipping."""
    fault: bool = False
    """Refused for what no honest peer sends."""


@dataclass(frozen=True)
class Evaluation:
    """How good the served parameters are."""

    accuracy: float
    """On the test part of the data, 0 to 1."""
    loss: float
    validation_accuracy: float
    """On the held-out share of the local part; decides what is served."""
    served: Literal["local", "average"]


@dataclass(frozen=True)
class Export:
    """A version of the model as it should be published."""

    content: bytes
    """A safetensors file: the tensors of the module's `state_dict`. The same parameters give the same bytes."""
    evaluation: Evaluation
    """Of what the file holds."""

    @property
    def score(self) -> float:
        """What `Trainer.score` of the content would give here."""
        return self.evaluation.validation_accuracy

    @property
    def metrics(self) -> dict[str, float]:
        """For the manifest."""
        found = self.evaluation
        return {
            "accuracy": found.accuracy,
            "loss": found.loss,
            "validation_accuracy": found.validation_accuracy,
        }


class Trainer(Protocol):
    """A model in training. All methods may be called while `train` is under way; merges and snapshots then
    happen between two batches.

    A trainer that only serves (`--no-train`) has no data: it answers `predict` from what was loaded, `evaluate` and
    `score` with None, and raises LocalError for everything else that needs data or an optimiser.
    """

    @property
    def layout(self) -> Layout: ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see the local training data once."""

    async def train(self, steps: int, encoding: str = "") -> RoundReport:
        """Take `steps` optimiser steps on the local data. With an encoding the report may bring the parameters."""

    async def snapshot(self, encoding: str) -> bytes:
        """The current parameters in the form of that name (`gossipml.models.compression`), which may be a part."""

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeReport:
        """x <- (1 - weight) x + weight m, after checking that m is finite and clipping m - x; where m holds a part of
        the parameters, the others stay, and the distance is what it would be were they as far away."""

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> list[MergeReport]:
        """The merge of our parameters and all of these (body, encoding), for rules that compare models; a report for
        each. Whole models only."""

    async def settle(self) -> None:
        """Nobody around trains any more: our parameters become their average over time, which is what is served."""

    async def evaluate(self) -> Evaluation | None:
        """How good the served parameters are; chooses which are served. None without data."""

    async def export(self) -> Export:
        """The parameters that should be published: the neighbourhood average, or the local ones where they do better
        on the local validation data by more than uneven classes explain. Evaluates and chooses as `evaluate` does."""

    async def load(self, content: bytes) -> None:
        """Adopt a published version: parameters and average become its, the optimiser starts anew. UserError, and
        nothing is changed, when it is not of this model or not finite."""

    async def score(self, content: bytes) -> float | None:
        """Accuracy of a published version on the local validation data, to be compared with
        `Export.score`. Adopts nothing. None without data; UserError as for `load`."""

    async def predict(self, request: bytes) -> bytes:
        """Answer a prediction: JSON in, JSON out (see `gossipml.models.predict`). UserError on a bad input."""

    async def save(self) -> bytes:
        """Everything needed to go on: parameters, average, optimiser, random state; a safetensors file."""

    async def restore(self, state: bytes) -> None:
        """Undo of `save`; UserError when it is of another model."""
