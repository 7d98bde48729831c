"""How long a client gives for an answer: a header for every prediction, a parameter of the Open Inference Protocol.

The parameter is `"timeout"`, in microseconds, of the schedule policy extension of Triton. It stands in a body that the
daemon does not read (docs/decisions/0008), so it is looked for without reading the rest: parameters hold no objects and
lists, and the request's own are those at depth 1. What is no JSON is for whoever reads the body to refuse.
"""

from __future__ import annotations

import json
import re
from itertools import islice

from starlette.requests import Request

from gossipml.errors import UserError

PREDICT_SECONDS = 30.0  # then the client gets its 504; a model here answers in milliseconds
HEADER = "prediction-timeout"

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_PARAMETERS = re.compile(rb'"parameters"\s*+:\s*+(\{(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^"{}\[\]])*+\})', re.DOTALL)
MAX_LOOKED = 2  # of the parameters that name a timeout: tensors have no such parameter


def header_seconds(request: Request) -> float:
    """What the header says, in seconds; the most that may be given without it."""
    text = request.headers.get(HEADER)
    if text is None:
        return PREDICT_SECONDS
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII) or not 0 < float(text) <= PREDICT_SECONDS:
        raise UserError(f"{HEADER} is {text[:24]!r}; give seconds, over 0 and at most {PREDICT_SECONDS:g}")
    return float(text)


def parameter_seconds(head: bytes) -> float:
    """What the JSON of an inference request says; the most that may be given without it, and for 0."""
    if b'"timeout"' not in head:
        return PREDICT_SECONDS
    named = (match for match in _PARAMETERS.finditer(head) if b'"timeout"' in match[1])
    for match in islice(named, MAX_LOOKED):
        before = _STRING.sub(b"", head[: match.start()])
        if before.count(b"{") - before.count(b"}") == 1 and before.count(b"[") == before.count(b"]"):
            return _microseconds(match[1])
    return PREDICT_SECONDS


def _microseconds(parameters: bytes) -> float:
    try:
        given = json.loads(parameters).get("timeout", 0)
    except ValueError:
        return PREDICT_SECONDS
    if type(given) is not int or given < 0:
        raise UserError(f"the parameter timeout is {given!r:.24}; give microseconds, a whole number of at least 0")
    return min(PREDICT_SECONDS, given / 1e6) if given else PREDICT_SECONDS
