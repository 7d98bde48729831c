"""Sweeps: every combination once, what is done is skipped, a failure holds nobody up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossipml.errors import UserError
from gossipml.simulations.result import load_result
from gossipml.simulations.scenario import Scenario, Variant
from gossipml.simulations.sweep import (
    Task,
    in_processes,
    is_done,
    make_cells,
    on_ray,
    parse_sweep,
    run_sweep,
    run_task,
    summarise_sweep,
)

SCENARIO = Scenario("vectors", peers=8, rounds=3, model="vector:4", compression="float32", merge="mean")


def here(tasks: list[Task]) -> Iterator[tuple[int, str]]:
    for number, task in enumerate(tasks):
        yield number, run_task(task)


def test_every_combination_is_a_cell_and_wins_over_the_variants() -> None:
    scenario = Scenario(**{**vars(SCENARIO), "variant": (Variant("a", (("peers", 4), ("network.loss", 0.5))),)})
    cells = make_cells(scenario, [parse_sweep("peers=8,16"), parse_sweep("protocol=push:1,push:2")])
    assert [cell.name for cell in cells] == [
        "peers=8,protocol=push_1",
        "peers=8,protocol=push_2",
        "peers=16,protocol=push_1",
        "peers=16,protocol=push_2",
    ]
    (variant,) = cells[2].scenario.variants()
    assert (variant.peers, variant.protocol, variant.network.loss) == (16, "push:1", 0.5)
    assert parse_sweep("seeds=[[1, 2], [3]]") == ("seeds", [[1, 2], [3]])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["peers"], "field=a,b,c"),
        (["peers=8,8"], "a value twice"),
        (["peers=8", "peers=9"], "each field once"),
        (["peerz=8"], "did you mean peers"),
        (["peers=8,0"], "peers=0: peers 0 is not from 1"),
    ],
)
def test_a_wrong_sweep_is_refused_before_it_runs(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_cells(SCENARIO, [parse_sweep(text) for text in texts])


def test_a_sweep_goes_on_where_it_was_and_makes_a_table(tmp_path: Path) -> None:
    cells = make_cells(SCENARIO, [parse_sweep("network.loss=0,0.5")])
    run: list[str] = []
    assert run_sweep(cells[:1], tmp_path, "cpu", here, lambda cell, error: run.append(cell.name)) == []
    assert is_done(cells[0], tmp_path) and not is_done(cells[1], tmp_path)
    assert run_sweep(cells, tmp_path, "cpu", here, lambda cell, error: run.append(cell.name)) == []
    assert run == ["network.loss=0", "network.loss=0.5"]
    lines = summarise_sweep(cells, tmp_path)
    assert [line.end.round for _, line in lines] == [3, 3]
    assert lines[0][1].end.variance < lines[1][1].end.variance
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0].startswith("network.loss,variant,seeds,round") and len(table) == 3


def test_a_cell_that_fails_says_why_and_the_others_run(tmp_path: Path) -> None:
    cells = make_cells(SCENARIO, [parse_sweep("network.loss=0,0.5")])
    (tmp_path / cells[0].name).mkdir()
    (tmp_path / cells[0].name / "thesis.tex").write_text("x")
    ((cell, error),) = run_sweep(cells, tmp_path, "cpu", here)
    assert cell is cells[0] and "not empty" in error
    assert is_done(cells[1], tmp_path)


@pytest.mark.real
def test_processes_give_the_same_as_one(tmp_path: Path) -> None:
    cells = make_cells(SCENARIO, [parse_sweep("network.loss=0,0.5")])
    assert run_sweep(cells, tmp_path / "two", "cpu", in_processes(2)) == []
    assert run_sweep(cells, tmp_path / "one", "cpu", here) == []
    for cell in cells:
        one, two = (load_result(tmp_path / place / cell.name).rows for place in ("one", "two"))
        assert [row.variance for row in one] == [row.variance for row in two]


class FakeRay:
    """The calls of Ray that are used; tasks run when they are waited for, the last one first."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def init(self, **options: Any) -> None:
        self.calls.append("init")

    def remote(self, function: Callable[[Task], str]) -> Any:
        class Remote:
            @staticmethod
            def remote(task: Task) -> Callable[[], str]:
                return lambda: function(task)

        return Remote

    def wait(self, running: list[Callable[[], str]], num_returns: int) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        return [running[-1]], running[:-1]

    def get(self, done: Callable[[], str]) -> str:
        return done()

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_cells_run_on_ray_in_any_order(tmp_path: Path) -> None:
    cells, ray, order = make_cells(SCENARIO, [parse_sweep("network.loss=0,0.5")]), FakeRay(), list[str]()
    assert run_sweep(cells, tmp_path, "cpu", on_ray(ray), lambda cell, error: order.append(cell.name)) == []
    assert order == ["network.loss=0.5", "network.loss=0"]
    assert ray.calls == ["init", "shutdown"]
    assert all(is_done(cell, tmp_path) for cell in cells)
