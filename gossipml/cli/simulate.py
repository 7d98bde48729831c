"""`gossipml simulate`: thousands of virtual peers, to see what a protocol, a topology or a failure does."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossipml.cli.common import is_terminal, print_json
from gossipml.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gossipml.cli.simulate_view import LinesView
    from gossipml.simulations.result import Result
    from gossipml.simulations.scenario import Scenario

app = typer.Typer(help="Simulate networks of peers: protocols, topologies, failures, liars.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
ScenarioName = Annotated[str, typer.Argument(metavar="FILE.toml|NAME", help="See `gossipml simulate list`.")]
RESULTS = Path("results")
ENGINES = "population, discrete, or ray for a sweep on a Ray cluster"
RAY = "ray"


@app.command("list", epilog="Example: gossipml simulate list")
def list_scenarios(as_json: Json = False) -> None:
    """List the scenarios that come along."""
    from gossipml.simulations.scenario_file import parse_scenario, shipped_scenarios

    scenarios = [parse_scenario(text, name) for name, text in shipped_scenarios().items()]
    if as_json:
        print_json(
            [{"name": s.name, "description": s.description, "reference": asdict(s.reference)} for s in scenarios]
        )
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("scenario", no_wrap=True)
    table.add_column("peers", justify="right")
    table.add_column("what", overflow="fold")
    for each in scenarios:
        cited = f" ({each.reference.cited})" if each.reference.title else ""
        table.add_row(each.name, str(each.peers), each.description + cited)
    _console().print(table, markup=False)


@app.command("run", epilog="Example: gossipml simulate run quick")
def run(
    file: ScenarioName,
    seed: Annotated[
        list[int] | None, typer.Option(help="Instead of the scenario's; may be given several times.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Instead of the scenario's.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Where the data lies, as mnist:DIR.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another field, as network.loss=0.1.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=A,B,...", help="Run once for each value; several give every combination."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Processes of a sweep.")] = 1,
    engine: Annotated[str | None, typer.Option(help=ENGINES + ".")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; else results/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Run a scenario, or a sweep over some of its fields; write rows, plots and a report.

    Ctrl-C keeps what is done; the same command goes on from there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown; choose one of auto, cpu, cuda")
    scenario = _scenario(file, seed, rounds, data, setting, None if engine == RAY else engine)
    if sweep:
        _run_sweep(scenario, sweep, jobs, out or _sweep_folder(scenario), device, engine == RAY, as_json)
        return
    folder = out or _folder(scenario)
    if engine == RAY:
        raise UserError("--engine ray distributes the cells of a sweep; give --sweep field=a,b,c with it")
    result = _run_one(scenario, folder, device, as_json)
    files = _write_report(result)
    if as_json:
        print_json(_as_json(result) | {"files": [str(each) for each in files]})
    else:
        _print_result(result, files)


@app.command("compare", epilog="Example: gossipml simulate compare results/quick results/quick-2")
def compare(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Folders of results, or scenarios, which are run first.")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="The HTML file that shows them together.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Put several results side by side, in one table and one report."""
    from gossipml.simulations.report import write_report
    from gossipml.simulations.result import load_result, merge_results

    results = []
    for each in files:
        if (Path(each) / "scenario.toml").is_file():
            results.append(load_result(each))
        else:
            scenario = _scenario(each, None, None, None, None, None)
            results.append(_run_one(scenario, _folder(scenario), device, as_json))
    merged = merge_results(results)
    write_report(merged, out)
    if as_json:
        print_json(_as_json(merged) | {"files": [str(out)]})
    else:
        _print_result(merged, [out])


@app.command("plot", epilog="Example: gossipml simulate plot results/quick")
def plot(
    result: Annotated[str, typer.Argument(metavar="RESULT", help="The folder of a result.")], as_json: Json = False
) -> None:
    """Write the plots and the report of a result once more, also of one that is not finished."""
    from gossipml.simulations.result import load_result

    files = _write_report(load_result(result))
    if as_json:
        print_json({"files": [str(each) for each in files]})
    else:
        _print_files(files)


def _scenario(
    file: str,
    seeds: list[int] | None,
    rounds: int | None,
    data: str | None,
    settings: list[str] | None,
    engine: str | None,
) -> Scenario:
    from gossipml.simulations.scenario_file import load_scenario, override, parse_setting

    scenario = load_scenario(file)
    options = {"seeds": seeds, "rounds": rounds, "data": data, "engine": engine}
    given: list[tuple[str, object]] = [(name, value) for name, value in options.items() if value is not None]
    scenario = override(scenario, [*given, *map(parse_setting, settings or [])], "the command line")
    # A variant that sets a field by itself would hide what the command line says.
    fixed = {name for name, _ in given} | {parse_setting(text)[0] for text in settings or []}
    variants = tuple(
        replace(variant, overrides=tuple(pair for pair in variant.overrides if pair[0] not in fixed))
        for variant in scenario.variant
    )
    return replace(scenario, variant=variants)


def _folder(scenario: Scenario) -> Path:
    """`results/NAME`, or with a number when another scenario's result lies there."""
    from gossipml.simulations.scenario_file import write_scenario

    text = write_scenario(scenario)
    name = _file_name(scenario)
    number = 1
    while True:
        folder = RESULTS / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
        file = folder / "scenario.toml"
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return folder
        number += 1


def _sweep_folder(scenario: Scenario) -> Path:
    return RESULTS / f"{_file_name(scenario)}-sweep"


def _file_name(scenario: Scenario) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in scenario.name)


def _run_one(scenario: Scenario, folder: Path, device: str, as_json: bool) -> Result:
    from gossipml.simulations.result import load_result
    from gossipml.simulations.runner import run_scenario

    console = _console(stderr=as_json)
    try:
        with _view(console) as view:
            run_scenario(scenario, folder, device, view)
    except KeyboardInterrupt:
        if (folder / "rows.csv").exists():
            console.print(f"stopped; what is done is kept in {folder}, the same command goes on from there")
        raise
    return load_result(folder)


def _run_sweep(
    scenario: Scenario, texts: list[str], jobs: int, folder: Path, device: str, ray: bool, as_json: bool
) -> None:
    from gossipml.simulations import sweep

    cells = sweep.make_cells(scenario, [sweep.parse_sweep(text) for text in texts])
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(sweep.is_done(cell, folder) for cell in cells)
    console = _console(stderr=as_json)
    if done:
        console.print(f"{done} of {len(cells)} cells were done before")

    def tell(cell: sweep.SweepCell, error: str) -> None:
        nonlocal done
        done += not error
        console.print(f"{done} of {len(cells)}: {cell.name}" + (f": {error}" if error else ""), markup=False)

    try:
        failed = sweep.run_sweep(cells, folder, device, sweep.on_ray() if ray else sweep.in_processes(jobs), tell)
    except KeyboardInterrupt:
        console.print(f"stopped; what is done is kept in {folder}, the same command goes on from there")
        raise
    lines = sweep.summarise_sweep(cells, folder)
    if as_json:
        ends = [
            {
                "settings": dict(cell.settings),
                **{name: _number(value) for name, value in asdict(line.end).items() if name != "seed"},
            }
            for cell, line in lines
        ]
        print_json({"folder": str(folder), "cells": ends, "failed": [cell.name for cell, _ in failed]})
    else:
        from gossipml.cli.simulate_view import sweep_table

        console = _console()
        console.print(sweep_table(lines, console.width), markup=False)
        _print_files([folder / "table.csv"])
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed; the first: {failed[0][0].name}: {failed[0][1]}")


def _write_report(result: Result) -> list[Path]:
    from gossipml.simulations.plots import write_plots
    from gossipml.simulations.report import write_report

    report = result.folder / "report.html"
    write_report(result, report)
    return [report, *write_plots(result, result.folder)]


def _as_json(result: Result) -> dict[str, Any]:  # Any: JSON
    from gossipml.simulations.summary import compare_figures, summarise

    return {
        "scenario": result.scenario.name,
        "folder": str(result.folder),
        "variants": [
            {
                "seeds": line.seeds,
                "complete": line.complete,
                "updates_per_second": _number(line.updates_per_second),
                "accuracy_error": _number(line.accuracy_error),
                **{name: _number(value) for name, value in asdict(line.end).items() if name != "seed"},
            }
            for line in summarise(result)
        ],
        "figures": [asdict(each) for each in compare_figures(result)],
    }


def _number(value: Any) -> Any:  # Any: JSON, which has no NaN
    return None if value != value else value


def _print_result(result: Result, files: list[Path]) -> None:
    from gossipml.cli.simulate_view import figures_table, summary_table
    from gossipml.simulations.summary import compare_figures, summarise

    console = _console()
    console.print(summary_table(summarise(result), console.width), markup=False)
    reference = result.scenario.reference
    if figures := compare_figures(result):
        console.print(figures_table(figures), markup=False)
    if reference.title:
        console.print(f"published: {reference.cited}. {reference.where}", markup=False)
    if reference.differs:
        console.print(f"here it differs: {reference.differs}", markup=False)
    _print_files([result.folder, *files])


def _print_files(files: list[Path]) -> None:
    print("written: " + ", ".join(map(str, files)))


def _view(console: Console) -> LinesView:
    from gossipml.cli.simulate_view import BarView, LinesView

    return BarView(console) if console.is_terminal else LinesView(console)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(width=None if is_terminal() else 200, stderr=stderr, highlight=False)
