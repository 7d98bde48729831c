"""The figures of learning: each row of the table in docs/learning-figures.md, measured here.

    python benchmarks/learning/run.py                    list the rows
    python benchmarks/learning/run.py all                measure them all; two hours on two cores
    python benchmarks/learning/run.py xor six            measure these
    python benchmarks/learning/run.py all --quick        see that all of them run; the figures are none

Writes NAME.csv and NAME.png of each row, and what the table shows to table.csv, into --out.
A row whose data are missing is skipped and says so. Seeds are fixed: the same machine gives the same accuracies, but
for rows with real processes, whose messages come when they come.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import sys
import time
from pathlib import Path

from rows import ROWS, Row, Settings, Skipped, draw, write_records

COLUMNS = ("row", "case", "reference", "reach", "ours", "reached", "seconds", "date", "machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows, or all")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and rounds")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at the same time (all cores)")
    results = Path(__file__).resolve().parents[1] / "results" / "learning"
    parser.add_argument("--out", type=Path, default=results)
    arguments = parser.parse_args()
    known = {row.name: row for row in ROWS}
    if not arguments.rows:
        for row in ROWS:
            print(f"{row.name:10} {row.case}; reach: {row.reach}")
        return
    unknown = [name for name in arguments.rows if name not in (*known, "all")]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; there are {', '.join(known)}, and all")
    chosen = ROWS if "all" in arguments.rows else [known[name] for name in dict.fromkeys(arguments.rows)]
    settings = Settings(arguments.quick, max(1, arguments.processes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [measured for row in chosen if (measured := measure(row, settings, arguments.out)) is not None]
    keep(arguments.out / "table.csv", lines)
    show(lines)
    if any(line["reached"] == "no" for line in lines) and not settings.quick:
        sys.exit(1)


def measure(row: Row, settings: Settings, out: Path) -> dict[str, str] | None:
    """The line of the table; None where the row was skipped."""
    print(f"== {row.name}: {row.case}", flush=True)
    begun = time.perf_counter()
    try:
        outcome = row.measure(settings)
    except Skipped as reason:
        print(f"skipped: {reason}", flush=True)
        return None
    seconds = time.perf_counter() - begun
    write_records(out / f"{row.name}.csv", outcome.records)
    if not draw(out / f"{row.name}.png", row, outcome):
        print("no plot: matplotlib is not installed (pip install 'gossipml[simulate]')")
    print(f"{outcome.ours}; to reach: {row.reach}; {'reached' if outcome.reached else 'NOT reached'}; {seconds:.0f} s")
    values = (
        *(row.name, row.case, row.reference, row.reach, outcome.ours),
        *("yes" if outcome.reached else "no", f"{seconds:.0f}"),
        *(datetime.date.today().isoformat(), f"{os.cpu_count()} cores, {platform.machine()}"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def keep(path: Path, lines: list[dict[str, str]]) -> None:
    """Rows measured before stay."""
    before: list[dict[str, str]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            before = [line for line in csv.DictReader(file) if line["row"] not in {new["row"] for new in lines}]
    order = [row.name for row in ROWS]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted([*before, *lines], key=lambda line: order.index(line["row"])))


def show(lines: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "reference", "reach", "ours", "reached", "s")
    for line in lines:
        table.add_row(*(line[name] for name in ("case", "reference", "reach", "ours", "reached", "seconds")))
    Console().print(table)


if __name__ == "__main__":
    main()
