"""Tells the node of every prediction that was asked for over HTTP, answered or refused.

Only references are handed on: hashing and reading the answer is the work of whoever keeps the record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from starlette.requests import Request
from starlette.responses import Response

from gossipml.api.answers import refusal_for
from gossipml.api.ports import Node, Prediction

Answer = Callable[[Request], Awaitable[Response]]


def audited(answer: Answer, node: Node) -> Answer:
    """The same route, with a record of each of its requests."""

    async def recorded(request: Request) -> Response:
        begun = trio.current_time()

        def record(status: int, answer: bytes, head: int) -> None:
            # What was read of the body, which is nothing of one that was refused before.
            given: bytes = request.scope["query_string"] or getattr(request, "_body", b"")
            seconds = trio.current_time() - begun
            model = str(request.scope["path_params"].get("model", ""))
            node.record(Prediction(request.scope["path"], model, status, seconds, given, answer, head))

        try:
            response = await answer(request)
        except Exception as error:
            refusal = refusal_for(error)
            record(refusal.status, refusal.sentence.encode(), 0)
            raise
        body = bytes(response.body)
        record(response.status_code, body, int(response.headers.get("inference-header-content-length", len(body))))
        return response

    return recorded
