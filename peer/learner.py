"""The seam between the mesh and whoever trains: two calls, and the error that says "not now"."""

from __future__ import annotations

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


class Learner(Protocol):
    """The two methods of `gossipml.models.trainer.Trainer` that gossip needs. Both may raise NotReady."""

    async def snapshot(self, encoding: str) -> bytes:
        """The current parameters, encoded."""

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeOutcome:
        """x <- (1 - weight) x + weight m, after checking the values of m."""
