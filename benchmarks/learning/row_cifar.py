"""CIFAR-10's pictures, a small convolutional network with batch norm: real peers against one process with all the data.

Both sides train on the same number of samples in all, so that each of N peers does an N-th of the work. Averaging N
peers is like a batch N times as large; as there, the learning rate grows with it (Goyal et al. 2017). Peers have a
higher momentum, which makes the steps of each smoother, so that they stay closer together (docs/decisions/0016). The
one process is measured with its own momentum and three rates. Models are sent as float16: what int8 rounds off is noise
that adds up over a thousand merges.

Batch norm's running means and variances are averaged like parameters and sent exactly.
"""

from __future__ import annotations

import statistics
import time

from rows import Chart, Outcome, Record, Settings, Skipped, data_folder, in_processes

from gossipml.config import PeerConfig

MODEL, RATE = "cifar-cnn", 0.005  # its own
MOMENTUM = 0.95  # of peers
STEPS = 2  # in a round
EPOCHS = 12.0
TRAIN = 45_000  # a tenth of the training pictures is held out for validation
PEERS = (2, 4)
RATES = (1, 2, 4)  # of the one process, times its own; the first is the best
LIMIT = 1500.0
# The accuracy is measured at the end alone: a look takes as long as thirty steps.
LEARNER: dict[str, object] = {"evaluate_seconds": 3600.0}


def measure(settings: Settings) -> Outcome:
    source = pictures()
    epochs = 0.01 if settings.quick else EPOCHS
    records = in_processes(central, [(source, epochs, rate) for rate in RATES], settings)
    for peers in PEERS:
        records.append(together(source, epochs, peers))
        print(records[-1], flush=True)
    best = max(float(record["accuracy"]) for record in records if record["peers"] == 1)
    found = [record for record in records if int(record["peers"]) > 1]
    ours = f"one process {best:.1f} % (the best of three rates); " + ", ".join(
        f"{record['peers']} peers {float(record['accuracy']):.1f} % with {int(record['samples']):,} samples each"
        for record in found
    )
    reached = all(best - float(record["accuracy"]) <= 1 for record in found)
    return Outcome(ours, reached, records, Chart("case", "accuracy", y_label="test accuracy, %"))


def pictures() -> str:
    """The folder with train/CLASS and test/CLASS; CIFAR-10's archive of pictures has to be unpacked before."""
    folder = next(
        (path for path in (data_folder() / "cifar10-images", data_folder()) if (path / "train").is_dir()), None
    )
    if folder is None:
        raise Skipped(
            f"no pictures of CIFAR-10 in {data_folder()}; unpack cifar10-images.tar.xz into a folder and set "
            "GOSSIPML_DATASETS to it"
        )
    return f"images:{folder}"


def central(cell: tuple[str, float, int]) -> Record:
    """A network of one, which is the daemon's trainer alone."""
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec
    from gossipml.simulations.lockstep import Network, Setting

    source, epochs, rate = cell
    options = PeerConfig(learning_rate=rate * RATE, local_steps=str(STEPS))
    network = Network(Setting(load_spec(MODEL), load_source(source), 1, options))
    samples = STEPS * network.peers[0].trainer.batch
    begun = time.perf_counter()
    while network.rounds * samples < epochs * TRAIN:
        network.round()
    seconds = time.perf_counter() - begun
    return _record(1, rate, network.served(), network.rounds * samples, seconds, 0.0)


def together(source: str, epochs: float, peers: int) -> Record:
    """Real peers; the rate is as many times the model's own as there are peers."""
    from processes import Budget, race

    rate = peers
    common = {
        "model": MODEL,
        "data": source,
        "learning_rate": rate * RATE,
        "momentum": MOMENTUM,
        "local_steps": str(STEPS),
        "compression": "float16",
        "nice": 0,
    }
    options = [{**common, "part": f"{part}/{peers}"} for part in range(1, peers + 1)]
    result = race(options, LEARNER, Budget(samples=int(epochs * TRAIN / peers), limit=LIMIT))
    return _record(peers, rate, list(result.accuracies), max(result.samples), result.seconds, result.sent)


def _record(peers: int, rate: int, accuracies: list[float], samples: int, seconds: float, sent: float) -> Record:
    return {
        "case": f"{peers} peers, rate x {rate}" if peers > 1 else f"one process, rate x {rate}",
        "peers": peers,
        "rate": rate,
        "accuracy": round(100 * statistics.fmean(accuracies), 3),
        "worst": round(100 * min(accuracies), 3),
        "samples": samples,
        "seconds": round(seconds, 1),
        "MB": round(sent / 1e6, 1),
    }
