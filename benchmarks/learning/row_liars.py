"""A fifth of the peers lie in every message: do the others learn as well as where everybody is honest?

Twenty peers, of which four lie about values; their heads (age, length, digest) are honest, since a lie there is refused
before a byte is read. They train and merge as everybody does. The default merge (`clipping`) is measured beside the
plain mean, on parts of alike and of uneven classes.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rows import Chart, Outcome, Record, Settings, in_processes, mnist

if TYPE_CHECKING:
    from gossipml.models.training import LocalTrainer

PEERS, LIARS, STEPS, ROUNDS = 20, 4, 20, 40
MODEL = "mnist-mlp"
SPLITS = ("iid", "dirichlet:0.5")
MERGES = ("clipping", "mean")
LIES = ("none", "nan", "sign flip", "x100", "stale", "noise")
NOISE = 3.0  # standard deviations of the parameters


def measure(settings: Settings) -> Outcome:
    mnist()
    rounds = 2 if settings.quick else ROUNDS
    cells = [(split, merge, lie, rounds) for split in SPLITS for merge in MERGES for lie in LIES]
    records = in_processes(one_network, cells, settings)
    found = {(r["split"], r["merge"], r["lie"]): float(r["accuracy"]) for r in records}
    lost = {
        (split, merge, lie): found[split, merge, "none"] - found[split, merge, lie]
        for split, merge, lie, _ in cells
        if lie != "none"
    }
    texts = []
    for split in SPLITS:
        kinds = ", ".join(f"{lie} {lost[split, 'clipping', lie]:.1f}" for lie in LIES if lie != "none")
        plain = max(lost[split, "mean", lie] for lie in LIES if lie != "none")
        texts.append(
            f"{split}: points lost of {found[split, 'clipping', 'none']:.1f} %: {kinds} (plain mean {plain:.1f})"
        )
    reached = all(points <= 2 for (_, merge, _), points in lost.items() if merge == "clipping")
    chart = Chart("case", "accuracy", y_label="mean test accuracy of the honest peers, %")
    return Outcome("; ".join(texts), reached, records, chart)


def one_network(cell: tuple[str, str, str, int]) -> Record:
    from lockstep import Network, Setting

    from gossipml.config import PeerConfig
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec

    split, merge, lie, rounds = cell
    options = PeerConfig(split=split, merge=merge, local_steps=str(STEPS))
    setting = Setting(load_spec(MODEL), load_source(mnist()), PEERS, options)
    network = Network(setting, [] if lie == "none" else [Liar(lie, number) for number in range(LIARS)])
    for _ in range(rounds):
        network.round()
    accuracies = network.served()
    return {
        "split": split,
        "merge": merge,
        "lie": lie,
        "case": f"{lie}, {merge}, {split}",
        "accuracy": round(100 * statistics.fmean(accuracies), 3),
        "worst": round(100 * min(accuracies), 3),
        "refused": sum(peer.refused for peer in network.honest()),
    }


class Liar:
    """What goes out in place of an honest body."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._first = b""

    def __call__(self, trainer: LocalTrainer, body: bytes, encoding: str) -> bytes:
        from gossipml.models.compression import pack, parse_form, unpack_into

        if self._kind == "nan":
            return b"\xff" * len(body)  # scales that are not finite
        if self._kind == "stale":  # the first model it ever had, with the age of a new one
            self._first = self._first or body
            return self._first
        form, model = parse_form(encoding), np.empty(trainer.layout.size, np.float32)
        unpack_into(form, body, model)
        return pack(form, self._changed(model))

    def _changed(self, model: NDArray[np.float32]) -> NDArray[np.float32]:
        match self._kind:
            case "sign flip":
                return -model
            case "x100":
                return 100 * model
        noise = self._rng.normal(scale=NOISE * float(model.std()), size=len(model))
        return model + noise.astype(np.float32)
