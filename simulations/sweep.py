"""Sweeps: a scenario once for every combination of values of some fields, in parallel processes or on a Ray cluster.

    SWEEP/
        table.csv                          the end of every variant of every cell
        topology.degree=2,network.loss=0.1/    one cell: a whole result

A cell is done when its result is: a repeated sweep runs what is missing, and goes on where a cell was interrupted.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gossipml.errors import UserError
from gossipml.simulations.result import Row, load_result
from gossipml.simulations.runner import run_scenario
from gossipml.simulations.scenario import Scenario
from gossipml.simulations.scenario_file import override, parse_scenario, parse_value, write_scenario
from gossipml.simulations.summary import Line, summarise

MOST_CELLS = 10_000  # a slip of the finger: two fields with a hundred values each

Setting = tuple[str, object]


@dataclass(frozen=True)
class SweepCell:
    """One combination of values."""

    settings: tuple[Setting, ...]
    scenario: Scenario

    @property
    def name(self) -> str:
        """For its folder."""
        text = ",".join(f"{path}={value}" for path, value in self.settings)
        return re.sub(r"[^A-Za-z0-9.,=_-]+", "_", text)[:200]


Task = tuple[str, str, str]
"""What travels to another process: the scenario as TOML, the folder, the device."""
Distribute = Callable[[list[Task]], Iterator[tuple[int, str]]]
"""Runs tasks somewhere; for each that ended its number and what went wrong, if anything did."""


def parse_sweep(text: str) -> tuple[str, list[object]]:
    """`field=a,b,c`, or `field=[[1, 2], [3]]` for values that hold commas."""
    path, equals, values = text.partition("=")
    if not equals or not path.strip() or not values.strip():
        raise UserError(f"{text!r} is not field=a,b,c, for example network.loss=0,0.1,0.3")
    whole = parse_value(values) if values.lstrip().startswith("[") else None
    found = whole if isinstance(whole, list) else [parse_value(value.strip()) for value in values.split(",")]
    if len(found) != len({str(value) for value in found}):
        raise UserError(f"{text!r} gives a value twice")
    return path.strip(), found


def make_cells(scenario: Scenario, sweeps: list[tuple[str, list[object]]]) -> list[SweepCell]:
    """Every combination, each one checked; UserError before anything runs."""
    paths = [path for path, _ in sweeps]
    if len(set(paths)) < len(paths):
        raise UserError(f"the sweep gives {', '.join(paths)}: each field once")
    cells = []
    for values in itertools.islice(itertools.product(*(values for _, values in sweeps)), MOST_CELLS + 1):
        settings = tuple(zip(paths, values, strict=True))
        variants = tuple(
            replace(variant, overrides=tuple(pair for pair in variant.overrides if pair[0] not in paths))
            for variant in scenario.variant
        )
        where = " ".join(f"{path}={value}" for path, value in settings)
        changed = override(replace(scenario, variant=variants), settings, where)
        list(changed.variants())
        cells.append(SweepCell(settings, changed))
    if len(cells) > MOST_CELLS:
        raise UserError(f"the sweep has more than {MOST_CELLS:,} cells; give fewer values")
    return cells


def is_done(cell: SweepCell, folder: Path) -> bool:
    """Whether every variant and seed of the cell is in its folder, of just this scenario."""
    file = folder / cell.name / "scenario.toml"
    if not file.is_file() or file.read_text(encoding="utf-8") != write_scenario(cell.scenario):
        return False
    finished = load_result(folder / cell.name).finished
    return all((v.chosen, seed) in finished for v in cell.scenario.variants() for seed in cell.scenario.seeds)


def run_sweep(
    cells: list[SweepCell],
    folder: Path,
    device: str,
    distribute: Distribute,
    tell: Callable[[SweepCell, str], None] = lambda cell, error: None,
) -> list[tuple[SweepCell, str]]:
    """Run the cells that are not done; those that failed, with the reason. The others are not held up by them.

    `tell` hears of each cell that ended, and of the reason when it failed.
    """
    todo = [cell for cell in cells if not is_done(cell, folder)]
    tasks = [(write_scenario(cell.scenario), str(folder / cell.name), device) for cell in todo]
    failed = []
    for number, error in distribute(tasks):
        tell(todo[number], error)
        if error:
            failed.append((todo[number], error))
    return failed


def run_task(task: Task) -> str:
    """One cell, in whatever process: what went wrong, or nothing."""
    text, folder, device = task
    try:
        run_scenario(parse_scenario(text, folder), Path(folder), device)
    except UserError as error:
        return str(error)
    return ""


def in_processes(jobs: int) -> Distribute:
    """On this machine, so many at a time, with a share of its cores each."""

    def distribute(tasks: list[Task]) -> Iterator[tuple[int, str]]:
        # spawned, not forked: torch's threads do not survive a fork
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_share, initargs=(jobs,)) as pool:
            running = {pool.submit(run_task, task): number for number, task in enumerate(tasks)}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return distribute


def on_ray(ray: Any = None) -> Distribute:  # Any: the module, which comes without types; a test gives its own
    """On the Ray cluster that RAY_ADDRESS names, else on a new one here. Its machines share a file system."""
    try:
        ray = ray or importlib.import_module("ray")
    except ImportError:
        raise UserError("--engine ray needs Ray; install it with: pip install 'gossipml[ray]'") from None

    def distribute(tasks: list[Task]) -> Iterator[tuple[int, str]]:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        try:
            remote = ray.remote(run_task)
            running = {remote.remote(task): number for number, task in enumerate(tasks)}
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done), ray.get(done)
        finally:
            ray.shutdown()

    return distribute


def summarise_sweep(cells: list[SweepCell], folder: Path) -> list[tuple[SweepCell, Line]]:
    """The end of every variant of the cells that there are, and `table.csv` with it."""
    lines = [
        (cell, line)
        for cell in cells
        if (folder / cell.name / "rows.csv").is_file()
        for line in summarise(load_result(folder / cell.name))
    ]
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        paths = [path for path, _ in cells[0].settings]
        columns = [name for name in asdict(Row("", 0, 0, 0)) if name not in ("variant", "seed")]
        writer.writerow([*paths, "variant", "seeds", *columns])
        for cell, line in lines:
            end = asdict(line.end)
            writer.writerow(
                [*(value for _, value in cell.settings), line.variant, line.seeds, *(end[name] for name in columns)]
            )
    return lines


def _share(jobs: int) -> None:
    import os

    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
