"""Rows for models under way, in blocks that stay where they are, counted by the messages that carry them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
        return self.block(number // self._block)[number % self._block]

    def place(self, number: int) -> tuple[int, int]:
        """The number of the block that has the row, and where there."""
        return number // self._block, number % self._block

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """A copy, (N, P)."""
        parts, order = [], []
        for block, here, places in self._by_block(numbers):
            parts.append(self.block(block)[places])
            order += here
        if len(parts) == 1:
            return parts[0]
        found = torch.cat(parts)
        return found[torch.tensor(order, device=found.device).argsort()]

    def put(self, numbers: Sequence[int], values: torch.Tensor) -> None:
        """`values` (N, P) become these rows."""
        for block, here, places in self._by_block(numbers):
            self.block(block)[places] = values[here]

    def block(self, number: int) -> torch.Tensor:
        """(rows, P)."""
        while number >= len(self._blocks):
            self._blocks.append(self._new(len(self._blocks)))
        return self._blocks[number]

    def _by_block(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[int], list[int]]]:
        """Blocks, which of the numbers are in each, and where there: row by row a GPU would take its time."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for index, number in enumerate(numbers):
            here, places = found.setdefault(number // self._block, ([], []))
            here.append(index)
            places.append(number % self._block)
        for block, (here, places) in found.items():
            yield block, here, places

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
