"""A node whose answers a test chooses, and a driver that calls the application without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import trio
from starlette.types import ASGIApp, Message

from gossipml import strict_json
from gossipml.api.broadcast import Broadcast
from gossipml.api.guard import GuardRules
from gossipml.api.ports import (
    JSON,
    Event,
    Health,
    Metric,
    ModelCard,
    NotReady,
    PredictAnswer,
    Prediction,
    PredictRequest,
    TensorSpec,
    UnknownModel,
)
from gossipml.api.routes import Endpoint
from gossipml.errors import UserError

XOR = ModelCard(
    name="xor",
    version="v7",
    platform="gossipml_torch",
    inputs=(TensorSpec("x", "FP32", (-1, 2)),),
    outputs=(TensorSpec("y", "FP32", (-1, 1)),),
    ready=True,
    labels=("0", "1"),
    versions=("v7",),
)
DIGITS = ModelCard(
    name="digits-mlp",
    version="",
    platform="gossipml_torch",
    inputs=(TensorSpec("pixels", "UINT8", (-1, 8, 8)),),
    outputs=(TensorSpec("class", "INT64", (-1,)),),
    ready=False,
    reason="digits-mlp has not finished its first round; try again in a few seconds",
)
ELSEWHERE = ModelCard(
    "other", "", "", (), (), ready=False, reason="no peer answers for it"
)  # what the node says of the library's other models
WELL = Health(True, "all parts run")
READY = Health(True, "xor answers")


@dataclass
class FakeLibrary:
    """Holds two versions of xor and remembers what it was asked to do."""

    asked: list[tuple[str, ...]] = field(default_factory=list)

    async def names(self) -> list[str]:
        return ["other", "xor"]

    async def table(self) -> list[dict[str, JSON]]:
        return [{"name": "xor", "version": "ab12", "replicas": 3}, {"name": "other", "version": "cd34", "replicas": 1}]

    async def show(self, name: str) -> dict[str, JSON]:
        if name != "xor":
            raise UnknownModel(f"there is no model {name!r} in the network")
        return {"name": name, "versions": []}

    async def publish(self, name: str, file: str, note: str) -> dict[str, JSON]:
        return self._done("publish", name, file, note)

    async def pull(self, name: str, version: str) -> dict[str, JSON]:
        return self._done("pull", name, version)

    async def rollback(self, name: str, version: str) -> dict[str, JSON]:
        return self._done("rollback", name, version)

    async def pin(self, name: str, version: str, pinned: bool) -> dict[str, JSON]:
        return self._done("pin" if pinned else "unpin", name, version)

    async def remove(self, name: str, version: str) -> dict[str, JSON]:
        return self._done("remove", name, version)

    def transfers(self) -> list[dict[str, JSON]]:
        return [{"name": "xor", "done": 5, "size": 10}]

    def _done(self, *what: str) -> dict[str, JSON]:
        self.asked.append(what)
        return {"version": "ab12"}


@dataclass
class FakeNode:
    """Knows xor, and digits-mlp that is not ready."""

    cards: tuple[ModelCard, ...] = (XOR, DIGITS)
    well: Health = WELL
    ready: Health = READY
    asked: list[tuple[str, PredictRequest]] = field(default_factory=list)
    failure: Exception | None = None
    """What every prediction raises."""
    hold: trio.Event | None = None
    """What every prediction waits for."""
    peer_rows: list[dict[str, JSON]] = field(default_factory=list)
    paused: bool = False
    loaded: set[str] = field(default_factory=set)
    recorded: list[Prediction] = field(default_factory=list)
    broadcast: Broadcast = field(default_factory=Broadcast)
    library: FakeLibrary = field(default_factory=FakeLibrary)

    def status(self) -> dict[str, JSON]:
        return {"name": "anna", "round": 3, "loss": float("nan")}

    def peers(self) -> list[dict[str, JSON]]:
        return self.peer_rows

    def health(self) -> Health:
        return self.well

    def readiness(self) -> Health:
        return self.ready

    def history(self) -> list[dict[str, JSON]]:
        return [{"uptime": 0.5, "round": 1, "loss": 2.0, "accuracy": None}]

    def record(self, prediction: Prediction) -> None:
        self.recorded.append(prediction)

    async def pause(self) -> str:
        self.paused = True
        return "training is paused"

    async def resume(self) -> str:
        self.paused = False
        return "training goes on"

    async def models(self, names: Iterable[str]) -> Sequence[ModelCard]:
        known = [card.name for card in self.cards]
        return (*self.cards, *(replace(ELSEWHERE, name=name) for name in names if name not in known))

    async def load(self, model: str) -> None:
        await self.card(model)
        self.loaded.add(model)

    async def unload(self, model: str) -> None:
        self.loaded.discard(model)

    def metrics(self) -> Sequence[Metric]:
        return (
            Metric("gossipml_rounds_total", "counter", "Rounds trained.", 3),
            Metric("gossipml_bytes_total", "counter", "Bytes.", 10, {"way": "in"}),
            Metric("gossipml_peer_up", "gauge", "Peers.", 1, {"name": 'a"b\n'}),
            Metric("gossipml_bytes_total", "counter", "Bytes.", 20, {"way": "out"}),
        )

    async def card(self, model: str, version: str = "") -> ModelCard:
        for card in self.cards:
            if card.name == model and version in ("", card.version):
                return card
        raise UnknownModel(f"there is no version {version!r} of {model!r} here; did you mean 'xor'?")

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        self.asked.append((model, request))
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        if model == DIGITS.name:
            raise NotReady(DIGITS.reason)
        if model != "xor" or request.version not in ("", "v7"):
            raise UnknownModel(f"there is no model {model!r} of version {request.version!r}; did you mean 'xor'?")
        if request.form == "infer":
            tail = request.body[request.json_size or len(request.body) :]
            head = json.dumps({"model_name": "xor", "model_version": "v7", "outputs": []}).encode()
            return PredictAnswer("v7", "peer1", head + tail, len(head) if tail else None)
        match strict_json.parse(request.body) if request.form == "json" else request.body.decode().split(","):
            case {"a": "0" | "1" as a, "b": "0" | "1" as b}:
                result = a != b
            case [a, b]:
                result = a != b
            case value:
                raise UserError(f"xor takes a and b, not {value!r:.50}")
        answer: dict[str, JSON] = {"result": int(result), "model": "xor", "version": "v7", "peer": "peer1"}
        return PredictAnswer("v7", "peer1", strict_json.dump(answer))

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[Event]]:
        with self.broadcast.subscribe() as events:
            yield events


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, JSON]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        sentence = self.json()["error"]
        assert isinstance(sentence, str)
        return sentence


class Client:
    """Calls an application as a server at 127.0.0.1:8710 would."""

    def __init__(self, app: ASGIApp, server: tuple[str, int] = ("127.0.0.1", 8710)) -> None:
        self.app = app
        self.server = server

    async def get(self, target: str, **headers: str) -> Answer:
        return await self.ask("GET", target, headers)

    async def post(self, target: str, body: bytes | JSON, media: str = "application/json", **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask("POST", target, {"content-type": media, **headers}, [data])

    async def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, chunks: Sequence[bytes] = ()
    ) -> Answer:
        """Headers may be written with _ for -; Host is added when missing, an empty value leaves it out."""
        given = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        if "host" not in given:
            given["host"] = f"{self.server[0]}:{self.server[1]}"
        return await self.ask_raw(
            method, target, [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value], chunks
        )

    async def ask_raw(
        self, method: str, target: str, headers: list[tuple[bytes, bytes]], chunks: Sequence[bytes] = ()
    ) -> Answer:
        path, _, query = target.partition("?")
        messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        told: list[Message] = []

        async def receive() -> Message:
            await trio.lowlevel.checkpoint()
            return messages.pop(0) if messages else await trio.sleep_forever()

        async def send(message: Message) -> None:
            await trio.lowlevel.checkpoint()
            told.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 5555),
            "server": self.server,
        }
        await self.app(scope, receive, send)
        start, *bodies = told
        assert start["type"] == "http.response.start", "an answer begins with its head"
        assert not bodies[-1].get("more_body", False), "an answer has an end"
        names = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], names, b"".join(message["body"] for message in bodies))


def client(node: FakeNode, rules: GuardRules | None = None, stopping: Callable[[], trio.Event] = trio.Event) -> Client:
    return Client(Endpoint(node, rules or GuardRules(), stopping()).app)
