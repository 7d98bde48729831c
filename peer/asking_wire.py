"""What the dialler and the answerer of a stream of `gossipml-ask/1` say. This docstring is the specification.

Predictions are asked on such a stream, one after the other: the next one when the one before it is answered. Frames are
those of `gossipml.peer.wire`: 4 bytes of length, big endian, a canonical msgpack header ("t" names the kind), a body.

| kind   | from     | fields                                  | body |
|--------|----------|-----------------------------------------|------|
| ask    | dialler  | model, version, form, json, wait, bytes | what the client sent, unread |
| answer | answerer | version, json, load, bytes              | what the client gets |
| no     | answerer | code, reason, after                     | |

`version` is a beginning of the version's id, or empty. The form `card`, without a body, asks what the model takes and
gives; any other one is a prediction. `json`: how many bytes of the body are JSON where binary tensors
follow, -1 where none do. `wait`: milliseconds for which an answer is still of use. `load`: predictions under way at the
answerer. `after`: seconds until asking again may help. Codes: `input` (the client's mistake, any other peer would say
so too), `unknown` (no such model or version here), `busy` (not now). Asking again is harmless: a prediction changes
nothing. Whoever is asked answers itself and asks nobody else, so that there are no circles.

Fields that are not listed are ignored. Everything that breaks these rules is a RemoteError.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gossipml import codec
from gossipml.codec import Value
from gossipml.errors import LocalError, RemoteError
from gossipml.peer.swarm_wire import LENGTH, MAX_HEADER
from gossipml.peer.wire import MAX_REASON, clean_reason

MAX_ASKED = 1 << 24  # bytes of a request: what HTTP lets in
MAX_ANSWERED = 1 << 25  # bytes of an answer: what a predicting process gives
MAX_WAIT = 600_000  # milliseconds
MAX_LOAD = 1 << 20
MAX_AFTER = 3600
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
VERSION = re.compile(r"[A-Za-z0-9._-]{0,64}")
CARD = "card"
FORMS = ("json", "picture", "csv", "infer", CARD)

Code: TypeAlias = Literal["input", "unknown", "busy"]
CODES: dict[str, Code] = {"input": "input", "unknown": "unknown", "busy": "busy"}


@dataclass(frozen=True)
class Ask:
    model: str
    version: str
    form: str
    json_size: int | None
    wait: float
    """Seconds."""
    length: int


@dataclass(frozen=True)
class Answer:
    version: str
    json_size: int | None
    load: int
    length: int


@dataclass(frozen=True)
class No:
    code: Code
    reason: str
    after: int = 0


FromAnswerer: TypeAlias = Answer | No
Message: TypeAlias = Ask | FromAnswerer


def encode(message: Message) -> bytes:
    """Length and header; the body follows it and is not copied here."""
    header = codec.pack(_fields(message))
    if len(header) > MAX_HEADER:
        raise LocalError(f"header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    return LENGTH.pack(len(header)) + header


def _fields(message: Message) -> dict[str, object]:
    match message:
        case Ask():
            wait = min(MAX_WAIT, max(1, round(1000 * message.wait)))
            return {
                "t": "ask", "model": message.model, "version": message.version, "form": message.form,
                "json": _size(message.json_size), "wait": wait, "bytes": message.length,
            }  # fmt: skip
        case Answer():
            return {
                "t": "answer", "version": message.version, "json": _size(message.json_size),
                "load": min(message.load, MAX_LOAD), "bytes": message.length,
            }  # fmt: skip
        case No():
            return {
                "t": "no", "code": message.code, "reason": clean_reason(message.reason),
                "after": min(message.after, MAX_AFTER),
            }  # fmt: skip


def from_dialler(data: bytes | bytearray | memoryview) -> Ask:
    """The message of a dialler whose header is `data`."""
    fields = codec.as_map(codec.unpack(data, limit=MAX_HEADER))
    kind = codec.get_str(fields, "t", limit=16)
    if kind != "ask":
        raise RemoteError(f"message of unknown kind {clean_reason(kind)!r} from the dialler")
    model, version = codec.get_str(fields, "model"), codec.get_str(fields, "version")
    form = codec.get_str(fields, "form", limit=16)
    if not NAME.fullmatch(model) or not VERSION.fullmatch(version) or form not in FORMS:
        raise RemoteError("a model, version or form has an impossible name")
    length = codec.get_int(fields, "bytes", high=0 if form == CARD else MAX_ASKED)
    wait = codec.get_int(fields, "wait", low=1, high=MAX_WAIT)
    return Ask(model, version, form, _read_size(fields, length), wait / 1000, length)


def from_answerer(data: bytes | bytearray | memoryview) -> FromAnswerer:
    """The message of an answerer whose header is `data`."""
    fields = codec.as_map(codec.unpack(data, limit=MAX_HEADER))
    kind = codec.get_str(fields, "t", limit=16)
    if kind == "answer":
        version = codec.get_str(fields, "version")
        if not version or not VERSION.fullmatch(version):
            raise RemoteError("a version has an impossible name")
        length = codec.get_int(fields, "bytes", low=1, high=MAX_ANSWERED)
        load = codec.get_int(fields, "load", high=MAX_LOAD)
        return Answer(version, _read_size(fields, length), load, length)
    if kind == "no":
        code = CODES.get(codec.get_str(fields, "code", limit=16))
        reason = codec.get_str(fields, "reason", limit=MAX_REASON)
        if code is None or not reason.isprintable():
            raise RemoteError("a refusal of unknown code, or with a reason that cannot be printed")
        return No(code, reason, codec.get_int(fields, "after", high=MAX_AFTER))
    raise RemoteError(f"message of unknown kind {clean_reason(kind)!r} from the answerer")


def _size(json_size: int | None) -> int:
    return -1 if json_size is None else json_size


def _read_size(fields: dict[str, Value], length: int) -> int | None:
    size = codec.get_int(fields, "json", low=-1, high=length)
    return None if size < 0 else size


def check_answer(body: bytes, answer: Answer, ask: Ask, peer: str) -> None:
    """RemoteError unless the body is JSON that says the model that was asked, the answer's version, and `peer`, who
    proved to be who sent it: what stands in the audit log is not hearsay."""
    try:
        value = json.loads(body[: answer.json_size])
    except (ValueError, RecursionError):
        raise RemoteError("its answer is no JSON") from None
    if not isinstance(value, dict):
        raise RemoteError("its answer is no JSON object")
    if ask.form == "infer":
        parameters = value.get("parameters")
        told = (value.get("model_name"), value.get("model_version"))
        by = parameters.get("peer") if isinstance(parameters, dict) else None
    else:
        told, by = (value.get("model"), value.get("version")), value.get("peer")
    if told != (ask.model, answer.version) or by != peer:
        raise RemoteError("its answer names another model, version or peer than its own")
    asked, version = ask.version.lower(), answer.version.lower()  # either may be shortened
    if not version.startswith(asked) and not asked.startswith(version):
        raise RemoteError("it answered with another version than the one that was asked for")
