"""What the endpoint answers: one method for each operation of `gossipml.api.openapi.OPERATIONS`."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from typing import TypeAlias
from urllib.parse import parse_qsl

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossipml import __version__, strict_json
from gossipml.api import openapi, page, prometheus
from gossipml.api.answers import Refusal, json_response
from gossipml.api.audit import audited
from gossipml.api.budget import PREDICT_SECONDS, header_seconds, parameter_seconds
from gossipml.api.durations import Durations
from gossipml.api.event_stream import EventStream
from gossipml.api.guard import Guard, GuardRules, check_token, headers_of
from gossipml.api.ports import (
    JSON,
    Form,
    Health,
    Metric,
    ModelCard,
    Node,
    Overloaded,
    PredictAnswer,
    PredictRequest,
    TensorSpec,
)
from gossipml.api.sessions import TICKET_SECONDS, session_of, set_cookie
from gossipml.errors import UserError

MAX_HELD = 1 << 26  # bytes of bodies at once: four of the largest, or 8,000 of 784 numbers
MAX_SMALL = 1 << 16  # bytes of a body that is no prediction
MAX_FIELDS = 4096  # query parameters; the head of a request (16 KiB) holds no more
MAX_TEXT = 1024  # of a member of a request

VERSION = "version"  # the one query parameter of /predict that is not the model's
JSON_SIZE = "inference-header-content-length"  # Open Inference Protocol, binary tensor data extension
BINARY = "application/octet-stream"
EXTENSIONS: list[JSON] = ["binary_tensor_data", "model_repository", "schedule_policy"]
EASY: dict[str, Form] = {"application/json": "json", "text/csv": "csv"}
PICTURES = ("image/png", "image/jpeg", "image/bmp", "image/gif", "image/webp")
FORM_DATA = "multipart/form-data"

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
        self._held = 0
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
        table = await self._node.library.table()
        listed = {str(line["name"]) for line in table}
        serving = {
            card.name: {**describe_model(card), "version": card.version, "ready": card.ready,
                        "reason": card.reason, "labels": list(card.labels), "features": list(card.features),
                        "picture": list(card.picture)}
            for card in await self._node.models(listed)
        }  # fmt: skip
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
        body = await self._small_body(request)
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
        fields = read_query(request.scope["query_string"])
        version = fields.pop(VERSION, "")
        answer = await self._answer(request, "json", strict_json.dump({**fields}), None, version)
        return Response(answer.body, media_type="application/json")

    async def predict_body(self, request: Request) -> Response:
        fields = read_query(request.scope["query_string"])
        version = fields.pop(VERSION, "")
        if fields:
            raise UserError("send the input as the body or as query parameters, not as both")
        media = _media_type(request, (*EASY, *PICTURES, FORM_DATA))
        with self._slot(request):
            body = await request.body()
            form: Form = EASY.get(media, "picture")
            if media == FORM_DATA:
                form, body = read_form(request.headers["content-type"], body)
            answer = await self._answer(request, form, body, None, version)
        return Response(answer.body, media_type="application/json")

    # The Open Inference Protocol

    async def v2_server(self, request: Request) -> Response:
        return json_response({"name": "gossipml", "version": __version__, "extensions": EXTENSIONS})

    async def v2_live(self, request: Request) -> Response:
        return _v2_probe("live", self._node.health())

    async def v2_ready(self, request: Request) -> Response:
        return _v2_probe("ready", self._node.readiness())

    async def v2_model(self, request: Request) -> Response:
        return json_response(describe_model(await self._card(request)))

    async def v2_version(self, request: Request) -> Response:
        return json_response(describe_model(await self._card(request)))

    async def v2_model_ready(self, request: Request) -> Response:
        card = await self._card(request)
        if card.ready:
            return json_response({"name": card.name, "ready": True})
        why = card.reason or f"the model {card.name} is not ready yet; try again in a little while"
        return json_response({"name": card.name, "ready": False, "error": why}, 503, {"retry-after": "5"})

    async def v2_version_ready(self, request: Request) -> Response:
        return await self.v2_model_ready(request)

    async def v2_infer(self, request: Request) -> Response:
        return await self._infer(request)

    async def v2_infer_version(self, request: Request) -> Response:
        return await self._infer(request)

    async def v2_index(self, request: Request) -> Response:
        wanted: JSON = {}
        if body := await self._small_body(request):
            _media_type(request, ("application/json", ""))
            wanted = strict_json.parse(body)
        only_ready = wanted.get("ready", False) if isinstance(wanted, dict) else None
        if not isinstance(only_ready, bool):
            raise UserError('the body must be empty or {"ready": true} or {"ready": false}')
        lines: list[JSON] = [
            {
                "name": card.name,
                "version": version,
                "state": "READY" if card.ready else "UNAVAILABLE",
                "reason": card.reason,
            }
            for card in await self._node.models(await self._node.library.names())
            if card.ready or not only_ready
            for version in card.versions or ("",)
        ]
        return json_response(lines)

    async def v2_load(self, request: Request) -> Response:
        await self._no_parameters(request)
        with trio.move_on_after(PREDICT_SECONDS):
            await self._node.load(_model(request))
            return json_response({})
        raise Refusal(504, f"the model {_model(request)} was not here within {PREDICT_SECONDS:g} s; ask again later")

    async def v2_unload(self, request: Request) -> Response:
        await self._no_parameters(request, "unload_dependents")  # no model here depends on another
        await self._node.unload(_model(request))
        return json_response({})

    async def _no_parameters(self, request: Request, *ignored: str) -> None:
        """UserError for a body with parameters: what a model is, is not the client's to say."""
        if not (body := await self._small_body(request)):
            return
        _media_type(request, ("application/json", ""))
        value = strict_json.parse(body)
        given = value.get("parameters", {}) if isinstance(value, dict) else None
        if not isinstance(given, dict) or given.keys() - set(ignored):
            raise UserError("the body must be empty or a JSON object without parameters; a model brings its own")

    async def _infer(self, request: Request) -> Response:
        size = _json_size(request)
        _media_type(request, ("application/json", BINARY, ""))  # tritonclient names no type
        with self._slot(request):
            body = await request.body()
            seconds = parameter_seconds(body if size is None else body[:size])
            answer = await self._answer(request, "infer", body, size, _version_of(request), seconds)
        if answer.json_size is None:
            return Response(answer.body, media_type="application/json")
        return Response(answer.body, 200, {JSON_SIZE: str(answer.json_size)}, media_type=BINARY)

    # Asking the node

    async def _card(self, request: Request) -> ModelCard:
        with trio.move_on_after(PREDICT_SECONDS):
            return await self._node.card(_model(request), _version_of(request))
        raise Refusal(504, f"the model {_model(request)} did not answer within {PREDICT_SECONDS:g} s; try again later")

    async def _small_body(self, request: Request) -> bytes:
        """One that is parsed on the event loop."""
        with self._slot(request):
            body = await request.body()
        if len(body) > MAX_SMALL:
            raise Refusal(413, f"the body has {len(body)} bytes; {MAX_SMALL} are enough here")
        return body

    @contextmanager
    def _slot(self, request: Request) -> Iterator[None]:
        """Room for the request's body, taken before it is read."""
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced else self._rules.max_body if _is_chunked(request.scope) else 0
        if self._held + size > MAX_HELD:
            raise Overloaded(f"the bodies of requests under way have {self._held} bytes; try again in a second")
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def _answer(
        self,
        request: Request,
        form: Form,
        body: bytes,
        json_size: int | None,
        version: str,
        seconds: float = PREDICT_SECONDS,
    ) -> PredictAnswer:
        """`seconds`: what the client gives, beside the header."""
        model, seconds = _model(request), min(seconds, header_seconds(request))
        if version and not re.fullmatch(openapi.VERSION_NAME, version):
            raise Refusal(404, f"{version[:64]!r} is not a version's name")
        with trio.move_on_after(seconds):
            return await self._node.predict(model, PredictRequest(form, body, json_size, version, seconds))
        raise Refusal(504, f"the model {model} did not answer within {seconds:g} s; try again later, or give it longer")


def read_query(query: bytes) -> dict[str, str]:
    """The parameters of a query string, each given once."""
    if not query:
        return {}
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict",
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
    return fields


def read_form(content_type: str, body: bytes) -> tuple[Form, bytes]:
    """The one file or value of a `multipart/form-data` body, and how it is to be read."""
    head = b"Content-Type: " + content_type.encode("latin-1") + b"\r\n\r\n"
    message = message_from_bytes(head + body)
    parts = [part for part in message.walk() if part is not message]
    if len(parts) != 1:
        raise UserError(f"the form has {len(parts)} parts; send one file: `curl -F image=@cat.jpg`")
    content = parts[0].get_payload(decode=True)
    assert isinstance(content, bytes)
    media = parts[0].get_content_type() if "content-type" in parts[0] else ""
    return EASY.get(media, "picture" if media in PICTURES else "json"), content


def _is_chunked(scope: Scope) -> bool:
    return any(name == b"transfer-encoding" for name, _ in scope["headers"])


def _media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The body's type. A page elsewhere cannot send these without being asked for its origin."""
    values = request.headers.getlist("content-type")
    media, _, parameters = (values[0] if len(values) == 1 else "").lower().partition(";")
    media, parameters = media.strip(), parameters.replace(" ", "").replace('"', "")
    if media not in allowed or (parameters not in ("", "charset=utf-8", "header=absent") and media != FORM_DATA):
        raise Refusal(
            415,
            f"the content type {media[:80]!r} is not understood; send the header `Content-Type: {allowed[0]}`"
            + "".join(f" or {other}" for other in allowed[1:] if other),
            {"accept": ", ".join(filter(None, allowed))},
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


def _version_of(request: Request) -> str:
    """That of the path; empty where it names none."""
    return _version(request) if "version" in request.path_params else ""


def _json_size(request: Request) -> int | None:
    text = request.headers.get(JSON_SIZE)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise UserError(f"{JSON_SIZE} is {text[:24]!r}; give the bytes of the JSON part")
    return int(text)


def describe_model(card: ModelCard) -> dict[str, JSON]:
    """Metadata of a model as the Open Inference Protocol wants it."""
    body: dict[str, JSON] = {
        "name": card.name,
        "versions": list(card.versions),
        "platform": card.platform,
        "inputs": [_describe_spec(spec) for spec in card.inputs],
        "outputs": [_describe_spec(spec) for spec in card.outputs],
    }
    if card.labels:
        body["parameters"] = {"labels": list(card.labels)}
    return body


def _describe_spec(spec: TensorSpec) -> JSON:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _probe(health: Health) -> Response:
    if health.ok:
        return json_response({"ok": True, "detail": health.sentence})
    return json_response({"ok": False, "detail": health.sentence, "error": health.sentence}, 503, {"retry-after": "5"})


def _v2_probe(what: str, health: Health) -> Response:
    if health.ok:
        return json_response({what: True})
    return json_response({what: False, "error": health.sentence}, 503, {"retry-after": "5"})
