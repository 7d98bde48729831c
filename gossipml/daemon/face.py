"""The peer as its HTTP endpoint shows it: status, peers, probes, predictions, metrics, events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gossipml import __version__
from gossipml.api.broadcast import Broadcast
from gossipml.api.ports import (
    JSON,
    CsvRow,
    Event,
    Fields,
    Health,
    JsonInput,
    Metric,
    ModelCard,
    NotReady,
    Overloaded,
    PredictAnswer,
    Prediction,
    PredictRequest,
    Tensor,
    TensorInputs,
    TensorSpec,
    UnknownModel,
)
from gossipml.config import PeerConfig
from gossipml.daemon.audit import Audit
from gossipml.daemon.follower import Follower
from gossipml.daemon.history import History
from gossipml.daemon.learner import Progress
from gossipml.daemon.library import name_of
from gossipml.daemon.library_face import LibraryFace
from gossipml.daemon.metrics import metrics
from gossipml.daemon.node import Node
from gossipml.errors import UserError
from gossipml.ids import format_peer_id

MAX_WAITING = 256  # predictions under way; each waits for the worker at most a batch
VERSION_DIGITS = 12  # of the digest, in the name of a version


@dataclass(frozen=True)
class About:
    """What the worker says of its model and data beside the layout."""

    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    features: tuple[str, ...] = ()
    picture: tuple[int, ...] = ()


class Face:
    """Implements `gossipml.api.ports.Node` for a running `Node`."""

    def __init__(self, node: Node, config: PeerConfig) -> None:
        self.node = node
        self.config = config
        self.api = config.api
        """Where the endpoint listens, once it does."""
        self.about: About | None = None
        """Known once the worker has loaded model and data."""
        self.events = Broadcast()
        self.library = LibraryFace(node)
        self.audit: Audit | None = None
        """Set where predictions are recorded."""
        self._history = History()
        self._begun = node.env.clock.now()
        self._waiting = 0

    # What happened

    def on_progress(self, progress: Progress) -> None:
        """To be told of each step of the learner."""
        self._history.add(self.node.env.clock.now() - self._begun, progress)
        data: dict[str, JSON] = {"state": progress.state, "round": progress.round, "loss": progress.loss}
        if progress.evaluation is not None:
            data["accuracy"] = progress.evaluation.accuracy
        self.events.publish(Event("round", data))

    def subscribe(self) -> AbstractContextManager[AsyncIterator[Event]]:
        return self.events.subscribe()

    def history(self) -> list[dict[str, JSON]]:
        return self._history.points()

    # Training

    async def pause(self) -> str:
        await self.node.pause()
        return "training is paused; averaging and answering go on"

    async def resume(self) -> str:
        left = await self.node.resume()
        return f"training stays paused: {left}" if left else "training goes on"

    # Status

    def status(self) -> dict[str, JSON]:
        node, config, progress = self.node, self.config, self.node.learner.progress
        evaluation, layout = progress.evaluation, self._layout_name()
        traffic = node.mesh.stats.traffic
        return {
            "name": node.config.name,
            "peer": format_peer_id(node.credentials.identity.peer_id),
            "trains": node.config.trains,
            "network": node.credentials.keys.network_id.hex(),
            "gossipml": __version__,
            "state": progress.state,
            "sentence": self.readiness().sentence,
            "paused": progress.paused or None,
            "model": layout,
            "version": self._version(),
            "data": self.about.source if self.about else config.data,
            "split": config.split,
            "part": f"{config.part[0]}/{config.part[1]}",
            "round": progress.round,
            "age": node.gossip.age,
            "samples": progress.samples,
            "training_seconds": progress.seconds,
            "loss": progress.loss,
            "accuracy": evaluation.accuracy if evaluation else None,
            "validation_accuracy": evaluation.validation_accuracy if evaluation else None,
            "served": evaluation.served if evaluation else None,
            "neighbours": len(node.mesh.links()),
            "members": len(node.view),
            "accepted": node.mesh.stats.sessions_accepted,
            "lan": node.lan.status() if node.lan else None,  # type: ignore[dict-item]  # JSON-able values
            "stored": node.library.store.used,
            "versions": len(node.library.store.versions()),
            "bytes_sent": traffic.sent,
            "bytes_received": traffic.received,
            "addresses": [str(address) for address in node.addresses],
            "api": str(self.api),
            "uptime": node.env.clock.now() - self._begun,
            "problems": self._problems(),
        }

    def _problems(self) -> list[JSON]:
        """What a person should know: parts that keep crashing, and, while alone, who turned us away."""
        problems: list[JSON] = [*self.node.supervisor.problems()]
        mesh = self.node.mesh
        if not mesh.links():
            problems += [f"no session with {address}: {why}" for address, why in mesh.strangers.items()]
            refused = [info for info in mesh.neighbours() if info.state == "refused"]
            problems += [f"no session with {info.name}: {info.reason}" for info in refused]
        return problems

    def peers(self) -> list[dict[str, JSON]]:
        now = self.node.env.clock.now()
        return [
            {
                "name": info.name,
                "peer": format_peer_id(info.peer),
                "state": info.state,
                "model": info.model,
                "address": str(info.address) if info.address else "",
                "age": info.age,
                "bytes_sent": info.bytes_sent,
                "bytes_received": info.bytes_received,
                "last_seen": None if info.last_seen is None else now - info.last_seen,
                "strikes": info.strikes,
                "problem": info.reason,
            }
            for info in self.node.mesh.neighbours()
        ]

    # Probes

    def health(self) -> Health:
        problems = self.node.supervisor.problems()
        if problems:
            return Health(False, "; ".join(problems))
        return Health(True, "all parts of the peer are running")

    def readiness(self) -> Health:
        progress, part = self.node.learner.progress, self.node.supervisor.parts.get("learner")
        if part is not None and part.problem and self.node.learner.trainer is None:
            return Health(False, f"the learner is not running: {part.problem}")
        if self.node.learner.trainer is None:
            return Health(False, "the peer is loading its model and data; ask again in a few seconds")
        if isinstance(self.node.learner, Follower):
            return self._serving(self.node.learner)
        if progress.state == "paused":
            if self.node.gossip.age <= 0:
                return Health(False, f"paused: {progress.paused}; nothing is trained yet, and no model heard of")
            return Health(True, f"paused: {progress.paused}; averaging and answering go on")
        if self.node.gossip.age <= 0:
            return Health(False, "the peer has trained nothing yet and heard of no model; ask again in a few seconds")
        if progress.state == "averaging":
            return Health(True, "training is over; averaging with the neighbours goes on")
        return Health(True, f"training, round {progress.round}")

    def _serving(self, follower: Follower) -> Health:
        if follower.version is not None:
            return Health(True, f"serving version {follower.version.height}, {name_of(follower.version)}")
        model = self._layout_name()
        return Health(
            False, f"this peer does not train, and no version of {model} has come yet; start a peer that trains it"
        )

    # Models and predictions

    def record(self, prediction: Prediction) -> None:
        if self.audit is not None:
            self.audit.record(prediction)

    def models(self) -> Sequence[ModelCard]:
        trainer, about = self.node.learner.trainer, self.about
        if trainer is None or about is None:
            return []
        ready = self.readiness()
        return [
            ModelCard(
                name=trainer.layout.model,
                version=self._version() if ready.ok else "",
                platform="gossipml_torch",
                inputs=about.inputs,
                outputs=about.outputs,
                ready=ready.ok,
                reason="" if ready.ok else ready.sentence,
                labels=about.labels,
                features=about.features,
                picture=about.picture,
            )
        ]

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        trainer, ready = self.node.learner.trainer, self.readiness()
        if trainer is None or not ready.ok:
            raise NotReady(ready.sentence)
        version = self._version()
        if request.version and request.version != version:
            raise UnknownModel(f"{model} has no version {request.version!r} here; it serves {version!r}")
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} predictions are under way, the most that may; ask again in a second")
        self._waiting += 1
        try:
            answer = json.loads(await trainer.predict(_as_json(request)))
        finally:
            self._waiting -= 1
        peer = format_peer_id(self.node.credentials.identity.peer_id)
        if isinstance(request.payload, TensorInputs):
            return PredictAnswer(version, peer, outputs=tuple(_tensor(output) for output in answer["outputs"]))
        return PredictAnswer(version, peer, result=answer)

    def _version(self) -> str:
        """Names what answers: a published version, or the layout and how far its training has come."""
        learner, trainer = self.node.learner, self.node.learner.trainer
        if isinstance(learner, Follower):
            return learner.version.version.hex()[:VERSION_DIGITS] if learner.version else ""
        if trainer is None:
            return ""
        return f"{trainer.layout.digest[:VERSION_DIGITS]}-{self.node.learner.progress.round}"

    def _layout_name(self) -> str:
        trainer = self.node.learner.trainer
        return trainer.layout.model if trainer is not None else self.config.model

    # Metrics

    def metrics(self) -> Sequence[Metric]:
        return metrics(self.node, self.audit)


def _as_json(request: PredictRequest) -> bytes:
    """The request in the forms of `gossipml.models.predict`."""
    value: object
    match request.payload:
        case Fields(values):
            value = values
        case JsonInput(value):
            pass
        case CsvRow(text):
            value = _csv_values(text)
        case TensorInputs(inputs, outputs):
            value = {
                "inputs": [
                    {"name": t.name, "datatype": t.datatype, "shape": list(t.shape), "data": list(t.data)}
                    for t in inputs
                ]
            }
            if outputs:
                value["outputs"] = [{"name": name} for name in outputs]
    return json.dumps(value).encode()


def _csv_values(text: str) -> list[float]:
    try:
        return [float(cell) for cell in text.split(",")]
    except ValueError:
        raise UserError(f"the CSV row {text[:60]!r} is not numbers with commas between them") from None


def _tensor(output: dict[str, object]) -> Tensor:
    """An output as the worker gives it; our own words, so no checks."""
    shape, data = output["shape"], output["data"]
    assert isinstance(shape, list) and isinstance(data, list)
    return Tensor(str(output["name"]), str(output["datatype"]), tuple(shape), tuple(data))
