"""How fast models are encoded, decoded and merged, and how many bytes they take: python benchmarks/encoding.py

    python benchmarks/encoding.py [--parameters 8000000] [--runs 5]

One thread, and its own CPU time, so that what else the machine does counts for less. MB/s are of the float32
parameters of a model (4 bytes each), also where only some of them are sent; each figure is the median of the runs.
`with state` keeps a residual (int4) or a reference (top). Merges are of 5 models; their MB/s are of all that is read.
Takes about half a minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from gossipml.models.arrays import A
from gossipml.models.compression import Form, pack_into, packed_size, unpack_into
from gossipml.models.encoding import ENCODINGS
from gossipml.models.feedback import pack_changes, pack_update
from gossipml.models.merge_rules import merge, parse_merge

FORMS = (*(Form(encoding) for encoding in ENCODINGS), Form("int8", 10), Form("int8", 1), Form("int8", fragments=8))
MERGES = ("mean", "age", "slerp", "trimmed-mean:1", "median", "krum:1", "clipping")
MODELS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=8_000_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    n, runs = arguments.parameters, arguments.runs
    rng = np.random.Generator(np.random.PCG64(0))
    values = rng.standard_normal(n, dtype=np.float32)
    out = np.zeros_like(values)
    print(f"{n} parameters, median of {runs} runs, MB/s of float32\n")
    print(f"| {'form':<14} | encode | decode | with state | bytes per parameter |")
    print(f"|{'-' * 16}|-------:|-------:|-----------:|--------------------:|")
    for form in FORMS:
        body, state = bytearray(packed_size(form, n)), np.zeros_like(values)
        encoding = measure(partial(pack_into, form, values, memoryview(body)), n, runs)
        decoding = measure(partial(unpack_into, form, body, out), n, runs)
        keeping = ""
        if form.percent < 100:
            keeping = measure(partial(pack_changes, form, values, state), n, runs)
        elif form.values == "int4":
            keeping = measure(partial(pack_update, form, values, state), n, runs)
        size = f"{len(body) / n:.3f}"
        print(f"| {form.name:<14} | {encoding:>6} | {decoding:>6} | {keeping:>10} | {size:>19} |")
    count = n // MODELS
    models: A = np.stack([values[k * count : (k + 1) * count] for k in range(MODELS)])
    ages, bound = np.arange(1, MODELS + 1), np.array(float(np.sqrt(count)))
    print(f"\n| merge of {MODELS:<5} |   MB/s | ns per parameter |")
    print(f"|{'-' * 16}|-------:|-----------------:|")
    for name in MERGES:
        speed = measure(partial(merge, parse_merge(name), models, ages=ages, bound=bound), models.size, runs)
        print(f"| {name:<14} | {speed:>6} | {4 * MODELS * 1e3 / float(speed):>16.1f} |")


def measure(work: Callable[[], object], n: int, runs: int) -> str:
    """MB/s of 4 n bytes."""
    work()
    times = []
    for _ in range(runs):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return f"{4 * n / statistics.median(times) / 1e6:.0f}"


if __name__ == "__main__":
    main()
