"""A hundred peers with parts of MNIST, in the simulator's population engine, against one process with all the data.

`iid`: equal parts, the daemon's defaults, rounds of one local epoch. `uneven`: `dirichlet:0.1`, where most peers know
two or three classes. There it pays to exchange often and little, and in both directions: rounds of 10 steps, push-pull
with one other. Beside it the daemon's defaults and federated averaging (McMahan et al. 2017) with one local
epoch a round, each until it has sent as many bytes.

Central training is the best of its looks, one an epoch or more. Of the peers two accuracies are shown: that of what
each of them trains, and that of the mean of their models, which is what they agree on when training is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from rows import Chart, Outcome, Record, Settings, mnist

from gossipml.simulations import population
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Scenario, Train

PEERS, MODEL, SEED = 100, "mnist-mlp", 1
EPOCHS = 20  # of central training, which gains nothing after the fifth
EPOCH = Train(epochs=1.0)


def iid(settings: Settings) -> Outcome:
    rounds = 1 if settings.quick else 60
    records = [
        *simulate("central", "iid", "central", min(rounds, EPOCHS), EPOCH, looks=10),
        *simulate("push, int8", "iid", "push", rounds, EPOCH, looks=6),
    ]
    central, ours = best(records, "central"), records[-1]
    text = f"central {central:.1f} %, peers {ours['own']:.1f} %, mean of their models {ours['agreed']:.1f} %"
    return Outcome(text, central - float(ours["agreed"]) <= 0.3, records, chart(central - 0.3))


def uneven(settings: Settings) -> Outcome:
    split = "dirichlet:0.1"
    rounds = 2 if settings.quick else 150
    frequent = Train(steps=10)
    often = simulate("push-pull:1, int8", split, "push-pull:1", rounds, frequent, looks=6)
    sent = float(often[-1]["MB"])
    default = until(sent, "push, int8", split, "push", frequent)
    fedavg = [
        record
        for clients in (PEERS, PEERS // 5)
        for record in until(sent, f"FedAvg, {clients} clients", split, f"fedavg:{clients}", EPOCH)
    ]
    central = simulate("central", split, "central", 1 if settings.quick else EPOCHS, EPOCH, looks=10)
    records = [*central, *often, *default, *fedavg]
    top, ours = best(records, "central"), float(often[-1]["agreed"])
    other = max(float(record["agreed"]) for record in fedavg)
    text = (
        f"central {top:.1f} %, peers {often[-1]['own']:.1f} %, mean of their models {ours:.1f} % for {sent:.0f} MB; "
        f"for as many FedAvg {other:.1f} %, the defaults {default[-1]['agreed']:.1f} %"
    )
    return Outcome(text, top - ours <= 1.5 and ours > other, records, chart(top - 1.5))


def simulate(
    variant: str,
    split: str,
    protocol: str,
    rounds: int,
    train: Train,
    *,
    looks: int = 1,
) -> list[Record]:
    scenario = Scenario(
        name=variant,
        peers=PEERS,
        rounds=rounds,
        model=MODEL,
        data=mnist(),
        split=split,
        protocol=protocol,
        train=train,
        evaluate_every=max(1, rounds // looks),
        evaluate_peers=20,
    )
    rows = (row for row in population.run(scenario, SEED, "cpu") if isinstance(row, Row) and row.round)
    records = [_record(variant, row) for row in rows]
    print(records[-1], flush=True)
    return records


def until(megabytes: float, variant: str, split: str, protocol: str, train: Train) -> list[Record]:
    """As many rounds as a peer may send bytes; a first one tells what it takes."""
    [first] = simulate(variant, split, protocol, 1, train)
    return simulate(variant, split, protocol, max(1, math.floor(megabytes / float(first["MB"]))), train, looks=4)


def best(records: Iterable[Record], variant: str) -> float:
    return max(float(record["own"]) for record in records if record["variant"] == variant)


def chart(aim: float) -> Chart:
    return Chart("variant", "agreed", "round", "test accuracy of the mean of the models, %", aim=aim, logarithmic=True)


def _record(variant: str, row: Row) -> Record:
    return {
        "variant": variant,
        "round": row.round,
        "own": round(100 * row.accuracy, 3),
        "worst": round(100 * row.accuracy_min, 3),
        "agreed": round(100 * (row.accuracy if math.isnan(row.accuracy_average) else row.accuracy_average), 3),
        "MB": round(row.bytes / 1e6, 3),
    }
