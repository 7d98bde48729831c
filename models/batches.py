"""Batches in a shuffled order that can be saved and continued: no loader, no workers, one index per batch.

What `ingest` makes of the samples is kept when it is small; otherwise each batch is ingested on its own, from
raw samples that take a quarter of the memory (uint8 images). Where `ingest` does nothing but multiply bytes by a
number, batches come from the bytes, which takes half as long as from the products, and need no `ingest`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.dataset import Labelled, Rows, is_stream
from gossipml.models.spec import Array, Spec

BLOCK = 4096  # samples that are ingested at once to see what `ingest` does
SCALED = 256 << 20  # bytes that are looked at for whether all that `ingest` does is to multiply them: half a second
INGEST_ONCE = 16 << 20  # bytes: digits whole, a hundredth of what mnist would take in all


class Rooms:
    """Buffers for samples; the same ones for as many, as long as nobody asks for more than ever."""

    def __init__(self) -> None:
        self._largest: list[torch.Tensor] = []
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, kept: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For so many rows of `kept`, which are always the same; and for these as float32."""
        found = self._known.get(count)
        if found is None:
            if not self._largest or len(self._largest[0]) < count:
                as_kept = kept.new_empty(count, *kept.shape[1:])
                as_float = as_kept if kept.dtype == torch.float32 else as_kept.to(torch.float32)
                self._largest = [as_kept, as_float]
                self._known.clear()
            chosen = self._largest[0][:count]
            found = chosen, chosen if self._largest[1] is self._largest[0] else self._largest[1][:count]
            self._known[count] = found
        return found


class Samples:
    """Raw samples and targets as tensors on demand; a stream of samples is read batch by batch.

    Where all that `ingest` makes of them takes at most `keep` bytes it is kept.
    """

    scale: float = 1.0
    """What `unscaled` leaves to be multiplied by."""

    def __init__(self, spec: Spec, labelled: Labelled, device: torch.device, *, keep: int = INGEST_ONCE) -> None:
        self._spec = spec
        self._device = device
        self._raw = samples = labelled.inputs
        self._targets = torch.from_numpy(labelled.targets).to(device)
        self._ingested: torch.Tensor | None = None
        # A stream keeps open files and what it read last; an array may be read by several threads at once.
        self._reading: AbstractContextManager[object] = threading.Lock() if is_stream(samples) else nullcontext()
        first = ingest(spec, samples[:1])
        scale = _scale(spec, samples, first)
        if scale is not None:
            self.scale = scale
            own = np.require(samples, requirements=("C", "W"))  # torch wants an array that it might write to
            self._ingested = torch.from_numpy(own.reshape(-1, *first.shape[1:])).to(device)
        elif first.nbytes * len(samples) <= keep:
            self._ingested = torch.from_numpy(ingest(spec, samples[:])).to(device)

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def kept(self) -> torch.Tensor | None:
        """All inputs, of which `scale` times as much is what the model takes; None where they are not kept."""
        return self._ingested

    @property
    def all_targets(self) -> torch.Tensor:
        return self._targets

    def at(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (b, ...) and targets (b,) of the samples at `indices` (b,), int64 on the CPU. Thread-safe, as far as
        the model's `ingest` is."""
        inputs = self.unscaled(indices)
        if self.scale != 1.0:
            inputs.mul_(self.scale)
        return inputs, self.targets(indices)

    def unscaled(self, indices: torch.Tensor, room: Rooms | None = None) -> torch.Tensor:
        """The inputs that become those of `at` when they are multiplied by `scale`; in buffers of `room` where they fit
        into those, which then hold them until the next call."""
        if self._ingested is None:
            with self._reading:
                raw = self._raw[indices.numpy()]
            return torch.from_numpy(ingest(self._spec, raw)).to(self._device)
        kept, places = self._ingested, indices.to(self._device)
        if room is None:
            return kept.index_select(0, places).to(torch.float32)
        chosen, inputs = room.of(kept, len(places))
        torch.index_select(kept, 0, places, out=chosen)
        return inputs if inputs is chosen else inputs.copy_(chosen)

    def unscaled_into(self, indices: torch.Tensor, out: torch.Tensor) -> None:
        """The same, written into `out` (b, k), a row for each sample."""
        kept = self._ingested
        if kept is None:
            out.copy_(self.unscaled(indices).view(out.shape))
        elif kept.dtype == out.dtype:
            torch.index_select(kept.view(len(kept), -1), 0, indices.to(self._device), out=out)
        else:
            out.copy_(kept.index_select(0, indices.to(self._device)).view(out.shape))

    def targets(self, indices: torch.Tensor) -> torch.Tensor:
        """Like the indices, which may have any shape."""
        return self._targets.index_select(0, indices.flatten().to(self._device)).view(indices.shape)

    def relabel(self, indices: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the targets of some samples by what `change` makes of them."""
        self._targets = self._targets.clone()  # the data set is everybody's
        places = indices.to(self._device)
        self._targets[places] = change(self._targets[places])

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a range."""
        if self._ingested is not None:
            inputs = self._ingested[start:stop].to(torch.float32)
            return inputs if self.scale == 1.0 else inputs.mul_(self.scale), self._targets[start:stop]
        inputs = torch.from_numpy(ingest(self._spec, self._raw[start:stop])).to(self._device)
        return inputs, self._targets[start:stop]


class Feed:
    """Batches for N models at once, in buffers that are used again: each until the next one, and the same tensor as
    the last time where it can be, so that nobody needs new views of it."""

    def __init__(self, samples: Samples, *, scaled: bool) -> None:
        """`scaled`: by `samples.scale`, which is otherwise left to do."""
        self._samples = samples
        self._scale = samples.scale if scaled else 1.0
        self._room = Rooms()
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def fetch(self, places: torch.Tensor, count: int) -> torch.Tensor:
        """The samples at `places` (count * b,): (count, b, ...)."""
        inputs = self._samples.unscaled(places, self._room)
        if self._scale != 1.0:
            inputs.mul_(self._scale)
        if self._last is None or self._last[0] is not inputs or len(self._last[1]) != count:
            self._last = inputs, inputs.view(count, -1, *inputs.shape[1:])
        return self._last[1]


class ShuffledOrder:
    """Indices of batches, epoch after epoch, each in a fresh random order. A last batch that would be smaller
    is left out of its epoch; where there are fewer samples than a batch, all of them are one."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count = count
        self._batch = min(batch, count)
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._begin_epoch()

    @property
    def batch(self) -> int:
        return self._batch

    def next_indices(self) -> torch.Tensor:
        """(batch,) int64."""
        if self._position + self._batch > self._count:
            self._begin_epoch()
        start = self._position
        self._position += self._batch
        return torch.from_numpy(self._order[start : self._position])

    def coming(self) -> torch.Tensor | None:
        """What `next_indices` will give; None where it would begin an epoch."""
        stop = self._position + self._batch
        return torch.from_numpy(self._order[self._position : stop]) if stop <= self._count else None

    def next_batches(self, steps: int) -> NDArray[np.int64]:
        """(steps, batch): the same for several steps, as an array: of many orders these are put together faster."""
        stretches = []  # of the order of one epoch each
        while steps:
            whole = min(steps, (self._count - self._position) // self._batch)
            if not whole:
                self._begin_epoch()
                continue
            start = self._position
            self._position += whole * self._batch
            stretches.append(self._order[start : self._position])
            steps -= whole
        return (np.concatenate(stretches) if len(stretches) > 1 else stretches[0]).reshape(-1, self._batch)

    def save(self) -> str:
        """The state as text, for `restore`."""
        return json.dumps({"generator": self._at_epoch, "position": self._position, "count": self._count})

    def restore(self, text: str) -> None:
        """Continues where `save` was called; a fresh epoch when the number of samples has changed since."""
        state: dict[str, Any] = json.loads(text)  # Any: numpy's own form of a generator's state
        if state["count"] != self._count:
            return
        position = int(state["position"])
        if not 0 <= position <= self._count:
            raise ValueError(f"position {position} is not from 0 to {self._count}")
        self._generator.bit_generator.state = state["generator"]
        self._begin_epoch()
        self._position = position

    def _begin_epoch(self) -> None:
        self._at_epoch = self._generator.bit_generator.state
        self._order = self._generator.permutation(self._count)
        self._position = 0


def ingest(spec: Spec, samples: Array) -> Array:
    """What the model's `ingest` gives, checked: float32, finite, one row a sample, contiguous."""
    given = spec.ingest(samples)
    if not isinstance(given, np.ndarray) or len(given) != len(samples):
        raise UserError(f"ingest of the model {spec.name!r} must give an array with one row a sample")
    return np.ascontiguousarray(given, dtype=np.float32)


def _scale(spec: Spec, samples: Rows, first: Array) -> float | None:
    """The number by which `ingest` multiplies, where the samples are bytes and it does nothing else, bit for bit.
    `first`: what it makes of the first of them."""
    if not isinstance(samples, np.ndarray) or samples.dtype != np.uint8 or samples.nbytes > SCALED:
        return None
    if first.size != samples[:1].size:
        return None
    largest = np.unravel_index(samples.argmax(), samples.shape)
    probe = samples[largest[0] : largest[0] + 1]
    if not samples[largest]:
        return None
    scale = np.float32(ingest(spec, probe).reshape(probe.shape)[(0, *largest[1:])] / samples[largest])
    for start in range(0, len(samples), BLOCK):
        block = samples[start : start + BLOCK]
        if not np.array_equal(ingest(spec, block).reshape(block.shape), np.multiply(block, scale, dtype=np.float32)):
            return None
    return float(scale)
