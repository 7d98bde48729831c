"""Charts of the report as SVG: lines with bands, and the spread over peers. Colours are the page's variables."""

from __future__ import annotations

import html
import math
from typing import TypeVar

from gossipml.simulations.axes import linear_ticks, power_ticks, tick_text
from gossipml.simulations.charts import COLOURS, Chart, Series, Spread, stroke

T = TypeVar("T")

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 12, 40
MOST_POINTS = 300  # of a line: more cannot be seen, and make the file large


class _Scale:
    """From a value to a place on the picture."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self._logarithmic = logarithmic
        self.low, self.high = low, high
        first, last = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        self._first, self._span = first, (last - first) or 1.0
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        value = math.log10(max(value, self.low)) if self._logarithmic else value
        return self._start + (value - self._first) / self._span * self._length


def draw_chart(chart: Chart) -> str:
    xs = [x for line in chart.series for x, _ in line.points]
    ys = [y for line in chart.series for _, y in line.points]
    ys += [y for line in chart.series for _, low, high in line.band for y in (low, high)]
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    logarithmic = chart.logarithmic and max(ys) > 0
    if logarithmic:
        positive = [y for y in ys if y > 0]
        ticks = power_ticks(min(positive), max(positive))
        up = _Scale(ticks[0], max(ticks[-1], *positive), HEIGHT - BOTTOM, TOP, True)
    else:
        low, high = (min(ys), 1.0) if chart.percent and max(ys) > 0.5 else (min(0.0, *ys), max(ys))
        ticks = linear_ticks(math.floor(20 * low) / 20 if chart.percent else low, high)
        up = _Scale(min(low, *ticks), max(high, *ticks), HEIGHT - BOTTOM, TOP)
    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(chart.title, quote=True)}'>"]
    for tick in ticks:
        y = up(tick)
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />")
        text = tick_text(tick, chart.percent)
        parts.append(f"<text x={LEFT - 8} y={y + 4:.1f} text-anchor=end>{text}</text>")
    parts += [
        f"<text x={across(tick):.1f} y={HEIGHT - BOTTOM + 18} text-anchor=middle>{tick_text(tick)}</text>"
        for tick in linear_ticks(across.low, across.high, 6)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f"<text x={middle:.0f} y={HEIGHT - 4} text-anchor=middle>{html.escape(chart.x)}</text>")
    parts += [_band(line, across, up) for line in chart.series if line.band]
    parts += [_trace(line, across, up) for line in chart.series]
    parts += [_hits(chart, line, across, up) for line in chart.series]
    return "".join(parts) + "</svg>"


def draw_spreads(spreads: list[Spread]) -> str:
    row, left = 30, 204  # room for 24 letters
    height = row * len(spreads) + BOTTOM
    low = math.floor(10 * min(each.least for each in spreads)) / 10
    across = _Scale(low, 1.0, left, WIDTH - 28)
    parts = [f"<svg viewBox='0 0 {WIDTH} {height}' role=img aria-label='spread over peers'>"]
    for tick in linear_ticks(low, 1.0):
        x = across(tick)
        parts.append(f"<line class=grid x1={x:.1f} x2={x:.1f} y1=4 y2={height - BOTTOM + 8} />")
        parts.append(f"<text x={x:.1f} y={height - 14} text-anchor=middle>{tick_text(tick, True)}</text>")
    for number, each in enumerate(spreads):
        y = row * number + row / 2
        colour = f"style='stroke:var(--c{each.colour % COLOURS})' y1={y} y2={y}"
        name = each.variant if len(each.variant) <= 24 else each.variant[:23] + "…"
        ends = [max(each.least, each.mean - each.deviation), min(each.most, each.mean + each.deviation)]
        said = f"{each.variant}: {each.mean:.1%} ± {each.deviation:.1%}, from {each.least:.1%} to {each.most:.1%}"
        parts.append(
            f"<g><title>{html.escape(said)}</title>"
            f"<text class=name x={left - 12} y={y + 4:.1f} text-anchor=end>{html.escape(name)}</text>"
            f"<line {colour} stroke-width=1.5 x1={across(each.least):.1f} x2={across(each.most):.1f} />"
            f"<line {colour} stroke-width=7 opacity=.4 x1={across(ends[0]):.1f} x2={across(ends[1]):.1f} />"
            f"<circle cx={across(each.mean):.1f} cy={y} r=5 style='fill:var(--c{each.colour % COLOURS})' /></g>"
        )
    return "".join(parts) + "</svg>"


def _trace(line: Series, across: _Scale, up: _Scale) -> str:
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in _thinned(line.points))
    classes = stroke(line.colour, line.baseline)
    return f"<polyline class='{classes}' style='stroke:var(--c{line.colour % COLOURS})' points='{path}' />"


def _band(line: Series, across: _Scale, up: _Scale) -> str:
    band = _thinned(line.band)
    outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
    points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in outline)
    return f"<polygon class=band style='fill:var(--c{line.colour % COLOURS})' points='{points}' />"


def _hits(chart: Chart, line: Series, across: _Scale, up: _Scale) -> str:
    """Invisible dots that say their value when the pointer is over them."""
    dots = []
    for x, y in _thinned(line.points, 60):
        value = f"{100 * y:.2f} %" if chart.percent else f"{y:.4g}"
        said = html.escape(f"{line.variant}: {value} at {x:.4g} ({chart.x})")
        dots.append(f"<circle class=hit cx={across(x):.1f} cy={up(y):.1f} r=5><title>{said}</title></circle>")
    return f"<g style='color:var(--c{line.colour % COLOURS})'>{''.join(dots)}</g>"


def _thinned(points: list[T], most: int = MOST_POINTS) -> list[T]:
    """At most about so many of them, the last one always."""
    every = math.ceil(len(points) / most)
    return points[:-1:every] + points[-1:] if every > 1 else points
