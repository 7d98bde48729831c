"""Trains one model on one peer's data: local steps, merges of neighbours' parameters, evaluation, prediction.

The training loop reads top to bottom in `step`. Everything here blocks; the worker process calls it between
two looks at its commands.

Beside the parameters x there is their average over time (`over_time`). It is served, unless x does better on local
validation data by more than the local classes explain: by the share of local samples that would need another class to
make the part as even as the test part. (Measured with 4 peers, mnist-mlp, labels:4, learning rate 0.05, 30 rounds of 50
steps: test accuracy of x 0.853, of this average 0.953; serving whichever is better on the local validation share, which
knows only local classes, chose x half of the time: 0.887.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gossipml.errors import RemoteError, UserError
from gossipml.models import published, state
from gossipml.models.averaging import coordinates_of
from gossipml.models.batches import Samples, ShuffledOrder
from gossipml.models.compression import Form, packed_size, parse_form, unpack_into
from gossipml.models.crew import hire
from gossipml.models.dataset import LocalData, Targets
from gossipml.models.feedback import Outgoing
from gossipml.models.flat import build_flat
from gossipml.models.kernels_split import Choice, Split, choose_split, make_steps
from gossipml.models.merger import Merger
from gossipml.models.optimise import FlatSgd, OuterStep, TorchOptimiser, make_optimiser
from gossipml.models.over_time import OverTime
from gossipml.models.predict import Forward
from gossipml.models.serving import Answering
from gossipml.models.spec import Spec
from gossipml.models.trainer import Evaluation, Export, Layout, MergeReport
from gossipml.models.tuning import Tuning

T = TypeVar("T")
Body: TypeAlias = bytes | bytearray | memoryview

ALONE_ROUNDS = 3  # without a merge, and the average is of our own rounds: then no class is favoured
EVALUATION_CHUNK = 256  # samples: 1 to 2 ms for 784-100-10, so that commands never wait long


class LocalTrainer:
    """A model, its optimiser and its data. Not thread-safe."""

    def __init__(
        self,
        spec: Spec,
        data: LocalData,
        *,
        network_id: bytes,
        seed: int,
        device: torch.device | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self._tuning = tuning = tuning or Tuning()
        self._device = device or torch.device("cpu")
        self.spec = spec
        self._flat, self.layout = build_flat(spec, network_id, self._device)
        vector = self._flat.vector
        self._over_time = OverTime(vector.clone())
        self._answering = Answering(spec, self._flat, self._device)
        self._moving = make_optimiser(self._flat, spec, tuning)
        self._outer = OuterStep(tuning.outer, vector[: self._flat.parameter_count]) if tuning.outer else None
        self._train = Samples(spec, data.train, self._device)
        self._validation = Samples(spec, data.validation, self._device)
        self._test = Samples(spec, data.test, self._device)
        self._order = ShuffledOrder(len(self._train), tuning.batch or spec.batch, seed)
        self._steps = make_steps(spec, self._flat, self._moving, self._train)
        self._unevenness = _distance_of_classes(data.train.targets, data.test.targets)
        self._incoming = np.empty(self.layout.size, dtype=np.float32)
        self._merger = Merger(tuning.merge, coordinates_of(self._flat.module))
        self._outgoing = Outgoing(vector.cpu().numpy(), exact=self.layout.buffers)
        self._serve_average = True
        self._rounds_alone = ALONE_ROUNDS
        self.steps = 0
        self._loss = torch.zeros(1, device=self._device)
        self._loss_steps = 0
        # Draws of the model while it trains (dropout) come from torch's global generator.
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"train {seed}".encode()).digest()[:8], "big") >> 1)
        self._flat.module.train()

    layout: Layout

    def use_cores(self, threads: int, workers: int = 0) -> tuple[Split, dict[Split, float]]:
        """Trains with so many threads from now on, and says how; 0 workers: as is fastest here, which takes a second
        to find out where there is a choice: the seconds of a step for each way that was tried. UserError when the model
        cannot be trained by more than one worker."""
        choice = Choice(Split(workers or 1, max(1, threads // (workers or 1))), None, {})
        if workers > 1:
            choice = replace(choice, crew=hire(workers - 1, choice.split.threads))
        elif not workers and self.on_cpu:
            choice = choose_split(self.spec, self._flat, self._train, self._order.batch, threads, self._tuning)
        self._steps.settle(optimiser=True)
        torch.set_num_threads(choice.split.threads)
        self._steps = make_steps(self.spec, self._flat, self._moving, self._train, choice.crew)
        return choice.split, choice.seconds

    @property
    def _x(self) -> torch.Tensor:
        """The parameters (size,), to be read and changed between two steps."""
        self._steps.settle()
        return self._flat.vector

    @property
    def _optimiser(self) -> FlatSgd | TorchOptimiser:
        """With its state, to be read and changed between two steps."""
        self._steps.settle(optimiser=True)
        return self._moving

    # Training

    def begin_round(self) -> None:
        """Call before the first step of a round."""
        if self._outer is not None and self.steps and math.isfinite(float(self._x.sum())):
            self._outer.step()
        if self.steps and self._rounds_alone and math.isfinite(float(self._x.sum())):
            self._over_time.alone(self._x)
        self._rounds_alone += 1

    def step(self) -> None:
        """One optimiser step on the next batch."""
        self._loss += self._steps.take(self._order.next_indices(), self._order.coming())
        self._loss_steps += 1
        self.steps += 1
        self._over_time.stepped()
        self._merger.stepped()

    def end_round(self) -> float:
        """The mean loss of the round's steps.

        UserError when the model replaced its parameters, and when training diverged; the parameters are then the
        average again and the optimiser is new, so that the next round, and what neighbours send, can mend it.
        """
        loss = float(self._loss) / max(1, self._loss_steps)
        self.drop_round()
        self._flat.check_parameters()
        if not math.isfinite(loss) or not math.isfinite(float(self._x.sum())):
            self._x.copy_(self._average)
            self._optimiser.reset()
            if self._outer is not None:
                self._outer.reset()
            raise UserError(
                f"training of {self.spec.name!r} diverged (its loss is {loss}); the parameters were put back to their "
                "average. If it happens again, lower the learning rate (--learning-rate)"
            )
        return loss

    def drop_round(self) -> None:
        """Forgets the loss of a round that did not end."""
        self._loss.zero_()
        self._loss_steps = 0

    @property
    def on_cpu(self) -> bool:
        return self._device.type == "cpu"

    @property
    def batch(self) -> int:
        """Samples per step."""
        return self._order.batch

    @property
    def sample_counts(self) -> dict[str, int]:
        return {"train": len(self._train), "validation": len(self._validation), "test": len(self._test)}

    # Exchange

    def snapshot_into(self, encoding: str, out: memoryview) -> int:
        """Writes the encoded parameters; how many bytes."""
        return self._outgoing.pack_into(parse_form(encoding), self._x.cpu().numpy(), out)

    def snapshot_size(self, encoding: str) -> int:
        return packed_size(parse_form(encoding), self.layout.size, self.layout.buffers)

    def snapshot(self, encoding: str) -> bytes:
        out = bytearray(self.snapshot_size(encoding))
        self.snapshot_into(encoding, memoryview(out))
        return bytes(out)

    def merge(self, update: Body, encoding: str, weight: float) -> MergeReport:
        """x <- (1 - weight) x + weight m by the rule (`merger`), or the reason why not."""
        try:
            form = parse_form(encoding)
            self._read_body(form, update, self._incoming)
        except RemoteError as error:
            return MergeReport(False, str(error), 0.0, fault=True)
        incoming = torch.from_numpy(self._incoming).to(self._device)
        report = self._merger.take(self._x, incoming, weight, form)
        if report.applied:
            self._moved(form.share)
        return report

    def merge_together(self, updates: Sequence[tuple[Body, str]]) -> list[MergeReport]:
        """One merge of all of them, as the rule says; a report for each."""
        read: list[MergeReport | None] = []
        models: list[torch.Tensor] = []
        for update, encoding in updates:
            incoming = np.empty(self.layout.size, dtype=np.float32)
            try:
                self._read_body(parse_form(encoding), update, incoming)
            except RemoteError as error:
                read.append(MergeReport(False, str(error), 0.0, fault=True))
            else:
                read.append(None)
                models.append(torch.from_numpy(incoming).to(self._device))
        merged = iter(self._merger.take_together(self._x, models))
        reports = [report or next(merged) for report in read]
        merges = sum(report.applied for report in reports)
        self._moved(1.0, merges)
        return reports

    def settle(self) -> None:
        """Nobody around trains any more: x becomes the average, for neighbours to agree on."""
        self._over_time.settle(self._x)
        self._merger.settle()
        if self._outer is not None:
            self._outer.reset()

    def _read_body(self, form: Form, body: Body, out: NDArray[np.float32]) -> None:
        """The model of a body; where it holds nothing, our own. RemoteError when it is none."""
        if form.share < 1.0:
            out[:] = self._x.cpu().numpy()
        unpack_into(form, body, out, exact=self.layout.buffers)

    def _moved(self, share: float, merges: int = 1) -> None:
        """There were merges of models of which the bodies hold that share."""
        if merges:
            self._rounds_alone = 0
            self._over_time.merged(self._x, share, merges)

    # Evaluation and prediction

    def evaluate(self) -> Evaluation:
        """See `evaluating`; all at once."""
        return _finish(self.evaluating())

    def evaluating(self) -> Generator[None, None, Evaluation]:
        """Chooses what is served and measures it, yielding between chunks; training may go on meanwhile."""
        evaluation, _ = yield from self.choosing()
        return evaluation

    def choosing(self) -> Generator[None, None, tuple[Evaluation, torch.Tensor]]:
        """The same, and the parameters (size,) that were measured: a copy."""
        local, average = self._x.clone(), self._average.clone()
        alone = self._rounds_alone >= ALONE_ROUNDS
        local_score, _ = yield from self._score(local, self._validation)
        average_score, _ = yield from self._score(average, self._validation)
        margin = 0.0 if alone else self._unevenness
        serve_average = not local_score > average_score + margin
        chosen = average if serve_average else local
        accuracy, loss = yield from self._score(chosen, self._test)
        self._serve_average = serve_average
        score = average_score if serve_average else local_score
        return Evaluation(accuracy, loss, score, "average" if serve_average else "local"), chosen

    def scoring(self, vector: torch.Tensor) -> Generator[None, None, float]:
        """Accuracy of other parameters, as `read` gives them, on the local validation data."""
        accuracy, _ = yield from self._score(vector, self._validation)
        return accuracy

    def _score(self, vector: torch.Tensor, samples: Samples) -> Generator[None, None, tuple[float, float]]:
        """Accuracy and mean loss of the parameters in `vector`."""
        accuracy = loss = 0.0
        for start in range(0, len(samples), EVALUATION_CHUNK):
            inputs, targets = samples.between(start, start + EVALUATION_CHUNK)
            with self._answering.holding(vector) as module:
                outputs = module(inputs)
                accuracy += self.spec.metrics(outputs, targets)["accuracy"] * len(targets)
                loss += float(self.spec.loss(outputs, targets)) * len(targets)
            yield
        mean_loss = loss / len(samples)
        return accuracy / len(samples), mean_loss if math.isfinite(mean_loss) else 1e30

    def forward(self) -> Forward:
        """The model with the served parameters."""
        return self._answering.forward(self._served)

    def pack_served(self) -> bytes:
        """The file of a version with the served parameters."""
        return self.pack(self._served)

    @property
    def _average(self) -> torch.Tensor:
        return self._over_time.vector

    @property
    def _served(self) -> torch.Tensor:
        return self._average if self._serve_average else self._x

    # Published versions

    def pack(self, vector: torch.Tensor) -> bytes:
        """Parameters as the file of a version (see `published`)."""
        return published.pack(self._flat.named(vector), self.layout)

    def read(self, content: bytes) -> torch.Tensor:
        """The parameters (size,) in the file of a version. UserError when they are not this model's or not finite."""
        return self._answering.read(content)

    def export(self) -> Export:
        """`choosing` and `pack`, all at once."""
        evaluation, chosen = _finish(self.choosing())
        return Export(self.pack(chosen), evaluation)

    def load(self, content: bytes) -> None:
        """Adopt a version: it is what the neighbourhood agreed on, and what our steps start from now."""
        vector = self.read(content)
        self._x.copy_(vector)
        self._over_time.begin(vector)
        self._optimiser.reset()
        self._is_another()
        self._serve_average = True
        self._rounds_alone = 0

    def score(self, content: bytes) -> float:
        """`scoring` of `read`, all at once."""
        return _finish(self.scoring(self.read(content)))

    # Going on later

    def save(self) -> bytes:
        """Everything needed to go on bit for bit, as a safetensors file (see `state`)."""
        tensors, optimiser = self._optimiser.save()
        return state.pack(
            {
                "parameters": self._x,
                "average": self._average,
                "torch_generator": torch.get_rng_state(),
                **tensors,
                **(self._outer.save() if self._outer is not None else {}),
            },
            state.Progress(
                digest=self.layout.digest,
                model=self.layout.model,
                steps=self.steps,
                serve_average=self._serve_average,
                averaged=self._over_time.seen,
                rounds_alone=self._rounds_alone,
                order=self._order.save(),
                optimiser=optimiser,
                optimiser_kind=self._optimiser.kind,
            ),
        )

    def restore(self, data: bytes) -> None:
        """Undo of `save`. UserError when it is damaged or of another model; then nothing is changed."""
        tensors, progress = state.unpack(data, self.layout)
        order = ShuffledOrder(len(self._train), self._order.batch, 0)
        try:
            order.restore(progress.order)
            generator, before = torch.get_rng_state(), self._optimiser.save()
            try:
                torch.set_rng_state(tensors["torch_generator"])
                if progress.optimiser_kind == self._optimiser.kind:
                    self._optimiser.restore(tensors, progress.optimiser)
                else:  # its user chose another one: the parameters are good all the same
                    self._optimiser.reset()
            except Exception:
                torch.set_rng_state(generator)
                self._optimiser.restore(*before)
                raise
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"the saved state of {self.layout.model!r} does not fit this model or data ({error}); remove the file "
                "to start from the beginning"
            ) from None
        self._order = order
        self._x.copy_(tensors["parameters"])
        self._over_time.begin(tensors["average"], progress.averaged)
        self._is_another()
        if self._outer is not None:
            self._outer.restore(tensors)
        self._serve_average = progress.serve_average
        self._rounds_alone = progress.rounds_alone
        self.steps = progress.steps

    def _is_another(self) -> None:
        """The parameters are not what they were: nothing that was learnt of neighbours, or sent, speaks of them."""
        if self._outer is not None:
            self._outer.reset()
        self._merger.forget()
        self._outgoing.begin(self._x.cpu().numpy())


def _finish(job: Generator[None, None, T]) -> T:
    """Runs the job to its end: its result."""
    while True:
        try:
            next(job)
        except StopIteration as done:
            result: T = done.value
            return result


def _distance_of_classes(local: Targets, common: Targets) -> float:
    """Total variation distance between the shares of the classes, 0 to 1; 0 where targets are values."""
    if local.dtype.kind == "f":
        return 0.0
    local, common = local.astype(np.int64), common.astype(np.int64)
    count = int(max(local.max(), common.max())) + 1
    ours, all_of_them = (np.bincount(targets, minlength=count) / len(targets) for targets in (local, common))
    return float(np.abs(ours - all_of_them).sum() / 2)
