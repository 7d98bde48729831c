"""The charts of a result as PNG, for papers and slides, where matplotlib is installed (extra `simulate`)."""

from __future__ import annotations

from pathlib import Path

from gossipml.simulations.axes import tick_text
from gossipml.simulations.charts import COLOURS, make_charts, stroke
from gossipml.simulations.report import PALETTE
from gossipml.simulations.result import Result

DPI = 160
DASHES = {"trace": "-", "trace dashed": "--", "trace again": ":", "trace dashed again": "-."}


def write_plots(result: Result, folder: Path) -> list[Path]:
    """`KEY.png` for each chart; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return []
    files = []
    for chart in make_charts(result):
        figure = Figure(figsize=(6.4, 4.0), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for line in chart.series:
            colour = PALETTE[line.colour % COLOURS][0]
            style = DASHES[stroke(line.colour, line.baseline)]
            axes.plot(*zip(*line.points, strict=True), color=colour, linestyle=style, label=line.variant, linewidth=1.8)
            if line.band:
                xs, lows, highs = zip(*line.band, strict=True)
                axes.fill_between(xs, lows, highs, color=colour, alpha=0.12, linewidth=0)
        if chart.logarithmic and any(y > 0 for line in chart.series for _, y in line.points):
            axes.set_yscale("log")
        if chart.percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(round(value, 6), True)))
        axes.set_xlabel(chart.x)
        axes.set_title(chart.title, loc="left", fontsize=11)
        axes.grid(color="#e2e4e1", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        path = folder / f"{chart.key}.png"
        figure.savefig(path)
        files.append(path)
    return files
