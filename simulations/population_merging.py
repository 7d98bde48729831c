"""Models on their way and their merges, for many peers at once; the arithmetic is that of `gossipml.models`.

What a peer sends is copied when it is sent, as its receivers will decode it; copies are rows of one pool, counted by
the messages that carry them. Every peer has the `Merger` that a trainer has; those of different peers run on all
threads. Forms with error feedback (top-k, int4) go through an `Outgoing` for each peer, bytes and all; in their rows
NaN stands for what was not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gossipml.models.arrays import IN_CACHE, ON_DEVICE
from gossipml.models.averaging import Coordinates
from gossipml.models.compression import Form, packed_size, parse_form, received, unpack_into
from gossipml.models.encoding import MAX_MAGNITUDE
from gossipml.models.feedback import Outgoing
from gossipml.models.merge_rules import MergeRule
from gossipml.models.merger import Merger, take_rows
from gossipml.models.trainer import MergeReport
from gossipml.models.training import MERGE_SHARE, share_of_average
from gossipml.simulations.population_training import Threads

WORTH_THREADS = 1 << 24  # parameters to merge, from which on two threads are faster than one (guess)
CHUNK_BYTES = 1 << 20  # of models that are rounded at once: with two or three intermediate ones they fit the cache
REFUSED = MergeReport(False, f"holds values that are not finite, or beyond {MAX_MAGNITUDE:g}", 0.0, fault=True)


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


def has_state(form: Form) -> bool:
    """Whether what is sent depends on what was sent before; see `Outgoing`."""
    return form.percent < 100 or (form.values == "int4" and form.share == 1.0)


class Mixer:
    """Sends from and merges into `x` (N, P). `start` (P,) is what all peers begin with."""

    def __init__(
        self, x: torch.Tensor, start: torch.Tensor, coordinates: Coordinates, rule: MergeRule, threads: Threads
    ) -> None:
        self.x = x
        self.pool = Pool(x.shape[1], x.device, block=min(len(x), 1024))
        self._start = start
        self._coordinates = coordinates
        self._mergers = [Merger(rule, coordinates) for _ in range(len(x))]
        self._outgoing: dict[int, Outgoing] = {}
        self._places: dict[int, torch.Tensor] = {}  # of rows of the pool with a part of a model, where that lies
        self._threads = threads
        self._one_by_one = x.device.type == "cpu"  # in the cache from the first pass to the last, and in place
        self._most = max(1, CHUNK_BYTES // (4 * x.shape[1])) if self._one_by_one else 4096
        self._doubtful = False
        self._merges: dict[int, int] = {}  # since the last step, of those that are watched
        self.served: dict[int, torch.Tensor] = {}
        """What these peers answer predictions with: the exponential average of their merges (`models.training`). Left
        out: a peer that hears nobody averages its own rounds."""

    def watch(self, peers: Sequence[int]) -> None:
        """Keep what these peers serve, from the start on."""
        self.served = {peer: self._start.clone() for peer in peers}
        self._merges = dict.fromkeys(peers, 0)

    def trained(self, peers: Sequence[int]) -> None:
        """These have taken steps since their last merge."""
        self._merges |= dict.fromkeys(self._merges.keys() & set(peers), 0)

    # Sending.

    def copy(self, peers: Sequence[int], form: Form) -> list[int]:
        """Rows with the models of these peers as they are now: as a receiver decodes them where the form sends all or
        has a state, else as they are."""
        taken = self.pool.take(len(peers))
        rows, sources = torch.tensor(taken), torch.tensor(peers)
        exact = self._coordinates.buffers
        if has_state(form):

            def send(place: int) -> None:
                row = taken[place]
                self.pool.rows[row], self._places[row] = self._sent(peers[place], form)

            self._threads.map(send, range(len(peers)))
            return taken

        def job(place: slice) -> None:
            if form.values == "float32" and self._one_by_one:
                for row, peer in zip(taken[place], peers[place], strict=True):
                    self.pool.rows[row].copy_(self.x[peer])
                return
            values = self.x[sources[place].to(self.x.device)]
            if form.share == 1.0 and form.values != "float32":
                values = received(form, values, values, exact=exact)
            self.pool.rows[rows[place].to(self.x.device)] = values

        slices = [slice(begin, begin + self._most) for begin in range(0, len(peers), self._most)]
        self._threads.map(job, slices)
        return taken

    def _sent(self, peer: int, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
        """(P,), NaN where the body holds nothing, and where it holds something."""
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            outgoing = self._outgoing[peer] = Outgoing(self._start.cpu().numpy(), exact=self._coordinates.buffers)
        body = bytearray(packed_size(form, self.x.shape[1], self._coordinates.buffers))
        outgoing.pack_into(form, self.x[peer].cpu().numpy(), memoryview(body))
        out = np.full(self.x.shape[1], np.nan, dtype=np.float32)
        places = unpack_into(form, body, out, exact=self._coordinates.buffers)
        if isinstance(places, slice):
            places = np.arange(len(out))[places]
        buffers = np.arange(self._coordinates.parameters, len(out))
        return torch.from_numpy(out), torch.from_numpy(np.concatenate([places, buffers])).to(self.x.device)

    def overwrite(self, row: int, values: torch.Tensor) -> None:
        """A lie in place of what was copied."""
        self.pool.rows[row] = values
        self._doubtful = True

    # Merging.

    def merge(self, merges: Sequence[Merging]) -> list[MergeReport]:
        """At most one for each receiver; what became of each."""
        found = [REFUSED] * len(merges)

        def job(places: Sequence[int]) -> None:
            room = self.x.new_empty(self.x.shape[1])
            for place in places:
                found[place] = self._merge_one(merges[place], room)

        if not self._one_by_one:
            return self._merge_rows(merges)
        count = self._threads.count if len(merges) * self.x.shape[1] > WORTH_THREADS else 1
        self._threads.map(job, [range(first, len(merges), count) for first in range(count)])
        return found

    def _merge_rows(self, merges: Sequence[Merging]) -> list[MergeReport]:
        """The same, many at once."""
        found = [REFUSED] * len(merges)
        alike: dict[Form, list[int]] = {}
        for place, each in enumerate(merges):
            alike.setdefault(each.form, []).append(place)

        def job(places: list[int]) -> None:
            form = merges[places[0]].form
            receivers = torch.tensor([merges[place].receiver for place in places], device=self.x.device)
            own = self.x[receivers]
            models = self._incoming([merges[place].row for place in places], own, form)
            good = self._good(models)
            if not all(good):
                places = [place for place, right in zip(places, good, strict=True) if right]
                receivers, own, models = receivers[good], own[good], models[good]
            if places:
                mergers = [self._mergers[merges[place].receiver] for place in places]
                reports = take_rows(mergers, own, models, [merges[place].weight for place in places], form.share)
                self.x[receivers] = own
                for place, report in zip(places, reports, strict=True):
                    found[place] = report
                    if report.applied:
                        self._moved(merges[place].receiver, MERGE_SHARE * form.share)

        most = self._most
        self._threads.map(job, [all_[a : a + most] for all_ in alike.values() for a in range(0, len(all_), most)])
        return found

    def _merge_one(self, merging: Merging, room: torch.Tensor) -> MergeReport:
        """`room` (P,) is anything afterwards."""
        form, receiver = merging.form, merging.receiver
        own, model = self.x[receiver], self.pool.rows[merging.row]
        if form.share < 1.0:
            model = self._incoming([merging.row], own[None], form)[0]
        if not self._good(model[None])[0]:
            return REFUSED
        report = self._mergers[receiver].take(own, model, merging.weight, form.share, room)
        if report.applied:
            self._moved(receiver, MERGE_SHARE * form.share)
        return report

    def merge_together(self, receiver: int, merges: Sequence[Merging]) -> list[MergeReport]:
        """By a rule that compares models; a report for each."""
        own = self.x[receiver]
        read = [self._incoming([each.row], own[None], each.form)[0] for each in merges]
        right = [self._good(model[None])[0] for model in read]
        good = [model for model, is_good in zip(read, right, strict=True) if is_good]
        reports = self._mergers[receiver].take_together(own, good)
        applied = sum(report.applied for report in reports)
        self._moved(receiver, 1.0 - (1.0 - MERGE_SHARE) ** applied, applied)
        left = iter(reports)
        return [next(left) if is_good else REFUSED for is_good in right]

    def _moved(self, receiver: int, share: float, merges: int = 1) -> None:
        if receiver in self.served and merges:
            self._merges[receiver] += merges
            self.served[receiver].lerp_(self.x[receiver], share_of_average(share, self._merges[receiver]))

    def _incoming(self, rows: Sequence[int], own: torch.Tensor, form: Form) -> torch.Tensor:
        """The models (N, P), new ones, that receivers with `own` (N, P) decode from these rows of the pool."""
        if form.share < 1.0 and has_state(form):
            models = own.clone()
            for model, row in zip(models, rows, strict=True):
                places = self._places[row]
                model[places] = self.pool.rows[row][places]
            return models
        sent = self.pool.rows[torch.tensor(rows, device=own.device)]
        if form.share == 1.0:
            return sent
        found: torch.Tensor = received(form, sent, own, exact=self._coordinates.buffers)
        return found

    def _good(self, models: torch.Tensor) -> list[bool]:
        """Which of (N, P) their receivers would not refuse for their values; only liars send others."""
        if not self._doubtful:
            return [True] * len(models)
        fine: list[bool] = (models.abs().amax(-1) <= MAX_MAGNITUDE).tolist()  # NaN compares false
        return fine


def spread(x: torch.Tensor, peers: Sequence[int]) -> tuple[torch.Tensor, float, float]:
    """The mean of these peers' models (P,), their root mean square distance from it relative to its norm, and the
    variance over peers, the mean over parameters. Sums in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    step = max(1, (IN_CACHE if x.device.type == "cpu" else ON_DEVICE) // x.shape[1])
    pieces = [torch.tensor(list(peers[start : start + step]), device=x.device) for start in range(0, len(peers), step)]
    for piece in pieces:
        total += x[piece].sum(0, dtype=torch.float64)
    centre = total / len(peers)
    squares = sum(float((x[piece] - centre).square_().sum()) for piece in pieces)
    length = float(centre.norm())
    variance = squares / (len(peers) * x.shape[1])
    distance = float(np.sqrt(squares / len(peers)))
    return centre.to(x.dtype), distance / length if length > 0 else distance, variance
