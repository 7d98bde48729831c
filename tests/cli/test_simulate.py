"""`gossipml simulate`: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gossipml.cli.app import app
from gossipml.cli.simulate_view import summary_table
from gossipml.errors import UserError
from gossipml.simulations.result import Row, load_result
from gossipml.simulations.summary import Line

VECTORS = """
name = "vectors"
description = "A small one."
peers = 8
rounds = 4
model = "vector:4"
compression = "float32"
merge = "mean"
[[variant]]
name = "two"
protocol = "push:2"
[[variant]]
name = "one"
protocol = "push:1"
[[figure]]
what = "rounds to 0.5"
column = "variance"
below = 0.5
published = "not stated"
variant = "two"
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vectors.toml").write_text(VECTORS)


def invoke(*arguments: str) -> str:
    """What is printed; the errors of a command rise."""
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_prints_a_table_and_writes_a_report() -> None:
    out = invoke("run", "vectors.toml")
    assert "two" in out and "rounds to 0.5" in out and "not stated" in out
    assert "results/vectors" in out.replace("\n", "")
    folder = Path("results/vectors")
    assert {"report.html", "rows.csv", "scenario.toml", "environment.json"} <= {file.name for file in folder.iterdir()}
    assert len(load_result(folder).rows) == 2 * 5


def test_the_same_run_again_simulates_nothing_and_another_gets_its_own_folder() -> None:
    invoke("run", "vectors.toml")
    rows = Path("results/vectors/rows.csv").read_bytes()
    assert "2 of 2 simulations were finished before" in invoke("run", "vectors.toml")
    assert Path("results/vectors/rows.csv").read_bytes() == rows
    invoke("run", "vectors.toml", "--rounds", "2", "--seed", "3", "--seed", "4", "--set", "protocol=push:3")
    other = load_result("results/vectors-2").scenario
    assert (other.rounds, other.seeds) == (2, (3, 4))
    assert {variant.protocol for variant in other.variants()} == {"push:3"}, "the command line wins"


def test_json_is_for_programs() -> None:
    answer = json.loads(invoke("run", "vectors.toml", "--json"))
    assert [variant["variant"] for variant in answer["variants"]] == ["two", "one"]
    assert answer["variants"][0]["accuracy"] is None and answer["variants"][0]["variance"] < 1
    assert answer["figures"][0]["published"] == "not stated"


def test_a_sweep_prints_every_cell() -> None:
    out = invoke("run", "vectors.toml", "--sweep", "network.loss=0,0.9", "--out", "sweep")
    assert "1 of 2" in out and "2 of 2" in out
    assert Path("sweep/table.csv").is_file()
    assert "2 of 2 cells were done before" in invoke(
        "run", "vectors.toml", "--sweep", "network.loss=0,0.9", "--out", "sweep"
    )


def test_results_and_scenarios_are_compared_and_plotted() -> None:
    invoke("run", "vectors.toml", "--out", "a")
    out = invoke("compare", "a", "vectors.toml", "--out", "both.html")
    assert "a: two" in out
    assert "results/vectors: one" in Path("both.html").read_text()
    Path("a/report.html").unlink()
    invoke("plot", "a")
    assert Path("a/report.html").is_file()


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_in_a_narrow_terminal_columns_are_left_out_and_names_stay_whole(width: int) -> None:
    end = Row(
        "push to 4, 30 % lost", 1, 25.0, 250.0, accuracy=0.9, accuracy_std=0.01, accuracy_min=0.8,
        accuracy_average=0.95, accuracy_served=0.9, consensus=0.1, bytes=1e6, messages=154.0,
    )  # fmt: skip
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(summary_table([Line(end.variant, 1, end, math.nan, 368.0, True)], width), markup=False)
    text = console.export_text()
    [line] = [line for line in text.splitlines() if "lost" in line]
    assert "push to 4, 30 % lost" in line
    assert "90.0 %" in line and "368" in line and "…" not in text
    assert ("154" in line) == (width == 200)


def test_the_shipped_scenarios_are_listed() -> None:
    names = [each["name"] for each in json.loads(invoke("list", "--json"))]
    assert {"quick", "epidemic", "averaging", "token-account", "label-sorted", "daemons"} <= set(names)
    assert "Token Account Algorithms" in invoke("list")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "vectors.toml", "--set", "peerz=3"], "did you mean peers"),
        (["run", "vectors.toml", "--engine", "ray"], "give --sweep"),
        (["run", "vectors.toml", "--engine", "popilation"], "did you mean 'population'"),
        (["run", "vectors.toml", "--device", "gpu"], "auto, cpu, cuda"),
        (["run", "label-sorted", "--data", "mnist:/nowhere"], "does not exist.*--data"),
        (["run", "quik"], "did you mean 'quick'"),
        (["plot", "nothing"], "not the folder of a result"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        invoke(*arguments)
    assert not Path("results").exists()
