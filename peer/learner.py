"""The seam between the mesh and whoever trains: three calls, and the error that says "not now"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gossipml.errors import GossipmlError


class NotReady(GossipmlError):
    """The learner cannot answer now: its worker is starting, restarting or gone. Nobody's fault."""


class MergeOutcome(Protocol):
    """What became of one incoming update (`gossipml.models.trainer.MergeReport` is one)."""

    @property
    def applied(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    @property
    def distance(self) -> float: ...

    @property
    def fault(self) -> bool: ...


class Learner(Protocol):
    """The methods of `gossipml.models.trainer.Trainer` that gossip needs. All may raise NotReady."""

    async def snapshot(self, encoding: str) -> bytes:
        """The current parameters, encoded."""

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeOutcome:
        """x <- (1 - weight) x + weight m, after checking the values of m."""

    async def settle(self) -> None:
        """Nobody around trains any more: x becomes its average over time, for neighbours to agree on."""

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> Sequence[MergeOutcome]:
        """The merge of x and all these (body, encoding) by a rule that compares them."""
