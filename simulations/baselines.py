"""What gossip is compared with, on the same data, batches and training, in rounds.

| baseline | |
|---|---|
| `local` | every peer trains alone |
| `central` | one machine with all peers' data: as many samples in a round as all of them see |
| `fedavg:K` | federated averaging (McMahan et al. 2017): a server sends its model to K random peers, which train it for a round and send it back; their mean by samples is the new one |
| `allreduce` | synchronous SGD: after each step the mean of all peers' gradients; as one step of each and the mean of what comes out, which is the same, with momentum, too |

Bytes are float32 bodies: of fedavg, down and up; of allreduce 2 (N - 1) / N models a peer and step, as a ring takes.
They wait for the slowest and lose nothing: delays, loss, churn and liars are not theirs.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch

from gossipml.models.averaging import mean
from gossipml.simulations.population_engine import Counts
from gossipml.simulations.population_training import Trainees
from gossipml.simulations.scenario import Scenario


def rounds(scenario: Scenario, trainees: Trainees, seed: int) -> Iterator[Counts]:
    """What was done in all, after each round."""
    match scenario.baseline:
        case "fedavg":
            return _fedavg(scenario, trainees, Random(f"clients {seed}"))
        case "allreduce":
            return _allreduce(scenario, trainees)
    return _alone(scenario, trainees)


def _steps(scenario: Scenario, trainees: Trainees, peer: int) -> int:
    train = scenario.train
    return train.steps or max(1, round(train.epochs * trainees.epoch_steps(peer)))


def _alone(scenario: Scenario, trainees: Trainees) -> Iterator[Counts]:
    """Each peer with its own data; central is the only one."""
    peers = range(len(trainees.counts))
    steps = [_steps(scenario, trainees, peer) for peer in peers]
    if scenario.baseline == "central" and scenario.train.steps:
        steps = [scenario.train.steps * scenario.peers]
    counts = Counts()
    for _ in range(scenario.rounds):
        counts.diverged += len(trainees.train(peers, steps))
        counts.updates += len(peers)
        yield counts


def _fedavg(scenario: Scenario, trainees: Trainees, rng: Random) -> Iterator[Counts]:
    counts, x = Counts(), trainees.x
    for _ in range(scenario.rounds):
        clients = sorted(rng.sample(range(scenario.peers), scenario.clients))
        for peer in clients:
            trainees.forget_velocity(peer)  # the server's model has none
        counts.diverged += len(trainees.train(clients, [_steps(scenario, trainees, peer) for peer in clients]))
        samples = torch.tensor([trainees.counts[peer] for peer in clients], dtype=torch.float32, device=x.device)
        x[:] = mean(x[torch.tensor(clients, device=x.device)], samples)
        counts.updates += len(clients)
        counts.messages += 2 * len(clients)
        counts.bytes += 2 * len(clients) * 4 * x.shape[1]
        yield counts


def _allreduce(scenario: Scenario, trainees: Trainees) -> Iterator[Counts]:
    counts, x, peers = Counts(), trainees.x, range(scenario.peers)
    steps = max(_steps(scenario, trainees, peer) for peer in peers)
    for _ in range(scenario.rounds):
        for _ in range(steps):
            counts.diverged += len(trainees.train(peers, [1] * len(peers)))
            x[:] = mean(x)
        counts.updates += len(peers)
        counts.messages += 2 * (len(peers) - 1) * steps
        counts.bytes += 2 * (len(peers) - 1) * steps * 4 * x.shape[1]
        yield counts
