"""What the endpoint answers: one method for each operation of `gossipml.api.openapi.OPERATIONS`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar
from urllib.parse import parse_qsl

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossipml import __version__
from gossipml.api import openapi, page, prometheus, strict_json, tensors
from gossipml.api.answers import Refusal, json_response
from gossipml.api.audit import audited
from gossipml.api.durations import Durations
from gossipml.api.event_stream import EventStream
from gossipml.api.guard import Guard, GuardRules, check_token, headers_of
from gossipml.api.ports import (
    JSON,
    CsvRow,
    Fields,
    Health,
    JsonInput,
    Metric,
    ModelCard,
    Node,
    NotReady,
    Overloaded,
    PredictAnswer,
    PredictRequest,
)
from gossipml.api.sessions import TICKET_SECONDS, session_of, set_cookie
from gossipml.errors import UserError

MAX_UNDER_WAY = 64  # predictions and other bodies at once; bounds what they hold in memory to 64 times the cap
MAX_FIELDS = 4096  # query parameters; the head of a request (16 KiB) holds no more
MAX_TEXT = 1024  # of a member of a request
LARGE_BODY = 1 << 14  # bytes from which JSON is read beside the event loop: a few milliseconds' work
PREDICT_SECONDS = 30.0  # then the client gets its 504; a model here answers in milliseconds

T = TypeVar("T")

Answer: TypeAlias = "Callable[[Request], Awaitable[Response]]"


class _Routes:
    """Which answer belongs to a path. Starlette's router tries forty routes one after the other, and cannot say which
    methods a path has."""

    def __init__(self, routes: Iterable[tuple[str, str, Answer]]) -> None:
        self._plain: dict[str, dict[str, Answer]] = {}
        self._patterns: dict[int, dict[re.Pattern[str], dict[str, Answer]]] = {}  # by the number of segments
        for method, path, answer in routes:
            if "{" in path:
                pattern = re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path))
                methods = self._patterns.setdefault(path.count("/"), {}).setdefault(pattern, {})
            else:
                methods = self._plain.setdefault(path, {})
            methods[method] = answer
            if method == "GET":
                methods["HEAD"] = answer

    def find(self, method: str, path: str) -> tuple[Answer, dict[str, str]]:
        """The answer and the path's parameters; Refusal when there is none."""
        found = self._plain.get(path)
        values: dict[str, str] = {}
        for pattern, methods in {} if found else self._patterns.get(path.count("/"), {}).items():
            if match := pattern.fullmatch(path):
                found, values = methods, match.groupdict()
                break
        if found is None:
            raise Refusal(404, f"there is nothing at {path[:80]!r}; GET /openapi.json lists what there is")
        if method not in found:
            allowed = ", ".join(sorted(found))
            raise Refusal(405, f"{method[:16]} is not understood here, only {allowed}", {"allow": allowed})
        return found[method], values


class Endpoint:
    """The routes over one node. `app` is the guarded ASGI application; `stopping` ends the event streams."""

    def __init__(self, node: Node, rules: GuardRules, stopping: trio.Event) -> None:
        self._node = node
        self._stopping = stopping
        self._under_way = 0
        self._reading = trio.CapacityLimiter(1)
        self._openapi = strict_json.dump(openapi.document())
        self._rules = rules
        self._durations = Durations()
        self._routes = _Routes((o.method, o.path, self._route(o)) for o in openapi.OPERATIONS)
        self.app = Guard(self._routed, rules)

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, scope["path_params"] = self._routes.find(scope["method"], scope["path"])
        response = await answer(Request(scope, receive))
        await response(scope, receive, send)

    def _route(self, operation: openapi.Operation) -> Answer:
        answer: Answer = getattr(self, operation.name)

        async def with_token(request: Request) -> Response:
            check_token(headers_of(request.scope), self._rules, request.scope["server"][1])
            return await answer(request)

        answer = self._durations.timed(operation.method, operation.path, answer)
        if operation.answer in ("Prediction", "InferAnswer"):
            return audited(answer, self._node)
        return with_token if operation.changes else answer

    # Pages, probes, status

    async def page(self, request: Request) -> Response:
        return page.file("index.html")

    async def page_file(self, request: Request) -> Response:
        return page.file(request.path_params["file"])

    async def docs(self, request: Request) -> Response:
        return page.docs()

    async def page_link(self, request: Request) -> Response:
        return json_response({"path": f"/open/{self._rules.sessions.ticket()}", "seconds": TICKET_SECONDS})

    async def page_open(self, request: Request) -> Response:
        value = self._rules.sessions.redeem(request.path_params["ticket"])
        if value is None:
            raise Refusal(
                403, "this link was followed already, or is too old; print another one with `gossipml peer open`"
            )
        cookie = set_cookie(request.scope["server"][1], value)
        return Response(status_code=303, headers={"location": "/", "set-cookie": cookie})

    async def page_session(self, request: Request) -> Response:
        headers, port = headers_of(request.scope), request.scope["server"][1]
        return json_response({"may_change": self._rules.sessions.holds(session_of(headers, port))})

    async def openapi(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def healthz(self, request: Request) -> Response:
        return _probe(self._node.health())

    async def readyz(self, request: Request) -> Response:
        return _probe(self._node.readiness())

    async def status(self, request: Request) -> Response:
        return json_response(self._node.status())

    async def peers(self, request: Request) -> Response:
        peers: list[JSON] = [*self._node.peers()]
        return json_response({"peers": peers})

    async def events(self, request: Request) -> Response:
        return EventStream(self._node, self._stopping)

    async def history(self, request: Request) -> Response:
        points: list[JSON] = [*self._node.history()]
        return json_response({"points": points})

    async def training_pause(self, request: Request) -> Response:
        return json_response({"detail": await self._node.pause()})

    async def training_resume(self, request: Request) -> Response:
        return json_response({"detail": await self._node.resume()})

    async def metrics(self, request: Request) -> Response:
        own = [
            Metric("gossipml_http_responses_total", "counter", "HTTP answers by status.", count, {"code": str(code)})
            for code, count in sorted(self.app.answered.items())
        ]
        text = prometheus.exposition([*self._node.metrics(), *own, *self._durations.metrics()])
        return Response(text, media_type=prometheus.MEDIA_TYPE)

    # Published models

    async def models(self, request: Request) -> Response:
        serving = {
            card.name: {**tensors.describe_model(card), "version": card.version, "ready": card.ready,
                        "reason": card.reason, "labels": list(card.labels), "features": list(card.features),
                        "picture": list(card.picture)}
            for card in self._node.models()
        }  # fmt: skip
        table = await self._node.library.table()
        listed = {line["name"] for line in table}
        lines: list[JSON] = [{**line, "serving": serving.get(str(line["name"]))} for line in table]
        lines += [{"name": name, "serving": card} for name, card in serving.items() if name not in listed]
        return json_response({"models": lines})

    async def model(self, request: Request) -> Response:
        return json_response(await self._node.library.show(_model(request)))

    async def transfers(self, request: Request) -> Response:
        transfers: list[JSON] = [*self._node.library.transfers()]
        return json_response({"transfers": transfers})

    async def model_publish(self, request: Request) -> Response:
        asked = await self._strings(request, "file", "note")
        return json_response(await self._node.library.publish(_model(request), asked["file"], asked["note"]))

    async def model_pull(self, request: Request) -> Response:
        asked = await self._strings(request, "version")
        return json_response(await self._node.library.pull(_model(request), asked["version"]))

    async def model_rollback(self, request: Request) -> Response:
        asked = await self._strings(request, "version")
        return json_response(await self._node.library.rollback(_model(request), asked["version"]))

    async def model_pin(self, request: Request) -> Response:
        asked = await self._strings(request, "version")
        return json_response(await self._node.library.pin(_model(request), asked["version"], True))

    async def model_unpin(self, request: Request) -> Response:
        asked = await self._strings(request, "version")
        return json_response(await self._node.library.pin(_model(request), asked["version"], False))

    async def model_remove(self, request: Request) -> Response:
        return json_response(await self._node.library.remove(_model(request), ""))

    async def model_remove_version(self, request: Request) -> Response:
        return json_response(await self._node.library.remove(_model(request), _version(request)))

    async def _strings(self, request: Request, *names: str) -> dict[str, str]:
        """The members of a JSON object of text, empty where they are missing."""
        with self._slot():
            body = await request.body()
        if not body:
            return dict.fromkeys(names, "")
        _media_type(request, ("application/json",))
        value = strict_json.parse(body)
        if not isinstance(value, dict) or value.keys() - set(names):
            raise UserError(f"the body must be a JSON object with no other members than {', '.join(names)}")
        asked = {name: value.get(name, "") for name in names}
        for name, text in asked.items():
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise UserError(f"{name} must be text of at most {MAX_TEXT} characters")
        return {name: str(text) for name, text in asked.items()}

    # The easy way to predict

    async def predict_query(self, request: Request) -> Response:
        card = self._ready_card(request)
        return _prediction(card, await self._ask(card, PredictRequest(read_query(request.scope["query_string"]))))

    async def predict_body(self, request: Request) -> Response:
        card = self._ready_card(request)
        media = _media_type(request, ("application/json", "text/csv"))
        if request.scope["query_string"]:
            raise UserError("send the input as the body or as query parameters, not as both")
        with self._slot():
            body = await request.body()
            payload = (
                read_csv_row(body) if media == "text/csv" else JsonInput(await self._read(body, strict_json.parse))
            )
            return _prediction(card, await self._answer(card, PredictRequest(payload)))

    # The Open Inference Protocol

    async def v2_server(self, request: Request) -> Response:
        return json_response({"name": "gossipml", "version": __version__, "extensions": []})

    async def v2_live(self, request: Request) -> Response:
        return _v2_probe("live", self._node.health())

    async def v2_ready(self, request: Request) -> Response:
        return _v2_probe("ready", self._node.readiness())

    async def v2_model(self, request: Request) -> Response:
        return json_response(tensors.describe_model(self._card(request)))

    async def v2_version(self, request: Request) -> Response:
        return json_response(tensors.describe_model(_of_version(self._card(request), request)))

    async def v2_model_ready(self, request: Request) -> Response:
        return json_response({"name": self._ready_card(request).name, "ready": True})

    async def v2_version_ready(self, request: Request) -> Response:
        _of_version(self._card(request), request)
        return await self.v2_model_ready(request)

    async def v2_infer(self, request: Request) -> Response:
        return await self._infer(request, "")

    async def v2_infer_version(self, request: Request) -> Response:
        return await self._infer(request, _version(request))

    async def v2_index(self, request: Request) -> Response:
        wanted: JSON = {}
        with self._slot():
            if body := await request.body():
                _media_type(request, ("application/json",))
                wanted = await self._read(body, strict_json.parse)
        only_ready = wanted.get("ready", False) if isinstance(wanted, dict) else None
        if not isinstance(only_ready, bool):
            raise UserError('the body must be empty or {"ready": true} or {"ready": false}')
        return json_response(
            [
                {
                    "name": card.name,
                    "version": card.version,
                    "state": "READY" if card.ready else "UNAVAILABLE",
                    "reason": card.reason,
                }
                for card in self._node.models()
                if card.ready or not only_ready
            ]
        )

    async def _infer(self, request: Request, version: str) -> Response:
        card = self._ready_card(request)
        _media_type(request, ("application/json",))
        with self._slot():
            payload, identifier = await self._read(
                await request.body(), lambda body: tensors.read_infer_request(strict_json.parse(body), card)
            )
            answer = await self._answer(card, PredictRequest(payload, version))
        return json_response(tensors.write_infer_answer(answer, card.name, identifier))

    # Asking the node

    def _card(self, request: Request) -> ModelCard:
        name: str = request.path_params["model"]
        cards = {card.name: card for card in self._node.models()}
        if name in cards:
            return cards[name]
        _model(request)
        near = difflib.get_close_matches(name, cards, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        elif cards:
            hint = f"there are: {', '.join(sorted(cards)[:10])}"
        else:
            hint = "this peer has none yet"
        raise Refusal(404, f"there is no model {name!r} here; {hint}")

    def _ready_card(self, request: Request) -> ModelCard:
        card = self._card(request)
        if not card.ready:
            raise NotReady(card.reason or f"the model {card.name} is not ready yet; try again in a little while")
        return card

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """Taken before the body is read, because the body is what fills memory."""
        if self._under_way >= MAX_UNDER_WAY:
            raise Overloaded(f"{self._under_way} requests are under way, the most that may; try again in a second")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _ask(self, card: ModelCard, request: PredictRequest) -> PredictAnswer:
        with self._slot():
            return await self._answer(card, request)

    async def _answer(self, card: ModelCard, request: PredictRequest) -> PredictAnswer:
        with trio.move_on_after(PREDICT_SECONDS):
            return await self._node.predict(card.name, request)
        raise Refusal(504, f"the model {card.name} did not answer within {PREDICT_SECONDS:g} s; try again later")

    async def _read(self, body: bytes, reader: Callable[[bytes], T]) -> T:
        if len(body) < LARGE_BODY:
            return reader(body)
        return await trio.to_thread.run_sync(reader, body, limiter=self._reading)


def read_query(query: bytes) -> Fields:
    """The parameters of a query string, each given once."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict",
            max_num_fields=MAX_FIELDS,
        )  # fmt: skip
    except UnicodeError:
        raise UserError("the query is not UTF-8; write other bytes as %XX of UTF-8") from None
    except ValueError:
        raise UserError(f"the query is not name=value&name=value of at most {MAX_FIELDS} names") from None
    fields: dict[str, str] = {}
    for name, value in pairs:
        if fields.setdefault(name, value) is not value:
            raise UserError(f"the parameter {name[:64]!r} is given twice; give it once")
    return Fields(fields)


def read_csv_row(body: bytes) -> CsvRow:
    """The one line of the body."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8 at byte {error.start}; send CSV as UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        raise UserError(f"the body has {len(lines)} lines with something in them; send one row without a header")
    if "\0" in text:
        raise UserError("the row holds a zero byte; send text")
    return CsvRow(lines[0])


def _media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The body's type. A page elsewhere cannot send these without being asked for its origin."""
    values = request.headers.getlist("content-type")
    media, _, parameters = (values[0] if len(values) == 1 else "").lower().partition(";")
    media, parameters = media.strip(), parameters.replace(" ", "").replace('"', "")
    if media not in allowed or parameters not in ("", "charset=utf-8", "header=absent"):
        raise Refusal(
            415,
            f"the content type {media[:80]!r} is not understood; send the header `Content-Type: {allowed[0]}`"
            + "".join(f" or {other}" for other in allowed[1:]),
            {"accept": ", ".join(allowed)},
        )
    return media


def _model(request: Request) -> str:
    name: str = request.path_params["model"]
    if not re.fullmatch(openapi.MODEL_NAME, name):
        raise Refusal(
            404, f"{name[:64]!r} is not a model's name (a-z, 0-9, _ and -, at most 64, not beginning with _ or -)"
        )
    return name


def _version(request: Request) -> str:
    version: str = request.path_params["version"]
    if not re.fullmatch(openapi.VERSION_NAME, version):
        raise Refusal(404, f"{version[:64]!r} is not a version's name")
    return version


def _of_version(card: ModelCard, request: Request) -> ModelCard:
    version = _version(request)
    if version != card.version:
        served = f"it has {card.version}" if card.version else "it has none yet"
        raise Refusal(404, f"there is no version {version!r} of {card.name} here; {served}")
    return card


def _prediction(card: ModelCard, answer: PredictAnswer) -> Response:
    return json_response({**answer.result, "model": card.name, "version": answer.version, "peer": answer.peer})


def _probe(health: Health) -> Response:
    if health.ok:
        return json_response({"ok": True, "detail": health.sentence})
    return json_response({"ok": False, "detail": health.sentence, "error": health.sentence}, 503, {"retry-after": "5"})


def _v2_probe(what: str, health: Health) -> Response:
    if health.ok:
        return json_response({what: True})
    return json_response({what: False, "error": health.sentence}, 503, {"retry-after": "5"})
