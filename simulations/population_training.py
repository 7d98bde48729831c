"""Local training of all peers: their parameters as rows of one tensor, stepped in batched kernels.

Peers that train at the same time are cut into chunks; a chunk is copied out, takes all its steps, and is copied back,
so that main memory is touched once a round. On a CPU there are as many processes as cores (`population_helpers`), or
as many threads, each with its own kernel and one torch thread; which of them takes which chunk changes nothing. On a
GPU there is one thread and large chunks.

Each peer has the batches that a `LocalTrainer` with the same data and seed has, in the same order. Optimisers other
than SGD step one peer after the other, each with its own torch optimiser, on the parameters as flat vectors.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from gossipml.errors import UserError
from gossipml.models.batches import Feed, Samples, ShuffledOrder
from gossipml.models.dataset import Dataset, is_stream
from gossipml.models.flat import build_flat
from gossipml.models.kernels import Kernel, kernel_for
from gossipml.models.kernels_dense import DenseKernel
from gossipml.models.kernels_functional import FunctionalKernel
from gossipml.models.kernels_loop import DenseLoop, dense_loop
from gossipml.models.partition import Indices
from gossipml.models.spec import Sgd, Spec
from gossipml.simulations.population_helpers import CAN_FORK, Helpers

T = TypeVar("T")
_Stages: TypeAlias = list[tuple[int, slice]]

CHUNK_BYTES = 1 << 24  # of parameters, velocities and batches of a chunk on a CPU; measured in turns: docs/simulator.md
DEVICE_BYTES = 4 << 30  # the same on a GPU
INGESTED_MOST = 4 << 30  # training samples that are kept as the model takes them


def order_seed(seed: int, peer: int) -> int:
    """The seed of a peer's batches."""
    return int.from_bytes(hashlib.sha256(f"order {seed} {peer}".encode()).digest()[:8], "big") >> 1


class Threads:
    """Runs a function over chunks; with one torch thread in each while it is open. As many as torch would use. Beside
    them there may be as many processes: `helpers`."""

    def __init__(self, device: torch.device, count: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = (count or min(cores, torch.get_num_threads())) if device.type == "cpu" else 1
        self._one_each = device.type == "cpu"
        self._before = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self.helpers = Helpers(self.count if CAN_FORK and self._one_each else 1, device)

    @contextmanager
    def open(self) -> Iterator[None]:
        self._before = torch.get_num_threads()
        if self._one_each:
            torch.set_num_threads(1)
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "population", initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield
        finally:
            self.helpers.close()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
            torch.set_num_threads(self._before)

    def map(self, job: Callable[[T], object], chunks: Sequence[T]) -> None:
        if self._pool is None or len(chunks) < 2:
            for chunk in chunks:
                job(chunk)
        else:
            list(self._pool.map(job, chunks))


class _Hand:
    """What one thread trains with."""

    def __init__(self, kernel: Kernel, loop: DenseLoop | None, samples: Samples) -> None:
        self.kernel = kernel
        self.loop = loop
        self.dense = kernel if isinstance(kernel, DenseKernel) else None
        self.feed = Feed(samples, scaled=self.dense is None)
        if self.dense is not None:
            self.dense.scale(samples.scale)


class Trainees:
    """N peers. `x` (N, size) is theirs to train and everybody's to read and merge into."""

    def __init__(
        self,
        spec: Spec,
        data: Dataset,
        parts: Sequence[Indices],
        *,
        seed: int,
        network_id: bytes,
        device: torch.device,
        threads: Threads,
    ) -> None:
        self.spec = spec
        self._device = device
        self._threads = threads
        flat, self.layout = build_flat(spec, network_id, device)
        self.parameter_count = flat.parameter_count
        self.first = flat.vector.clone()  # (size,)
        self._helpers = threads.helpers
        self.x = self._helpers.memory(len(parts), self.layout.size)
        self.x[:] = self.first
        self._samples = Samples(spec, data.train, device, keep=INGESTED_MOST)
        self._parts = [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in parts]
        self._orders = [ShuffledOrder(len(part), spec.batch, order_seed(seed, peer)) for peer, part in enumerate(parts)]
        self._module = copy.deepcopy(flat.module)
        self._hands = threading.local()
        self._velocity: torch.Tensor | None = None
        self._frozen = self._frozen_places(flat.module)
        self._optimisers: list[torch.optim.Optimizer] = []
        self._prepare_optimiser()
        self._in_turn = self._finds_draws() or is_stream(data.train.inputs)  # streams are for one thread
        self._helpers.offer("train", self._train)
        vectors = 1 if self._velocity is None and not self._optimisers else 2
        self._bytes_a_peer = 4 * (vectors * self.layout.size + spec.batch * self._values_a_sample())
        torch.manual_seed(order_seed(seed, -1))  # dropout draws from the global generator

    def replace_targets(self, peers: Sequence[int], targets: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Other labels for the training samples of these peers, whose parts are nobody else's; before they train."""
        assert not self._helpers.forked, "they have the targets that were there when they were forked"
        self._samples.relabel(torch.cat([self._parts[peer] for peer in peers]), targets)

    def epoch_steps(self, peer: int) -> int:
        """Optimiser steps in which a peer sees its data once."""
        return max(1, len(self._parts[peer]) // self._orders[peer].batch)

    def batch(self, peer: int) -> int:
        return self._orders[peer].batch

    @property
    def counts(self) -> list[int]:
        """Training samples of each peer."""
        return [len(part) for part in self._parts]

    def train(self, peers: Sequence[int], steps: Sequence[int]) -> list[int]:
        """So many steps of each of these peers; which of them diverged: those are as they were before."""
        work = list(zip(peers, steps, strict=True))
        found = self._train(work) if self._in_turn else self._helpers.do("train", work)
        return sorted(peer for (peer, _), diverged in zip(work, found, strict=True) if diverged)

    def _train(self, work: list[tuple[int, int]]) -> list[bool]:
        """The same, in this process; of each whether it diverged."""
        diverged: list[int] = []
        chunks: list[list[tuple[int, int]]] = []
        threads = 1 if self._helpers.count > 1 or self._in_turn else self._threads.count
        most = self.chunk(len(work), threads)
        for peer, steps in sorted(work, key=lambda one: (-self.batch(one[0]), -one[1], one[0])):
            last = chunks[-1][0] if chunks else None
            if last is None or len(chunks[-1]) >= most or self.batch(last[0]) != self.batch(peer):
                chunks.append([])
            chunks[-1].append((peer, steps))
        job = self._train_alone if self._optimisers else self._train_chunk
        if threads == 1:
            for chunk in chunks:
                diverged += job(chunk)
        else:
            self._threads.map(lambda chunk: diverged.extend(job(chunk)), chunks)
        return [peer in diverged for peer, _ in work]

    def chunk(self, peers: int, threads: int) -> int:
        """How many of so many peers are trained at once by each thread."""
        most = max(1, (CHUNK_BYTES if self._device.type == "cpu" else DEVICE_BYTES) // self._bytes_a_peer)
        # All threads should end together: as many chunks for each, all of one size.
        chunks = threads * max(1, -(-peers // (most * threads)))
        return max(1, -(-peers // chunks))

    def forget_velocity(self, peer: int) -> None:
        if self._velocity is not None:
            self._velocity[peer] = 0

    def _train_chunk(self, chunk: list[tuple[int, int]]) -> list[int]:
        """All steps of peers with the same batch size, those with most steps first."""
        peers = [peer for peer, _ in chunk]
        places = self._draw(chunk)
        steps = [steps for _, steps in chunk]
        hand = self._hand()
        if hand.loop is not None:
            good = hand.loop.descend(self.x, self._velocity, peers, steps, places, self._sgd)
        else:
            take = self._descend if hand.dense is not None else self._step
            rows = torch.tensor(peers, device=self._device)
            good = take(hand, rows, places, self._samples.targets(places), _stages(steps))
        diverged = [peer for peer, is_good in zip(peers, good, strict=True) if not is_good]
        for peer in diverged:
            self.forget_velocity(peer)
        return diverged

    def _draw(self, chunk: list[tuple[int, int]]) -> torch.Tensor:
        """Where the samples of all steps are: (steps, peers, batch), int64."""
        places = np.zeros((chunk[0][1], len(chunk), self.batch(chunk[0][0])), dtype=np.int64)
        for number, (peer, steps) in enumerate(chunk):
            if steps:
                places[:steps, number] = self._parts[peer].numpy()[self._orders[peer].next_batches(steps)]
        return torch.from_numpy(places)

    def _descend(
        self, hand: _Hand, rows: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, stages: _Stages
    ) -> list[bool]:
        """The steps of a chunk, in its own copy of the parameters; whose are finite after them. Others stay."""
        dense = hand.dense
        assert dense is not None
        prepared = dense.prepare(targets)
        dense.hold(self.x, self._velocity, rows)
        for active, stage in stages:
            for where, own in zip(
                places[stage, :active].flatten(1).unbind(), prepared[stage, :active].unbind(), strict=True
            ):
                dense.descend(hand.feed.fetch(where, active), own, self._sgd)
        return dense.release(self.x, self._velocity, rows)

    def _step(
        self, hand: _Hand, rows: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, stages: _Stages
    ) -> list[bool]:
        """The same for any model."""
        sgd = self._sgd
        x = self.x.index_select(0, rows)
        if self._velocity is not None:
            velocity = self._velocity.index_select(0, rows)
        else:
            velocity = x.new_empty(len(rows), self.parameter_count)
        values = x[:, : self.parameter_count]
        for active, stage in stages:
            own_x, own_velocity, own_values = x[:active], velocity[:active], values[:active]
            for where, own in zip(
                places[stage, :active].flatten(1).unbind(), targets[stage, :active].unbind(), strict=True
            ):
                hand.kernel.accumulate(own_x, hand.feed.fetch(where, active), own, own_velocity, sgd.momentum)
                if sgd.weight_decay:
                    own_velocity.add_(own_values, alpha=sgd.weight_decay)
                own_values.add_(own_velocity, alpha=-sgd.learning_rate)
        finite = x.sum(-1).isfinite()
        kept = slice(None) if bool(finite.all()) else finite
        self.x[rows[kept]] = x[kept]
        if self._velocity is not None:
            self._velocity[rows[kept]] = velocity[kept]
        good: list[bool] = finite.tolist()
        return good

    def _train_alone(self, chunk: list[tuple[int, int]]) -> list[int]:
        """The same for any optimiser, one peer after the other."""
        hand, diverged = self._hand(), []
        for peer, steps in chunk:
            row = self.x[peer : peer + 1]
            before = row.clone()
            gradient = self._gradients[peer : peer + 1]
            for _ in range(steps):
                places = self._parts[peer][self._orders[peer].next_indices()][None]
                hand.kernel.accumulate(row, hand.feed.fetch(places[0], 1), self._samples.targets(places), gradient)
                self._optimisers[peer].step()
            if not bool(row.sum().isfinite()):
                row.copy_(before)
                diverged.append(peer)
        return diverged

    def _hand(self) -> _Hand:
        """Of this thread."""
        found: _Hand | None = getattr(self._hands, "hand", None)
        if found is None:
            module = copy.deepcopy(self._module).train()
            kernel = kernel_for(self.spec, module) or FunctionalKernel(self.spec, module)
            found = self._hands.hand = _Hand(kernel, dense_loop(self.spec, module, self._samples), self._samples)
        return found

    def _frozen_places(self, module: torch.nn.Module) -> list[tuple[int, int]]:
        """Begin and end of the parameters that are not trained."""
        places, offset = [], 0
        for parameter in module.parameters():
            if not parameter.requires_grad:
                places.append((offset, offset + parameter.numel()))
            offset += parameter.numel()
        return places

    def _prepare_optimiser(self) -> None:
        asked = self.spec.optimiser([torch.nn.Parameter(torch.zeros(1))])
        if isinstance(asked, Sgd) and not self._frozen:
            self._sgd = asked
            if asked.has_velocity:
                self._velocity = self._helpers.memory(len(self._parts), self.parameter_count)
            return
        self._gradients = torch.zeros(len(self._parts), self.parameter_count, device=self._device)
        ends = [0, *(end for pair in self._frozen for end in pair), self.parameter_count]
        stretches = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
        for row, gradient in zip(self.x, self._gradients, strict=True):
            parameters = []
            for start, stop in stretches:
                parameter = torch.nn.Parameter(row[start:stop])
                parameter.grad = gradient[start:stop]
                parameters.append(parameter)
            own = self.spec.optimiser(parameters)
            if isinstance(own, Sgd):
                own = torch.optim.SGD(
                    parameters, lr=own.learning_rate, momentum=own.momentum, weight_decay=own.weight_decay
                )
            if not isinstance(own, torch.optim.Optimizer):
                raise UserError(
                    f"optimiser() of the model {self.spec.name!r} gave a {type(own).__name__}; return a "
                    "torch.optim.Optimizer or a gossipml.models.spec.Sgd"
                )
            self._optimisers.append(own)

    def _finds_draws(self) -> bool:
        """Whether training draws random numbers (dropout): then one thread trains, or the order would be random."""
        before = torch.get_rng_state()
        places = self._parts[0][:1].repeat(2)[None]  # two: batch norm wants more than one
        gradient, hand = self.first.new_empty(1, self.parameter_count), self._hand()
        hand.kernel.accumulate(
            self.first.clone()[None], hand.feed.fetch(places[0], 1), self._samples.targets(places), gradient
        )
        draws = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        return draws

    def _values_a_sample(self) -> int:
        inputs, _ = self._samples.at(self._parts[0][:1])
        return inputs.numel()


def _stages(steps: Sequence[int]) -> _Stages:
    """From steps that get fewer and fewer: how many still train, and in which steps."""
    ends = sorted(set(steps) - {0})
    return [
        (sum(more >= end for more in steps), slice(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)
    ]
