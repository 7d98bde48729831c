"""Merges and forms of compression in a whole cluster of the daemon's own nodes: all learn what each knows a part of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from gossipml.config import PeerConfig
from gossipml.daemon.exchange_rules import gossip_config
from gossipml.env.simulated import World, run_simulation
from gossipml.simulations.cluster import BASE, SLOW_ROUNDS, Cluster

ROUNDS = 20  # of ten virtual seconds


def play(merge: str, compression: str, *, least: float = 0.85) -> set[str]:
    """Six peers with two classes of five each; the encodings that were sent."""
    sent: set[str] = set()

    async def scenario(world: World) -> None:
        learner = replace(SLOW_ROUNDS, max_rounds=ROUNDS)
        config = gossip_config(PeerConfig(merge=merge, compression=compression))
        base = replace(BASE, gossip=config)
        async with Cluster.of(world, peers=6, config=learner, base=base, merge=merge) as cluster:
            for _ in range(30):
                await trio.sleep(10)
                for member in cluster.running():
                    assert member.node is not None
                    sent.update(other.encoding for other in member.node.mesh._links.values())
            nodes = [member.node for member in cluster.running() if member.node is not None]
            assert [node.mesh.stats.faults for node in nodes] == [0] * 6
            assert min(node.mesh.stats.merges for node in nodes) > ROUNDS
            assert min(cluster.accuracies()) > least, "alone none would pass 0.4"
            assert cluster.spread() < 0.05

    run_simulation(scenario, seed=4)
    return sent


@pytest.mark.parametrize("merge", ["mean", "slerp", "median", "multi-krum:1"])
def test_peers_with_two_classes_each_learn_all_five_by_each_merge(merge: str) -> None:
    play(merge, "int8", least=0.7 if "krum" in merge else 0.85)  # Krum drops what few peers know


@pytest.mark.parametrize("compression", ["int4", "int8-top10", "int4-of4"])
def test_peers_with_two_classes_each_learn_all_five_in_each_form(compression: str) -> None:
    play("clipping", compression)


def test_auto_sends_int8_over_good_links() -> None:
    assert play("clipping", "auto") == {"int8"}
