"""A fifth of the peers lie in every message: do the others learn as well as where everybody is honest?

Liars lie about values (simulations/lockstep_liars.py); their heads (age, length, digest) are honest, since a lie there
is refused before a byte is read. They train and merge as everybody does. The default merge (`clipping`) is measured
beside the plain mean: on MNIST with parts of alike and of uneven classes, twenty peers; and on digits, ten peers, as
the mean over eight seeds, since there it matters who the liars are. benchmarks/merging.py compares all merges.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import product

from rows import Chart, Outcome, Record, Settings, in_processes, mnist

MERGES = ("clipping", "mean")
LIES = ("none", "nan", "sign flip", "x100", "stale", "noise")


@dataclass(frozen=True)
class Case:
    data: str
    model: str
    peers: int
    split: str
    steps: int
    rounds: int
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.data.partition(':')[0]}, {self.split}"


@dataclass(frozen=True)
class Cell:
    case: Case
    merge: str
    lie: str
    seed: int


def measure(settings: Settings) -> Outcome:
    pictures = mnist()
    cases = [
        Case(pictures, "mnist-mlp", 20, "iid", steps=20, rounds=40, seeds=1),
        Case(pictures, "mnist-mlp", 20, "dirichlet:0.5", steps=20, rounds=40, seeds=1),
        Case("digits", "digits-mlp", 10, "dirichlet:0.5", steps=8, rounds=20, seeds=1 if settings.quick else 8),
    ]
    kinds = list(product(cases, MERGES, LIES))
    cells = [Cell(case, merge, lie, seed) for case, merge, lie in kinds for seed in range(case.seeds)]
    records = in_processes(one_network_quickly if settings.quick else one_network, cells, settings)
    found = {
        (case.name, merge, lie): statistics.fmean(
            float(record["accuracy"])
            for cell, record in zip(cells, records, strict=True)
            if (cell.case, cell.merge, cell.lie) == (case, merge, lie)
        )
        for case, merge, lie in kinds
    }
    lost = {
        (name, merge, lie): found[name, merge, "none"] - accuracy
        for (name, merge, lie), accuracy in found.items()
        if lie != "none"
    }
    texts = []
    for name in (case.name for case in cases):
        each = ", ".join(f"{lie} {lost[name, 'clipping', lie]:.1f}" for lie in LIES if lie != "none")
        plain = max(lost[name, "mean", lie] for lie in LIES if lie != "none")
        texts.append(f"{name}: points lost of {found[name, 'clipping', 'none']:.1f} %: {each} (plain mean {plain:.1f})")
    reached = all(points <= 2 for (_, merge, _), points in lost.items() if merge == "clipping")
    chart = Chart("group", "accuracy", y_label="mean test accuracy of the honest peers, %")
    return Outcome("; ".join(texts), reached, records, chart)


def one_network_quickly(cell: Cell) -> Record:
    return one_network(cell, 2)


def one_network(cell: Cell, rounds: int = 0) -> Record:
    from gossipml.config import PeerConfig
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec
    from gossipml.simulations.lockstep import Network, Setting
    from gossipml.simulations.lockstep_liars import Liar

    case = cell.case
    options = PeerConfig(split=case.split, merge=cell.merge, local_steps=str(case.steps), seed=cell.seed)
    setting = Setting(load_spec(case.model), load_source(case.data), case.peers, options)
    liars = case.peers // 5
    lies = [None if cell.lie == "none" else Liar(cell.lie, number) for number in range(liars)]
    network = Network(setting, lies)
    for _ in range(rounds or case.rounds):
        network.round()
    accuracies = [peer.trainer.evaluate().accuracy for peer in network.peers[liars:]]
    return {
        "case": case.name,
        "merge": cell.merge,
        "lie": cell.lie,
        "seed": cell.seed,
        "group": f"{cell.lie}, {cell.merge}, {case.name}",
        "accuracy": round(100 * statistics.fmean(accuracies), 3),
        "worst": round(100 * min(accuracies), 3),
        "refused": sum(peer.refused for peer in network.honest()),
    }
