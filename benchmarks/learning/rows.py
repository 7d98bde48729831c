"""What a row of the table is, and what comes of it: a figure, records for the CSV, a chart.

The module that measures a row is imported only when it does. Cells (a variant and a seed)
are independent of each other and go to as many processes as there are cores.
"""

from __future__ import annotations

import csv
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias, TypeVar

A = TypeVar("A")
B = TypeVar("B")

Record: TypeAlias = Mapping[str, str | int | float]
"""A line of the CSV; all of one row have the same columns."""


@dataclass(frozen=True)
class Settings:
    """How the user wants a row to be measured."""

    quick: bool = False
    """Fewer seeds and rounds: to see that it runs. Its figures are none."""
    processes: int = 1


COLOURS = 10  # of matplotlib; then lines are dashed


@dataclass(frozen=True)
class Chart:
    """Which columns of the records are drawn: a line for each `series` and seed, or, without `x`, a bar."""

    series: str
    y: str
    x: str = ""
    y_label: str = ""
    x_label: str = ""
    aim: float | None = None
    """A line to reach."""
    logarithmic: bool = False
    """The x axis; what is not above 0 is left out then."""


@dataclass(frozen=True)
class Outcome:
    ours: str
    reached: bool
    records: Sequence[Record]
    chart: Chart


class Skipped(Exception):
    """The row cannot be measured here; says why."""


@dataclass(frozen=True)
class Row:
    name: str
    case: str
    reference: str
    reach: str
    measured_by: str
    """MODULE:FUNCTION, from settings to outcome."""

    def measure(self, settings: Settings) -> Outcome:
        module, _, function = self.measured_by.partition(":")
        outcome: Outcome = getattr(importlib.import_module(module), function)(settings)
        return outcome


ROWS = (
    Row(
        "xor",
        "XOR, 2 and 3 peers, 100 seeds",
        "91 % (mean), 75 % (SLERP) published; 100 % alone",
        "100 of 100 seeds, with the mean and with SLERP",
        "row_xor:measure",
    ),
    Row(
        "six",
        "MNIST, 6 peers, at most 2 classes each",
        "64.6 ± 20.9 % published",
        "at least 97 %, std at most 0.5",
        "row_six:measure",
    ),
    Row(
        "iid",
        "MNIST, 100 peers (simulator), IID",
        "central training",
        "within 0.3 points",
        "row_hundred:iid",
    ),
    Row(
        "uneven",
        "MNIST, 100 peers, Dirichlet 0.1",
        "central training, FedAvg",
        "within 1.5 points of central, above FedAvg at equal bytes",
        "row_hundred:uneven",
    ),
    Row(
        "cifar",
        "CIFAR-10 images, cifar-cnn, 2 and 4 peers, real processes",
        "one process on all the data",
        "within 1 point, and the work of each peer halved (quartered)",
        "row_cifar:measure",
    ),
    Row(
        "bytes",
        "bytes to 97 % MNIST",
        "fp32 push",
        "at most 1/8 of the bytes, at most 0.3 points lost",
        "row_bytes:measure",
    ),
    Row(
        "liars",
        "20 % liars (NaN, sign flip, x100, stale, noise)",
        "plain mean",
        "within 2 points of clean",
        "row_liars:measure",
    ),
    Row(
        "workers",
        "one peer, MLP 784-512-256-10, MSE, batch 128, 2 workers",
        "1.69 times published for 2",
        "at least 1.7 times one worker",
        "row_speed:workers",
    ),
    Row(
        "ddp",
        "4 real peers on 2 cores, time to 97 % MNIST",
        "torch DDP with gloo, 4 ranks, same machine, same run",
        "less wall time than DDP",
        "row_speed:ddp",
    ),
)


def in_processes(measure: Callable[[A], B], cells: Iterable[A], settings: Settings) -> list[B]:
    """`measure` of each cell, in the order of the cells. It is a function of a module: processes import it."""
    cells = list(cells)
    count = min(settings.processes, len(cells))
    if count <= 1:
        begin_process()
        return [measure(cell) for cell in cells]
    with ProcessPoolExecutor(count, get_context("spawn"), begin_process) as pool:
        return list(pool.map(measure, cells))


def begin_process() -> None:
    """One thread of torch a process: as a peer has, and the same sums whatever the machine has."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the worker does


def write_records(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        lines.writeheader()
        lines.writerows(records)


def draw(path: Path, row: Row, outcome: Outcome) -> bool:
    """The chart as a picture; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, records = outcome.chart, outcome.records
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    series = list(dict.fromkeys(record[chart.series] for record in records))
    for number, name in enumerate(series):
        mine = [record for record in records if record[chart.series] == name]
        if chart.x:
            for seed in dict.fromkeys(record.get("seed") for record in mine):
                points = sorted((float(r[chart.x]), float(r[chart.y])) for r in mine if r.get("seed") == seed)
                if chart.logarithmic:
                    points = [(x, y) for x, y in points if x > 0]
                if not points:
                    continue
                label = str(name) if seed == mine[0].get("seed") else None
                line = "-" if number < COLOURS else "--"
                marker = "." if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), f"{marker}{line}", color=f"C{number % COLOURS}", label=label)
        else:
            axes.bar(str(name), _mean(float(record[chart.y]) for record in mine))
    if chart.aim is not None:
        axes.axhline(chart.aim, linestyle="--", color="grey", linewidth=1, label="to be reached")
    if chart.logarithmic:
        axes.set_xscale("log")
    axes.set(title=row.case, xlabel=chart.x_label or chart.x, ylabel=chart.y_label or chart.y)
    if chart.x:
        axes.legend(fontsize="small")
    else:
        axes.tick_params(axis="x", labelrotation=20)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def mnist() -> str:
    """The source of MNIST. Skipped where it is missing."""
    folder = data_folder() / "mnist"
    if not folder.is_dir():
        raise Skipped(f"no MNIST in {folder.parent}; set GOSSIPML_DATASETS to the folder that holds mnist/")
    return f"mnist:{folder}"


def data_folder() -> Path:
    return Path(os.environ.get("GOSSIPML_DATASETS", Path(__file__).resolve().parents[3] / "shared" / "data"))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


sys.path.append(str(Path(__file__).resolve().parents[1]))  # the other benchmarks, which rows may call
