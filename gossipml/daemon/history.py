"""How the learning of a peer went, in a bounded number of points: what the page draws."""

from __future__ import annotations

from gossipml.api.ports import JSON
from gossipml.daemon.learner import Progress

POINTS = 600  # as many as a chart has pixels that matter; 60 kB as JSON
FIRST_STEP = 0.5  # seconds between two points at first: as often as the accuracy is looked at


class History:
    """Points at even distances; when there are too many, every second one goes and the distance doubles."""

    def __init__(self) -> None:
        self._points: list[dict[str, JSON]] = []
        self._step = FIRST_STEP

    def add(self, uptime: float, progress: Progress) -> None:
        """Note the progress `uptime` seconds after the start; too soon after the last point it is left out."""
        evaluation = progress.evaluation
        if evaluation is None and progress.loss is None:
            return
        last = self._points[-1]["uptime"] if self._points else None
        if isinstance(last, float) and uptime - last < self._step:
            return
        self._points.append(
            {
                "uptime": uptime,
                "round": progress.round,
                "loss": progress.loss,
                "accuracy": evaluation.accuracy if evaluation else None,
            }
        )
        if len(self._points) > POINTS:
            del self._points[1::2]
            self._step *= 2

    def points(self) -> list[dict[str, JSON]]:
        return list(self._points)
