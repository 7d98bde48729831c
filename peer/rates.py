"""How fast bytes may go, and how fast they went: a token bucket in debt, a meter, a bandwidth.

A taker takes first and then waits until its debt is paid: nobody computes how much is there, takers that wait
share in the order in which they took, and one large take cannot starve for being larger than the bucket.
"""

from __future__ import annotations

import math

BURST_SECONDS = 0.25  # of the rate, saved up while nobody takes
SMALLEST_SLICE = 4 * 1024
METER_SECONDS = 3.0  # a rate that people look at
MEMORY = 0.8  # of what sends over a link took before, at each one: some five sends (guess)


class TokenBucket:
    """`rate` a second on average; 0 for no limit."""

    def __init__(self, rate: float, *, burst: float | None = None) -> None:
        self.rate = rate
        self._most = rate * BURST_SECONDS if burst is None else burst
        self._level = self._most
        self._at = -math.inf

    def take(self, amount: float, now: float) -> float:
        """Take that many tokens; the seconds to wait before going on."""
        if not self.rate:
            return 0.0
        if now > self._at:
            self._level = min(self._most, self._level + (now - self._at) * self.rate)
            self._at = now
        self._level -= amount
        return max(0.0, -self._level / self.rate)

    def slice(self, most: int) -> int:
        """How much to take at once, so that none who shares the rate waits long for its turn."""
        if not self.rate:
            return most
        return max(min(SMALLEST_SLICE, most), min(most, int(self.rate * BURST_SECONDS)))


class Meter:
    """Bytes a second, averaged over the last seconds with weights that fall off exponentially."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = -math.inf

    def add(self, count: int, now: float) -> None:
        self._rate = self.rate(now) + count / METER_SECONDS
        self._at = now

    def rate(self, now: float) -> float:
        return self._rate * math.exp((self._at - now) / METER_SECONDS) if self._rate else 0.0


class Bandwidth:
    """Bytes a second of one link, from what its sends took; long ones count for more than short ones."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def learn(self, size: int, seconds: float) -> None:
        """A body of `size` bytes left in that time. Nothing is learnt from a clock that stood still."""
        if size > 0 and seconds > 0:
            self._bytes = MEMORY * self._bytes + size
            self._seconds = MEMORY * self._seconds + seconds

    @property
    def estimate(self) -> float | None:
        """None before the first send."""
        return self._bytes / self._seconds if self._seconds else None
