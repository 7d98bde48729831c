"""The record of each peer's conduct: strikes for what no honest peer does, and quarantine after a few.

A strike is for a header that contradicts our hello, for values that the learner refused (not finite, out of
bounds), for broken framing. Never for being slow, stale, busy or dead.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossipml.ids import PeerId


@dataclass(frozen=True)
class ConductConfig:
    strikes: int = 3
    """Strikes within the memory that lead to quarantine: one may be a bug in a rare path, three are a habit."""
    memory: float = 600.0
    """Seconds after which a strike is forgotten (guess)."""
    quarantine: float = 600.0
    """Seconds of the first quarantine; each further one is twice as long (guess)."""
    quarantine_most: float = 86_400.0
    peers: int = 256
    """Records kept; the one longest without a new strike goes first."""


@dataclass(frozen=True)
class Record:
    """What `Conduct.record` tells about a peer."""

    strikes: int
    """In all, also those forgotten since."""
    reason: str
    """Of the last strike."""
    quarantined_until: float | None


@dataclass
class _Book:
    recent: list[float]
    total: int = 0
    reason: str = ""
    terms: int = 0
    until: float = float("-inf")


class Conduct:
    def __init__(self, config: ConductConfig) -> None:
        self.config = config
        self._books: dict[PeerId, _Book] = {}

    def strike(self, peer: PeerId, reason: str, now: float) -> float | None:
        """Note a fault; until when the peer is in quarantine, when this one put it there."""
        book = self._books.pop(peer, None) or _Book([])
        self._books[peer] = book
        if len(self._books) > self.config.peers:
            del self._books[next(iter(self._books))]
        book.total += 1
        book.reason = reason
        if now < book.until:
            return None
        book.recent = [t for t in book.recent if now - t < self.config.memory] + [now]
        if len(book.recent) < self.config.strikes:
            return None
        book.recent.clear()
        book.until = now + min(self.config.quarantine * 2.0**book.terms, self.config.quarantine_most)
        book.terms += 1
        return book.until

    def is_quarantined(self, peer: PeerId, now: float) -> bool:
        book = self._books.get(peer)
        return book is not None and now < book.until

    def quarantined(self, now: float) -> list[PeerId]:
        return [peer for peer, book in self._books.items() if now < book.until]

    def record(self, peer: PeerId, now: float) -> Record:
        book = self._books.get(peer)
        if book is None:
            return Record(0, "", None)
        return Record(book.total, book.reason, book.until if now < book.until else None)
