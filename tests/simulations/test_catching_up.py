"""Who was away, or comes late, is far away, and what is far away is left out: yet all soon learn together again.

Half of the distances that a peer remembers (WINDOW) decide what is usual; so after as many models as that, whatever
they hold, it follows the others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import trio

from gossipml.daemon.releases import ReleaseConfig
from gossipml.env.simulated import World, run_simulation
from gossipml.models.merging import WINDOW
from gossipml.simulations.cluster import SLOW_ROUNDS, Cluster
from gossipml.simulations.numpy_trainer import evaluate_all

AWAY, RESTED = "peer-0", [f"peer-{number}" for number in range(1, 5)]
ROUND = 10.0  # virtual seconds
UNPUBLISHED = replace(SLOW_ROUNDS, releases=ReleaseConfig(seconds=1e9, first_seconds=1e9))


def accuracies(cluster: Cluster) -> list[float]:
    """Of each peer's own parameters, now."""
    members = cluster.running()
    x = np.stack([member.trainer.parameters for member in members if member.trainer])
    return [float(accuracy) for accuracy in evaluate_all(x, members[0].points)[0]]


def heard(cluster: Cluster, name: str = AWAY) -> tuple[int, int]:
    """Models that the peer has merged, and that it left out."""
    node = cluster.members[name].node
    assert node is not None
    return node.mesh.stats.merges, node.mesh.stats.merges_refused


def test_a_peer_cut_off_for_sixty_rounds_follows_after_as_many_models_as_it_remembers() -> None:
    async def scenario(world: World) -> None:
        async with Cluster.of(world, peers=5, config=UNPUBLISHED) as cluster:
            await trio.sleep(10 * ROUND)
            world.partition({AWAY}, RESTED)
            await trio.sleep(60 * ROUND)
            world.heal()
            merged, refused = heard(cluster)
            assert accuracies(cluster)[0] < 0.7, "it has seen two classes of five for long"
            assert cluster.spread() > 0.2
            while accuracies(cluster)[0] < 0.9:
                await trio.sleep(ROUND)
                models = sum(heard(cluster)) - merged - refused
                assert models <= WINDOW
            assert heard(cluster)[1] - refused >= 5, "the test is about models that are left out"
            await trio.sleep(3 * ROUND)
            left_out = [heard(cluster, name)[1] for name in (AWAY, *RESTED)]
            await trio.sleep(10 * ROUND)
            assert left_out == [heard(cluster, name)[1] for name in (AWAY, *RESTED)]
            assert min(accuracies(cluster)) > 0.9 and cluster.spread() < 0.05

    run_simulation(scenario, seed=1)


def test_a_peer_that_comes_back_with_an_old_state_follows_within_two_rounds() -> None:
    async def scenario(world: World) -> None:
        async with Cluster.of(world, peers=5, config=UNPUBLISHED) as cluster:
            await trio.sleep(10 * ROUND)
            cluster.crash(AWAY)
            await trio.sleep(60 * ROUND)
            await cluster.start(AWAY)
            await trio.sleep(2 * ROUND)
            assert accuracies(cluster)[0] > 0.9
            assert heard(cluster)[1] == 0
            assert cluster.spread() < 0.05

    run_simulation(scenario, seed=1)


def test_fresh_peers_and_one_that_has_learnt_for_long_come_together_without_a_published_version() -> None:
    async def scenario(world: World) -> None:
        async with Cluster.of(world, peers=5, late=4, config=UNPUBLISHED) as cluster:
            await trio.sleep(60 * ROUND)
            for name in RESTED:
                await cluster.start(name)
            await trio.sleep(5 * ROUND)
            assert min(accuracies(cluster)) > 0.9 and cluster.spread() < 0.1
            left_out = [heard(cluster, name)[1] for name in (AWAY, *RESTED)]
            await trio.sleep(10 * ROUND)
            assert left_out == [heard(cluster, name)[1] for name in (AWAY, *RESTED)], "nobody is left out any more"

    run_simulation(scenario, seed=1)
