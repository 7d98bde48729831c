"""Every gossip protocol in a whole cluster of the daemon's own nodes: a peer dies and comes back, and all learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from gossipml.env.simulated import World, run_simulation
from gossipml.peer.gossip import GossipConfig
from gossipml.peer.protocols import PROTOCOLS, parse_protocol
from gossipml.simulations.cluster import BASE, SLOW_ROUNDS, Cluster

FAMILIES = [name for name in PROTOCOLS if not name.startswith("token-account-")]
ROUNDS = 30  # of ten virtual seconds


@pytest.mark.parametrize("name", FAMILIES)
def test_peers_with_two_classes_each_learn_all_five(name: str) -> None:
    async def scenario(world: World) -> None:
        learner = replace(SLOW_ROUNDS, max_rounds=ROUNDS)
        base = replace(BASE, gossip=GossipConfig(protocol=parse_protocol(name)))
        async with Cluster.of(world, peers=6, config=learner, base=base) as cluster:
            await trio.sleep(100)
            cluster.crash("peer-3")
            await trio.sleep(60)
            await cluster.start("peer-3")
            await trio.sleep(340)
            nodes = [member.node for member in cluster.running() if member.node is not None]
            assert [node.mesh.stats.faults for node in nodes] == [0] * 6
            assert all(node.learner.progress.round >= ROUNDS for node in nodes)
            assert min(cluster.accuracies()) > 0.85, "alone none would pass 0.4"
            assert cluster.spread() < 0.02
            if nodes[0].gossip.policy.push_sum is not None:
                weights = [node.gossip.policy.push_sum.weight for node in nodes if node.gossip.policy.push_sum]
                assert min(weights) > 0.01
                assert 5.0 < sum(weights) <= 7.0, "six peers, and one began anew"

    run_simulation(scenario, seed=4)
