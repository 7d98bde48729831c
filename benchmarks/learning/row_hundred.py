"""A hundred peers with parts of MNIST, in the simulator's population engine, against one process with all the data.

`iid`: equal parts, the daemon's defaults, rounds of one local epoch. `uneven`: `dirichlet:0.1`, where most peers know
two or three classes, and some have a hundred times as many pictures as others. There it pays to exchange often and
little, in both directions, and to let each picture count the same: push-pull with one other, the twentieth of the
parameters that moved most, rounds of 30 % of an epoch. Beside it the daemon's defaults and federated averaging
(McMahan et al. 2017, in float32) with several numbers of clients and of local epochs, each until it has sent as many
bytes.

Central training and federated averaging are the best of their looks, since both swing to the end; ours is the last
look, and no peer's own: what peers serve when training is over and they have averaged for a while, those bytes counted.
While they train each peer's own model is far from the mean of all, which is shown, too.
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
OFTEN = Train(epochs=0.3)
SETTLE = 60.0  # virtual seconds: some forty exchanges
FEDAVG = ((PEERS, 1.0), (PEERS // 5, 1.0), (PEERS // 10, 1.0), (PEERS // 5, 3.0))  # clients, local epochs


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
    rounds = 2 if settings.quick else 440
    often = simulate("push-pull:1, int8-top5", split, "push-pull:1", rounds, OFTEN, "int8-top5", looks=4, settle=SETTLE)
    sent = float(often[-1]["MB"])
    default = until(sent, "push, int8", split, "push", Train(epochs=0.3))
    fedavg = {
        (clients, epochs): until(
            sent, f"FedAvg, {clients} clients, {epochs:g} epochs", split, f"fedavg:{clients}", Train(epochs=epochs)
        )
        for clients, epochs in FEDAVG
    }
    central = simulate("central", split, "central", 1 if settings.quick else EPOCHS, EPOCH, looks=10)
    records = [*central, *often, *default, *(record for each in fedavg.values() for record in each)]
    top, ours = best(records, "central"), often[-1]
    (clients, epochs), other = max(
        ((kind, max(float(record["agreed"]) for record in each)) for kind, each in fedavg.items()),
        key=lambda pair: pair[1],
    )
    text = (
        f"central {top:.1f} %; peers serve {ours['served']:.1f} % (the worst own model {ours['worst']:.1f} %) for "
        f"{sent:.1f} MB; for as many the best FedAvg ({clients} clients, {epochs:g} epochs) {other:.1f} %, the mean of "
        f"the models with the defaults {default[-1]['agreed']:.1f} %"
    )
    served = float(ours["served"])
    return Outcome(text, top - served <= 1.5 and served > other, records, chart(top - 1.5))


def simulate(
    variant: str,
    split: str,
    protocol: str,
    rounds: int,
    train: Train,
    compression: str = "int8",
    *,
    looks: int = 1,
    settle: float = 0.0,
) -> list[Record]:
    scenario = Scenario(
        name=variant,
        peers=PEERS,
        rounds=rounds,
        settle=settle,
        model=MODEL,
        data=mnist(),
        split=split,
        protocol=protocol,
        compression=compression,
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
    return simulate(variant, split, protocol, max(1, math.floor(megabytes / float(first["MB"]))), train, looks=10)


def best(records: Iterable[Record], variant: str) -> float:
    return max(float(record["own"]) for record in records if record["variant"] == variant)


def chart(aim: float) -> Chart:
    return Chart("variant", "agreed", "round", "test accuracy of the mean of the models, %", aim=aim, logarithmic=True)


def _record(variant: str, row: Row) -> Record:
    """Of one model that all share (federated, central) `own` is all that there is."""
    agreed = row.accuracy if math.isnan(row.accuracy_average) else row.accuracy_average
    served = row.accuracy if math.isnan(row.accuracy_served) else row.accuracy_served
    return {
        "variant": variant,
        "round": row.round,
        "own": round(100 * row.accuracy, 3),
        "worst": round(100 * row.accuracy_min, 3),
        "served": round(100 * served, 3),
        "agreed": round(100 * agreed, 3),
        "MB": round(row.bytes / 1e6, 3),
    }
