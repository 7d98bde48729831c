"""A hundred peers with parts of MNIST, in the simulator's population engine, against one process with all the data.

`iid`: equal parts, the daemon's defaults, rounds of one local epoch. `uneven`: `dirichlet:0.1`, where most peers know
two or three classes, and some have a hundred times as many pictures as others. There it pays to exchange often and
little, in both directions, and to let each picture count the same: push-pull with one other, the twentieth of the
parameters that moved most, rounds of 30 % of an epoch. Beside it the daemon's defaults and federated averaging
(McMahan et al. 2017, in float32) with several numbers of clients and of local epochs, each until it has sent as many
bytes. All of that with the model's own learning rate and with others: what is compared is each with the rate that
suits it best. Federated averaging takes a plain mean, which any liar moves as far as it likes; gossip does it with the
daemon's default, which clips, and once with a plain mean, too.

Central training and federated averaging are the best of their looks, since both swing to the end; ours is the last
look, and no peer's own: what peers serve when training is over and they have averaged for a while, those bytes counted.
While they train each peer's own model is far from the mean of all, which is shown, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from rows import Chart, Outcome, Record, Settings, mnist

from gossipml.models.registry import load_spec
from gossipml.models.spec import Sgd
from gossipml.simulations import population
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Scenario, Train

PEERS, MODEL, SEED = 100, "mnist-mlp", 1
EPOCHS = 20  # of central training, which gains nothing after the fifth
EPOCH = Train(epochs=1.0)
SETTLE = 60.0  # virtual seconds: some forty exchanges
ROUNDS = 740
GOSSIP = (  # of the model's own learning rate, momentum, merge
    (1.0, 0.9, "clipping"),
    (1.0, 0.95, "clipping"),  # what suits it best on such data
    (1.0, 0.95, "mean"),
)
FEDAVG = (  # clients, local epochs, and of the model's own learning rate
    *((PEERS, 1.0, 1.0), (PEERS // 5, 1.0, 1.0), (PEERS // 10, 1.0, 1.0)),
    *((PEERS // 5, 3.0, 1.0), (PEERS // 10, 3.0, 1.0), (PEERS // 5, 3.0, 0.5), (PEERS // 10, 3.0, 0.5)),
    (PEERS // 5, 3.0, 2.0),
)


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
    rounds = 2 if settings.quick else ROUNDS
    gossip = {
        (times, momentum, merge): simulate(
            f"push-pull:1, int8-top5, {merge}{_times(times)}, momentum {momentum:g}",
            split,
            "push-pull:1",
            rounds,
            replace(train(0.3, times), momentum=momentum),
            "int8-top5",
            merge=merge,
            settle=SETTLE,
        )
        for times, momentum, merge in GOSSIP
    }
    sent = max(float(records[-1]["MB"]) for records in gossip.values())
    default = until(sent, "push, int8", split, "push", train(0.3))
    fedavg = {
        (clients, epochs, times): until(
            sent,
            f"FedAvg, {clients} clients, {epochs:g} epochs{_times(times)}",
            split,
            f"fedavg:{clients}",
            train(epochs, times),
        )
        for clients, epochs, times in FEDAVG
    }
    central = simulate("central", split, "central", 1 if settings.quick else EPOCHS, EPOCH, looks=10)
    top = best(central, "central")
    served = {kind: float(records[-1]["served"]) for kind, records in gossip.items()}
    tops = {kind: max(float(record["agreed"]) for record in records) for kind, records in fedavg.items()}
    ours, rival = max(served, key=served.__getitem__), max(tops, key=tops.__getitem__)
    told = ", ".join(f"{served[each]:.2f} % with {each[2]}{_times(each[0])}, momentum {each[1]:g}" for each in GOSSIP)
    text = (
        f"central {top:.1f} %; for {sent:.1f} MB peers serve {told} (the worst own model of the best "
        f"{gossip[ours][-1]['worst']:.1f} %), the best FedAvg "
        f"({rival[0]} clients, {rival[1]:g} epochs{_times(rival[2])}) comes to {tops[rival]:.2f} %, the mean of the "
        f"models with the defaults to {default[-1]['agreed']:.1f} %"
    )
    reached = top - served[GOSSIP[0]] <= 1.5 and served[ours] > tops[rival]
    runs = [central, *gossip.values(), default, *fedavg.values()]
    return Outcome(text, reached, [record for run in runs for record in run], chart(top - 1.5, "MB"))


def train(epochs: float, times: float = 1.0) -> Train:
    """Of so many epochs, with so many times the model's own learning rate."""
    own = load_spec(MODEL).optimiser([])
    assert isinstance(own, Sgd), "the model descends by SGD"
    return Train(epochs=epochs, learning_rate=times * own.learning_rate, momentum=own.momentum)


def _times(times: float) -> str:
    return "" if times == 1.0 else f", {times:g} times the rate"


def simulate(
    variant: str,
    split: str,
    protocol: str,
    rounds: int,
    settings: Train,
    compression: str = "int8",
    *,
    merge: str = "clipping",
    looks: int = 4,
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
        merge=merge,
        train=settings,
        evaluate_every=max(1, rounds // looks),
        evaluate_peers=20,
    )
    rows = (row for row in population.run(scenario, SEED, "cpu") if isinstance(row, Row) and row.round)
    records = [_record(variant, row) for row in rows]
    print(records[-1], flush=True)
    return records


def until(megabytes: float, variant: str, split: str, protocol: str, settings: Train) -> list[Record]:
    """As many rounds as a peer may send bytes; a first one tells what it takes."""
    [first] = simulate(variant, split, protocol, 1, settings, looks=1)
    return simulate(variant, split, protocol, max(1, math.floor(megabytes / float(first["MB"]))), settings, looks=10)


def best(records: Iterable[Record], variant: str) -> float:
    return max(float(record["own"]) for record in records if record["variant"] == variant)


def chart(aim: float, x: str = "round") -> Chart:
    label = "MB sent by a peer" if x == "MB" else x
    return Chart("variant", "agreed", x, "test accuracy of the mean of the models, %", label, aim, logarithmic=True)


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
