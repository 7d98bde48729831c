"""A result in a few numbers: the end of each variant, the mean over its seeds, and published figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from gossipml.simulations.result import Result, Row
from gossipml.simulations.scenario import Figure


@dataclass(frozen=True)
class Line:
    """One variant."""

    variant: str
    seeds: int
    end: Row
    """The last row of each seed, the mean of every column."""
    accuracy_error: float
    """Standard deviation of the accuracy over seeds; NaN with one seed."""
    updates_per_second: float
    """Local rounds a second of real time, evaluations included."""
    complete: bool


@dataclass(frozen=True)
class Compared:
    """A published figure beside ours."""

    what: str
    variant: str
    published: str
    ours: str
    differs: str


SHARES = ("accuracy", "accuracy_std", "accuracy_min", "accuracy_max", "accuracy_average", "accuracy_served")


def summarise(result: Result) -> list[Line]:
    """One line a variant, in the order in which they were run."""
    lines = []
    for variant in result.variants():
        seeds = result.seeds(variant)
        ends = [result.of(variant, seed)[-1] for seed in seeds]
        end = mean_row(ends)
        deviation = math.nan
        if len(ends) > 1:
            deviation = math.sqrt(sum((row.accuracy - end.accuracy) ** 2 for row in ends) / (len(ends) - 1))
        wall = sum(row.wall for row in ends)
        speed = sum(row.updates for row in ends) / wall if wall > 0 else math.nan
        complete = all((variant, seed) in result.finished for seed in result.scenario.seeds)
        lines.append(Line(variant, len(seeds), end, deviation, speed, complete))
    return lines


def compare_figures(result: Result) -> list[Compared]:
    """Every published figure of the scenario beside ours."""
    return [
        Compared(figure.what, variant, figure.published, _ours(result, figure, variant), figure.differs)
        for figure in result.scenario.figure
        for variant in ([figure.variant] if figure.variant else result.variants())
    ]


def mean_row(rows: list[Row]) -> Row:
    """The mean of every column but the names; NaN is left out."""
    first = rows[0]
    values = {
        each.name: mean(getattr(row, each.name) for row in rows)
        for each in fields(Row)
        if each.name not in ("variant", "seed", "updates", "alive")
    }
    updates, alive = (round(mean(getattr(row, name) for row in rows)) for name in ("updates", "alive"))
    return replace(first, updates=updates, alive=alive, **values)  # type: ignore[arg-type]  # floats where they belong


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN when none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def shown(column: str, value: float) -> str:
    """A value of a column for people; a dash for one that was not measured."""
    if math.isnan(value):
        return "-"
    if column in SHARES:
        return f"{100 * value:.1f} %"
    if column == "bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e4 else f"{value:.0f} B"
    if column in ("updates", "messages", "alive"):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ours(result: Result, figure: Figure, variant: str) -> str:
    seeds = result.seeds(variant)
    if not seeds:
        return "not run"
    if figure.below:
        reached = [
            next(
                (row.round for row in result.of(variant, seed) if getattr(row, figure.column) < figure.below), math.nan
            )
            for seed in seeds
        ]
        missed = sum(math.isnan(each) for each in reached)
        text = f"{mean(reached):.3g} rounds" if missed < len(seeds) else "not reached"
        return text + (f" ({missed} of {len(seeds)} seeds never)" if 0 < missed < len(seeds) else "")
    ends = [result.of(variant, seed)[-1] for seed in seeds]
    text = shown(figure.column, mean(getattr(row, figure.column) for row in ends))
    if figure.column == "accuracy":
        text = f"{text} ± {100 * mean(row.accuracy_std for row in ends):.1f} over peers"
    return text
