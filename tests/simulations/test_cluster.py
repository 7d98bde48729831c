"""Twenty real peers, an hour of virtual time, every kind of trouble, twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = "7"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_hour_of_trouble_ends_well_and_the_same_way_twice() -> None:
    program = str(Path(__file__).with_name("hour.py"))
    runs = [
        subprocess.Popen(
            [sys.executable, "-P", program, SEED],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        )
        for hash_seed in ("1", "2")  # the two at the same time, one on each core
    ]
    outputs = [run.communicate(timeout=380) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs[0][1]
    first, second = (json.loads(out) for out, _ in outputs)

    assert first["seconds"] == 3600
    assert first["events"] > 20_000
    assert first == second, "one seed, two traces"

    assert first["met"] == 19, "in ten minutes everybody has heard of everybody"
    # A round takes a minute: nobody waited for the dead, nor for the other half.
    assert first["rounds without them"] >= 9
    assert first["rounds after"] >= first["rounds before"], "a restarted peer goes on where it was"
    assert first["rounds apart"] >= 13
    assert first["running"] == 20
    assert first["neighbours"] >= 5
    assert first["crashed parts"] == 0
    # At most two of five classes lie with each peer: alone none would pass 0.4.
    assert first["accuracy"] > 0.85
    assert first["spread"] < first["spread apart"] / 2, "the healed halves come to agree"
