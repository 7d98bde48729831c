"""Token buckets: how many requests of one source are answered."""

from __future__ import annotations

from collections.abc import Hashable

MAX_SOURCES = 4096  # about 1 MB; the one not seen for longest is forgotten and begins with a full bucket


class TokenBuckets:
    """One bucket a source: `rate` tokens a second, at most `burst` seconds of them."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._size = max(1.0, rate * burst)
        self._buckets: dict[Hashable, tuple[float, float]] = {}  # source -> tokens, when

    def take(self, source: Hashable, now: float) -> bool:
        """Whether the source has a token left; takes it."""
        tokens, then = self._buckets.pop(source, (self._size, now))
        tokens = min(self._size, tokens + (now - then) * self._rate)
        allowed = tokens >= 1
        self._buckets[source] = (tokens - 1 if allowed else tokens, now)  # at the end, as the latest
        if len(self._buckets) > MAX_SOURCES:
            del self._buckets[next(iter(self._buckets))]
        return allowed
