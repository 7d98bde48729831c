"""Models on their way and their merges, for many peers at once; the arithmetic is that of `gossipml.models`.

What a peer sends is copied when it is sent, as its receivers will decode it; copies are rows of one pool. Every peer
has the `Merger` that a trainer has. On a CPU copies and merges are made one by one, in numpy, by the process that has
the sender or receiver (`population_helpers`); on a GPU many at once. Forms with error feedback (top-k, int4) go through
an `Outgoing` for each peer, bytes and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch

from gossipml.models.arrays import IN_CACHE, ON_DEVICE, can_compile
from gossipml.models.averaging import Coordinates
from gossipml.models.compression import Form, packed_size, parse_form, received, unpack_into
from gossipml.models.encoding import MAX_MAGNITUDE
from gossipml.models.feedback import Outgoing
from gossipml.models.merge_rules import MergeRule
from gossipml.models.merger import Merger, Places, compile_places, take_places, take_rows
from gossipml.models.over_time import OverTime
from gossipml.models.trainer import MergeReport
from gossipml.simulations.population_helpers import Helpers
from gossipml.simulations.population_pool import Pool

CHUNK_BYTES = 1 << 20  # of models that are rounded at once: with two or three intermediate ones they fit the cache
REFUSED = MergeReport(False, f"holds values that are not finite, or beyond {MAX_MAGNITUDE:g}", 0.0, fault=True)
NOT_SENT: Final = 0x7FC05EED
"""In rows of the pool with parts of models this NaN, bit for bit, stands for what the body does not hold."""

_Report: TypeAlias = tuple[bool, str, float, bool]  # a `MergeReport`, between processes


class Merging(NamedTuple):
    """One model to merge: receiver, row of the pool, encoding, the share of it in the mean."""

    receiver: int
    row: int
    encoding: str
    weight: float


form_of = lru_cache(4096)(parse_form)


def has_state(form: Form) -> bool:
    """Whether what is sent depends on what was sent before; see `Outgoing`."""
    return form.percent < 100 or (form.values == "int4" and form.share == 1.0)


class Mixer:
    """Sends from and merges into `x` (N, P), memory of the helpers. `start` (P,) is what all peers begin with."""

    def __init__(
        self,
        x: torch.Tensor,
        start: torch.Tensor,
        coordinates: Coordinates,
        rule: MergeRule,
        helpers: Helpers,
        *,
        watched: Sequence[int] = (),
        doubtful: bool = False,
    ) -> None:
        """`watched`: keep what these serve, from the start on; of all peers, where there is a time after training.
        `doubtful`: some may lie (`overwrite`)."""
        self.x = x
        block = min(len(x), 1024)
        self.pool = Pool(block, helpers.blocks(block, x.shape[1]))
        self._start = start
        self._coordinates = coordinates
        self._mergers = [Merger(rule, coordinates) for _ in range(len(x))]
        self._outgoing: dict[int, Outgoing] = {}
        self._one_by_one = x.device.type == "cpu"  # in the cache from the first pass to the last, and in place
        self._most = max(1, CHUNK_BYTES // (4 * x.shape[1])) if self._one_by_one else 4096
        self._in_loops = self._one_by_one and rule.name != "slerp" and can_compile()
        if self._in_loops:
            compile_places()
        self._doubtful = doubtful
        served = helpers.memory(len(watched), x.shape[1])
        served[:] = start
        self.served: dict[int, torch.Tensor] = dict(zip(watched, served, strict=True))
        """What these peers answer predictions with (`over_time`). Left out: a peer that hears nobody averages its own
        rounds."""
        counts = helpers.memory(len(watched), 2).cpu().numpy()
        self._over_time = {
            peer: OverTime(served, own) for (peer, served), own in zip(self.served.items(), counts, strict=True)
        }
        self._helpers = helpers
        helpers.offer("copy", self._copy)
        helpers.offer("settle", self._settle)
        helpers.offer("merge", self._merge)
        helpers.offer("merge together", self._merge_together)

    def trained(self, peers: Sequence[int]) -> None:
        """These have taken steps since their last merge."""
        for peer in self._over_time.keys() & set(peers):
            self._over_time[peer].stepped()

    def settle(self, peers: Sequence[int]) -> None:
        """Nobody around these trains any more, nor will."""
        self._helpers.do("settle", [(peer,) for peer in peers])

    def _settle(self, peers: Sequence[tuple[int]]) -> list[None]:
        for (peer,) in peers:
            if peer in self._over_time:
                self._over_time[peer].settle(self.x[peer])
                self._mergers[peer].settle()
        return [None] * len(peers)

    # Sending.

    def copy(self, peers: Sequence[int], encoding: str) -> list[int]:
        """Rows with the models of these peers as they are now: as a receiver decodes them where the form sends all or
        has a state, else as they are."""
        taken = self.pool.take(len(peers))
        self._helpers.do("copy", [(peer, row, encoding) for peer, row in zip(peers, taken, strict=True)])
        return taken

    def _copy(self, copies: Sequence[tuple[int, int, str]]) -> list[None]:
        """Peer, row and encoding of each; all are of one encoding."""
        form = form_of(copies[0][2])
        if has_state(form):
            for peer, row, _ in copies:
                self._send(peer, row, form)
        elif self._one_by_one and form.values == "float32":
            x = self.x.numpy()
            for peer, row, _ in copies:
                block, place = self.pool.place(row)
                self.pool.block(block).numpy()[place] = x[peer]
        else:
            exact = self._coordinates.buffers
            for begin in range(0, len(copies), self._most):
                peers, rows, _ = zip(*copies[begin : begin + self._most], strict=True)
                values = self.x[torch.tensor(peers, device=self.x.device)]
                if form.share == 1.0 and form.values != "float32":
                    values = received(form, values, values, exact=exact)
                self.pool.put(rows, values)
        return [None] * len(copies)

    def _send(self, peer: int, row: int, form: Form) -> None:
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            outgoing = self._outgoing[peer] = Outgoing(self._start.cpu().numpy(), exact=self._coordinates.buffers)
        body = bytearray(packed_size(form, self.x.shape[1], self._coordinates.buffers))
        outgoing.pack_into(form, self.x[peer].cpu().numpy(), memoryview(body))
        out = np.full(self.x.shape[1], NOT_SENT, dtype=np.int32).view(np.float32)
        unpack_into(form, body, out, exact=self._coordinates.buffers)
        self.pool.row(row).copy_(torch.from_numpy(out))

    def overwrite(self, row: int, values: torch.Tensor) -> None:
        """A lie in place of what was copied."""
        there = self.pool.row(row)
        there.copy_(torch.where(_is_sent(there), values, there))

    # Merging.

    def merge(self, merges: Sequence[Merging]) -> list[MergeReport]:
        """At most one for each receiver; what became of each."""
        if not self._one_by_one:
            return self._merge_rows(merges)
        return [MergeReport(*report) for report in self._helpers.do("merge", merges)]

    def _merge(self, merges: Sequence[tuple[int, int, str, float]]) -> list[_Report]:
        if self._in_loops:
            return self._merge_in_loops([Merging(*each) for each in merges])
        room = np.empty(self.x.shape[1], dtype=np.float32)
        return [_told(self._merge_one(Merging(*each), room)) for each in merges]

    def _merge_in_loops(self, merges: Sequence[Merging]) -> list[_Report]:
        """The same, as many at once as the cache holds."""
        found: list[_Report] = [(False, "", 0.0, False)] * len(merges)
        blocks: dict[int, list[int]] = {}
        for place, merging in enumerate(merges):
            if form_of(merging.encoding).share < 1.0:
                found[place] = _told(self._merge_one(merging, None))  # the model, which is a copy, may be anything then
            elif not self._good(self.pool.row(merging.row)[None])[0]:
                found[place] = _told(REFUSED)
            else:
                blocks.setdefault(self.pool.place(merging.row)[0], []).append(place)
        x = self.x.numpy()
        for block, places in blocks.items():
            models = self.pool.block(block).numpy()
            for begin in range(0, len(places), self._most):
                some = places[begin : begin + self._most]
                receivers = [merges[place].receiver for place in some]
                rows = [self.pool.place(merges[place].row)[1] for place in some]
                weights = [merges[place].weight for place in some]
                mergers = [self._mergers[receiver] for receiver in receivers]
                reports = take_places(mergers, Places(x, receivers, models, rows), weights)
                for place, receiver, report in zip(some, receivers, reports, strict=True):
                    found[place] = _told(report)
                    if report.applied:
                        self._moved(receiver)
        return found

    def _merge_rows(self, merges: Sequence[Merging]) -> list[MergeReport]:
        """The same, many at once."""
        found = [REFUSED] * len(merges)
        alike: dict[str, list[int]] = {}
        for place, each in enumerate(merges):
            alike.setdefault(each.encoding, []).append(place)
        for encoding, all_ in alike.items():
            form = form_of(encoding)
            for begin in range(0, len(all_), self._most):
                places = all_[begin : begin + self._most]
                receivers = torch.tensor([merges[place].receiver for place in places], device=self.x.device)
                own = self.x[receivers]
                models = self._incoming([merges[place].row for place in places], own, form)
                good = self._good(models)
                if not all(good):
                    places = [place for place, right in zip(places, good, strict=True) if right]
                    receivers, own, models = receivers[good], own[good], models[good]
                if not places:
                    continue
                mergers = [self._mergers[merges[place].receiver] for place in places]
                weights = [merges[place].weight for place in places]
                reports = take_rows(mergers, own, models, weights, form)
                self.x[receivers] = own
                for place, report in zip(places, reports, strict=True):
                    found[place] = report
                    if report.applied:
                        self._moved(merges[place].receiver, form.share)
        return found

    def _merge_one(self, merging: Merging, room: Any) -> MergeReport:
        """`room` (P,), an array, is anything afterwards; without one, the model is."""
        form, receiver = form_of(merging.encoding), merging.receiver
        own, model = self.x[receiver], self.pool.row(merging.row)
        if form.share < 1.0:
            model = self._incoming([merging.row], own[None], form)[0]
        if not self._good(model[None])[0]:
            return REFUSED
        report = self._mergers[receiver].take(own.numpy(), model.numpy(), merging.weight, form, room)
        if report.applied:
            self._moved(receiver, form.share)
        return report

    def merge_together(self, merges: Sequence[tuple[int, Sequence[tuple[int, str]]]]) -> list[list[MergeReport]]:
        """For each of these receivers rows and encodings of models, by a rule that compares them; a report for each."""
        found = self._helpers.do("merge together", merges)
        return [[MergeReport(*report) for report in reports] for reports in found]

    def _merge_together(self, merges: Sequence[tuple[int, Sequence[tuple[int, str]]]]) -> list[list[_Report]]:
        found = []
        for receiver, models in merges:
            own = self.x[receiver]
            read = [self._incoming([row], own[None], form_of(encoding))[0] for row, encoding in models]
            right = [self._good(model[None])[0] for model in read]
            good = [model for model, is_good in zip(read, right, strict=True) if is_good]
            reports = self._mergers[receiver].take_together(own, good)
            applied = sum(report.applied for report in reports)
            self._moved(receiver, 1.0, applied)
            left = iter(reports)
            found.append([_told(next(left) if is_good else REFUSED) for is_good in right])
        return found

    def _moved(self, receiver: int, share: float = 1.0, merges: int = 1) -> None:
        if merges and receiver in self._over_time:
            self._over_time[receiver].merged(self.x[receiver], share, merges)

    def _incoming(self, rows: Sequence[int], own: torch.Tensor, form: Form) -> torch.Tensor:
        """The models (N, P), new ones, that receivers with `own` (N, P) decode from these rows of the pool."""
        sent = self.pool.rows(rows)
        if form.share == 1.0:
            return sent
        if has_state(form):
            return torch.where(_is_sent(sent), sent, own)
        found: torch.Tensor = received(form, sent, own, exact=self._coordinates.buffers)
        return found

    def _good(self, models: torch.Tensor) -> list[bool]:
        """Which of (N, P) their receivers would not refuse for their values; only liars send others."""
        if not self._doubtful:
            return [True] * len(models)
        fine: list[bool] = (models.abs().amax(-1) <= MAX_MAGNITUDE).tolist()  # NaN compares false
        return fine


def _is_sent(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.int32) != NOT_SENT


def _told(report: MergeReport) -> _Report:
    return report.applied, report.reason, report.distance, report.fault


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
