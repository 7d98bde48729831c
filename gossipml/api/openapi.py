"""Every operation of the endpoint in one table; the router, `/openapi.json` and `/docs` are made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gossipml import __version__
from gossipml.api.ports import JSON

MODEL_NAME = "^[a-z0-9][a-z0-9_-]{0,63}$"
VERSION_NAME = "^[A-Za-z0-9._-]{1,64}$"

JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Operation:
    name: str
    method: str
    path: str
    summary: str
    answer: str
    """Name of the schema of a 200 answer."""
    media: str = JSON_TYPE
    body: tuple[tuple[str, str], ...] = ()
    """(media type, schema) of what may be sent."""
    body_required: bool = True
    errors: tuple[int, ...] = ()
    """Beyond those that every operation may give."""
    query: bool = False
    """Whether any query parameter goes to the model."""
    predicts: bool = False
    """Whether it takes a version and a time from the client."""
    changes: bool = False
    """Whether it changes something: then the bearer token of HOME/api-token is needed."""


BINARY = ("application/octet-stream", "Binary")  # JSON, then the bytes of tensors
INFER = ((JSON_TYPE, "InferRequest"), BINARY)
PREDICT = (
    (JSON_TYPE, "Anything"),
    ("text/csv", "Text"),
    *((media, "Binary") for media in ("image/png", "image/jpeg", "image/bmp", "image/gif", "image/webp")),
    ("multipart/form-data", "Upload"),
)
LOADING = (404, 502, 503, 504)
ASKING = (400, 404, 502, 503, 504)
SENDING = (*ASKING, 408, 413, 415)
CHANGING = (400, 404, 408, 413, 415, 502, 503)
VERSION = ((JSON_TYPE, "VersionRequest"),)

OPERATIONS = (
    Operation("page", "GET", "/", "The network, for people", "Text", "text/html"),
    Operation("page_file", "GET", "/web/{file}", "What the page is made of", "Text", "text/css", errors=(404,)),
    Operation("page_link", "POST", "/v1/page-link", "A link that opens the page with leave to change things", "Object",
              changes=True),
    Operation("page_open", "GET", "/open/{ticket}", "Follow that link, once", "Text", "text/html"),
    Operation("page_session", "GET", "/v1/page-session", "Whether the page may change things", "Object"),
    Operation("docs", "GET", "/docs", "These operations, for people", "Text", "text/html"),
    Operation("openapi", "GET", "/openapi.json", "This document", "Object"),
    Operation("healthz", "GET", "/healthz", "Whether the peer is alive", "Health", errors=(503,)),
    Operation("readyz", "GET", "/readyz", "Whether the peer can answer", "Health", errors=(503,)),
    Operation(
        "predict_query", "GET", "/predict/{model}", "Predict from query parameters", "Prediction",
        errors=ASKING, query=True, predicts=True,
    ),
    Operation(
        "predict_body", "POST", "/predict/{model}", "Predict from JSON, a CSV row or a picture", "Prediction",
        body=PREDICT, errors=SENDING, predicts=True,
    ),
    Operation("v2_server", "GET", "/v2", "Open Inference Protocol: the server", "Object"),
    Operation("v2_live", "GET", "/v2/health/live", "Open Inference Protocol: alive", "Object", errors=(503,)),
    Operation("v2_ready", "GET", "/v2/health/ready", "Open Inference Protocol: ready", "Object", errors=(503,)),
    Operation("v2_model", "GET", "/v2/models/{model}", "A model's inputs and outputs", "ModelMetadata",
              errors=LOADING),
    Operation(
        "v2_version", "GET", "/v2/models/{model}/versions/{version}", "The same of a version", "ModelMetadata",
        errors=LOADING,
    ),
    Operation(
        "v2_model_ready", "GET", "/v2/models/{model}/ready", "Whether a model can answer", "Object",
        errors=LOADING,
    ),
    Operation(
        "v2_version_ready", "GET", "/v2/models/{model}/versions/{version}/ready", "Whether a version can answer",
        "Object", errors=LOADING,
    ),
    Operation(
        "v2_infer", "POST", "/v2/models/{model}/infer", "Predict from tensors", "InferAnswer",
        body=INFER, errors=SENDING, predicts=True,
    ),
    Operation(
        "v2_infer_version", "POST", "/v2/models/{model}/versions/{version}/infer", "The same by a version",
        "InferAnswer", body=INFER, errors=SENDING, predicts=True,
    ),
    Operation(
        "v2_index", "POST", "/v2/repository/index", "All models and whether they can answer", "ModelIndex",
        body=((JSON_TYPE, "IndexRequest"),), body_required=False, errors=(400, 408, 413, 415),
    ),
    Operation("v2_load", "POST", "/v2/repository/models/{model}/load", "Have a model here and in memory", "Object",
              body=((JSON_TYPE, "Object"),), body_required=False, errors=(*CHANGING, 504), changes=True),
    Operation("v2_unload", "POST", "/v2/repository/models/{model}/unload", "Take a model out of memory", "Object",
              body=((JSON_TYPE, "Object"),), body_required=False, errors=CHANGING, changes=True),
    Operation("status", "GET", "/v1/status", "What this peer is and does", "Object"),
    Operation("peers", "GET", "/v1/peers", "Who else is in the network", "Object"),
    Operation("models", "GET", "/v1/models", "The models of the network and which this peer answers for", "Object",
              errors=(502,)),
    Operation("model", "GET", "/v1/models/{model}", "A model's versions and who holds them", "Object",
              errors=(404, 502)),
    Operation("transfers", "GET", "/v1/transfers", "Downloads of models", "Object"),
    Operation("model_publish", "POST", "/v1/models/{model}/publish", "Make a new version", "Object",
              body=((JSON_TYPE, "PublishRequest"),), body_required=False, errors=CHANGING, changes=True),
    Operation("model_pull", "POST", "/v1/models/{model}/pull", "Fetch a version to this peer", "Object",
              body=VERSION, body_required=False, errors=CHANGING, changes=True),
    Operation("model_rollback", "POST", "/v1/models/{model}/rollback", "Make an older version the latest", "Object",
              body=VERSION, errors=CHANGING, changes=True),
    Operation("model_pin", "POST", "/v1/models/{model}/pin", "Keep a version here", "Object",
              body=VERSION, body_required=False, errors=CHANGING, changes=True),
    Operation("model_unpin", "POST", "/v1/models/{model}/unpin", "Keep it no longer than others", "Object",
              body=VERSION, body_required=False, errors=CHANGING, changes=True),
    Operation("model_remove", "DELETE", "/v1/models/{model}", "Remove all versions of a model from this peer", "Object",
              errors=(400, 404), changes=True),
    Operation("model_remove_version", "DELETE", "/v1/models/{model}/versions/{version}",
              "Remove one version from this peer", "Object", errors=(400, 404), changes=True),
    Operation("history", "GET", "/v1/history", "How the learning went since the start", "Object"),
    Operation("training_pause", "POST", "/v1/training/pause", "Train no more until resumed", "Object", changes=True),
    Operation("training_resume", "POST", "/v1/training/resume", "Train again", "Object", changes=True),
    Operation("events", "GET", "/v1/events", "Server-sent events", "Text", "text/event-stream", errors=(503,)),
    Operation("metrics", "GET", "/metrics", "Counters for Prometheus", "Text", "text/plain"),
)  # fmt: skip

ERRORS: Mapping[int, str] = {
    400: "The request is wrong; the sentence says what",
    401: "The API key or, for what changes something, the bearer token is missing or wrong",
    403: "A page of another origin asked",
    404: "No such model or version",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The content type is not understood",
    421: "The Host header names another server",
    502: "The peer that was asked failed",
    503: "Not ready, or too busy; Retry-After says when to try again",
    504: "The model did not answer in time",
}
EVERYWHERE = (400, 401, 403, 421)


def _object(required: tuple[str, ...] = (), **properties: JSON) -> dict[str, JSON]:
    return {"type": "object", "properties": properties, "required": list(required)}


_STRING: JSON = {"type": "string"}
_SHAPE: JSON = {"type": "array", "items": {"type": "integer"}}
_SPECS: JSON = {"type": "array", "items": _object(("name", "datatype", "shape"), name=_STRING, datatype=_STRING,
                                                  shape=_SHAPE)}  # fmt: skip
_TIMEOUT: JSON = {
    "type": "integer",
    "minimum": 0,
    "description": "Microseconds to wait for the answer; then 504. 0 for the most that may be waited",
}
_TENSORS: JSON = {
    "type": "array",
    "minItems": 1,
    "items": _object(
        ("name", "shape", "datatype"),
        name=_STRING,
        shape={"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
        datatype=_STRING,
        parameters={"type": "object"},
        data={"type": "array", "description": "row-major, flat or nested as the shape says"},
    ),
}

SCHEMAS: dict[str, JSON] = {
    "Anything": {"description": "any JSON value; the model reads it"},
    "Object": {"type": "object"},
    "Text": _STRING,
    "Binary": {"type": "string", "format": "binary"},
    "Upload": _object(("image",), image={"type": "string", "format": "binary"}),
    "Error": _object(("error",), error=_STRING),
    "Health": _object(("ok", "detail"), ok={"type": "boolean"}, detail=_STRING),
    "Prediction": _object(("model", "version", "peer"), model=_STRING, version=_STRING, peer=_STRING,
                          result={"description": "the model's answer"}),
    "ModelMetadata": _object(("name", "versions", "platform", "inputs", "outputs"), name=_STRING,
                             versions={"type": "array", "items": _STRING}, platform=_STRING,
                             inputs=_SPECS, outputs=_SPECS, parameters={"type": "object"}),
    "InferRequest": _object(("inputs",), id=_STRING, parameters=_object(timeout=_TIMEOUT), inputs=_TENSORS,
                            outputs={"type": "array", "items": _object(("name",), name=_STRING)}),
    "InferAnswer": _object(("model_name", "model_version", "outputs"), model_name=_STRING, model_version=_STRING,
                           id=_STRING, parameters={"type": "object"}, outputs=_TENSORS),
    "VersionRequest": _object(version=_STRING),
    "PublishRequest": _object(file=_STRING, note=_STRING),
    "IndexRequest": _object(ready={"type": "boolean"}),
    "ModelIndex": {"type": "array", "items": _object(("name", "version", "state", "reason"), name=_STRING,
                                                     version=_STRING, state=_STRING, reason=_STRING)},
}  # fmt: skip


def document() -> dict[str, JSON]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, dict[str, JSON]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gossipml", "version": __version__, "description": "One peer's local endpoint."},
        "paths": {**paths},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _describe(operation: Operation) -> dict[str, JSON]:
    described: dict[str, JSON] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Done", "content": _content((operation.media, operation.answer))},
            **{
                str(status): {"description": ERRORS[status], "content": _content((JSON_TYPE, "Error"))}
                for status in sorted({*EVERYWHERE, *operation.errors})
            },
        },
    }
    parameters: list[JSON] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": MODEL_NAME if name == "model" else VERSION_NAME},
        }
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    if operation.query:
        free: JSON = {"type": "object", "additionalProperties": {"type": "string"}}
        parameters.append({"name": "fields", "in": "query", "style": "form", "explode": True, "schema": free})
    if operation.predicts:
        seconds: JSON = {"type": "number", "exclusiveMinimum": 0, "maximum": 30}
        parameters.append({"name": "Prediction-Timeout", "in": "header", "schema": seconds,
                           "description": "Seconds to wait for the answer; then 504"})  # fmt: skip
    if operation.predicts and operation.path.startswith("/predict"):
        version: JSON = {"type": "string", "pattern": VERSION_NAME}
        parameters.append({"name": "version", "in": "query", "schema": version,
                           "description": "The version that must answer, or a beginning of its id"})  # fmt: skip
    if operation.predicts and operation.path.startswith("/v2"):
        parameters.append({"name": "Inference-Header-Content-Length", "in": "header",
                           "schema": {"type": "integer", "minimum": 0},
                           "description": "Bytes of JSON, where binary tensors follow it"})  # fmt: skip
    if parameters:
        described["parameters"] = parameters
    if operation.body:
        described["requestBody"] = {"required": operation.body_required, "content": _content(*operation.body)}
    return described


def _content(*bodies: tuple[str, str]) -> dict[str, JSON]:
    return {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}} for media, schema in bodies}
