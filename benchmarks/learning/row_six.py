"""Six peers with at most two classes of MNIST each, with the options of `peer start` but shorter rounds.

What decides is how far the peers run apart between two exchanges: 50 steps a round come to 88 % in as many steps as
5 a round come to 95 %. When training is over they go on averaging, as daemons do, and agree.
"""

from __future__ import annotations

import statistics

from rows import Chart, Outcome, Record, Settings, in_processes, mnist

PEERS, SPLIT, MODEL = 6, "labels:2", "mnist-mlp"
STEPS, ROUNDS, LOOK = 5, 1500, 250
SEEDS = 3
LEARNER: dict[str, object] = {"evaluate_seconds": 3600.0}  # a look takes as long as a hundred steps


def measure(settings: Settings) -> Outcome:
    mnist()
    rounds = 20 if settings.quick else ROUNDS
    cells = [(seed, rounds) for seed in range(1 if settings.quick else SEEDS)]
    records = [record for records in in_processes(one_network, cells, settings) for record in records]
    ends = [record for record in records if record["round"] == rounds]
    records += real(rounds)
    means = [float(record["mean"]) for record in ends]
    spread = max(float(record["std"]) for record in [*ends, records[-1]])
    over_seeds = statistics.pstdev(means)
    ours = (
        f"{statistics.fmean(means):.1f} % (seeds {min(means):.1f} to {max(means):.1f}), real processes "
        f"{float(records[-1]['mean']):.1f} %; std over peers {spread:.2f}, over seeds {over_seeds:.2f}"
    )
    reached = min(*means, float(records[-1]["mean"])) >= 97 and max(spread, over_seeds) <= 0.5
    chart = Chart("variant", "mean", "round", "mean test accuracy of the peers, %", "round", aim=97)
    return Outcome(ours, reached, records, chart)


def one_network(cell: tuple[int, int]) -> list[Record]:
    """Looks at the peers, the last one when they have agreed."""
    from gossipml.config import PeerConfig
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec
    from gossipml.simulations.lockstep import Network, Setting

    seed, rounds = cell
    options = PeerConfig(split=SPLIT, seed=seed, local_steps=str(STEPS))
    network = Network(Setting(load_spec(MODEL), load_source(mnist()), PEERS, options))
    records = []
    for number in range(1, rounds + 1):
        network.round()
        if number == rounds:
            network.settle()
        if number % LOOK == 0 or number == rounds:
            records.append(_record("in one process", seed, number, network.served(), network.bytes_sent))
    return records


def real(rounds: int) -> list[Record]:
    from processes import Budget, race

    common = {"model": MODEL, "data": mnist(), "split": SPLIT, "local_steps": str(STEPS), "max_rounds": rounds}
    options = [{**common, "part": f"{part}/{PEERS}"} for part in range(1, PEERS + 1)]
    result = race(options, LEARNER, Budget())
    return [_record("real processes", 0, rounds, list(result.accuracies), result.sent)]


def _record(variant: str, seed: int, number: int, accuracies: list[float], sent: float) -> Record:
    return {
        "variant": variant,
        "seed": seed,
        "round": number,
        "mean": round(100 * statistics.fmean(accuracies), 3),
        "worst": round(100 * min(accuracies), 3),
        "std": round(100 * statistics.pstdev(accuracies), 3),
        "MB": round(sent / 1e6, 2),
    }
