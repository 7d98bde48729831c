"""Twenty peers for an hour of virtual time, with loss, delay, crashes and a partition; prints what became of them.

A program of its own, so that the test can run it twice at the same time under different hash seeds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import trio

from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.releases import ReleaseConfig
from gossipml.env.link import Link, heavy_tailed
from gossipml.env.simulated import World, run_simulation
from gossipml.models.store import StoreConfig
from gossipml.simulations.cluster import BASE, Cluster

PEERS = 20
CONFIG = LearnerConfig(
    round_seconds=10.0,
    least_round=60.0,
    evaluate_seconds=120.0,
    save_seconds=60.0,
    release_look_seconds=30.0,
    releases=ReleaseConfig(seconds=900.0),
)
FEW_VERSIONS = replace(BASE, store=StoreConfig(keep_last=1))  # the records of each are most of the traffic
BAD_LINK = Link(delay=heavy_tailed(0.03), loss=0.05, duplicate=0.01, reorder=0.01)

Facts = dict[str, object]


async def hour(world: World) -> Facts:
    facts: Facts = {}
    world.set_default_link(BAD_LINK)
    async with Cluster.of(world, peers=PEERS, config=CONFIG, base=FEW_VERSIONS) as cluster:

        def rounds(name: str) -> int:
            node = cluster.members[name].node
            assert node is not None
            return node.learner.progress.round

        await trio.sleep(600)
        facts["met"] = min(len(member.node.view) for member in cluster.running() if member.node)

        # The first peer, named in everybody's token, dies with two others; one of them loses its power.
        facts["rounds before"] = rounds("peer-0")
        cluster.crash("peer-0")
        cluster.crash("peer-5")
        cluster.power_off("peer-9")
        before = rounds("peer-1")
        await trio.sleep(600)
        facts["rounds without them"] = rounds("peer-1") - before
        for name in ("peer-0", "peer-5", "peer-9"):
            await cluster.start(name)
        await trio.sleep(120)
        facts["rounds after"] = min(rounds(name) for name in ("peer-0", "peer-5", "peer-9"))

        half = [f"peer-{index}" for index in range(0, PEERS, 2)]
        other = [f"peer-{index}" for index in range(1, PEERS, 2)]
        world.partition(half, other)
        before, before_other = rounds("peer-2"), rounds("peer-3")
        await trio.sleep(900)
        facts["rounds apart"] = min(rounds("peer-2") - before, rounds("peer-3") - before_other)
        facts["spread apart"] = cluster.spread()
        world.heal()
        await trio.sleep(3600 - world.now())

        facts["seconds"] = world.now()
        facts["running"] = len(cluster.running())
        facts["accuracy"] = min(cluster.accuracies())
        facts["spread"] = cluster.spread()
        facts["neighbours"] = min(len(member.node.mesh.links()) for member in cluster.running() if member.node)
        facts["crashed parts"] = sum(
            part.crashes
            for member in cluster.running()
            if member.node
            for part in member.node.supervisor.parts.values()
        )
    facts["events"] = world.events
    facts["digest"] = world.digest
    return facts


if __name__ == "__main__":
    print(json.dumps(run_simulation(hour, int(sys.argv[1]))))
