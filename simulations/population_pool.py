"""Rows for models under way, in blocks that stay where they are, counted by the messages that carry them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Pool:
    """Grows by blocks; a process that was forked before it grew finds what its parent speaks of."""

    def __init__(self, block: int, new: Callable[[int], torch.Tensor]) -> None:
        """`new(n)` is the n-th block, of `block` rows; see `population_helpers.Helpers.blocks`."""
        self._block, self._new = block, new
        self._blocks: list[torch.Tensor] = []
        self._free: list[int] = []
        self._users: dict[int, int] = {}

    def row(self, number: int) -> torch.Tensor:
        """(P,)."""
        block, place = divmod(number, self._block)
        while block >= len(self._blocks):
            self._blocks.append(self._new(len(self._blocks)))
        return self._blocks[block][place]

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """A copy, (N, P)."""
        return torch.stack([self.row(number) for number in numbers])

    def put(self, numbers: Sequence[int], values: torch.Tensor) -> None:
        """`values` (N, P) become these rows."""
        for number, value in zip(numbers, values, strict=True):
            self.row(number).copy_(value)

    def take(self, count: int) -> list[int]:
        """Rows that are nobody's; each is used once."""
        while len(self._free) < count:
            begin = len(self._blocks) * self._block
            self._blocks.append(self._new(len(self._blocks)))
            self._free = [*range(begin + self._block - 1, begin - 1, -1), *self._free]
        taken = [self._free.pop() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def use(self, row: int) -> None:
        self._users[row] += 1

    def drop(self, row: int) -> None:
        left = self._users.pop(row) - 1
        if left:
            self._users[row] = left
        else:
            self._free.append(row)

    @property
    def used(self) -> int:
        return len(self._users)
