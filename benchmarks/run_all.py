"""Runs every benchmark, one after the other: python benchmarks/run_all.py (or `make bench`). Takes some minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    "startup.py",
    "transport.py",
    "http_latency.py",
    "serving.py",
    "dht_nodes.py",
    "four_peers.py",
    "swarm.py",
    "large_model.py",
    "name_to_manifest.py",
    "dht_1024.py",
    "simulator.py",
)
MINUTES = 20  # for each


def main() -> None:
    failed = []
    for program in PROGRAMS:
        print(f"\n== {program}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(program)), *sys.argv[1:]]
        try:
            if subprocess.run(command, timeout=60 * MINUTES, check=False).returncode:
                failed.append(program)
        except subprocess.TimeoutExpired:
            failed.append(f"{program} (over {MINUTES} minutes)")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
