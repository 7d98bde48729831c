"""Models on their way and their merges, for many peers at once; the arithmetic is that of `gossipml.models`.

What a peer sends is copied when it is sent, as its receivers will decode it; copies are rows of one pool, counted by
the messages that carry them. Merges of different receivers are done together, in chunks that fit the cache: the way of
`LocalTrainer.merge`, with `received`, `clipped_difference` and a `ClippingBound` for each peer.

With a robust rule (`merge_rules`) models wait until the receiver's round ends and are merged in one stack with its own;
fewer than the rule needs wait on. `mean`, `age` and `slerp` merge each model when it comes, by the protocol's weight
and without clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gossipml.models.averaging import Coordinates, mean
from gossipml.models.compression import Form, parse_form, received, rounded
from gossipml.models.encoding import MAX_MAGNITUDE
from gossipml.models.merge_rules import MergeRule, merge
from gossipml.models.merging import ClippingBound, clipped_difference, norm
from gossipml.models.slerp import slerp
from gossipml.simulations.population_training import Threads

CHUNK_BYTES = 1 << 20  # of models in a chunk: own, incoming and two or three intermediate ones fit 2 MiB of cache
MOST_WAITING = 64  # models that a peer keeps for a robust rule; the oldest goes first


@dataclass(frozen=True)
class Merging:
    """One model to merge: receiver, row of the pool, form, the share of it in the mean."""

    receiver: int
    row: int
    form: Form
    weight: float


class Pool:
    """Rows for models under way; grows by blocks, which stay where they are."""

    def __init__(self, size: int, device: torch.device, block: int) -> None:
        self._size, self._device, self._block = size, device, max(1, block)
        self.rows = torch.empty(0, size, device=device)
        self._free: list[int] = []
        self._users: dict[int, int] = {}

    def take(self, count: int) -> list[int]:
        """Rows that are nobody's; each is used once."""
        if len(self._free) < count:
            begin = len(self.rows)
            more = max(self._block, count - len(self._free))
            self.rows = torch.cat([self.rows, torch.empty(more, self._size, device=self._device)])
            self._free = [*range(begin + more - 1, begin - 1, -1), *self._free]
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


form_of = lru_cache(4096)(parse_form)


class Mixer:
    """Sends from and merges into `x` (N, P)."""

    def __init__(self, x: torch.Tensor, coordinates: Coordinates, rule: MergeRule | None, threads: Threads) -> None:
        self.x = x
        self.pool = Pool(x.shape[1], x.device, block=min(len(x), 1024))
        self.bounds = [ClippingBound() for _ in range(len(x))]
        self._coordinates = coordinates
        self._rule = rule
        self._threads = threads
        self._most = max(1, CHUNK_BYTES // (4 * x.shape[1])) if x.device.type == "cpu" else 4096
        self._waiting: dict[int, list[int]] = {}

    @property
    def collects(self) -> bool:
        """Whether models wait for the end of the receiver's round."""
        return self._rule is not None and self._rule.needs > 1

    # Sending.

    def copy(self, peers: Sequence[int], form: Form) -> list[int]:
        """Rows with the models of these peers as they are now; in a form that leaves nothing out, rounded."""
        taken = self.pool.take(len(peers))
        rows, sources = torch.tensor(taken), torch.tensor(peers)
        exact = self._coordinates.buffers

        def job(place: slice) -> None:
            values = self.x[sources[place].to(self.x.device)]
            if form.share == 1.0 and form.values != "float32":
                kept = values[:, values.shape[1] - exact :].clone()
                values = torch.cat([rounded(form.values, values[:, : values.shape[1] - exact]), kept], 1)
            self.pool.rows[rows[place].to(self.x.device)] = values

        self._threads.map(job, self._slices(len(peers)))
        return taken

    def overwrite(self, row: int, values: torch.Tensor) -> None:
        """A lie in place of what was copied."""
        self.pool.rows[row] = values

    # Merging.

    def merge(self, merges: Sequence[Merging]) -> list[tuple[bool, float]]:
        """At most one for each receiver. Whether it was merged, or refused for its values, and how far away it was."""
        found: list[tuple[bool, float]] = [(False, 0.0)] * len(merges)
        groups: dict[Form | None, list[int]] = {}
        for place, each in enumerate(merges):
            groups.setdefault(None if each.form.share == 1.0 else each.form, []).append(place)

        def job(chunk: tuple[Form | None, list[int]]) -> None:
            form, places = chunk
            for place, result in zip(places, self._merge(form, [merges[place] for place in places]), strict=True):
                found[place] = result

        self._threads.map(
            job, [(form, places[piece]) for form, places in groups.items() for piece in self._slices(len(places))]
        )
        if self.collects:
            for each, (applied, _) in zip(merges, found, strict=True):
                if applied:
                    self.pool.use(each.row)
                    waiting = self._waiting.setdefault(each.receiver, [])
                    waiting.append(each.row)
                    if len(waiting) > MOST_WAITING:
                        self.pool.drop(waiting.pop(0))
        return found

    def _merge(self, form: Form | None, merges: Sequence[Merging]) -> list[tuple[bool, float]]:
        device = self.x.device
        receivers = torch.tensor([each.receiver for each in merges], device=device)
        own = self.x[receivers]
        incoming = self.pool.rows[torch.tensor([each.row for each in merges], device=device)]
        share = 1.0
        if form is not None:
            incoming = received(form, incoming, own, exact=self._coordinates.buffers)
            share = form.share
        good = self._acceptable(incoming) & own.sum(-1).isfinite()
        if not bool(good.all()):
            incoming = torch.where(good[:, None], incoming, own)
        lengths = norm(own).tolist()
        reach = [self.bounds[each.receiver].bound(length) for each, length in zip(merges, lengths, strict=True)]
        bound = own.new_tensor(reach) * share**0.5
        difference, distance = clipped_difference(own, incoming, bound)
        found = (distance / share**0.5).tolist()
        accepted = good.tolist()
        weights = own.new_tensor([each.weight for each in merges])
        if self._rule is None or self._rule.name == "clipping":
            own.addcmul_(difference, weights[:, None])
            for each, applied, length in zip(merges, accepted, found, strict=True):
                if applied:
                    self.bounds[each.receiver].learn(length)
            self.x[receivers] = own
        elif self._rule.name == "slerp":
            few = weights.double().cpu().numpy()
            self.x[receivers] = slerp(own, incoming, few, self._coordinates.parameters)
        elif not self.collects:
            pairs = torch.stack([own, incoming], 1)  # (k, 2, P)
            self.x[receivers] = mean(pairs, torch.stack([1 - weights, weights], 1))
        return list(zip(accepted, found, strict=True))

    def _acceptable(self, incoming: torch.Tensor) -> torch.Tensor:
        """(k,): all values finite and none beyond what `decode_into` takes, no variance below 0."""
        largest = torch.maximum(incoming.amax(-1), -incoming.amin(-1))
        good = largest <= MAX_MAGNITUDE  # NaN compares false
        for start, stop in self._coordinates.variances:
            good &= incoming[:, start:stop].amin(-1) >= 0
        return good

    def merge_waiting(self, peers: Sequence[int]) -> None:
        """What came in for these peers, with a robust rule: once there are enough models."""
        if self._rule is None or not self.collects:
            return
        groups: dict[int, list[int]] = {}
        for peer in peers:
            count = 1 + len(self._waiting.get(peer, ()))
            if count >= self._rule.needs:
                groups.setdefault(count, []).append(peer)
        for count, members in sorted(groups.items()):
            most = max(1, 4 * self._most // count)
            for start in range(0, len(members), most):
                some = members[start : start + most]
                rows = torch.tensor([self._waiting[peer] for peer in some], device=self.x.device)
                own = torch.tensor(some, device=self.x.device)
                stack = torch.cat([self.x[own][:, None], self.pool.rows[rows]], 1)  # (k, count, P)
                self.x[own] = merge(self._rule, stack, coordinates=self._coordinates)
        for members in groups.values():
            for peer in members:
                for row in self._waiting.pop(peer):
                    self.pool.drop(row)

    def forget(self, peer: int) -> None:
        """What waits for a peer that is gone."""
        for row in self._waiting.pop(peer, []):
            self.pool.drop(row)

    def _slices(self, count: int) -> list[slice]:
        return [slice(start, start + self._most) for start in range(0, count, self._most)]


def spread(x: torch.Tensor, peers: Sequence[int]) -> tuple[torch.Tensor, float, float]:
    """The mean of these peers' models (P,), their root mean square distance from it relative to its norm, and the
    variance over peers, the mean over parameters. Sums in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    step = max(1, (16 << 20) // x.shape[1])
    pieces = [torch.tensor(list(peers[start : start + step]), device=x.device) for start in range(0, len(peers), step)]
    for piece in pieces:
        total += x[piece].sum(0, dtype=torch.float64)
    centre = total / len(peers)
    squares = sum(float((x[piece] - centre).square_().sum()) for piece in pieces)
    length = float(centre.norm())
    variance = squares / (len(peers) * x.shape[1])
    distance = float(np.sqrt(squares / len(peers)))
    return centre.to(x.dtype), distance / length if length > 0 else distance, variance
