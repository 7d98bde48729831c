"""Wall time: several cores inside one peer, and four whole peers against torch's DistributedDataParallel.

The measuring is that of `benchmarks/workers.py` and `benchmarks/ddp.py`; a busy machine shows in it. `workers` is
reached where two that share one batch come to it; two with a batch each, whose gradients are averaged, which is what
data-parallel systems publish, stand beside it.
"""

from __future__ import annotations

import statistics

import ddp as race
import workers as turns
from rows import Chart, Outcome, Record, Settings, mnist

MODEL = "mnist-wide-mse"


def workers(settings: Settings) -> Outcome:
    mnist()
    found = turns.measure(MODEL, 2.0 if settings.quick else 20.0)
    records: list[Record] = [
        {"way": str(way), "turn": number, "samples_per_second": round(speed, 1)}
        for way, speeds in found.items()
        for number, speed in enumerate(speeds)
    ]
    one = statistics.median(found[turns.ONE])
    times = {way: statistics.median(speeds) / one for way, speeds in found.items() if way != turns.ONE}
    text = "; ".join(f"{way} {gain:.2f}" for way, gain in times.items())
    reached = max(gain for way, gain in times.items() if way in turns.SHARED) >= 1.7
    chart = Chart("way", "samples_per_second", y_label="samples a second, mean of the turns", aim=1.7 * one)
    return Outcome(f"{one:.0f} samples/s by one worker; times as many: {text}", reached, records, chart)


def ddp(settings: Settings) -> Outcome:
    mnist()
    runs = [race.row("mnist-mlp", 0.9 if settings.quick else 0.97, 15.0) for _ in range(1 if settings.quick else 3)]
    records: list[Record] = [
        {"run": number, "side": side, "seconds": round(run[f"{key}_seconds"], 3), "steps": run[f"{key}_steps"]}
        for number, run in enumerate(runs)
        for side, key in (("four peers", "peers"), ("DDP", "ddp"))
    ]
    ratio = statistics.median(run["ratio"] for run in runs)
    ours, theirs = (statistics.median(run[f"{key}_seconds"] for run in runs) for key in ("peers", "ddp"))
    text = f"peers {ours:.2f} s, DDP {theirs:.2f} s, median ratio of {len(runs)} runs {ratio:.2f}"
    return Outcome(text, ratio < 1, records, Chart("side", "seconds", y_label="seconds to 97 %"))
