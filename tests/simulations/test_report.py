"""Results in numbers, charts, a page and pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from gossipml.errors import UserError
from gossipml.simulations.axes import linear_ticks, power_ticks, tick_text
from gossipml.simulations.charts import make_charts, make_spreads
from gossipml.simulations.plots import write_plots
from gossipml.simulations.report import render_report, write_report
from gossipml.simulations.report_topology import draw_topologies, draw_topology
from gossipml.simulations.result import Result, ResultWriter, Row, load_result, merge_results
from gossipml.simulations.scenario import TOPOLOGIES, Byzantine, Figure, Reference, Scenario, Topology, Variant
from gossipml.simulations.summary import compare_figures, summarise

SCENARIO = Scenario(
    "ours & theirs",
    peers=20,
    seeds=(1, 2),
    baselines=("local",),
    reference=Reference("A <paper>", "Somebody", 2023, "NeurIPS", "other data"),
    figure=(
        Figure("accuracy", "64.6 %", variant="push"),
        Figure("rounds to 0.01", "not stated", column="variance", below=0.01, variant="push"),
        Figure("rounds to 1e-9", "not stated", column="variance", below=1e-9, variant="push"),
    ),
    byzantine=Byzantine("sign-flip", 0.1),
    variant=(Variant("push", ()),),
)


@pytest.fixture
def result(tmp_path: Path) -> Result:
    with ResultWriter(tmp_path / "r", SCENARIO, {"when": 0.0, "packages": {"torch": "2"}, "cores": 2}) as writer:
        for variant in ("push", "local"):
            for seed in (1, 2):
                for round in range(5):
                    share = 0.1 * round * seed + 0.1 * (variant == "push")
                    row = Row(variant, seed, round, 10.0 * round, 20 * round, share, 0.05, share / 2, share, share)
                    sent = 1e5 * round if variant == "push" else 0.0
                    writer.add(Row(**{**vars(row), "bytes": sent, "wall": 0.5 * round, "variance": 0.1**round}))
                writer.finish((variant, seed))
    return load_result(tmp_path / "r")


def test_the_summary_is_the_mean_over_seeds_of_the_last_rows(result: Result) -> None:
    push, local = summarise(result)
    assert (push.variant, push.seeds, push.complete) == ("push", 2, True)
    assert push.end.accuracy == pytest.approx((0.5 + 0.9) / 2)
    assert push.accuracy_error == pytest.approx(0.4 / math.sqrt(2))
    assert push.updates_per_second == pytest.approx(40.0)
    assert local.end.bytes == 0
    assert math.isnan(push.end.loss)


def test_published_figures_stand_beside_ours(result: Result) -> None:
    accuracy, reached, missed = compare_figures(result)
    assert accuracy.published == "64.6 %" and accuracy.ours == "70.0 % ± 5.0 over peers"
    assert reached.ours == "3 rounds"
    assert missed.ours == "not reached"


def test_charts_leave_out_what_was_not_measured(result: Result) -> None:
    charts = {chart.key: chart for chart in make_charts(result)}
    assert set(charts) == {"accuracy-rounds", "accuracy-time", "accuracy-bytes", "average", "worst"}
    assert [line.variant for line in charts["accuracy-bytes"].series] == ["push"], "baselines send nothing"
    (push, local) = charts["accuracy-rounds"].series
    assert push.points[-1] == pytest.approx((4.0, 0.7))
    assert local.baseline and not push.baseline
    assert [spread.least for spread in make_spreads(result)] == [pytest.approx(0.35), pytest.approx(0.3)]


def test_the_report_needs_nothing_but_itself(result: Result) -> None:
    page = render_report(result)
    assert "ours &amp; theirs" in page and "A &lt;paper&gt;" in page and "64.6 %" in page
    assert not re.search(r"https?://|<script|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<figure>") == 7
    assert "NaN" not in page and ">nan" not in page and "inf" not in re.sub(r"inf[a-z]", "", page)


def test_a_result_without_rows_is_no_report(tmp_path: Path) -> None:
    ResultWriter(tmp_path / "r", SCENARIO, {}).__exit__(None, None, None)
    with pytest.raises(UserError, match="holds no rows yet"):
        write_report(load_result(tmp_path / "r"), tmp_path / "x.html")


def test_the_plots_are_pictures(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(result, tmp_path)
    assert [file.name for file in files] == [f"{chart.key}.png" for chart in make_charts(result)]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_results_side_by_side_keep_their_names(result: Result) -> None:
    merged = merge_results([result, result])
    assert len(merged.rows) == 2 * len(result.rows)
    assert merged.variants()[0] == f"{result.folder}: push"
    assert "local" in render_report(merged)


@pytest.mark.parametrize("kind", [kind for kind in TOPOLOGIES if kind != "edges"])
def test_every_topology_is_drawn(kind: str) -> None:
    about, picture = draw_topology(Scenario("x", peers=30, topology=Topology(kind), byzantine=Byzantine("zero", 0.1)))
    assert about
    assert picture.count("<circle") == 30 and picture.count("class=edge") >= 30 - 3
    assert picture.count("class=liar") == 3


def test_ticks_are_round_numbers() -> None:
    assert linear_ticks(0, 60) == [0, 20, 40, 60]
    assert linear_ticks(0.37, 1.0) == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(3, 3) == [3]
    assert power_ticks(2e-9, 0.5) == pytest.approx([1e-9, 1e-7, 1e-5, 1e-3, 1e-1])
    texts = (tick_text(0.4, True), tick_text(1e-9), tick_text(20000.0), tick_text(0.5))
    assert texts == ("40 %", "10⁻⁹", "20,000", "0.5")


def test_more_variants_than_colours_can_be_told_apart(tmp_path: Path) -> None:
    names = [f"variant {number}" for number in range(9)]
    scenario = Scenario("many", baselines=("local", "central"), variant=tuple(Variant(name, ()) for name in names))
    with ResultWriter(tmp_path / "many", scenario, {"when": 0.0, "packages": {}, "cores": 2}) as writer:
        for variant in (*names, "local", "central"):
            for round in range(2):
                writer.add(Row(variant, 1, round, 10.0 * round, 20 * round, 0.5, 0.05, 0.4, 0.6, 0.5))
            writer.finish((variant, 1))
    result = load_result(tmp_path / "many")
    page = render_report(result)
    legend = page[page.index("<div class=legend>") : page.index("</div>", page.index("<div class=legend>"))]
    lines = re.findall(r"class='([a-z ]+)' style='stroke:var\((--c\d)\)'", legend)
    assert len(set(lines)) == len(lines) == 11
    assert not any(line.band for chart in make_charts(result) for line in chart.series)
    assert len(write_plots(result, tmp_path)) > 0


def test_each_topology_is_drawn_once_with_the_variants_that_have_it() -> None:
    variants = tuple(
        Variant(name, (("topology.kind", kind),))
        for name, kind in (("one", "ring"), ("two", "torus"), ("three", "ring"))
    )
    drawn = draw_topologies(Scenario("x", peers=16, baselines=("local",), variant=variants))
    assert [(names, about) for names, about, _ in drawn] == [
        ("one, three", "a ring"),
        ("two", "a torus, each peer with four neighbours"),
    ]
    ((names, _, _),) = draw_topologies(Scenario("x", variant=(Variant("a", ()), Variant("b", ()))))
    assert names == ""
