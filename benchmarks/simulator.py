"""The population engine beside gossipy: updates of nodes a second, on MNIST, batch 32, one local epoch a round; and an
hour of whole daemons in the discrete engine.

    python benchmarks/simulator.py [--rounds 20] [--gossipy-seconds 40] [--device cpu]

An update is one merge and one local epoch of one node. Both have the same parts of the data, the same start for all
nodes, SGD 0.1 without momentum, one push a node and round, plain means, float32. gossipy trains when a message comes
(on average once a node and round), the population when a round ends. Accuracies are of the same nodes, just after their
local epochs; time spent on measuring them is in neither figure. Logistic regression takes pixels from 0 to 1, as
784-100-10 does; the registry's `logistic` standardises each pixel. gossipy runs as it comes, with torch's own number of
threads, and once more for a moment with one torch thread, with which it is faster; it stops after so many seconds, and
accuracies are compared at the round that it came to.

gossipy (`pip install --no-deps gossipy-dfl dill tqdm pandas networkx rich matplotlib pyparsing`) is left out, visibly,
where it is not installed. It imports torchvision without declaring it, for CIFAR alone: an empty module stands in.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import data_folder

from gossipml.models.data import load_source
from gossipml.models.flat import build_flat
from gossipml.simulations import discrete, population
from gossipml.simulations.population_evaluation import Judge
from gossipml.simulations.population_setting import device_of, model_and_data, parts_of
from gossipml.simulations.population_training import Threads, Trainees
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Scenario, Train
from gossipml.simulations.scenario_file import load_scenario

BATCH, RATE, SEED = 32, 0.1, 1
SINGLE_SECONDS = 15.0  # of gossipy with one torch thread
EPOCHS = 5  # trained in a turn: about as long as the products take alone
WATCHED = 10  # nodes whose accuracy is measured
LOGISTIC, MLP = f"{Path(__file__).resolve().parent / 'pixel_logistic.py'}:PixelLogistic", "mnist-mlp"
NAMES = {LOGISTIC: "logistic regression", MLP: "784-100-10"}
LAYERS = {LOGISTIC: ((784, 10),), MLP: ((784, 100), (100, 10))}


@dataclass(frozen=True)
class Found:
    updates_per_second: float
    samples_per_second: float
    accuracy: dict[int, float]
    """By round."""
    rounds: int


def scenario_of(model: str, source: str, peers: int, rounds: int) -> Scenario:
    """An epoch is as many whole batches as hold all samples of a node; gossipy's last one is smaller instead."""
    own = Scenario(
        "simulator",
        peers=peers,
        rounds=rounds,
        model=model,
        data=source,
        protocol="merge-update:1",
        merge="mean",
        compression="float32",
        evaluate_peers=1,  # see `Watched`
        seeds=(SEED,),
        train=Train(batch=BATCH, learning_rate=RATE),
    )
    _, data = model_and_data(model, source, own.train)
    each = max(map(len, parts_of(data, own.split, peers, SEED)))
    return replace(own, train=replace(own.train, batch=min(BATCH, each), steps=-(-each // BATCH)))


class Watched(Trainees):
    """Keeps some models as they are between training and merges."""

    kept = torch.empty(0)

    def train(self, peers: Sequence[int], steps: Sequence[int]) -> list[int]:
        diverged = super().train(peers, steps)
        Watched.kept = self.x[:WATCHED].clone()
        return diverged


def ours(scenario: Scenario, device: str) -> Found:
    accuracy: dict[int, float] = {}
    seconds = updates = 0.0
    start: float | None = None
    spec, data = model_and_data(scenario.model, scenario.data, scenario.train)
    where = device_of(device)
    judge = Judge(spec, data, build_flat(spec, population.NETWORK, where, trains=False)[0], where, Threads(where, 1))
    with mock.patch.object(population, "Trainees", Watched):
        for each in population.run(scenario, SEED, device):
            if isinstance(each, Row):  # the engine goes on when the next one is asked for
                updates = each.updates
                if updates:
                    accuracy[round(each.round)] = statistics.fmean(judge.score(x)[0] for x in Watched.kept)
                start = time.perf_counter()
            elif start is not None:
                seconds += time.perf_counter() - start
                start = None
    rounds = max(accuracy)
    rate = updates / seconds
    return Found(rate, rate * scenario.train.steps * scenario.train.batch, accuracy, rounds)


def gossipys(scenario: Scenario, limit: float, threads: int) -> Found | None:
    """The same with gossipy and so many torch threads; None where it is not installed."""
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    try:
        from gossipy.core import AntiEntropyProtocol, CreateModelMode, StaticP2PNetwork
        from gossipy.data import DataDispatcher
        from gossipy.data.handler import ClassificationDataHandler
        from gossipy.model.handler import TorchModelHandler
        from gossipy.model.nn import LogisticRegression, TorchMLP
        from gossipy.node import GossipNode
        from gossipy.simul import GossipSimulator
    except ImportError as error:
        print(f"gossipy: skipped ({error})")
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    spec, data = model_and_data(scenario.model, scenario.data, scenario.train)
    inputs, tests = (torch.from_numpy(spec.ingest(part.inputs[:])) for part in (data.train, data.test))
    targets, test_targets = (torch.from_numpy(part.targets) for part in (data.train, data.test))
    parts = parts_of(data, scenario.split, scenario.peers, SEED)
    updates, seconds, start = 0, 0.0, 0.0

    class Stop(Exception):
        pass

    class Handler(TorchModelHandler):  # type: ignore[misc]  # gossipy is untyped
        def _update(self, own: Any) -> None:  # Any: gossipy's
            nonlocal updates
            super()._update(own)
            updates += 1

    class Start(TorchMLP):  # type: ignore[misc]  # the same
        def init_weights(self) -> None:
            """All nodes keep the start that was copied to them."""

    net = LogisticRegression(784, 10) if scenario.model == LOGISTIC else Start(784, 10, (100,))
    handler = Handler(
        net=net, optimizer=torch.optim.SGD, optimizer_params={"lr": RATE}, criterion=torch.nn.CrossEntropyLoss(),
        local_epochs=1, batch_size=BATCH, create_model_mode=CreateModelMode.MERGE_UPDATE,
    )  # fmt: skip
    handling = ClassificationDataHandler(inputs, targets, tests, test_targets)
    dispatcher = DataDispatcher(handling, n=scenario.peers, eval_on_user=False, auto_assign=False)
    dispatcher.set_assignments([part.tolist() for part in parts], None)
    network = StaticP2PNetwork(scenario.peers, None)
    nodes = GossipNode.generate(
        data_dispatcher=dispatcher, p2p_net=network, model_proto=handler, round_len=100, sync=True
    )
    accuracy: dict[int, float] = {}

    class Simulator(GossipSimulator):  # type: ignore[misc]  # the same
        def notify_timestep(self, t: int) -> None:
            nonlocal seconds, start
            if (t + 1) % self.delta:
                return
            seconds += time.perf_counter() - start
            watched = [nodes[number] for number in range(min(WATCHED, scenario.peers))]
            with torch.inference_mode():
                found = [
                    float((node.model_handler.model(tests).argmax(1) == test_targets).float().mean())
                    for node in watched
                ]
            accuracy[(t + 1) // self.delta] = statistics.fmean(found)
            start = time.perf_counter()
            if seconds > limit and accuracy:
                raise Stop

    # No evaluation of its own: its data dispatcher says that there is no test part.
    dispatcher.has_test = lambda: False
    for node in nodes.values():
        node.has_test = lambda: False
    simulator = Simulator(
        nodes=nodes, data_dispatcher=dispatcher, delta=100, protocol=AntiEntropyProtocol.PUSH, sampling_eval=0.0
    )
    simulator.init_nodes(SEED)
    updates = 0
    start = time.perf_counter()
    try:
        simulator.start(scenario.rounds)
    except Stop:
        pass
    finally:
        torch.set_num_threads(before)
    samples = statistics.fmean(map(len, parts)) * updates
    return Found(updates / seconds, samples / seconds, accuracy, max(accuracy))


def compare(scenario: Scenario, device: str, limit: float, aim: int) -> None:
    print(f"\n{NAMES[scenario.model]}, {scenario.peers} peers, {scenario.rounds} rounds", flush=True)
    mine = ours(scenario, device)
    tell("population", mine)
    theirs = gossipys(scenario, limit, torch.get_num_threads())
    single = gossipys(scenario, min(limit, SINGLE_SECONDS), 1)
    if theirs is None or single is None:
        return
    tell(f"gossipy, {torch.get_num_threads()} torch threads", theirs)
    tell("gossipy, 1 torch thread", single)
    if theirs.rounds < scenario.rounds:
        print(f"  gossipy was stopped after {theirs.rounds} of {scenario.rounds} rounds; its rate is from those")
    print(
        f"  ratio {mine.updates_per_second / theirs.updates_per_second:.1f} (aim: at least {aim}), to gossipy with one "
        f"torch thread {mine.updates_per_second / single.updates_per_second:.1f}"
    )
    at = max(theirs.rounds, single.rounds)
    found = theirs if theirs.rounds == at else single
    apart = 100 * (mine.accuracy[at] - found.accuracy[at])
    print(
        f"  accuracy at round {at}: {mine.accuracy[at]:.4f} against {found.accuracy[at]:.4f}: {apart:+.2f} points "
        "(aim: at most 0.5 apart at round 20)"
    )


def tell(who: str, found: Found) -> None:
    print(f"  {who}: {found.updates_per_second:,.0f} updates/s, {found.samples_per_second:,.0f} samples/s", flush=True)


def products(model: str, chunk: int, threads: int) -> float:
    """FLOP/s of the matrix products alone of that many models at once, on all threads."""
    shapes = LAYERS[model]
    repeat = 200 if model == LOGISTIC else 40
    ready = threading.Barrier(threads + 1)

    def work(_: int) -> None:
        arrays = [
            (torch.randn(chunk, BATCH, i), torch.randn(chunk, i, o), torch.randn(chunk, BATCH, o)) for i, o in shapes
        ]
        outs = [
            (torch.empty(chunk, BATCH, o), torch.empty(chunk, i, o), torch.empty(chunk, BATCH, i)) for i, o in shapes
        ]

        def once() -> None:
            for number, ((x, w, d), (y, g, back)) in enumerate(zip(arrays, outs, strict=True)):
                torch.bmm(x, w, out=y)
                torch.bmm(x.transpose(1, 2), d, out=g)
                if number:
                    torch.bmm(d, w.transpose(1, 2), out=back)

        once()
        ready.wait()
        for _ in range(repeat):
            once()

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(work, number) for number in range(threads)]
        ready.wait()
        start = time.perf_counter()
        for each in running:
            each.result()
        seconds = time.perf_counter() - start
    return threads * repeat * chunk * BATCH * flop(model) / seconds


def flop(model: str) -> int:
    """Of one sample: forward, and backward without the gradient of the samples."""
    return sum(2 * i * o * (3 if number else 2) for number, (i, o) in enumerate(LAYERS[model]))


def fraction(scenario: Scenario) -> None:
    """What share of the rate of its matrix products training reaches; the two measured in turn."""
    device = device_of("cpu")
    threads = Threads(device)
    with threads.open():
        trainees, _, _ = population.population(scenario, SEED, device, threads)
        peers = range(scenario.peers)
        steps = [trainees.epoch_steps(peer) for peer in peers]
        work = sum(steps) * BATCH * flop(scenario.model)
        training, alone = [], []
        for _ in range(5):
            trainees.train(peers, steps)  # as the products: not the first time
            start = time.perf_counter()
            for _ in range(EPOCHS):
                trainees.train(peers, steps)
            training.append(EPOCHS * work / (time.perf_counter() - start) / 1e9)
            each = trainees.chunk(len(peers) // threads.count, 1)
            alone.append(products(scenario.model, each, threads.count) / 1e9)
    share = statistics.median(training) / statistics.median(alone)
    print(
        f"\n{NAMES[scenario.model]}: training {statistics.median(training):.0f} GFLOP/s, its matrix products alone "
        f"{statistics.median(alone):.0f} GFLOP/s: fraction {share:.2f} (aim: at least 0.5)"
    )


def large(folder: Path, source: str, device: str) -> None:
    """10,000 peers with a dozen samples each: MNIST twice, since 60,000 samples make at most 6,000 parts."""
    data = load_source(source)
    file = folder / "twice.npz"
    train, test = data.train, data.test
    np.savez(
        file, x_train=np.concatenate([train.inputs[:]] * 2), y_train=np.tile(train.targets, 2), x_test=test.inputs[:],
        y_test=test.targets,
    )  # fmt: skip
    scenario = replace(scenario_of(MLP if device == "cuda" else LOGISTIC, f"npz:{file}", 10_000, 3))
    found = ours(scenario, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{NAMES[scenario.model]}, 10,000 peers: {found.updates_per_second:,.0f} updates/s, accuracy after 3 rounds "
        f"{found.accuracy[3]:.3f}; peak memory of this process {peak:.1f} GiB (aim: it runs on 24 GiB)"
    )


def hour() -> None:
    """The shipped scenario `daemons`, without its report."""
    scenario = load_scenario("daemons")
    begun, accuracy = time.perf_counter(), 0.0
    for each in discrete.run(scenario, scenario.seeds[0]):
        if isinstance(each, Row):
            accuracy = each.accuracy
    seconds = time.perf_counter() - begun
    print(
        f"\n{scenario.peers} daemons, {scenario.seconds / 3600:g} hour, {scenario.network.loss:.0%} of messages lost: "
        f"{seconds:.1f} s (aim: under 20), {scenario.seconds / seconds:.0f} times real time; accuracy {accuracy:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gossipy-seconds", type=float, default=40.0, help="of each of its parts")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=("logistic", "mlp", "thousand", "large", "fraction", "hour"))
    options = parser.parse_args()
    source = f"mnist:{data_folder() / 'mnist'}"
    limit, device, only = options.gossipy_seconds, options.device, options.only
    if only in (None, "hour"):
        hour()  # first: gossipy's log would show every line of fifty daemons
    for name, model, peers, aim in (
        ("logistic", LOGISTIC, 100, 20),
        ("mlp", MLP, 100, 10),
        ("thousand", LOGISTIC, 1000, 40),
    ):
        if only in (None, name):
            rounds = options.rounds if peers == 100 else min(5, options.rounds)
            compare(scenario_of(model, source, peers, rounds), device, limit, aim)
    if only in (None, "fraction") and device == "cpu":
        for model in LAYERS:
            fraction(scenario_of(model, source, 100, 1))
    if only in (None, "large"):
        with tempfile.TemporaryDirectory() as folder:
            large(Path(folder), source, device)


if __name__ == "__main__":
    main()
