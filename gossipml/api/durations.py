"""How long the answers of each route take, for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import trio
from starlette.requests import Request
from starlette.responses import Response

from gossipml.api.ports import Metric

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # seconds
NAME = "gossipml_http_request_duration_seconds"
HELP = "Time from a request to its answer, by route."

Answer = Callable[[Request], Awaitable[Response]]


@dataclass
class _Route:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0


class Durations:
    """One histogram for each route that was asked."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str], _Route] = {}

    def timed(self, method: str, path: str, answer: Answer) -> Answer:
        """The same route, with the time of each of its answers noted; of an event stream until it begins."""

        async def noted(request: Request) -> Response:
            begun = trio.current_time()
            try:
                return await answer(request)
            finally:
                self.note(method, path, trio.current_time() - begun)

        return noted

    def note(self, method: str, path: str, seconds: float) -> None:
        route = self._routes.setdefault((method, path), _Route())
        route.counts[bisect_left(BOUNDS, seconds)] += 1
        route.total += seconds

    def metrics(self) -> Iterator[Metric]:
        for (method, path), route in sorted(self._routes.items()):
            labels, count = {"method": method, "path": path}, 0
            for bound, inside in zip((*map(str, BOUNDS), "+Inf"), route.counts, strict=True):
                count += inside
                yield Metric(NAME, "histogram", HELP, count, {**labels, "le": bound}, "_bucket")
            yield Metric(NAME, "histogram", HELP, route.total, labels, "_sum")
            yield Metric(NAME, "histogram", HELP, count, labels, "_count")
