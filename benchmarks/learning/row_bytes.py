"""How many bytes a peer sends until the peers answer 97 % of MNIST right, by what they send.

Ten peers with equal parts; only `--compression` differs. Bytes are those of the bodies, counted as they are sent, and
those at 97 % are read off between two looks in a straight line. The accuracy after all rounds says what a form loses.
"""

from __future__ import annotations

import statistics
from itertools import pairwise

from rows import Chart, Outcome, Record, Settings, in_processes, mnist

PEERS, STEPS, ROUNDS, LOOK = 10, 10, 80, 4
MODEL, AIM = "mnist-mlp", 97.0
SEEDS = 2
FULL = "float32"
FORMS = (FULL, "int8", "int4", "int8-top25", "int8-top10", "int8-of4")


def measure(settings: Settings) -> Outcome:
    mnist()
    seeds, rounds = (1, LOOK) if settings.quick else (SEEDS, ROUNDS)
    cells = [(form, seed, rounds) for form in FORMS for seed in range(seeds)]
    runs = in_processes(one_network, cells, settings)
    needed = {
        form: _mean([bytes_to_aim(r) for (name, *_), r in zip(cells, runs, strict=True) if name == form])
        for form in FORMS
    }
    last = {
        form: _mean([float(r[-1]["accuracy"]) for (name, *_), r in zip(cells, runs, strict=True) if name == form])
        for form in FORMS
    }
    good = [form for form in FORMS if last[form] >= last[FULL] - 0.3]
    best = min(good, key=lambda form: needed[form])
    share = needed[FULL] / needed[best]
    ours = (
        f"{FULL} {needed[FULL]:.1f} MB a peer, {best} {needed[best]:.2f} MB: 1/{share:.1f} of the bytes, "
        f"{last[FULL] - last[best]:+.2f} points lost in the end; "
        + ", ".join(
            f"{form} {needed[form]:.2f} MB ({last[FULL] - last[form]:+.2f})"
            for form in FORMS
            if form not in (FULL, best)
        )
    )
    records = [record for run in runs for record in run]
    chart = Chart(
        "form", "accuracy", "MB", "mean test accuracy of the peers, %", "MB sent by a peer", AIM, logarithmic=True
    )
    return Outcome(ours, share >= 8, records, chart)


def one_network(cell: tuple[str, int, int]) -> list[Record]:
    from gossipml.config import PeerConfig
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec
    from gossipml.simulations.lockstep import Network, Setting

    form, seed, rounds = cell
    options = PeerConfig(compression=form, seed=seed, local_steps=str(STEPS))
    network = Network(Setting(load_spec(MODEL), load_source(mnist()), PEERS, options))
    records: list[Record] = []
    for number in range(1, rounds + 1):
        network.round()
        if number % LOOK == 0:
            accuracies = network.served()
            records.append(
                {
                    "form": form,
                    "seed": seed,
                    "round": number,
                    "MB": round(network.bytes_sent / 1e6, 4),
                    "accuracy": round(100 * statistics.fmean(accuracies), 3),
                    "worst": round(100 * min(accuracies), 3),
                }
            )
    return records


def bytes_to_aim(looks: list[Record]) -> float:
    """MB; infinite when the aim was not reached."""
    for before, after in pairwise(looks):
        low, high = float(before["accuracy"]), float(after["accuracy"])
        if high >= AIM:
            share = max(0.0, (AIM - low) / (high - low)) if high > low else 0.0
            return float(before["MB"]) + share * (float(after["MB"]) - float(before["MB"]))
    return float("inf")


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)
