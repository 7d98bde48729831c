"""A small trainer without torch: softmax regression on generated points, for whole daemons on virtual time.

It keeps to the `Trainer` interface and uses the same forms and the same merges as the real one, so that a
simulated peer differs from a real one in its model alone. Each step is charged virtual seconds. Left out: the
neighbourhood average (what is served is what is trained), and validation data apart from the test data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gossipml import codec
from gossipml.env import Env
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.averaging import Coordinates
from gossipml.models.compression import packed_size, parse_form, unpack_into
from gossipml.models.feedback import Outgoing
from gossipml.models.merge_rules import MergeRule, parse_merge
from gossipml.models.merger import Merger
from gossipml.models.merging import is_finite
from gossipml.models.trainer import Evaluation, Export, Layout, MergeReport, RoundReport

Vector = NDArray[np.float32]
MAX_STATE = 1 << 20
METADATA = "gossipml"  # as `gossipml.models.published`, which needs torch


@dataclass(frozen=True)
class Descent:
    """How the trainer descends: SGD as `torch.optim.SGD` without Nesterov."""

    batch: int = 16
    rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    steps: int = 0
    """That the learner takes for an epoch; 0: as many as the samples make."""
    seconds: float = 0.01
    """Virtual, that a step is charged."""


@dataclass(frozen=True)
class Points:
    """Labelled points: training data of one peer, and the test data that all peers share."""

    inputs: Vector  # (n, features)
    targets: NDArray[np.int64]  # (n,)
    test_inputs: Vector  # (t, features)
    test_targets: NDArray[np.int64]  # (t,)
    classes: int


def make_points(seed: int, peers: int, *, features: int = 8, classes: int = 5, each: int = 200) -> list[Points]:
    """A part for each peer of one problem: normal clouds around class centres, at most two classes a peer."""
    rng = np.random.Generator(np.random.PCG64(seed))
    centres = rng.normal(size=(classes, features)) * 1.5

    def draw(labels: NDArray[np.int64]) -> Vector:
        points = centres[labels] + rng.normal(size=(len(labels), features))
        return points.astype(np.float32)

    test_targets = np.arange(1000) % classes
    test_inputs = draw(test_targets)
    parts = []
    for peer in range(peers):
        targets = np.array([peer % classes, (peer + 1) % classes])[rng.integers(0, 2, each)]
        parts.append(Points(draw(targets), targets, test_inputs, test_targets, classes))
    return parts


class NumpyTrainer:
    """A `Trainer` on virtual time. With `train` false it only serves: of the points it looks at the shape alone."""

    def __init__(
        self,
        env: Env,
        points: Points,
        descent: Descent | None = None,
        *,
        train: bool = True,
        merge: MergeRule | None = None,
    ) -> None:
        features = points.inputs.shape[1]
        self._env = env
        self._points = points
        self._inputs = np.hstack([points.inputs, np.ones((len(points.inputs), 1), np.float32)])  # times bias, too
        self._descent = descent = descent or Descent()
        self._trains = train
        self._loaded = train
        self._shape = (features + 1, points.classes)
        size = (features + 1) * points.classes
        digest = hashlib.sha256(f"points/{features}/{points.classes}".encode()).hexdigest()
        self.layout = Layout("points", digest, size)
        self.steps_per_epoch = descent.steps or -(-len(points.targets) // descent.batch)
        self._x = np.zeros(size, np.float32)
        self._velocity = np.zeros(self._shape, np.float32)  # times batch
        self._merger = Merger(merge or parse_merge("clipping"), Coordinates(size, size))
        self._outgoing = Outgoing(self._x)
        self._rounds = 0
        self._rng = np.random.Generator(np.random.PCG64(env.rng.getrandbits(64)))

    async def train(self, steps: int, encoding: str = "") -> RoundReport:
        self._check_trains()
        self._rounds += 1
        self._merger.stepped()
        loss = await self._env.compute.run(self._steps, steps, cost=steps * self._descent.seconds)
        body = self._pack(encoding) if encoding else b""
        seconds = steps * self._descent.seconds
        return RoundReport(steps, steps * self._descent.batch, seconds, seconds, loss, body)

    async def snapshot(self, encoding: str) -> bytes:
        self._check_trains()
        return self._pack(encoding)

    def _pack(self, encoding: str) -> bytes:
        form = parse_form(encoding)
        body = bytearray(packed_size(form, len(self._x)))
        self._outgoing.pack_into(form, self._x, memoryview(body))
        return bytes(body)

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeReport:
        self._check_trains()
        try:
            form, incoming = parse_form(encoding), self._x.copy()
            unpack_into(form, update, incoming)
        except RemoteError as error:
            return MergeReport(False, str(error), 0.0, fault=True)
        return self._merger.take(self._x, incoming, weight, form)

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> list[MergeReport]:
        self._check_trains()
        reports: list[MergeReport | None] = []
        models = []
        for update, encoding in updates:
            incoming = self._x.copy()
            try:
                unpack_into(parse_form(encoding), update, incoming)
            except RemoteError as error:
                reports.append(MergeReport(False, str(error), 0.0, fault=True))
            else:
                reports.append(None)
                models.append(incoming)
        merged = iter(self._merger.take_together(self._x, models))
        return [report or next(merged) for report in reports]

    async def settle(self) -> None:
        """There is no average over time here."""
        self._merger.settle()

    async def evaluate(self) -> Evaluation | None:
        return self._evaluation(self._x) if self._trains else None

    async def export(self) -> Export:
        self._check_trains()
        weights = self._x.reshape(self._shape)
        tensors = {"weight": np.ascontiguousarray(weights[:-1].T), "bias": weights[-1].copy()}
        metadata = json.dumps({"digest": self.layout.digest, "model": self.layout.model})
        return Export(save(tensors, {METADATA: metadata}), self._evaluation(self._x))

    async def load(self, content: bytes) -> None:
        self._x[:] = self._read(content)
        self._is_another()
        self._loaded = True

    async def score(self, content: bytes) -> float | None:
        return self._evaluation(self._read(content)).validation_accuracy if self._trains else None

    async def predict(self, request: bytes) -> bytes:
        if not self._loaded:
            raise UserError("no version of 'points' has been loaded yet; ask again in a few seconds")
        try:
            points = np.array(json.loads(request), np.float32).reshape(-1, self._shape[0] - 1)
        except (ValueError, TypeError):
            raise UserError(f"the input is not a list of {self._shape[0] - 1} numbers") from None
        return json.dumps({"label": int(self._scores(points).argmax(1)[0])}).encode()

    async def save(self) -> bytes:
        self._check_trains()
        return codec.pack({"x": self._x.tobytes()})

    async def restore(self, state: bytes) -> None:
        self._check_trains()
        try:
            fields = codec.as_map(codec.unpack(state, limit=MAX_STATE))
            values = codec.get_bytes(fields, "x", size=self._x.nbytes, limit=MAX_STATE)
        except RemoteError as error:
            raise UserError(f"the state is not of this model: {error}") from None
        self._x[:] = np.frombuffer(values, np.float32)
        self._is_another()

    def _is_another(self) -> None:
        self._merger.forget()
        self._outgoing.begin(self._x)

    @property
    def rounds(self) -> int:
        """Calls of `train` so far."""
        return self._rounds

    @property
    def parameters(self) -> Vector:
        """A copy of the flat parameters, for the one who watches."""
        return self._x.copy()

    def _check_trains(self) -> None:
        if not self._trains:
            raise LocalError("this peer only serves (--no-train): it has no data and no optimiser")

    def _evaluation(self, x: Vector) -> Evaluation:
        scores = self._scores(self._points.test_inputs, x)
        targets = self._points.test_targets
        accuracy = int(np.count_nonzero(scores.argmax(1) == targets)) / len(targets)
        return Evaluation(accuracy, self._loss(scores, targets), accuracy, "local")

    def _read(self, content: bytes) -> Vector:
        """The flat parameters in the file of a version; UserError when they are not this model's."""
        features, classes = self._shape[0] - 1, self._shape[1]
        try:
            tensors = load(content)
            weight, bias = tensors["weight"], tensors["bias"]
            if weight.shape != (classes, features) or bias.shape != (classes,):
                raise ValueError(f"shapes {weight.shape} and {bias.shape}")
            values: Vector = np.concatenate([weight.T.reshape(-1), bias]).astype(np.float32)
            if not is_finite(values):
                raise ValueError("its values are not finite")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"the version cannot be used with 'points': {error}") from None
        return values

    def _steps(self, steps: int) -> float:
        """Mean loss of that many optimiser steps."""
        batches = self._rng.integers(0, len(self._points.targets), (steps, self._descent.batch))
        inputs, targets = self._inputs[batches], self._points.targets[batches]  # (steps, batch, ...)
        right = targets + self._shape[1] * np.arange(self._descent.batch)
        chosen = [self._step(*batch) for batch in zip(inputs, right, strict=True)]
        return float(-np.log(np.array(chosen) + 1e-12).mean())

    def _step(self, inputs: Vector, right: NDArray[np.int64]) -> Vector:
        """What the model gave, before the step, to the `right` class of each sample, a place in (batch, classes)."""
        descent, weights, velocity = self._descent, self._x.reshape(self._shape), self._velocity  # views
        gradient = _softmax(inputs @ weights)  # (batch, classes), times batch
        flat = gradient.reshape(-1)  # a view
        chosen: Vector = flat[right]
        flat[right] = chosen - 1
        if descent.momentum:
            velocity *= descent.momentum
            velocity += inputs.T @ gradient
        else:
            np.matmul(inputs.T, gradient, out=velocity)
        if descent.weight_decay:
            velocity += np.float32(descent.weight_decay * descent.batch) * weights
        weights -= np.float32(descent.rate / descent.batch) * velocity
        return chosen

    def _scores(self, inputs: Vector, x: Vector | None = None) -> Vector:
        weights = (self._x if x is None else x).reshape(self._shape)
        scores: Vector = inputs @ weights[:-1] + weights[-1]
        return scores

    @staticmethod
    def _loss(scores: Vector, targets: NDArray[np.int64]) -> float:
        return float(-np.log(_softmax(scores)[np.arange(len(targets)), targets] + 1e-12).mean())


def evaluate_all(x: Vector, points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracies and mean losses (N,) of the parameters x (N, P) on the test data."""
    features, classes = points.inputs.shape[1], points.classes
    weights = x.reshape(len(x), features + 1, classes)
    scores = points.test_inputs @ weights[:, :-1] + weights[:, -1:]  # (N, t, classes)
    right = scores.argmax(2) == points.test_targets
    shares = np.take_along_axis(_softmax(scores), points.test_targets[None, :, None], 2)[..., 0]  # (N, t)
    return right.mean(1, dtype=np.float64), -np.log(shares + 1e-12).mean(1, dtype=np.float64)


def _softmax(scores: Vector) -> Vector:
    """In place of the scores. Arrays are so small that whatever numpy does in Python counts."""
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=-1, keepdims=True)
    return scores
