"""What compression and merges cost in accuracy, with few peers and uneven data; and what liars do to each merge.

    python benchmarks/merging.py [--data digits] [--peers 16] [--split dirichlet:0.1] [--rounds 60] [--seeds 3]
    python benchmarks/merging.py --liars 4 --peers 20 --split iid

All peers live in one tensor (peers, parameters) and train a perceptron with one hidden layer: STEPS local steps of
SGD with momentum a round, then an exchange with `--receivers` random others, by the functions that a daemon
calls, each peer with a `Merger` of its own. Rounds are synchronous and nothing is lost. Accuracy is on the common test
part, of the peers' own parameters: mean over peers, the worst peer, and the average of all models. The docs
(docs/choosing.md) show its tables. Takes some minutes.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.nn import functional

from gossipml.models.averaging import Coordinates
from gossipml.models.compression import Form, packed_size, parse_choice, received, rounded
from gossipml.models.data import Dataset, load_source
from gossipml.models.feedback import with_feedback
from gossipml.models.merge_rules import parse_merge
from gossipml.models.merger import STRAY, Merger
from gossipml.models.merging import is_finite
from gossipml.models.partition import parse_rule, split_indices

STEPS, BATCH, RATE, MOMENTUM = 8, 32, 0.1, 0.9
PARTIAL_WEIGHT = 0.5  # of a message that holds a part of the parameters: few other messages hold the same ones
MOST_TESTS = 2000  # samples; keeps the evaluation shorter than the training

COMPRESSIONS = (
    *("float32", "float32+weight 1/2", "float16", "bfloat16", "int8", "int4", "int4+residual", "int8-top25+reference"),
    *("int8-top10+reference", "int8-top10", "int8-top5+reference", "int8-top1+reference", "int8-of4"),
)
NEVER = 1e9  # medians: nothing is left out
RULES = (  # the rule, and from how many medians on a model is left out
    *(("mean", STRAY), ("slerp", STRAY)),
    *(("clipping:3", NEVER), ("clipping:1.5", NEVER), ("clipping:1", NEVER)),
    *(("clipping:1.5", 4.0), ("clipping:1.5", 3.0), ("clipping:1.5", STRAY)),
    *((rule, STRAY) for rule in ("trimmed-mean:3", "median", "krum:3", "multi-krum:3")),
)
LIES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # what a liar sends, from its own honest parameters (f, P), those of the honest peers (h, P), and the first (P,)
    "none": lambda own, honest, first: own,
    "sign flip": lambda own, honest, first: -own,
    "x100": lambda own, honest, first: 100 * own,
    "stale": lambda own, honest, first: first.expand_as(own),
    "noise": lambda own, honest, first: own + own.std() * 3 * torch.randn_like(own),
    "inliers": lambda own, honest, first: (honest.mean(0) + 1.5 * honest.std(0)).expand_as(own),  # Baruch et al. 2019
}


class Population:
    """Peers with a perceptron each, as rows of `x` (N, P); all start from the same parameters."""

    def __init__(self, data: Dataset, split: str, peers: int, hidden: int, seed: int) -> None:
        inputs = [
            np.asarray(part.inputs[np.arange(len(part))], np.float32).reshape(len(part), -1)
            for part in (data.train, data.test)
        ]
        largest = inputs[0].max()
        self._train, self._test = (torch.from_numpy(part / largest) for part in inputs)
        self._targets = torch.from_numpy(data.train.targets)
        picked = np.random.RandomState(9).permutation(len(data.test))[:MOST_TESTS]
        self._test, self._test_targets = self._test[picked], torch.from_numpy(data.test.targets)[picked]
        self._parts = split_indices(data.train.targets, data.classes, parse_rule(split), peers, seed)
        self._rng = np.random.RandomState(seed)
        self._shapes = ((self._train.shape[1], hidden), (1, hidden), (hidden, data.classes), (1, data.classes))
        generator = torch.Generator().manual_seed(seed)
        start = torch.cat(
            [
                torch.randn(a * b, generator=generator) * (1.5 / a) ** 0.5 if a > 1 else torch.zeros(b)
                for a, b in self._shapes
            ]
        )
        self.x = start.repeat(peers, 1)
        self.start = start
        self._momentum = torch.zeros_like(self.x)

    def _outputs(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        ends = np.cumsum([0, *(a * b for a, b in self._shapes)])
        w, b, v, c = (
            x[:, start:stop].view(-1, *shape)
            for start, stop, shape in zip(ends[:-1], ends[1:], self._shapes, strict=True)
        )
        outputs: torch.Tensor = torch.relu(inputs @ w + b) @ v + c
        return outputs

    def train(self) -> None:
        for _ in range(STEPS):
            batch = torch.from_numpy(np.stack([self._rng.choice(part, BATCH) for part in self._parts]))  # (N, BATCH)
            x = self.x.requires_grad_()
            outputs = self._outputs(x, self._train[batch])
            loss = (
                functional.cross_entropy(outputs.flatten(0, 1), self._targets[batch].flatten(), reduction="sum") / BATCH
            )
            (gradient,) = torch.autograd.grad(loss, x)
            self._momentum.mul_(MOMENTUM).add_(gradient)
            self.x = x.detach() - RATE * self._momentum

    @torch.no_grad()
    def accuracy(self, x: torch.Tensor) -> torch.Tensor:
        """(n, P) -> (n,)."""
        found = self._outputs(x, self._test.expand(len(x), -1, -1)).argmax(-1)
        return (found == self._test_targets).float().mean(1)


@dataclass(frozen=True)
class Result:
    mean: float
    worst: float
    averaged: float

    @staticmethod
    def of(population: Population, honest: slice) -> Result:
        x = population.x[honest]
        each = population.accuracy(x)
        return Result(float(each.mean()), float(each.min()), float(population.accuracy(x.mean(0, keepdim=True))[0]))


def compressed(population: Population, name: str, receivers: int, rounds: int, seed: int) -> Result:
    """Push to random receivers, who take in one message after the other."""
    choice, _, state = name.partition("+")
    form = parse_choice(choice)
    assert form is not None
    peers = len(population.x)
    rng = np.random.RandomState(seed)
    residual = torch.zeros_like(population.x)
    reference = population.start.repeat(peers, 1)
    sends = 0
    whole_models = form.share == 1 and state != "weight 1/2"
    for _ in range(rounds):
        population.train()
        x = population.x
        if state == "residual":
            whole, residual = with_feedback(x, residual, lambda total: rounded(form.values, total))
        importance = x - reference if state == "reference" else x
        inbox: list[list[tuple[int, Form]]] = [[] for _ in range(peers)]
        for sender in range(peers):
            others = np.delete(np.arange(peers), sender)
            for number, receiver in enumerate(rng.choice(others, receivers, replace=False)):
                inbox[receiver].append((sender, form.at(sends + number)))
        sends += receivers
        merged = x.clone()
        for receiver, messages in enumerate(inbox):
            own = merged[receiver]
            for number, (sender, part) in enumerate(messages):
                m = (
                    whole[sender]
                    if state == "residual"
                    else received(part, x[sender], own, importance=importance[sender])
                )
                own += (1 / (2 + number) if whole_models else PARTIAL_WEIGHT) * (m - own)
        if state == "reference":
            reference = received(form, x, reference, importance=importance)
        population.x = merged
    return Result.of(population, slice(None))


def attacked(
    population: Population, merge: tuple[str, float], lie: str, liars: int, taken: int, rounds: int, seed: int
) -> Result:
    """Each peer takes the models of `taken` random others and merges them with its own; the last peers lie."""
    peers, size = population.x.shape
    rule, stray = parse_merge(merge[0]), merge[1]
    rng = np.random.RandomState(seed)
    mergers = [Merger(rule, Coordinates(size, size), stray=stray) for _ in range(peers)]
    torch.manual_seed(seed)
    for _ in range(rounds):
        population.train()
        x = population.x
        sent = x.clone()
        if liars:
            sent[peers - liars :] = LIES[lie](x[peers - liars :], x[: peers - liars], population.start)
        for peer, merger in enumerate(mergers):
            chosen = rng.choice(np.delete(np.arange(peers), peer), taken, replace=False)
            models = [sent[other].clone() for other in chosen if is_finite(sent[other])]  # else refused on receipt
            if rule.needs > 1:
                merger.take_together(x[peer], models)
                continue
            merged = 1
            for model in models:
                merged += merger.take(x[peer], model, 1 / (1 + merged)).applied
    return Result.of(population, slice(0, peers - liars))


def average(results: list[Result]) -> str:
    columns = [[result.mean, result.worst, result.averaged] for result in results]
    return " | ".join(f"{value:.3f}" for value in np.nan_to_num(np.mean(columns, 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits or mnist:DIR")
    parser.add_argument("--split", default="dirichlet:0.1")
    parser.add_argument("--peers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--receivers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--liars", type=int, default=0, help="compare merges instead of compressions")
    parser.add_argument("--merge", default="", help="only merges that begin so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_source(arguments.data)

    def population(seed: int) -> Population:
        return Population(data, arguments.split, arguments.peers, arguments.hidden, seed)

    print(f"{arguments.split}, {arguments.peers} peers, {arguments.rounds} rounds, {arguments.seeds} seeds")
    if arguments.liars:
        print(f"\n| merge | {' | '.join(LIES)} |\n|---{'|---:' * len(LIES)}|")
        for rule, stray in (each for each in RULES if each[0].startswith(arguments.merge)):
            cells = []
            for lie in LIES:
                results = [
                    attacked(
                        population(seed),
                        (rule, stray),
                        lie,
                        arguments.liars,
                        2 * arguments.receivers,
                        arguments.rounds,
                        seed,
                    )
                    for seed in range(arguments.seeds)
                ]
                cells.append(f"{np.mean([0 if math.isnan(result.mean) else result.mean for result in results]):.3f}")
            named = rule + (f", left out from {stray:g}" if "clipping" in rule and stray < NEVER else "")
            print(f"| {named} | {' | '.join(cells)} |", flush=True)
        return
    print("\n| compression | bytes per parameter | kB a send | mean of peers | worst peer | averaged model |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in COMPRESSIONS:
        form = parse_choice(name.partition("+")[0])
        assert form is not None
        results = []
        for seed in range(arguments.seeds):
            peers = population(seed)
            results.append(compressed(peers, name, arguments.receivers, arguments.rounds, seed))
        size = packed_size(form, len(peers.start))
        print(
            f"| {name.replace('+', ', ')} | {size / len(peers.start):.3f} | {size / 1e3:.1f} | {average(results)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
