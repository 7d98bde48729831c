"""Gossip protocols between meshes on the simulated network: what only the shell can get wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import trio

from gossipml.env.simulated import World, run_simulation
from gossipml.peer.gossip import GossipConfig
from gossipml.peer.protocols import PROTOCOLS, parse_protocol
from gossipml.peer.wire import Update, UpdateAck

from .peers import SIZE, Cluster, Peer, RawPeer, cluster, introduce, make_facts, make_profile


def play(scenario: Callable[[World, Cluster], Awaitable[None]]) -> None:
    async def main(world: World) -> None:
        async with cluster(world) as peers:
            await scenario(world, peers)

    run_simulation(main, 1)


def config(name: str) -> GossipConfig:
    return GossipConfig(protocol=parse_protocol(name))


def weight(peer: Peer) -> float:
    assert peer.mesh.gossip.policy.push_sum is not None
    return peer.mesh.gossip.policy.push_sum.weight


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("partitioned", "sub-sampled")])
def test_peers_with_any_protocol_come_to_agree_over_sessions(name: str) -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_of_them = [await peers.start(f"peer{n}", value=float(n), gossip=config(name)) for n in range(6)]
        await introduce(*all_of_them)
        for _ in range(60):
            for peer in all_of_them:
                await peer.round()
                await trio.sleep(0.05)
        values = [float(peer.learner.values[0]) for peer in all_of_them]
        assert np.ptp(values) < 0.05
        assert 0.0 < np.mean(values) < 5.0
        assert sum(peer.mesh.stats.faults for peer in all_of_them) == 0
        if name == "push-sum":
            assert sum(weight(peer) for peer in all_of_them) == pytest.approx(6)
            assert np.mean(values) == pytest.approx(2.5, abs=0.01)

    play(scenario)


def test_a_pull_brings_the_others_model_and_sends_none() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann", value=1.0, gossip=config("pull"))
        bob = await peers.start("bob", value=3.0, gossip=config("pull"))
        await introduce(ann, bob)
        await ann.round(samples=0)
        await trio.sleep(1)
        assert ann.learner.values == pytest.approx(2.0)
        assert bob.learner.values == pytest.approx(3.0)
        assert ann.learner.snapshots == 0
        assert bob.learner.snapshots == 1
        assert bob.mesh.stats.updates_received == 0

    play(scenario)


def test_a_pull_dials_whom_it_asks() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name, gossip=config("pull")) for name in ("ann", "bob")]
        ann.mesh.view.learn([bob.contact])
        await ann.round()
        await trio.sleep(2)
        assert ann.mesh.stats.merges == 1

    play(scenario)


def test_a_question_of_another_model_is_no_fault_and_gets_no_answer() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.say(Update("other", "0" * 64, "float32", SIZE, 0, 1.0, 1, True, False))
        assert [m for m in await raw.listen_for(5) if isinstance(m, Update)] == []
        assert ann.mesh.stats.faults == 0
        await raw.say(Update("digits", make_facts().digest, "float32", SIZE, 0, 1.0, 1, True, False))
        assert [m.reply for m in await raw.listen_for(5) if isinstance(m, Update)] == [True]

    play(scenario)


def test_weight_that_a_busy_peer_refused_comes_back() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann", gossip=config("push-sum"))
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await ann.round()
        [update] = [m for m in await raw.listen_for(2) if isinstance(m, Update)]
        assert update.mass is not None
        assert weight(ann) == 0.5
        await raw.say(UpdateAck(update.round, False, "busy", update.mass.total))
        await trio.sleep(1)
        assert weight(ann) == 1.0

    play(scenario)


def test_weight_in_doubt_stays_out_until_the_next_message_to_that_peer() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name, gossip=config("push-sum")) for name in ("ann", "bob")]
        await introduce(ann, bob)
        bob.mesh.detach()  # refuses: not ready
        await ann.round()
        await trio.sleep(1)
        assert weight(ann) == 1.0
        bob.mesh.attach(bob.learner, make_facts())
        for _ in range(10):
            for peer in (ann, bob):
                await peer.round()
                await trio.sleep(0.1)
        assert weight(ann) + weight(bob) == pytest.approx(2.0)

    play(scenario)


def test_a_restarted_peer_is_not_given_what_its_former_life_had() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name, gossip=config("push-sum")) for name in ("ann", "bob")]
        await introduce(ann, bob)
        for _ in range(5):
            await ann.round()
            await trio.sleep(0.1)
        peers.crash(bob)
        await trio.sleep(30)
        bob = await peers.start("bob", gossip=config("push-sum"))
        await introduce(ann, bob)
        before = weight(ann)
        await ann.round()
        await trio.sleep(1)
        assert weight(ann) + weight(bob) == pytest.approx(1.0 + before)

    play(scenario)


def test_an_update_without_weight_is_refused_where_sums_are_pushed_and_nobody_is_blamed() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name, gossip=config(p)) for name, p in (("ann", "push-sum"), ("bob", "push"))]
        await introduce(ann, bob)
        for peer in (ann, bob):
            await peer.round()
        await trio.sleep(2)
        assert ann.mesh.stats.merges == bob.mesh.stats.merges == 0
        assert ann.mesh.stats.faults == bob.mesh.stats.faults == 0
        [of_bob], [of_ann] = ann.mesh.neighbours(), bob.mesh.neighbours()
        assert "start both with the same --protocol" in of_bob.reason
        assert "start both with the same --protocol" in of_ann.reason
        assert weight(ann) == 1.0

    play(scenario)
