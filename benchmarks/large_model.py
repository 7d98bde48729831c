"""A model larger than the memory that it may take: imported, fetched by another peer, exported; peak RSS of each side.

    python benchmarks/large_model.py --gigabytes 2.5

Real processes on loopback, the commands of the command line. The limit is 400 MB for each daemon and each command.
Needs four times the size on the disk of --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ask, running_peers

from gossipml.daemon.home import Home

LIMIT_MB = 400
CHUNK = 4 << 20


def write_model(path: Path, size: int) -> None:
    """A safetensors file of `size` bytes with one tensor, whose content does not repeat."""
    values = size // 4
    header = json.dumps({"weight": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        left = 4 * values
        while left:
            left -= file.write(os.urandom(min(CHUNK, left)))


def command(home: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak RSS (MB) of a `gossipml models` command."""
    begun = time.monotonic()
    program = [sys.executable, "-P", "-m", "gossipml", "--home", str(home), "models", *arguments]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=1200)
    if process.returncode:
        raise SystemExit(err.decode())
    return time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


def same(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while piece := a.read(CHUNK):
            if piece != b.read(CHUNK):
                return False
        return not b.read(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go, for a while")
    options = parser.parse_args()
    size = int(options.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_model(folder / "large.safetensors", size)
        quiet: dict[str, object] = {"model": "xor", "train": False, "lan": False, "replicas": 1}
        with running_peers(folder, [quiet, quiet]) as apis:
            homes = [folder / "peer0", folder / "peer1"]
            while not all(ask(api, "/v1/status")["neighbours"] for api in apis):
                time.sleep(0.1)
            rows = {"publish": command(homes[0], "publish", "large", "--file", str(folder / "large.safetensors"))}
            (folder / "large.safetensors").rename(folder / "original")
            rows["pull"] = command(homes[1], "pull", "large")
            rows["export"] = command(homes[1], "export", "large", str(folder / "exported"))
            infos = [Home(home).require_run_info() for home in homes]
            daemons = [peak_mb(info.pid) for info in infos]
            if not same(folder / "original", folder / "exported"):
                raise SystemExit("what was exported is not what was published")
        print(f"{size / 1e9:.2f} GB, every byte the same at the end")
        for step, (seconds, _) in rows.items():
            print(f"{step:<8} {seconds:7.1f} s  {size / seconds / 1e6:7.0f} MB/s")
        print(f"peak RSS: publisher's daemon {daemons[0]:.0f} MB, fetcher's daemon {daemons[1]:.0f} MB, "
              f"largest command {max(peak for _, peak in rows.values()):.0f} MB (limit {LIMIT_MB})")  # fmt: skip
        if max(*daemons, *(peak for _, peak in rows.values())) > LIMIT_MB:
            raise SystemExit(f"over {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
