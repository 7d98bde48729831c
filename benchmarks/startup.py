"""How fast it starts and how much memory it takes: `gossipml --help`, `peer start` to `/healthz`, a peer in training.

    python benchmarks/startup.py [--runs 5]

Resident memory is that of the daemon and its training process together while `mnist-mlp` trains on all of MNIST.
Pages that both map, such as the interpreter, are counted once (PSS) and, beside it, twice (RSS). Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ask, data_folder, running_peers, status

TRAINING_SECONDS = 8.0


def help_seconds() -> float:
    begun = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("gossipml")), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def health_seconds() -> float:
    """From the start of the process to the first answer of /healthz."""
    with tempfile.TemporaryDirectory(prefix="gossipml-bench-") as folder:
        begun = time.perf_counter()
        with running_peers(Path(folder), [{"model": "digits-mlp"}]) as (api,):
            ask(api, "/healthz")
            return time.perf_counter() - begun


def memory() -> tuple[float, float, float]:
    """MB of daemon and worker together as PSS and as RSS, and of the daemon alone (RSS)."""
    source = f"mnist:{data_folder() / 'mnist'}"
    with (
        tempfile.TemporaryDirectory(prefix="gossipml-bench-") as folder,
        running_peers(Path(folder), [{"model": "mnist-mlp", "data": source}]) as (api,),
    ):
        until = time.monotonic() + 60
        while status(api)["state"] != "training" and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(TRAINING_SECONDS)
        daemon = int((Path(folder) / "peer0" / "run.json").read_text().split('"pid":')[1].split(",")[0])
        tasks = Path(f"/proc/{daemon}/task").glob("*/children")
        workers = [int(child) for task in tasks for child in task.read_text().split()]
        both = [daemon, *workers]
        return (
            sum(_kilobytes(pid, "Pss:") for pid in both) / 1e3,
            sum(_kilobytes(pid, "Rss:") for pid in both) / 1e3,
            _kilobytes(daemon, "Rss:") / 1e3,
        )


def _kilobytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise SystemExit(f"no {field} of process {pid}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = range(parser.parse_args().runs)
    print(f"gossipml --help:          {statistics.median(help_seconds() for _ in runs):.2f} s (aim: under 0.3)")
    print(f"peer start to /healthz:   {statistics.median(health_seconds() for _ in runs):.2f} s (aim: under 3)")
    pss, rss, daemon = memory()
    print(f"a peer training MNIST:    {pss:.0f} MB PSS, {rss:.0f} MB RSS (daemon {daemon:.0f}; aim: under 400)")


if __name__ == "__main__":
    main()
