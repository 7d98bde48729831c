"""What the plots and the report show: lines of each variant, the mean over its seeds. Data only; no drawing here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gossipml.simulations.result import Result, Row
from gossipml.simulations.scenario import BASELINES
from gossipml.simulations.summary import mean_row

LOGARITHMIC = ("consensus", "variance")
COLOURS = 8  # of the palette; further variants take them again, with other dashes
MOST_BANDS = 8  # more of them are one grey cloud


@dataclass(frozen=True)
class Series:
    """One line, with a band around it where it has one."""

    variant: str
    colour: int
    """Which of the palette: variants keep theirs over all charts."""
    baseline: bool
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    """x, low, high."""


@dataclass(frozen=True)
class Chart:
    key: str
    """For names of files."""
    title: str
    about: str
    x: str
    y: str
    percent: bool
    logarithmic: bool
    series: list[Series]


@dataclass(frozen=True)
class Spread:
    """The peers of one variant at the end: mean, standard deviation, worst and best."""

    variant: str
    colour: int
    mean: float
    deviation: float
    least: float
    most: float


def colours(result: Result) -> dict[str, int]:
    """A number of the palette for each variant."""
    return {variant: number for number, variant in enumerate(result.variants())}


def is_baseline(variant: str) -> bool:
    return variant.rpartition(": ")[2].partition(":")[0] in BASELINES


def stroke(colour: int, baseline: bool) -> str:
    """The classes of a line."""
    return "trace" + " dashed" * baseline + " again" * (colour >= COLOURS)


def make_charts(result: Result) -> list[Chart]:
    """Those for which something was measured."""
    unit, seconds = _time_unit(max((row.seconds for row in result.rows), default=0.0))
    size, factor = _size_unit(max((row.bytes for row in result.rows), default=0.0))
    rounds: Callable[[Row], float] = lambda row: row.round  # noqa: E731 beside its two likes
    time: Callable[[Row], float] = lambda row: row.seconds / seconds  # noqa: E731
    sent: Callable[[Row], float] = lambda row: row.bytes / factor  # noqa: E731
    around = "mean over peers"
    if len(result.variants()) <= MOST_BANDS:
        around += "; the band is one standard deviation over peers"
    alone = "what sends nothing is left out"
    relative = "of the peers' models from their mean, relative to it"
    asked = [
        ("accuracy-rounds", "Accuracy over rounds", around, "round", rounds, "accuracy"),
        ("accuracy-time", "Accuracy over virtual time", around, f"virtual {unit}", time, "accuracy"),
        ("accuracy-bytes", "Accuracy over bytes", alone, size, sent, "accuracy"),
        ("average", "The averaged model", "the mean of all peers' models", "round", rounds, "accuracy_average"),
        ("worst", "The worst peer", "accuracy of the peer that does worst", "round", rounds, "accuracy_min"),
        ("loss", "Loss", "on the test data, mean over peers", "round", rounds, "loss"),
        ("consensus", "Consensus distance", relative, "round", rounds, "consensus"),
        ("variance", "Variance over peers", "of each value, the mean over all values", "round", rounds, "variance"),
    ]
    trained = any(not math.isnan(row.accuracy) for row in result.rows)
    charts = []
    for key, title, about, x, abscissa, column in asked:
        if (column == "variance" and trained) or (column == "consensus" and not trained):
            continue
        series = [line for variant in result.variants() if (line := _line(result, variant, abscissa, column))]
        if key == "accuracy-bytes":
            series = [line for line in series if line.points[-1][0] > 0]
        if series:
            share = column.startswith("accuracy")
            charts.append(Chart(key, title, about, x, column, share, column in LOGARITHMIC, series))
    return charts


def make_spreads(result: Result) -> list[Spread]:
    """The peers at the end, of those variants that have several models."""
    spreads = []
    for variant, colour in colours(result).items():
        end = mean_row([result.of(variant, seed)[-1] for seed in result.seeds(variant)])
        if not math.isnan(end.accuracy_min):
            spreads.append(Spread(variant, colour, end.accuracy, end.accuracy_std, end.accuracy_min, end.accuracy_max))
    return spreads


def _line(result: Result, variant: str, abscissa: Callable[[Row], float], column: str) -> Series | None:
    runs = [result.of(variant, seed) for seed in result.seeds(variant)]
    rows = [mean_row(list(same)) for same in zip(*runs, strict=False)]  # one that was stopped is shorter
    logarithmic = column in LOGARITHMIC
    known = [row for row in rows if not math.isnan(value := getattr(row, column)) and (value > 0 or not logarithmic)]
    if not known:
        return None
    band = []
    if column == "accuracy" and len(result.variants()) <= MOST_BANDS:
        band = [
            (abscissa(row), max(0.0, row.accuracy - row.accuracy_std), min(1.0, row.accuracy + row.accuracy_std))
            for row in known
            if row.accuracy_std > 0
        ]
    points = [(abscissa(row), float(getattr(row, column))) for row in known]
    return Series(variant, colours(result)[variant], is_baseline(variant), points, band)


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds > 7200:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds > 300 else ("seconds", 1.0)


def _size_unit(size: float) -> tuple[str, float]:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 2 * factor:
            return f"{unit} sent by a peer", factor
    return "bytes sent by a peer", 1.0
