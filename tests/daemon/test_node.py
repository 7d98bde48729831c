"""Whole peers on virtual time: what they keep on disk, and what becomes of them when that goes wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from gossipml.daemon.learner import LearnerConfig
from gossipml.env.simulated import World, run_simulation
from gossipml.simulations.cluster import Cluster

QUICK = LearnerConfig(round_seconds=1.0, least_round=2.0, evaluate_seconds=4.0, save_seconds=5.0)


def play(scenario: Callable[[World, Cluster], Awaitable[None]], *, peers: int, contacts: int = 1) -> None:
    async def run(world: World) -> None:
        async with Cluster.of(world, peers=peers, config=QUICK, contacts=contacts) as cluster:
            await scenario(world, cluster)

    run_simulation(run, seed=3)


def rounds(cluster: Cluster, name: str) -> int:
    node = cluster.members[name].node
    assert node is not None
    return node.learner.progress.round


def neighbours(cluster: Cluster, name: str) -> int:
    node = cluster.members[name].node
    assert node is not None
    return len(node.mesh.links())


def test_a_network_comes_back_without_the_peer_named_in_the_token() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(120)
        assert [neighbours(cluster, f"peer-{index}") for index in range(3)] == [2, 2, 2]
        for index in range(3):
            cluster.crash(f"peer-{index}")
        await trio.sleep(60)
        await cluster.start("peer-1")  # the token names peer-0 alone, which stays dead
        await cluster.start("peer-2")
        await trio.sleep(120)
        assert neighbours(cluster, "peer-1") == neighbours(cluster, "peer-2") == 1

    play(scenario, peers=3)


@pytest.mark.parametrize("death", ["crash", "power_off"])
def test_a_peer_goes_on_with_its_parameters_age_and_round(death: str) -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(101)
        member = cluster.members["peer-0"]
        assert member.node is not None
        before, age = rounds(cluster, "peer-0"), member.node.gossip.age
        getattr(cluster, death)("peer-0")
        await cluster.start("peer-0")
        await trio.sleep(0.5)
        assert member.node is not None
        assert before - 4 <= rounds(cluster, "peer-0") <= before + 2, "at most what was trained since the last save"
        assert member.node.gossip.age > 0.9 * age
        assert member.trainer is not None
        assert abs(member.trainer.parameters).max() > 0.1, "not the initial zeros"

    play(scenario, peers=1)


def test_a_damaged_state_is_set_aside_and_training_starts_anew() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(60)
        cluster.crash("peer-0")
        env = world.env("peer-0")
        state = bytearray(await env.disk.read("state/resume", limit=1 << 20))
        state[-1] ^= 1
        await env.disk.write("state/resume", bytes(state))
        world.crash("peer-0")
        await cluster.start("peer-0")
        await trio.sleep(0.5)
        assert rounds(cluster, "peer-0") <= 2
        assert "state/resume.damaged" in world.disk("peer-0").files()

    play(scenario, peers=1)


def test_a_full_disk_costs_no_training_and_is_used_again_when_freed(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(30)
        disk = world.disk("peer-0")
        kept = disk.files()["state/resume"]
        disk.capacity = 0
        before = rounds(cluster, "peer-0")
        await trio.sleep(60)
        assert rounds(cluster, "peer-0") > before + 20
        assert "free or mend the disk" in caplog.text
        assert disk.files()["state/resume"] == kept, "the last good state is still there"
        member = cluster.members["peer-0"]
        assert member.node is not None
        assert member.node.supervisor.problems() == []
        disk.capacity = None
        await trio.sleep(10)
        assert disk.files()["state/resume"] != kept

    play(scenario, peers=2)


def test_a_stopped_peer_says_goodbye_and_keeps_its_last_round() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(61)
        member = cluster.members["peer-1"]
        assert member.node is not None and member.scope is not None
        last = rounds(cluster, "peer-1")
        member.scope.cancel()  # as SIGTERM does
        await trio.sleep(5)
        assert neighbours(cluster, "peer-0") == 0, "told, not found out by silence"
        world.crash("peer-1")
        await cluster.start("peer-1")
        await trio.sleep(0.5)
        assert rounds(cluster, "peer-1") >= last

    play(scenario, peers=2)
