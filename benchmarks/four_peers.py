"""Four peers train MNIST together: wall time to 95 % against one process with all the data and two threads.

    python benchmarks/four_peers.py [--target 0.95] [--runs 3]

Both train `mnist-mlp` with the same hyperparameters and the same loop. A peer has a quarter of the data (iid); the
four are ordinary `gossipml peer start` processes on loopback, DHT, TLS, HTTP and all. Time runs from the moment when
the model and the data are loaded (for the peers: when the last of them begins) to a mean test accuracy of the
target; time from the start of the processes, with the import of torch, is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import data_folder, running_peers, status

PEERS = 4
LIMIT = 120.0  # seconds for one run

CENTRAL = """
import json, sys, time
begun = float(sys.argv[3])
import torch
torch.set_num_threads(2)
from gossipml.models.central import train_central
from gossipml.models.data import load_source
from gossipml.models.registry import load_spec
result = train_central(load_spec("mnist-mlp"), load_source(sys.argv[1]), until=float(sys.argv[2]))
print(json.dumps({"training": result.seconds, "all": time.time() - begun, "accuracy": result.accuracy}))
"""


def central(source: str, target: float) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CENTRAL, source, str(target), str(time.time())],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def peers(source: str, target: float) -> dict[str, float]:
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="gossipml-bench-") as folder:
        options = [["--model", "mnist-mlp", "--data", source, "--part", f"{i + 1}/{PEERS}"] for i in range(PEERS)]
        with running_peers(Path(folder), options) as apis:
            loaded: float | None = None
            while time.time() - begun < LIMIT:
                answers = [status(api) for api in apis]
                if loaded is None and all(answer["state"] == "training" for answer in answers):
                    loaded = time.time()
                accuracies = [answer["accuracy"] or 0.0 for answer in answers]
                mean = statistics.fmean(accuracies)
                if loaded is not None and mean >= target:
                    now = time.time()
                    sent = statistics.fmean(answer["bytes_sent"] for answer in answers)
                    rounds = statistics.fmean(answer["round"] for answer in answers)
                    return {
                        "training": now - loaded,
                        "all": now - begun,
                        "accuracy": mean,
                        "sent": sent,
                        "rounds": rounds,
                    }
                time.sleep(0.05)
    raise SystemExit(f"the peers did not reach {target:.0%} in {LIMIT:.0f} s; the last mean was {mean:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    source = f"mnist:{data_folder() / 'mnist'}"
    ratios = []
    print(
        f"{'run':<6}{'one process':>14}{'four peers':>14}{'ratio':>8}   from the start of the processes   sent per peer"
    )
    for run in range(arguments.runs):  # one after the other in each run, so that both meet the same machine
        one, four = central(source, arguments.target), peers(source, arguments.target)
        ratios.append(four["training"] / one["training"])
        print(
            f"{run + 1:<6}{one['training']:>12.2f} s{four['training']:>12.2f} s{ratios[-1]:>8.2f}"
            f"   {one['all']:.1f} s and {four['all']:.1f} s{four['sent'] / 1e6:>26.1f} MB in {four['rounds']:.0f} rounds",
            flush=True,
        )
    print(f"median ratio to {arguments.target:.0%}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
