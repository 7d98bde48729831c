"""Results on the disk: every row counts at once, an interrupted one goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gossipml.errors import UserError
from gossipml.simulations.result import ResultWriter, Row, load_result
from gossipml.simulations.scenario import Scenario

SCENARIO = Scenario("x", seeds=(1, 2))


def test_rows_read_back_exactly_while_the_writer_is_still_open(tmp_path: Path) -> None:
    row = Row('push, 4 to "all"', 1, 3.0, 30.0, updates=300, accuracy=1 / 3, bytes=1e9 / 7, alive=20)
    with ResultWriter(tmp_path / "r", SCENARIO, {"python": "3"}) as writer:
        writer.add(row)
        result = load_result(tmp_path / "r")
    (read,) = result.rows
    assert (read.variant, read.updates, read.accuracy, read.bytes) == (row.variant, 300, 1 / 3, 1e9 / 7)
    assert math.isnan(read.loss)
    assert result.scenario == SCENARIO
    assert result.environment == {"python": "3"}


def test_an_interrupted_result_keeps_what_is_finished_and_goes_on(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, SCENARIO, {}) as writer:
        writer.add(Row("push", 1, 0, 0))
        writer.add(Row("push", 1, 1, 10))
        writer.finish(("push", 1))
        writer.add(Row("push", 2, 0, 0))
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("push,2,1.0,1")  # killed within a line
    assert len(load_result(tmp_path).rows) == 3
    with ResultWriter(tmp_path, SCENARIO, {}) as writer:
        assert writer.finished == {("push", 1)}
        writer.add(Row("push", 2, 0, 0))
        writer.finish(("push", 2))
    result = load_result(tmp_path)
    assert [(row.seed, row.round) for row in result.rows] == [(1, 0), (1, 1), (2, 0)]
    assert result.finished == {("push", 1), ("push", 2)}
    assert (result.variants(), result.seeds("push"), len(result.of("push", 1))) == (["push"], [1, 2], 2)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    ResultWriter(tmp_path / "a", SCENARIO, {}).__exit__(None, None, None)
    with pytest.raises(UserError, match="another scenario; choose another --out"):
        ResultWriter(tmp_path / "a", Scenario("y"), {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        ResultWriter(tmp_path / "b", SCENARIO, {})
    with pytest.raises(UserError, match="not the folder of a result"):
        load_result(tmp_path / "b")


def test_the_rows_are_written_as_parquet_too(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with ResultWriter(tmp_path, SCENARIO, {}) as writer:
        writer.add(Row("push", 1, 0, 0, accuracy=0.5))
        assert writer.write_parquet()
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist()[0]["accuracy"] == 0.5
