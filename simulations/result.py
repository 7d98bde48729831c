"""What a simulation gives: rows, one each time the peers are evaluated, written to a folder as they come.

    RESULT/
        scenario.toml      the scenario as it was run, with every default
        rows.csv           one line a row, flushed at once: what is there survives Ctrl-C and kill -9
        rows.parquet       the same at the end, where pyarrow is installed
        cells.csv          a line for each variant and seed that is finished: a repeated run skips these
        environment.json   versions, machine, when

The engines make rows; `runner` drives them; `report` and `plots` show them.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from gossipml.errors import UserError
from gossipml.simulations.scenario import Scenario
from gossipml.simulations.scenario_file import load_scenario, write_scenario

NAN = math.nan
Cell = tuple[str, int]
"""Variant and seed."""


@dataclass(frozen=True)
class Row:
    """The state of one simulation at one moment. Accuracies are shares from 0 to 1; NaN: not measured.

    Peers are the honest ones that are there (alive) at that moment.
    """

    variant: str
    seed: int
    round: float
    """Virtual seconds by `round_seconds`."""
    seconds: float
    """Virtual."""
    updates: int = 0
    """Local rounds of training that all peers together have finished."""
    accuracy: float = NAN
    """Mean over peers of the accuracy on the common test data."""
    accuracy_std: float = NAN
    accuracy_min: float = NAN
    accuracy_max: float = NAN
    accuracy_average: float = NAN
    """Of the model that is the mean of all peers' models."""
    accuracy_served: float = NAN
    """Of what peers serve, an average of what came of their merges: the mean over some of them."""
    loss: float = NAN
    """Mean over peers of the loss on the test data."""
    consensus: float = NAN
    """Root mean square distance of the peers' parameters from their mean, relative to the norm of the mean."""
    variance: float = NAN
    """Of each parameter over the peers, the mean over all parameters."""
    bytes: float = 0.0
    """Sent by a peer so far, the mean over peers: bodies of messages."""
    messages: float = 0.0
    """Sent by a peer so far, the mean over peers."""
    alive: int = 0
    wall: float = NAN
    """Seconds that this simulation has taken so far; the runner sets it."""


COLUMNS = tuple(each.name for each in fields(Row))


@dataclass(frozen=True)
class Progress:
    """How far a simulation is, between rows; for the progress bar. An engine gives one a few times a second or less."""

    round: float


class Engine(Protocol):
    """How simulations are run: the module `gossipml.simulations.NAME` has `check` and `run`.

    The population's graphs are also what the report draws: `gossipml.simulations.topologies.edges(topology, peers,
    seed)` gives them as (E, 2) numbers of peers, each undirected edge once; none for `peer-sampling`.
    """

    def check(self, scenario: Scenario, device: str) -> list[str]:
        """Before anything starts: sentences of warning (a graph that is not connected). UserError for what cannot be
        done: not enough memory (with what would fit), a trace with holes, a model that the engine cannot train."""
        ...

    def run(self, scenario: Scenario, seed: int, device: str) -> Iterator[Row | Progress]:
        """One variant (`scenario.chosen`; no further variants in it) with one seed: a row at the start, one every
        `evaluate_every` rounds and one at the end. Deterministic. `device` is auto, cpu or cuda."""
        ...


class ResultWriter:
    """Writes one result; use as a context manager. Opening an unfinished one of the same scenario goes on with it."""

    def __init__(self, folder: Path, scenario: Scenario, environment: Mapping[str, object]) -> None:
        """UserError when the folder holds something else."""
        self.folder = folder
        text = write_scenario(scenario)
        path = folder / "scenario.toml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if path.read_text(encoding="utf-8") != text:
                    raise UserError(f"{folder} holds the result of another scenario; choose another --out")
                self._drop_unfinished()
            elif any(folder.iterdir()):
                raise UserError(f"{folder} is not empty and holds no result; choose another --out")
            path.write_text(text, encoding="utf-8")
            (folder / "environment.json").write_text(json.dumps(dict(environment), indent=2) + "\n", encoding="utf-8")
            self._rows, self._row_lines = self._append("rows.csv", COLUMNS)
            self._cells, self._cell_lines = self._append("cells.csv", ("variant", "seed"))
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None
        self.finished: set[Cell] = finished_cells(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._rows.close()
        self._cells.close()

    def add(self, row: Row) -> None:
        """One more row, on the disk when this returns (of the process; not synced)."""
        self._row_lines.writerow([_text(value) for value in dataclasses.astuple(row)])
        self._rows.flush()

    def finish(self, cell: Cell) -> None:
        """All rows of this variant and seed are there."""
        self._cell_lines.writerow(cell)
        self._cells.flush()
        self.finished.add(cell)

    def write_parquet(self) -> bool:
        """The rows once more as Parquet; False where pyarrow is not installed."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            return False
        rows = [dataclasses.asdict(row) for row in read_rows(self.folder)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), str(self.folder / "rows.parquet"))
        return True

    def _append(
        self, name: str, columns: tuple[str, ...]
    ) -> tuple[TextIOWrapper, Any]:  # Any: a csv.writer, whose type has no name
        path = self.folder / name
        new = not path.exists()
        file = path.open("a", encoding="utf-8", newline="")
        lines = csv.writer(file)
        if new:
            lines.writerow(columns)
            file.flush()
        return file, lines

    def _drop_unfinished(self) -> None:
        """Rows of variants that were interrupted go: they are simulated anew."""
        finished = finished_cells(self.folder)
        rows = [row for row in read_rows(self.folder) if (row.variant, row.seed) in finished]
        path = self.folder / "rows.csv"
        fresh = path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            lines.writerows([_text(value) for value in dataclasses.astuple(row)] for row in rows)
        fresh.replace(path)


@dataclass(frozen=True)
class Result:
    """A result, read back."""

    folder: Path
    scenario: Scenario
    rows: list[Row]
    finished: set[Cell]
    environment: dict[str, object]

    def variants(self) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(row.variant for row in self.rows))

    def seeds(self, variant: str) -> list[int]:
        return list(dict.fromkeys(row.seed for row in self.rows if row.variant == variant))

    def of(self, variant: str, seed: int) -> list[Row]:
        """The rows of one simulation in their order."""
        return [row for row in self.rows if row.variant == variant and row.seed == seed]


def load_result(where: str | Path) -> Result:
    """UserError when the folder holds no result."""
    folder = Path(where).expanduser()
    if not (folder / "scenario.toml").is_file() or not (folder / "rows.csv").is_file():
        raise UserError(f"{where} is not the folder of a result; `gossipml simulate run` makes one and says where")
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    scenario = load_scenario(str(folder / "scenario.toml"))
    return Result(folder, scenario, read_rows(folder), finished_cells(folder), environment)


def merge_results(results: list[Result]) -> Result:
    """Several results as one, each variant with the name of its scenario (or folder) before it."""
    if len(results) == 1:
        return results[0]
    names = [result.scenario.name for result in results]
    if len(set(names)) < len(names):
        names = [str(result.folder) for result in results]
    rows, finished, figures = [], set[Cell](), []
    for name, result in zip(names, results, strict=True):
        rows += [dataclasses.replace(row, variant=f"{name}: {row.variant}") for row in result.rows]
        finished |= {(f"{name}: {variant}", seed) for variant, seed in result.finished}
        figures += [
            dataclasses.replace(figure, variant=f"{name}: {variant}")
            for figure in result.scenario.figure
            for variant in ([figure.variant] if figure.variant else result.variants())
        ]
    first = results[0]
    scenario = dataclasses.replace(
        first.scenario, name=" and ".join(names)[:100], description="", figure=tuple(figures), variant=()
    )
    return Result(first.folder, scenario, rows, finished, first.environment)


def read_rows(folder: Path) -> list[Row]:
    """The rows so far; a last line that was cut off is left out."""
    rows = []
    path = folder / "rows.csv"
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(_row(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is no row of a result") from None
    return rows


def finished_cells(folder: Path) -> set[Cell]:
    try:
        with (folder / "cells.csv").open(encoding="utf-8", newline="") as file:
            return {(line[0], int(line[1])) for line in list(csv.reader(file))[1:] if len(line) == 2}
    except FileNotFoundError:
        return set()


def _row(line: list[str]) -> Row:
    if len(line) != len(COLUMNS):
        raise ValueError("cut off")
    variant, *numbers = line
    values = dict(zip(COLUMNS[1:], numbers, strict=True))
    whole = {"seed", "updates", "alive"}
    parsed = {name: int(text) if name in whole else float(text or "nan") for name, text in values.items()}
    return Row(variant, **parsed)  # type: ignore[arg-type]  # whole numbers where the fields are


def _text(value: object) -> str:
    """Empty for NaN, as in other CSV files; floats so that they read back exactly."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return str(value)
