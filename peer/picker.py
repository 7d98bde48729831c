"""Which pieces to ask for next: the rarest first, at random among equals (BEP 3's advice, Cohen 2003).

Sets of pieces are integers, bit i for piece i, and the pieces that exactly k sources have are one such set for
each k: a source with 2,000 pieces that comes or goes costs a few operations on 250 bytes for each k instead of
2,000 steps, and the rarest piece that a source has is found by a few intersections.

Leaves out: who was asked for what and when (`gossipml.peer.download`).
"""

from __future__ import annotations

import random


class Picker:
    """The pieces of one content: how many sources have each, and which are still to be asked for."""

    def __init__(self, count: int, have: int, rng: random.Random) -> None:
        self.all = (1 << count) - 1
        self.missing = self.all & ~have
        """Pieces that we do not have."""
        self.free = self.missing
        """Pieces that nobody has been asked for."""
        self._levels = [self.all]  # [k]: the pieces that k sources have
        self._rng = rng

    def add(self, bits: int) -> None:
        """A source with these pieces is there, or a source has got them."""
        levels = self._levels
        if levels[-1] & bits:
            levels.append(0)
        for k in range(len(levels) - 2, -1, -1):
            moved = levels[k] & bits
            levels[k] ^= moved
            levels[k + 1] |= moved

    def remove(self, bits: int) -> None:
        """A source with these pieces is gone, or has lost them."""
        levels = self._levels
        for k in range(1, len(levels)):
            moved = levels[k] & bits
            levels[k] ^= moved
            levels[k - 1] |= moved
        while len(levels) > 1 and not levels[-1]:
            levels.pop()

    def availability(self, index: int) -> int:
        """How many sources have the piece."""
        return next(k for k, level in enumerate(self._levels) if level >> index & 1)

    def pick(self, bits: int, most: int) -> list[int]:
        """At most that many free pieces out of `bits`, rarest first; they are free no longer."""
        picked: list[int] = []
        wanted = self.free & bits
        for level in self._levels[1:]:
            candidates = wanted & level
            while candidates and len(picked) < most:
                index = _nth(candidates, self._rng.randrange(candidates.bit_count()))
                candidates ^= 1 << index
                self.free ^= 1 << index
                picked.append(index)
            if len(picked) >= most:
                break
        return picked

    def release(self, index: int) -> None:
        """Whoever was asked for the piece does not send it."""
        self.free |= self.missing & 1 << index

    def done(self, index: int) -> None:
        """We have the piece."""
        self.missing &= ~(1 << index)
        self.free &= ~(1 << index)


def _nth(bits: int, n: int) -> int:
    """The position of the n-th set bit, counted from 0, by halving."""
    position, width = 0, bits.bit_length()
    while width > 1:
        half = width // 2
        low = bits & (1 << half) - 1
        count = low.bit_count()
        if n < count:
            bits, width = low, half
        else:
            n -= count
            bits >>= half
            position += half
            width -= half
    return position
