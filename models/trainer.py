"""What the daemon asks of whoever trains: the `Trainer` interface and the values that cross it.

Three implementations: a worker process with torch (`gossipml.daemon.worker`), and for simulations and tests a
small numpy model on the virtual clock. The daemon itself never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Layout:
    """What two peers must have in common to average their parameters."""

    model: str
    digest: str
    """SHA-256, in hexadecimal, of the specification: name, parameter names, shapes and dtypes."""
    size: int
    """Length of the flat float32 parameter vector."""


@dataclass(frozen=True)
class RoundReport:
    """One round of local training."""

    steps: int
    samples: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class MergeReport:
    """What became of one incoming update."""

    applied: bool
    reason: str
    """Why it was refused, in a few words; empty when applied."""
    distance: float
    """L2 norm of the difference between the update and our parameters, before clipping."""


@dataclass(frozen=True)
class Evaluation:
    """How good the served parameters are."""

    accuracy: float
    """On the test part of the data, 0 to 1."""
    loss: float
    validation_accuracy: float
    """On the held-out share of the local part; decides what is served."""
    served: Literal["local", "average"]


class Trainer(Protocol):
    """A model in training. All methods may be called while `train` is under way; merges and snapshots then
    happen between two batches."""

    @property
    def layout(self) -> Layout: ...

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see the local training data once."""

    async def train(self, steps: int) -> RoundReport:
        """Take `steps` optimiser steps on the local data."""

    async def snapshot(self, encoding: str) -> bytes:
        """The current parameters, encoded as `gossipml.models.encoding` describes."""

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeReport:
        """x <- (1 - weight) x + weight m, after checking that m is finite and clipping m - x."""

    async def evaluate(self) -> Evaluation: ...

    async def predict(self, request: bytes) -> bytes:
        """Answer a prediction: JSON in, JSON out (see `gossipml.models.predict`). UserError on a bad input."""

    async def save(self) -> bytes:
        """Everything needed to go on: parameters, average, optimiser, random state; a safetensors file."""

    async def restore(self, state: bytes) -> None:
        """Undo of `save`; UserError when it is of another model."""
