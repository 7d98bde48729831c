"""The peer as its HTTP endpoint shows it: status, peers, probes, predictions, metrics, events."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager

import trio

from gossipml import __version__
from gossipml.api.broadcast import Broadcast
from gossipml.api.ports import (
    JSON,
    Event,
    Health,
    Metric,
    ModelCard,
    PredictAnswer,
    Prediction,
    PredictRequest,
)
from gossipml.config import PeerConfig
from gossipml.daemon.audit import Audit
from gossipml.daemon.cards import Cards
from gossipml.daemon.follower import Follower
from gossipml.daemon.history import History
from gossipml.daemon.learner import Progress
from gossipml.daemon.library import name_of
from gossipml.daemon.library_face import LibraryFace
from gossipml.daemon.metrics import metrics
from gossipml.daemon.node import Node
from gossipml.daemon.routing import Routing
from gossipml.daemon.serving import VERSION_DIGITS, Serving
from gossipml.errors import UserError
from gossipml.ids import format_peer_id
from gossipml.peer.wire import LINK_SIZE

NEWS_SECONDS = 2.0  # 100 bytes to each of eight neighbours: 0.4 kB a second


class Face:
    """Implements `gossipml.api.ports.Node` for a running `Node`."""

    def __init__(self, node: Node, config: PeerConfig, serving: Serving) -> None:
        self.node = node
        self.serving = serving
        self.config = config
        self.api = config.api
        """Where the endpoint listens, once it does."""
        self.events = Broadcast()
        self.library = LibraryFace(node)
        self.audit: Audit | None = None
        """Set where predictions are recorded."""
        self.routing: Routing | None = None
        """Set where other peers are asked for predictions."""
        self._cards = Cards(serving.models, self.card)
        self._history = History()
        self._begun = node.env.clock.now()

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
        if self.node.learner.progress.state == "averaging":
            return "training is over already; should it begin again, it is paused until `gossipml peer resume`"
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
            "data": self.serving.info.source if self.serving.info else config.data,
            "device": self.serving.info.device if self.serving.info else None,
            "workers": self.serving.info.workers if self.serving.info else None,
            "threads": self.serving.info.threads if self.serving.info else None,
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
        problems: list[JSON] = [*self.node.supervisor.problems(), *self._lacks()]
        mesh, gossip = self.node.mesh, self.node.gossip
        if 0 < len(mesh.links()) < gossip.config.stack:
            problems.append(
                f"the merge {self.config.merge} compares the models of {gossip.config.stack} neighbours at least, and "
                f"{len(mesh.links())} are connected: nothing is merged until there are more"
            )
        if not mesh.links():
            problems += [f"no session with {address}: {why}" for address, why in mesh.strangers.items()]
            refused = [info for info in mesh.neighbours() if info.state == "refused"]
            problems += [f"no session with {info.name}: {info.reason}" for info in refused]
        return problems

    def peers(self) -> list[dict[str, JSON]]:
        now, mesh = self.node.env.clock.now(), self.node.mesh
        infos = mesh.neighbours()
        own = self.node.credentials.identity.peer_id
        names = {peer[:LINK_SIZE]: format_peer_id(peer) for peer in (own, *(info.peer for info in infos))}
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
                "strike_reason": info.strike_reason,
                "quarantined_until": (
                    None
                    if info.quarantined_until is None
                    else self.node.env.clock.wall() + info.quarantined_until - now  # seconds since 1970
                ),
                "problem": info.reason,
                "learning": news.state if news else None,
                "round": news.round if news else None,
                "accuracy": news.accuracy if news else None,
                "loss": news.loss if news else None,
                "links": [names[link] for link in news.links if link in names] if news else [],
            }
            for info in infos
            for news in [mesh.news(info.peer)]
        ]

    async def tell_neighbours(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell our neighbours how we fare, until cancelled."""
        task_status.started()
        while True:
            progress = self.node.learner.progress
            accuracy = progress.evaluation.accuracy if progress.evaluation else None
            loss = progress.loss if progress.loss is not None and math.isfinite(progress.loss) else None
            self.node.mesh.tell(progress.state, progress.round, accuracy, loss)
            await trio.sleep(NEWS_SECONDS * self.node.env.rng.uniform(0.8, 1.2))

    # Probes

    def health(self) -> Health:
        problems = self.node.supervisor.problems()
        if problems:
            return Health(False, "; ".join(problems))
        return Health(True, "; ".join(["all parts of the peer are running", *self._lacks()]))

    def _lacks(self) -> list[str]:
        """What does not work, and keeps the peer from nothing else."""
        return [self.audit.problem] if self.audit is not None and self.audit.problem else []

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

    async def models(self, names: Iterable[str]) -> Sequence[ModelCard]:
        return await self._cards.of(names)

    async def card(self, model: str, version: str = "") -> ModelCard:
        return await (self.routing or self.serving).card(model, version)

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        return await (self.routing or self.serving).predict(model, request)

    async def load(self, model: str) -> None:
        await (self.routing.load(model) if self.routing else self.serving.warm(model))

    async def unload(self, model: str) -> None:
        if model == self._layout_name():
            raise UserError(f"{model} is what this peer was started for; stop the peer: `gossipml peer stop`")
        self.node.library.followed.discard(model)
        await self.serving.unload(model)

    def _version(self) -> str:
        """Names what answers: a published version, or the layout and how far its training has come."""
        learner = self.node.learner
        if isinstance(learner, Follower):
            return learner.version.version.hex()[:VERSION_DIGITS] if learner.version else ""
        return self.serving.live_version()

    def _layout_name(self) -> str:
        trainer = self.node.learner.trainer
        return trainer.layout.model if trainer is not None else self.config.model

    # Metrics

    def metrics(self) -> Sequence[Metric]:
        return metrics(self.node, self.audit, self.routing.stats if self.routing else None)
