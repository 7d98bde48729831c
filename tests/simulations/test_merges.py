"""Merges and forms of compression in a whole cluster of the daemon's own nodes: all learn what each knows a part of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import trio

from gossipml.config import PeerConfig
from gossipml.daemon.exchange_rules import gossip_config
from gossipml.env.simulated import World, run_simulation
from gossipml.models.merge_rules import parse_merge
from gossipml.simulations.cluster import BASE, SLOW_ROUNDS, Cluster
from gossipml.simulations.numpy_trainer import Points, make_points

ROUNDS = 12  # of ten virtual seconds
FEW, MORE = make_points(4, 4), make_points(4, 6)  # two classes of five each, all five together


def play(merge: str, compression: str, parts: Sequence[Points]) -> tuple[set[str], float]:
    """A peer for each part; the encodings that were sent, and the accuracy of the worst peer."""
    sent: set[str] = set()

    async def scenario(world: World) -> float:
        learner = replace(SLOW_ROUNDS, max_rounds=ROUNDS)
        config = gossip_config(PeerConfig(merge=merge, compression=compression))
        base = replace(BASE, gossip=config)
        async with Cluster.of(world, peers=len(parts), config=learner, base=base, merge=merge, parts=parts) as cluster:
            for _ in range(18):
                await trio.sleep(10)
                for member in cluster.running():
                    assert member.node is not None
                    sent.update(other.encoding for other in member.node.mesh._links.values())
            nodes = [member.node for member in cluster.running() if member.node is not None]
            assert [node.mesh.stats.faults for node in nodes] == [0] * len(parts)
            assert min(node.mesh.stats.merges for node in nodes) > ROUNDS
            assert cluster.spread() < 0.05
            return min(cluster.accuracies())

    return sent, run_simulation(scenario, seed=4)


@pytest.mark.parametrize("merge", ["mean", "age", "slerp", "clipping:1", "trimmed-mean:1", "median"])
def test_peers_with_two_classes_each_learn_all_five_by_each_merge(merge: str) -> None:
    _, accuracy = play(merge, "int8", MORE if parse_merge(merge).needs > 1 else FEW)
    assert accuracy > 0.85, "alone none would pass 0.4"


def test_multi_krum_learns_where_peers_know_alike_and_drops_what_few_know_elsewhere() -> None:
    """Of models that differ it takes those that are nearest to each other: here the two peers with the same classes."""
    inputs, targets = (np.concatenate([getattr(part, name) for part in MORE]) for name in ("inputs", "targets"))
    alike = [replace(part, inputs=inputs[peer::6], targets=targets[peer::6]) for peer, part in enumerate(MORE)]
    _, accuracy = play("multi-krum:1", "int8", alike)
    assert accuracy > 0.85
    assert play("multi-krum:1", "int8", MORE)[1] < accuracy


@pytest.mark.parametrize("compression", ["float32", "bfloat16", "int4", "int8-top10", "int4-of4"])
def test_peers_with_two_classes_each_learn_all_five_in_each_form(compression: str) -> None:
    _, accuracy = play("clipping", compression, FEW)
    assert accuracy > 0.85, "alone none would pass 0.4"


def test_auto_sends_int8_over_good_links() -> None:
    sent, accuracy = play("clipping", "auto", FEW)
    assert sent == {"int8"}
    assert accuracy > 0.85
