"""Published models among whole peers on virtual time: who publishes, who follows, what survives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import trio
from safetensors.numpy import save

from gossipml.api.ports import UnknownModel
from gossipml.daemon.follower import Follower
from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.library import Draft, Library
from gossipml.daemon.node import Node
from gossipml.daemon.releases import ReleaseConfig
from gossipml.daemon.replication import ReplicationConfig, rendezvous
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import RemoteError, UserError
from gossipml.ids import Contact, PeerId
from gossipml.models.manifest import Manifest
from gossipml.peer.swarm import Swarm
from gossipml.simulations.cluster import Cluster

QUICK = LearnerConfig(
    round_seconds=1.0,
    least_round=2.0,
    evaluate_seconds=4.0,
    save_seconds=5.0,
    releases=ReleaseConfig(seconds=60.0, first_seconds=10.0),
)
NEVER = replace(QUICK, releases=ReleaseConfig(seconds=1e9, first_seconds=1e9))
CALM = replace(NEVER, least_round=120.0, evaluate_seconds=600.0, save_seconds=600.0)
LOOKS = ReplicationConfig(replicas=3, look_seconds=10.0, count_seconds=20.0)

Scenario = Callable[[World, Cluster], Awaitable[None]]


def play(scenario: Scenario, *, peers: int, config: LearnerConfig = NEVER, seed: int = 3) -> None:
    async def run(world: World) -> None:
        async with Cluster.of(world, peers=0, config=config) as cluster:
            cluster.base = replace(cluster.base, replication=LOOKS)
            for index in range(peers):
                await cluster.join(f"peer-{index}", parts=peers)
            await scenario(world, cluster)

    run_simulation(run, seed=seed)


def node(cluster: Cluster, index: int) -> Node:
    found = cluster.members[f"peer-{index}"].node
    assert found is not None
    return found


def library(cluster: Cluster, index: int) -> Library:
    return node(cluster, index).library


def content(value: float, size: int = 1000) -> bytes:
    return save({"weight": np.full(size, value, np.float32)})


async def publish(cluster: Cluster, index: int, name: str, value: float, **more: object) -> Manifest:
    return await library(cluster, index).publish(Draft(name, **more), content(value))  # type: ignore[arg-type]


def holders(cluster: Cluster, version: Manifest) -> list[str]:
    return [
        member.name for member in cluster.running() if member.node and member.node.library.store.holds(version.version)
    ]


def test_trainers_publish_by_themselves_and_rarely() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(250)
        heads = {(await library(cluster, index).latest("points")) for index in range(4)}
        assert len(heads) == 1, "everybody sees one head"
        head = heads.pop()
        assert head is not None
        versions = await library(cluster, 0).history("points")
        assert len(versions) <= 250 / 60 + 2, "at most every T, whoever publishes"
        assert head.age > 0
        assert head.metrics["accuracy"] > 0.5
        scores = [version.metrics["accuracy"] for version in reversed(versions)]
        assert scores[-1] >= scores[0]
        await trio.sleep(60)
        newest = await library(cluster, 0).latest("points")
        assert newest is not None
        assert len(holders(cluster, newest)) == 4, "every trainer of a model holds its head"

    play(scenario, peers=4, config=QUICK)


def test_a_newcomer_begins_with_the_head() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(200)
        head = await library(cluster, 0).latest("points")
        assert head is not None
        await cluster.join("peer-2", parts=3)
        await trio.sleep(8)
        assert node(cluster, 2).gossip.age >= head.age, "the samples of the head count as seen"
        assert node(cluster, 2).learner.progress.round >= int(head.metrics["round"])
        evaluation = node(cluster, 2).learner.progress.evaluation
        assert evaluation is not None
        assert evaluation.accuracy > 0.8 * head.metrics["accuracy"]

    play(scenario, peers=2, config=QUICK)


def test_a_peer_that_only_serves_follows_the_head() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await cluster.join("peer-2", parts=3, trains=False)
        await trio.sleep(200)
        follower = node(cluster, 2).learner
        assert isinstance(follower, Follower)
        first = follower.version
        assert first is not None
        assert follower.trainer is not None
        assert b"label" in await follower.trainer.predict(b"[0, 0, 0, 0, 0, 0, 0, 0]")
        later = await publish(cluster, 0, "points", 0.0, age=1e9)  # of another shape: it cannot be served
        await trio.sleep(60)
        assert library(cluster, 2).store.holds(later.version)
        assert follower.version != later
        assert follower.progress.state == "serving", "what cannot be served does not end the serving"

    play(scenario, peers=2, config=QUICK)


def test_a_version_gets_as_many_replicas_as_are_wanted_and_gets_them_again() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        version = await publish(cluster, 0, "model", 1.0)
        await trio.sleep(30)
        first = holders(cluster, version)
        assert len(first) == 3, "R, although there are eight peers"
        await trio.sleep(60)
        assert holders(cluster, version) == first, "nobody takes more than is asked for"
        for name in first[:2]:
            cluster.crash(name)
        await trio.sleep(400)
        left = holders(cluster, version)
        assert len(left) >= 3
        survivor = int(left[0].removeprefix("peer-"))
        assert node(cluster, survivor).replication.count(version.version) == len(left)
        for name in first[:2]:
            await cluster.start(name)
        await trio.sleep(200)
        assert len(holders(cluster, version)) == len(left) + 2, "who comes back has not lost anything"

    play(scenario, peers=8, config=CALM)


def test_whom_we_have_a_session_with_need_not_be_asked_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        version = await publish(cluster, 0, "model", 1.0)
        await trio.sleep(90)
        assert len(holders(cluster, version)) == 3
        asked: list[Contact] = []

        async def holds(self: Swarm, contact: Contact, versions: list[bytes]) -> list[bool]:
            asked.append(contact)
            raise RemoteError("it does not answer")

        monkeypatch.setattr(Swarm, "holds", holds)
        live = await node(cluster, 0).replication.holders([version])
        assert len(live[version.version]) == 2 and not asked, "all four have met"
        monkeypatch.setattr(node(cluster, 0).replication, "_is_met", lambda peer: False)
        live = await node(cluster, 0).replication.holders([version])
        assert live == {version.version: []} and len(asked) == 2

    play(scenario, peers=4, config=CALM)


def test_all_versions_of_a_name_gather_on_one_holder_set() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        sets = []
        for value in range(4):
            version = await publish(cluster, 0, "model", float(value))
            await trio.sleep(60)
            sets.append(set(holders(cluster, version)))
        assert len(set().union(*sets)) <= 4

    play(scenario, peers=8, config=CALM)


def test_concurrent_publishers_are_decided_the_same_way_everywhere_and_come_together() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        async with trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(publish, cluster, index, "model", float(index))
        await trio.sleep(30)
        found = [await library(cluster, index).latest("model") for index in range(4)]
        assert None not in found
        assert len({version.version for version in found if version}) == 1
        heads = await library(cluster, 3).heads("model")
        assert {head.height for head in heads} == {1}
        assert heads[0] == found[0]
        after = await publish(cluster, 3, "model", 9.0)
        assert after.height == 2
        assert set(after.parents) == {head.version for head in heads}
        await trio.sleep(10)
        assert await library(cluster, 0).latest("model") == after

    play(scenario, peers=4, config=CALM)


def test_a_rollback_is_a_new_version_with_the_old_content() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        old = await publish(cluster, 0, "model", 1.0)
        await trio.sleep(10)
        bad = await publish(cluster, 1, "model", 2.0)
        await trio.sleep(10)
        back = await library(cluster, 2).roll_back(await library(cluster, 2).find("model", old.version.hex()[:8]))
        assert (back.height, back.root, back.parents) == (bad.height + 1, old.root, (bad.version,))
        assert "rollback" in back.note
        await trio.sleep(10)
        latest = await library(cluster, 3).latest("model")
        assert latest == back
        await library(cluster, 3).fetch(back)
        assert await library(cluster, 3).content(back) == content(1.0)

    play(scenario, peers=4, config=CALM)


def test_the_head_outlives_its_publisher_and_the_first_peer() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        version = await publish(cluster, 0, "model", 5.0)
        await trio.sleep(60)
        cluster.power_off("peer-0")
        await trio.sleep(3 * 3600)  # longer than any record lives that its owner does not repeat
        await cluster.join("peer-5", parts=6)
        await trio.sleep(60)
        assert await library(cluster, 5).latest("model") == version
        assert "model" in await library(cluster, 5).names()
        await library(cluster, 5).fetch(version)
        assert await library(cluster, 5).content(version) == content(5.0)

    play(scenario, peers=4, config=CALM)


def test_what_is_removed_by_hand_does_not_come_back_and_leaves_the_others_alone() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        version = await publish(cluster, 0, "model", 5.0)
        await trio.sleep(60)
        assert await library(cluster, 0).remove([version]) > 0
        await trio.sleep(200)
        assert "peer-0" not in holders(cluster, version)
        assert len(holders(cluster, version)) >= 3

    play(scenario, peers=5, config=CALM)


def test_old_versions_go_pinned_ones_stay() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        first = await publish(cluster, 0, "model", 0.0)
        await library(cluster, 0).pin(first, True)
        for value in range(1, 9):
            await publish(cluster, 0, "model", float(value))
        await trio.sleep(30)
        heights = [version.height for version in library(cluster, 0).store.versions("model")]
        assert heights == [9, 8, 7, 6, 5, 1]

    play(scenario, peers=1)


def test_what_a_person_names_wrongly_is_said() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await publish(cluster, 0, "model", 0.0)
        with pytest.raises(UnknownModel, match="models list"):
            await library(cluster, 0).find("nothing")
        for wrong in ("xyz", "../../etc", "00"):
            with pytest.raises(UserError):
                await library(cluster, 0).find("model", wrong)
        with pytest.raises(UserError, match="safetensors"):
            await library(cluster, 0).publish(Draft("model"), b"no safetensors at all")
        with pytest.raises(UserError):
            await library(cluster, 0).publish(Draft("../x"), content(1.0))

    play(scenario, peers=1)


def test_everybody_ranks_holders_the_same() -> None:
    peers = [PeerId(bytes([index]) * 32) for index in range(9)]
    assert rendezvous("a", peers) == rendezvous("a", reversed(peers))
    assert rendezvous("a", peers) != rendezvous("b", peers)
    without = [peer for peer in peers if peer != peers[3]]
    assert rendezvous("a", without) == [peer for peer in rendezvous("a", peers) if peer != peers[3]], "no reshuffling"
