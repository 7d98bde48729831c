"""Predictions of this peer: which process answers for which model and version.

Any version that is whole in the store answers, loaded when it is first asked for, in a predicting process that starts
with the first need. Where the client names no version, the model in training answers with what its trainer serves now:
the training process itself while such predictions are rare, a copy in the predicting process, renewed every few
seconds, when they are not. Other models answer with their newest version; while that is loaded, the one before it goes
on answering, so that a new version drops no request. Why it is so: docs/decisions/0008.

One prediction is answered by one version, which the answer names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import trio

from gossipml.api.ports import ModelCard, NotReady, Overloaded, PredictAnswer, PredictRequest, TensorSpec, UnknownModel
from gossipml.config import PeerConfig
from gossipml.daemon.channel import WorkerDied
from gossipml.daemon.follower import Follower
from gossipml.daemon.node import Node
from gossipml.daemon.serving_memory import Memory, Wanted
from gossipml.daemon.worker import Asked, Described, Predictor, WorkerInfo, WorkerTrainer
from gossipml.errors import UserError
from gossipml.ids import format_peer_id
from gossipml.models.builtin import BUILTIN
from gossipml.models.manifest import Manifest
from gossipml.models.registry import model_names, nearest
from gossipml.models.spec import adapts, picture_shape
from gossipml.models.store_rules import choose

log = logging.getLogger("gossipml.serving")

VERSION_DIGITS = 12  # of an id, in the name of a version
MAX_WAITING = 1024  # predictions under way, of all models: half a second's work of a small one
RARE = 16  # predictions that the training process answers before the predicting process is started for its model
COPY_SECONDS = 2.0  # between two copies of the model in training, while it is asked for
COPY_SHARE = 50  # a copy that took long is renewed so many times less often: 2 % of the time
IDLE_SECONDS = 600.0  # without a prediction, and the predicting process ends: it takes 250 MB
PLATFORM = "gossipml_torch"


@dataclass(frozen=True)
class _Copy:
    """Of the model in training, in the predicting process."""

    memory: Memory
    key: str
    version: str
    taken: float
    good_until: float


class Serving:
    """The predictions of a running `Node`; `run` is a part of the daemon."""

    def __init__(
        self, node: Node, config: PeerConfig, open_predictor: Callable[[], AbstractAsyncContextManager[Predictor]]
    ) -> None:
        self._node = node
        self._config = config
        self._open_predictor = open_predictor
        self.info: WorkerInfo | None = None
        """What the worker says of its model, once it has loaded it."""
        self._waiting = 0
        self._live_asked = 0
        self._last = 0.0  # when something was asked last
        self._nursery: trio.Nursery | None = None
        self._needed = trio.Event()
        self._memory: Memory | None = None
        self._up = trio.Event()
        self._copy: _Copy | None = None
        self._copying = False
        self._seen = trio.Event()  # the library's `changed` at which `_newest` was right
        self._newest: dict[str, list[Manifest]] = {}

    # The predicting process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the predicting process whenever it is needed. Raises WorkerDied when it dies."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    await self._needed.wait()
                    async with self._open_predictor() as predictor:
                        self._memory = Memory(predictor, nursery)
                        self._up.set()
                        log.info("the predicting process runs")
                        with trio.CancelScope() as scope:
                            nursery.start_soon(self._end_when_idle, scope)
                            await predictor.channel.wait_for_death()
                        self._forget_memory()
            finally:
                self._nursery = None
                self._forget_memory()

    async def _end_when_idle(self, scope: trio.CancelScope) -> None:
        while self._waiting or self._now() - self._last < IDLE_SECONDS:
            await trio.sleep(IDLE_SECONDS / 10)
        log.info("the predicting process ends: nothing was asked for %.0f minutes", IDLE_SECONDS / 60)
        self._needed = trio.Event()
        self._live_asked = 0
        scope.cancel()

    def _forget_memory(self) -> None:
        self._memory = self._copy = None
        self._up = trio.Event()

    async def _hosting(self) -> Memory:
        """Where versions are hosted; waits for the process to start. NotReady when there can be none now."""
        self._last = self._now()  # or else a process that starts for something else than a prediction ends at once
        if self._nursery is None:
            raise NotReady("predictions are starting; ask again in a moment", 1)
        learner = self._node.learner
        if isinstance(learner, Follower):  # its process trains nothing: it predicts
            trainer = learner.trainer
            if not isinstance(trainer, WorkerTrainer):
                raise NotReady("the peer is loading its model; ask again in a few seconds", 2)
            if self._memory is None or self._memory.predictor is not trainer:
                self._memory = Memory(trainer, self._nursery)
            return self._memory
        self._needed.set()
        while self._memory is None:
            await self._up.wait()
        return self._memory

    # Predictions

    @property
    def waiting(self) -> int:
        """Predictions under way."""
        return self._waiting

    def has(self, model: str) -> bool:
        """Whether a version of it is here, or it is in training here."""
        return model == self._own_name() or bool(self._stored(model))

    def could_have(self, model: str) -> bool:
        """Whether a version of it would be answered for here, were it here."""
        return model in model_names() and not _adapts(model)

    async def warm(self, model: str) -> None:
        """Load the newest version of it that is here, before it is asked for. Raises as `predict` does."""
        memory = await self._hosting()
        await memory.load(self._wanted(self._versions(model, "")[0]))

    async def unload(self, model: str) -> None:
        """Forget its versions until they are asked for again."""
        if self._memory is not None:
            await self._memory.drop_model(model)

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        """See `gossipml.api.ports.Node.predict`."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} predictions are under way, the most that may; ask again in a second")
        self._waiting += 1
        self._last = self._now()
        try:
            if self._is_live(model, request.version):
                return await self._predict_live(model, request)
            memory, wanted = await self._loaded(model, request.version)
            return await self._ask(memory.predictor, wanted.key, model, wanted.version, request)
        except WorkerDied as error:
            raise NotReady(f"{error}; it starts again, ask again in a few seconds", 3) from None
        finally:
            self._waiting -= 1

    async def _loaded(self, model: str, version: str) -> tuple[Memory, Wanted]:
        """The version that is to answer, in memory."""
        choice = [self._wanted(one) for one in self._versions(model, version)]
        memory = await self._hosting()
        if not version:
            choice = [wanted for wanted in choice if not memory.problem(wanted)] or choice
            newest = choice[0]
            older = next((wanted for wanted in choice if wanted in memory), None)
            if older is not None and newest not in memory:
                memory.begin(newest)
                return memory, older
        await memory.load(choice[0])
        return memory, choice[0]

    async def _predict_live(self, model: str, request: PredictRequest) -> PredictAnswer:
        trainer = self._node.learner.trainer
        if not isinstance(trainer, WorkerTrainer):
            raise NotReady("the peer is loading its model and data; ask again in a few seconds")
        copy = self._good_copy(trainer)
        if copy is not None and request.version in ("", copy.version):
            return await self._ask(copy.memory.predictor, copy.key, model, copy.version, request)
        return await self._ask(trainer, "", model, self.live_version(), request)

    async def _ask(
        self, predictor: Predictor, key: str, model: str, version: str, request: PredictRequest
    ) -> PredictAnswer:
        peer = format_peer_id(self._node.credentials.identity.peer_id)
        until = self._now() + request.seconds
        asked = Asked(request.form, request.body, request.json_size, model, version, peer, until)
        body, json_size = await predictor.answer(key, asked)
        return PredictAnswer(version, peer, body, json_size)

    # The model in training

    def live_version(self) -> str:
        """The name of the parameters that are served while they train; empty without any."""
        trainer = self._node.learner.trainer
        if isinstance(self._node.learner, Follower) or trainer is None or self._node.gossip.age <= 0:
            return ""
        return f"{trainer.layout.digest[:VERSION_DIGITS]}-{self._node.learner.progress.round}"

    def _is_live(self, model: str, version: str) -> bool:
        trainer = self._node.learner.trainer
        if isinstance(self._node.learner, Follower) or trainer is None or trainer.layout.model != model:
            return False
        if version:
            return version in (self.live_version(), self._copy.version if self._copy else "")
        return bool(self.live_version())

    def _good_copy(self, trainer: WorkerTrainer) -> _Copy | None:
        """The copy in the predicting process, once there is one; sees to it that there is one when it is worth it."""
        self._live_asked += 1
        memory, nursery = self._memory, self._nursery
        if memory is None:
            if self._live_asked > RARE:
                self._needed.set()
            return None
        copy = self._copy if self._copy is not None and self._copy.memory is memory else None
        if nursery is not None and not self._copying and (copy is None or self._now() >= copy.good_until):
            self._copying = True
            nursery.start_soon(self._renew_copy, trainer, memory, copy)
        return copy

    async def _renew_copy(self, trainer: WorkerTrainer, memory: Memory, old: _Copy | None) -> None:
        begun, version = self._now(), self.live_version()
        key = f"copy of {begun}"
        try:
            info = trainer.info
            await memory.predictor.host(key, self._config.model, info.source, await trainer.served())
            took = self._now() - begun
            self._copy = _Copy(memory, key, version, begun, begun + max(COPY_SECONDS, COPY_SHARE * took))
            if old is not None:
                await memory.predictor.drop(old.key)
        except (UserError, WorkerDied) as error:
            log.warning("the model in training could not be copied for predictions: %s", error)
        finally:
            self._copying = False

    # What there is

    def models(self) -> list[ModelCard]:
        """Those of this peer's memory and disk, the one of its own first."""
        own = self._own_name()
        names = dict.fromkeys([*([own] if own else []), *(one.name for one in self._node.library.store.versions())])
        return [self._known_card(name) for name in names]

    async def card(self, model: str, version: str = "") -> ModelCard:
        """A model with its inputs and outputs, loaded when these are not known otherwise."""
        if self._is_live(model, version):
            card = self._known_card(model)
            return card if not version else _only(card, version)
        found = self._versions(model, version)
        card = self._known_card(model)
        if not card.inputs and card.ready:
            memory = await self._hosting()
            card = _described(card, await memory.load(self._wanted(found[0])))
        return _only(card, _digits(found[0])) if version else card

    def _known_card(self, model: str) -> ModelCard:
        own = model == self._own_name()
        stored = [_digits(one) for one in self._stored(model)]
        live = self.live_version() if own else ""
        versions = (*([live] if live else []), *stored)
        described = self.info.described if own and self.info is not None else _built_in(model)
        reason = "" if versions else f"no version of {model} has come yet, and nothing is trained; ask again later"
        if versions and not own and described is None and model not in model_names():
            reason = f"no model {model!r} is installed on this peer, so that only its file is kept here"
        if versions and not own and _adapts(model):
            reason = f"the model {model!r} takes its shape from data that are not on this peer"
        empty = described or Described((), (), (), (), ())
        return ModelCard(
            model, versions[0] if versions and not reason else "", PLATFORM, empty.inputs, empty.outputs,
            ready=not reason, reason=reason, labels=empty.labels, features=empty.features, picture=empty.picture,
            versions=versions,
        )  # fmt: skip

    def _own_name(self) -> str:
        trainer = self._node.learner.trainer
        return trainer.layout.model if trainer is not None else ""

    def _stored(self, model: str) -> list[Manifest]:
        """The versions that are whole here, newest first. Looked up once for each change of the library."""
        library = self._node.library
        if self._seen is not library.changed:
            self._seen, self._newest = library.changed, {}
        if model not in self._newest:
            self._newest[model] = library.store.versions(model)
        return self._newest[model]

    def _versions(self, model: str, version: str) -> list[Manifest]:
        """Those that may answer, newest first. UnknownModel when there are none here, NotReady when there will be."""
        stored = self._stored(model)
        if not stored and model == self._own_name() and not version:
            raise NotReady(f"no version of {model} has come yet, and nothing is trained; ask again in a few seconds")
        if not stored and not self._own_name():
            raise NotReady("the peer is loading its model and data; ask again in a few seconds")
        if not stored and model != self._own_name():
            there = [card.name for card in self.models()]
            raise UnknownModel(f"there is no model {model[:64]!r} here; {nearest(model[:64], there)}")
        if not version:
            return stored
        try:
            return [choose(stored, model, version)]
        except UserError as error:
            live = self.live_version() if model == self._own_name() else ""
            raise UnknownModel(f"{error}" + (f"; {live} answers now" if live else "")) from None

    def _wanted(self, manifest: Manifest) -> Wanted:
        own = manifest.name == self._own_name()
        source = (self.info.source if self.info is not None else "") or self._config.data

        async def content() -> bytes | None:
            return await self._node.library.content(manifest)

        return Wanted(
            manifest.version.hex(), manifest.name, _digits(manifest), manifest.size,
            self._config.model if own else manifest.name, source if own else "", content,
        )  # fmt: skip

    def _now(self) -> float:
        return self._node.env.clock.now()


def _digits(manifest: Manifest) -> str:
    return manifest.version.hex()[:VERSION_DIGITS]


def _only(card: ModelCard, version: str) -> ModelCard:
    return replace(card, version=version, versions=(version,))


def _described(card: ModelCard, described: Described) -> ModelCard:
    return replace(
        card, inputs=described.inputs, outputs=described.outputs, labels=described.labels,
        features=described.features, picture=described.picture,
    )  # fmt: skip


def _built_in(model: str) -> Described | None:
    """What a built-in model takes and gives; None of others, whose code runs in the workers only."""
    spec = BUILTIN[model]() if model in BUILTIN else None
    if spec is None or adapts(spec):
        return None
    inputs, outputs = (
        tuple(TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return Described(inputs, outputs, spec.labels, spec.features, picture_shape(spec) or ())


def _adapts(model: str) -> bool:
    return model in BUILTIN and adapts(BUILTIN[model]())
