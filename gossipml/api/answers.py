"""Answers every route gives alike: JSON, and refusals as `{"error": "sentence"}` (the form of the Open Inference
Protocol, used everywhere)."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from gossipml import strict_json
from gossipml.api.ports import JSON, NotReady, UnknownModel
from gossipml.errors import RemoteError, UserError


class Refusal(Exception):
    """An answer that is an error: a status, a sentence for the person, headers."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return json_response({"error": self.sentence}, self.status, self.headers)


def json_response(value: JSON, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(strict_json.dump(value), status, headers, media_type="application/json")


def refusal_for(error: Exception) -> Refusal:
    """What an error of the daemon or of the client's input means in HTTP. Anything unexpected is our bug: 500."""
    match error:
        case Refusal():
            return error
        case UserError():
            return Refusal(400, str(error))
        case UnknownModel():
            return Refusal(404, str(error))
        case NotReady():
            return Refusal(503, str(error), {"retry-after": str(error.retry_after)})
        case RemoteError():
            return Refusal(502, f"the peer that was asked failed: {error}", {"retry-after": "1"})
        case _:
            return Refusal(500, "gossipml failed inside; its log says more: `gossipml peer logs`")
