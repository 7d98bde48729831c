"""Drives an engine through a scenario: every variant with every seed, rows to the disk as they come.

What is finished in the folder already is not simulated again, so that an interrupted run goes on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from gossipml.env.real import RealClock
from gossipml.errors import UserError
from gossipml.simulations.result import Cell, Engine, Progress, ResultWriter, Row
from gossipml.simulations.scenario import Scenario

PACKAGES = ("gossipml", "torch", "numpy")


class Watcher(Protocol):
    """Who is told how a run goes."""

    def warn(self, text: str) -> None: ...

    def begin(self, cells: list[tuple[Cell, float]], skipped: int) -> None:
        """What will be simulated, with the rounds of each, and how many were finished before."""

    def advance(self, cell: Cell, round: float) -> None: ...

    def row(self, row: Row) -> None: ...

    def finish(self, cell: Cell) -> None: ...


class Silent:
    """Nobody watches."""

    def warn(self, text: str) -> None:
        pass

    def begin(self, cells: list[tuple[Cell, float]], skipped: int) -> None:
        pass

    def advance(self, cell: Cell, round: float) -> None:
        pass

    def row(self, row: Row) -> None:
        pass

    def finish(self, cell: Cell) -> None:
        pass


def load_engine(name: str) -> Engine:
    return cast(Engine, importlib.import_module(f"gossipml.simulations.{name}"))


def run_scenario(scenario: Scenario, folder: Path, device: str = "auto", watcher: Watcher | None = None) -> None:
    """Simulate what the folder does not hold yet. Blocks. UserError before the start when a variant cannot be run.

    KeyboardInterrupt leaves the folder readable, with every row so far.
    """
    watcher = watcher or Silent()
    variants = [with_data(variant) for variant in scenario.variants()]
    warnings = [warning for variant in variants for warning in load_engine(variant.engine).check(variant, device)]
    for warning in dict.fromkeys(warnings):
        watcher.warn(warning)
    clock = RealClock()
    with ResultWriter(folder, scenario, environment(device)) as writer:
        todo = [
            ((variant.chosen, seed), variant)
            for variant in variants
            for seed in scenario.seeds
            if (variant.chosen, seed) not in writer.finished
        ]
        skipped = len(variants) * len(scenario.seeds) - len(todo)
        watcher.begin([(cell, variant.seconds / variant.round_seconds) for cell, variant in todo], skipped)
        for cell, variant in todo:
            start = clock.now()
            for each in load_engine(variant.engine).run(variant, cell[1], device):
                if isinstance(each, Progress):
                    watcher.advance(cell, each.round)
                    continue
                row = replace(each, wall=clock.now() - start)
                writer.add(row)
                watcher.advance(cell, row.round)
                watcher.row(row)
            writer.finish(cell)
            watcher.finish(cell)
        writer.write_parquet()


def with_data(scenario: Scenario) -> Scenario:
    """The scenario with `~` and `$NAME` in its data replaced; UserError when the data is not there."""
    if not scenario.data:
        return scenario
    from gossipml.models.data import check_source

    name, colon, argument = scenario.data.partition(":")
    data = f"{name}{colon}{os.path.expanduser(os.path.expandvars(argument))}"
    try:
        check_source(data)
    except UserError as error:
        raise UserError(f"{error}; say where it lies with --data {name}:...") from None
    return replace(scenario, data=data)


def environment(device: str) -> dict[str, object]:
    """Where a result was made."""
    clock = RealClock()
    return {
        "when": clock.wall(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
