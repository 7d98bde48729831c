"""Whole meshes on the simulated network and virtual time: sessions, updates, faults, faulty peers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import trio

from gossipml.env.link import Link, fixed
from gossipml.env.simulated import World, run_simulation
from gossipml.ids import Address, Contact
from gossipml.peer.failure import FailureConfig
from gossipml.peer.gossip import GossipConfig
from gossipml.peer.gossip_events import SendUpdate
from gossipml.peer.learner import NotReady
from gossipml.peer.link import LinkConfig
from gossipml.peer.mesh import MeshConfig
from gossipml.peer.neighbours import NeighbourInfo
from gossipml.peer.protocols import parse_protocol
from gossipml.peer.wire import Body, Goodbye, HelloReply, News, Ping, Pong, Refusal, Update, UpdateAck, encode

from .peers import (
    DIGEST,
    OTHER_DIGEST,
    SIZE,
    Cluster,
    Outcome,
    Peer,
    RawPeer,
    VectorLearner,
    cluster,
    introduce,
    make_facts,
    make_profile,
    make_update,
    peer_id,
)

Scenario = Callable[[World, Cluster], Awaitable[None]]
BODY = np.zeros(SIZE, dtype=np.float32).tobytes()


def play(scenario: Scenario, seed: int = 1, *, link: Link | None = None) -> str:
    """Run a scenario in a fresh world; the digest of its trace."""

    async def main(world: World) -> str:
        async with cluster(world) as peers:
            await scenario(world, peers)
        return world.digest

    with_link = link or Link()
    return run_simulation(main, seed, link=with_link)


def info(peer: Peer, other: Peer) -> NeighbourInfo:
    return next(i for i in peer.mesh.neighbours() if i.peer == other.id)


def connected(peer: Peer) -> set[bytes]:
    return set(peer.mesh.links())


# Finding each other.


def test_peers_that_know_of_each_other_connect_with_one_session_each_way() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob, eve = [await peers.start(name) for name in ("ann", "bob", "eve")]
        await introduce(ann, bob, eve)
        for peer in (ann, bob, eve):
            assert connected(peer) == {other.id for other in (ann, bob, eve) if other is not peer}
            assert peer.mesh.stats.sessions_opened - peer.mesh.stats.sessions_closed == 2
        seen = info(ann, bob)
        assert (seen.name, seen.model, seen.state) == ("bob", "digits", "connected")
        assert seen.bytes_sent > 0 < seen.bytes_received
        assert ann.mesh.stats.traffic.sent == sum(i.bytes_sent for i in ann.mesh.neighbours())

    play(scenario)


def test_neighbours_hear_how_we_fare_as_long_as_the_session_lasts() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        assert bob.mesh.news(ann.id) is None
        ann.mesh.tell("training", 7, 0.5, None)
        await trio.sleep(1)
        assert bob.mesh.news(ann.id) == News("training", 7, 0.5, None, (bob.id[:8],))
        ann.scope.cancel()
        await trio.sleep(1)
        assert bob.mesh.news(ann.id) is None

    play(scenario)


def test_an_address_alone_is_enough_and_others_are_learnt_from_updates() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}") for n in range(5)]
        for peer in all_peers[1:]:
            peer.mesh.bootstrap([all_peers[0].address])
        await trio.sleep(3)
        assert len(connected(all_peers[0])) == 4
        for _ in range(3):
            for peer in all_peers:
                await peer.round()
            await trio.sleep(2)
        for peer in all_peers:
            assert len(connected(peer)) == 4

    play(scenario)


def test_ones_own_address_is_no_neighbour() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        ann.mesh.bootstrap([ann.address])
        await trio.sleep(10)
        assert not connected(ann)
        assert ann.mesh.neighbours() == []
        assert ann.mesh.view.doors(1e9) == []

    play(scenario)


@pytest.mark.parametrize("seed", range(10))
def test_of_two_sessions_dialled_at_once_the_same_one_stays_on_both_sides(seed: int) -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        ann.mesh.learn([bob.contact])
        bob.mesh.learn([ann.contact])
        await trio.sleep(10)
        assert connected(ann) == {bob.id}
        assert connected(bob) == {ann.id}
        for peer in (ann, bob):
            assert peer.mesh.stats.sessions_opened - peer.mesh.stats.sessions_closed == 1
            await peer.round()
        await trio.sleep(1)
        assert ann.mesh.stats.merges == bob.mesh.stats.merges > 0

    play(scenario, seed)


def test_a_peer_that_goes_says_goodbye_and_nothing_is_left_of_it() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        link = ann.mesh._links[bob.id]
        bob.scope.cancel()
        await trio.sleep(0.5)
        assert link.end_code == "goodbye"
        assert link.end_reason == "stopping"
        assert not connected(ann)
        assert not connected(bob)
        assert info(ann, bob).state == "known"
        assert bob.mesh._all == {}
        assert bob.mesh._dialling.contacts == 0

    play(scenario)


def test_a_crashed_peer_is_found_again_after_its_restart() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        peers.crash(bob)
        await trio.sleep(1)
        assert not connected(ann)
        await ann.round()  # to a dead peer: costs nothing but the attempt
        await trio.sleep(20)
        assert info(ann, bob).state == "lost"
        assert not ann.mesh.gossip._sending
        bob = await peers.start("bob")
        bob.mesh.learn([ann.contact])
        await trio.sleep(2)
        assert connected(ann) == {bob.id}

    play(scenario)


def test_a_peer_whose_power_fails_is_suspect_then_lost() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        config = MeshConfig(failure=FailureConfig(silence=5, answer=3, suspicion=7))
        ann, bob = await peers.start("ann", config=config), await peers.start("bob", config=config)
        await introduce(ann, bob)
        await trio.sleep(60)
        assert info(ann, bob).state == "connected", "probes keep an idle session alive"
        world.power_off("bob")
        bob.scope.cancel()
        await trio.sleep(9)
        assert info(ann, bob).state == "suspect"
        await trio.sleep(8)
        assert not connected(ann)
        assert info(ann, bob).state in ("suspect", "lost")

    play(scenario)


def test_a_restarted_peer_takes_the_place_of_its_dead_session() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        world.power_off("bob")  # ann's stream stays half open
        bob.scope.cancel()
        bob = await peers.start("bob")
        bob.mesh.learn([ann.contact])
        await trio.sleep(1)
        assert connected(bob) == {ann.id}
        await bob.round()
        await trio.sleep(1)
        assert ann.mesh.stats.updates_received == 1

    play(scenario)


def test_a_partition_heals() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}") for n in range(4)]
        await introduce(*all_peers)
        world.partition(["p0", "p1"], ["p2", "p3"])
        for _ in range(10):
            await trio.sleep(6)
            for peer in all_peers:
                await peer.round()
        assert [len(connected(peer)) for peer in all_peers] == [1, 1, 1, 1]
        world.heal()
        await trio.sleep(60)
        assert [len(connected(peer)) for peer in all_peers] == [3, 3, 3, 3]

    play(scenario)


def test_the_number_of_sessions_is_bounded_and_the_least_used_makes_room() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        config = MeshConfig(sessions=3, wanted=2)
        hub = await peers.start("hub", config=config)
        others = [await peers.start(f"p{n}", config=config) for n in range(6)]
        for peer in others:
            peer.mesh.learn([hub.contact])
        for _ in range(20):
            await trio.sleep(3)
            assert len(connected(hub)) <= 3
            for peer in others:
                await peer.round()
        assert hub.mesh.stats.sessions_opened > 6
        assert len([i for i in hub.mesh.neighbours() if i.age is not None]) == 6, "everybody had a turn"

    play(scenario)


# Updates.


def test_a_round_reaches_the_neighbours_and_is_answered() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = await peers.start("ann", value=1.0), await peers.start("bob", value=3.0)
        await introduce(ann, bob)
        await ann.round(samples=0)
        await trio.sleep(1)
        assert bob.learner.values == pytest.approx(2.0)
        assert ann.learner.values == pytest.approx(2.0), "push-pull of two equals keeps their mean"
        assert ann.mesh.stats.updates_sent == ann.mesh.stats.merges == bob.mesh.stats.merges == 1
        assert info(ann, bob).age == 0
        await ann.round(samples=50)
        await trio.sleep(1)
        assert bob.mesh.age == 50

    play(scenario)


def test_one_encoding_serves_all_receivers() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}") for n in range(5)]
        await introduce(*all_peers)
        await all_peers[0].round()
        await trio.sleep(1)
        assert all_peers[0].mesh.stats.updates_sent == 4
        assert all_peers[0].learner.snapshots == 1

    play(scenario)


def test_a_peer_without_its_model_yet_is_a_member_and_gossips_once_it_is_loaded() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = await peers.start("ann"), await peers.start("bob", attach=False)
        await introduce(ann, bob)
        await ann.round()
        await trio.sleep(1)
        assert connected(ann) == {bob.id}
        assert ann.mesh.stats.updates_sent == 0
        bob.mesh.attach(bob.learner, make_facts())
        await trio.sleep(1)
        await ann.round()
        await trio.sleep(1)
        assert bob.mesh.stats.merges == 1
        assert info(ann, bob).model == "digits"

    play(scenario)


def test_updates_for_a_learner_that_is_away_are_refused_and_the_session_stays() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        closed = ann.mesh.stats.sessions_closed
        bob.mesh.detach()
        await ann.round()
        await trio.sleep(1)
        assert "not ready" in info(ann, bob).reason
        assert connected(ann) == {bob.id}
        assert info(bob, ann).strikes == 0
        await bob.round()  # nothing to send: not an error
        bob.mesh.attach(bob.learner, make_facts())
        await ann.round()
        await trio.sleep(1)
        assert bob.mesh.stats.merges == 1
        assert ann.mesh.stats.sessions_closed == closed

    play(scenario)


def test_a_learner_that_fails_costs_its_updates_and_nothing_else() -> None:
    class Failing(VectorLearner):
        async def snapshot(self, encoding: str) -> bytes:
            raise NotReady("the worker died")

        async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> Outcome:
            raise NotReady("the worker died")

    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        bob.mesh.detach()
        bob.mesh.attach(Failing(bob.learner.values), make_facts())
        for _ in range(5):
            await ann.round()
            await bob.round()
            await trio.sleep(1)
        assert bob.mesh.stats.updates_received == 5
        assert bob.mesh.stats.merges == 0
        assert not bob.mesh.gossip._sending
        assert info(bob, ann).strikes == 0
        assert bob.mesh._exchange.bytes_held == 0

    play(scenario)


def test_peers_of_other_models_are_members_without_gossip() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        bob = await peers.start("bob", model="other", digest=OTHER_DIGEST)
        eve = await peers.start("eve", attach=False)
        await introduce(ann, bob, eve)
        assert connected(ann) == {bob.id, eve.id}
        for peer in (ann, bob):
            await peer.round()
        await trio.sleep(1)
        assert ann.mesh.stats.updates_sent == bob.mesh.stats.updates_sent == 0
        assert info(ann, bob).model == "other"

    play(scenario)


def test_one_name_for_two_specifications_is_refused_and_shown_on_both_sides() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        bob = await peers.start("bob", digest=OTHER_DIGEST)
        await introduce(ann, bob)
        for here, there in ((ann, bob), (bob, ann)):
            assert not connected(here)
            seen = info(here, there)
            assert seen.state == "refused"
            assert DIGEST in seen.reason
            assert OTHER_DIGEST in seen.reason
        dials = world.events
        await trio.sleep(100)
        assert world.events - dials < 20, "nobody hammers at a closed door"

    play(scenario)


def test_two_specifications_that_show_when_the_model_is_loaded_end_the_session() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = await peers.start("ann"), await peers.start("bob", attach=False)
        await introduce(ann, bob)
        assert connected(ann) == {bob.id}
        bob.mesh.attach(bob.learner, make_facts(digest=OTHER_DIGEST))
        await trio.sleep(1)
        assert not connected(ann)
        assert info(bob, ann).state == "refused"
        assert DIGEST in info(bob, ann).reason

    play(scenario)


def test_finished_peers_go_on_averaging_and_slow_down() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}", value=float(n)) for n in range(4)]
        await introduce(*all_peers)
        for peer in all_peers:
            peer.mesh.training_finished()
        await trio.sleep(30)
        values = [float(peer.learner.values[0]) for peer in all_peers]
        assert [peer.learner.settles for peer in all_peers] == [1] * 4
        assert max(values) - min(values) < 0.01
        assert sum(values) / 4 == pytest.approx(1.5, abs=0.6)
        await trio.sleep(200)
        before = sum(peer.mesh.stats.updates_sent for peer in all_peers)
        await trio.sleep(120)
        rate = (sum(peer.mesh.stats.updates_sent for peer in all_peers) - before) / 120 / 4
        assert rate < 0.5, "updates a second from each peer"

    play(scenario)


def test_a_newcomer_catches_up_with_finished_peers() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        old = [await peers.start(f"p{n}", value=1.0) for n in range(4)]
        for peer in old:
            peer.mesh.restore(50_000, 100)
        await introduce(*old)
        for peer in old:
            peer.mesh.training_finished()
        await trio.sleep(300)
        new = await peers.start("new", value=-10.0)
        new.mesh.learn([old[0].contact])
        await trio.sleep(2)
        for _ in range(5):
            await new.round(samples=10)
            await trio.sleep(0.5)
        assert new.mesh.age > 50_000
        assert float(new.learner.values[0]) > 0.5
        for peer in old:
            assert float(peer.learner.values[0]) > 0.5

    play(scenario)


# Slow and dead neighbours.


def test_nobody_waits_for_a_slow_peer() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        size = 500_000  # 2 MB
        all_peers = [await peers.start(f"p{n}", size=size, value=float(n)) for n in range(4)]
        await introduce(*all_peers)
        slow = all_peers[3]
        world.set_link("p3", "p0", Link(delay=fixed(0.5), bandwidth=100_000))
        begun, link = world.now(), all_peers[0].mesh._links[slow.id]
        for _ in range(10):
            await all_peers[0].round()
            await trio.sleep(0.1)
        assert world.now() - begun < 2
        assert all_peers[1].mesh.stats.updates_received >= 8
        assert slow.mesh.stats.updates_received == 0
        await trio.sleep(60)
        assert 1 <= slow.mesh.stats.updates_received <= 3
        assert all_peers[0].mesh._links[slow.id] is link, "slow is not dead"
        assert info(all_peers[0], slow).state == "connected"

    play(scenario)


def test_a_peer_that_stops_reading_costs_one_update_and_then_its_session() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        size = 2_000_000  # 8 MB, more than streams hold
        ann = await peers.start("ann", size=size)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        assert isinstance(raw.heard[0], HelloReply)
        await ann.round()
        await trio.sleep(5)
        held = ann.mesh.gossip._sending
        assert len(held) == 1
        await ann.round()
        assert ann.mesh.gossip._sending == held, "not a second one"
        await trio.sleep(20)
        assert not connected(ann)
        assert not ann.mesh.gossip._sending
        assert ann.mesh.stats.updates_failed == 1

    play(scenario)


def test_an_update_that_finds_another_one_waiting_is_dropped_and_counted() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        size = 2_000_000
        ann = await peers.start("ann", size=size)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        snapshot = await ann.mesh._exchange.snapshot("float32")
        for _ in range(4):
            parcel = ann.mesh._packing._parcel(snapshot, make_facts(size), SendUpdate(raw.id, reply_wanted=False), ())
            ann.mesh.deliver(raw.id, parcel)
            await trio.sleep(0.1)
        assert ann.mesh.stats.updates_dropped == 2, "one is being sent, one waits"

    play(scenario)


def test_an_update_that_stalls_in_the_middle_ends_the_session() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.stream.send_all(encode(make_update()), BODY[:10])
        await trio.sleep(5)
        assert ann.mesh.gossip.expects(raw.id)
        await bob.round()  # others go on meanwhile
        await trio.sleep(1)
        assert ann.mesh.stats.merges == 1
        await trio.sleep(8)
        assert connected(ann) == {bob.id}
        assert not ann.mesh.gossip.expects(raw.id)

    play(scenario)


def test_a_trickle_does_not_hold_a_buffer_for_ever() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        config = MeshConfig(link=LinkConfig(stall=10, slowest=1000))
        ann = await peers.start("ann", size=1000, config=config)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.say(make_update(size=1000))
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await raw.stream.send_all(b"x")
                await trio.sleep(1)
        assert 13 < world.now() < 17, "10 s of grace and 4,000 bytes at 1,000 a second"
        assert not connected(ann)

    play(scenario)


# Peers that break the rules.


def test_garbage_after_hello_ends_that_session_alone() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.stream.send_all(b"\x00\x00\x00\x05hello, this is no frame")
        heard = await raw.listen_for(1)
        assert isinstance(heard[-1], Goodbye)
        assert "msgpack" in heard[-1].reason
        assert raw.ended
        assert connected(ann) == {bob.id}
        assert ann.mesh.stats.faults == 1
        assert ann.mesh.gossip.conduct.record(raw.id, world.now()).strikes == 1
        await bob.round()
        await trio.sleep(1)
        assert ann.mesh.stats.merges == 1

    play(scenario)


def test_garbage_instead_of_hello_and_silence_hurt_nobody() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        loud = await RawPeer.dial(world, "loud", ann)
        await loud.stream.send_all(bytes(range(256)) * 100)
        mute = await RawPeer.dial(world, "mute", ann)
        await mute.listen_for(4)
        early = mute.ended
        await introduce(ann, bob)
        assert connected(ann) == {bob.id}
        await mute.listen_for(1)
        assert (early, mute.ended) == (False, True), "no hello within 5 s"
        await loud.listen_for(1)
        assert loud.ended

    play(scenario)


@pytest.mark.parametrize(
    "hostile",
    [
        replace(make_update(), digest=OTHER_DIGEST),
        replace(make_update(), model="other"),
        replace(make_update(), body_length=2**40),
        replace(make_update(), encoding="int3"),
    ],
)
def test_a_body_of_unknown_length_ends_the_session_before_it_is_read(hostile: Update) -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.say(hostile, BODY)
        await raw.listen_for(1)
        assert raw.ended
        assert ann.learner.merges == []
        assert ann.mesh._exchange.bytes_held == 0

    play(scenario)


def test_values_that_are_not_finite_lead_to_quarantine_and_back_out_of_it() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = [await peers.start(name) for name in ("ann", "bob")]
        await introduce(ann, bob)
        nan = np.full(SIZE, np.nan, dtype=np.float32).tobytes()
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        for strike in range(3):
            await raw.say(make_update(), nan)
            heard = await raw.listen_for(1)
            if strike < 2:
                assert heard == [UpdateAck(1, False, "not finite")]
        assert isinstance(heard[-1], Goodbye)
        assert raw.ended
        [seen] = [i for i in ann.mesh.neighbours() if i.name == "raw"]
        assert (seen.state, seen.strikes) == ("quarantined", 3)
        assert "not finite" in seen.reason
        assert np.isfinite(ann.learner.values).all()
        assert connected(ann) == {bob.id}
        world.crash("raw")
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        assert isinstance(raw.heard[0], Refusal)
        assert raw.heard[0].code == "quarantined"
        await trio.sleep(700)
        world.crash("raw")
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        assert isinstance(raw.heard[0], HelloReply)

    play(scenario)


def test_a_stale_update_is_refused_answered_and_its_body_skipped() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann", value=3.0)
        ann.mesh.restore(10_000, 5)
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))
        await raw.say(make_update(age=10, want=True), BODY)
        ack, update, body = await raw.listen_for(1)
        assert isinstance(ack, UpdateAck)
        assert not ack.accepted
        assert "stale" in ack.reason
        assert isinstance(update, Update)
        assert update.reply
        assert isinstance(body, Body)
        await raw.say(Ping(5))
        assert await raw.listen_for(1) == [Pong(5)], "the session goes on behind the skipped body"
        assert ann.learner.merges == []

    play(scenario)


def test_too_many_silent_connections_do_not_keep_members_out() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        config = MeshConfig(hellos=10)
        ann, bob = await peers.start("ann", config=config), await peers.start("bob")
        mute = [await RawPeer.dial(world, f"mute{n}", ann) for n in range(30)]
        await trio.sleep(0.5)
        assert len(ann.mesh._all) == 10
        bob.mesh.learn([ann.contact])
        await trio.sleep(20)
        assert connected(ann) == {bob.id}
        for raw in mute:
            await raw.listen_for(0.1)
            assert raw.ended

    play(scenario)


def test_a_peer_that_claims_to_be_another_one_is_never_asked_twice() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob, eve = [await peers.start(name) for name in ("ann", "bob", "eve")]
        ann.mesh.learn([bob.contact._replace(addresses=(eve.address,))])
        await trio.sleep(3)
        assert bob.id not in connected(ann)
        ann.mesh.learn([bob.contact])
        await trio.sleep(2)
        assert bob.id in connected(ann)

    play(scenario)


def test_nobody_far_away_makes_us_knock_at_our_own_machine() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        inner = Address("127.0.0.1", 22)
        profile = replace(make_profile("raw"), addresses=(inner, Address("10.7.7.7", 1)))
        raw = await RawPeer.dial(world, "raw", ann, profile=profile)
        hint = Contact(peer_id(9), (inner,), "digits", "nine")
        await raw.say(replace(make_update(), contacts=(hint,)), BODY)
        await trio.sleep(1)
        addresses = [address for entry in ann.mesh.view.entries() for address in entry.contact.addresses]
        assert addresses == [Address("10.7.7.7", 1), Address(world.host("raw"), 8711)]

    play(scenario)


# The whole.


def test_thirty_peers_come_to_agree_while_some_die() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}", value=float(n)) for n in range(30)]
        for peer in all_peers[1:]:
            peer.mesh.bootstrap([all_peers[0].address])
        await trio.sleep(3)
        for number in range(10):
            for peer in all_peers:
                await peer.round(samples=10)
            await trio.sleep(1)
            if number == 2:
                for peer in all_peers[:6]:  # the first one too
                    peers.crash(peer)
                del all_peers[:6]
        values = np.array([peer.learner.values[0] for peer in all_peers])
        assert values.max() - values.min() < 0.3
        assert 8 < values.mean() < 22
        for peer in all_peers:
            assert len(connected(peer)) >= 8
            assert peer.mesh.stats.faults == 0

    play(scenario)


def test_two_runs_with_one_seed_are_identical() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        all_peers = [await peers.start(f"p{n}", value=float(n)) for n in range(5)]
        for peer in all_peers[1:]:
            peer.mesh.bootstrap([all_peers[0].address])
        for number in range(6):
            for peer in all_peers:
                await peer.round(samples=10 + number)
            await trio.sleep(1)
            if number == 3:
                peers.crash(all_peers.pop())
        for peer in all_peers:
            peer.mesh.training_finished()
        await trio.sleep(10)
        for peer in all_peers:
            world.note(f"value {float(peer.learner.values[0])!r}", peer.name)

    lossy = Link(loss=0.05)
    first = play(scenario, 5, link=lossy)
    assert play(scenario, 5, link=lossy) == first
    assert play(scenario, 6, link=lossy) != first


# What a link carries, and merges of several models at once.


def test_auto_asks_what_each_link_carries_in_a_receivers_share_of_a_round() -> None:
    asked: list[tuple[str, float | None, float]] = []

    def choose(now: str, bandwidth: float | None, seconds: float) -> str:
        asked.append((now, bandwidth, seconds))
        return "float32"

    async def scenario(world: World, peers: Cluster) -> None:
        size = 1_000_000  # 4 MB: more than a socket's buffers take at once
        ann, bob = await peers.start("ann", size=size), await peers.start("bob", size=size)
        ann.mesh.gossip.config = replace(ann.mesh.gossip.config, encoding="auto")
        ann.mesh.attach(ann.learner, replace(make_facts(size), choose=choose))
        await introduce(ann, bob)
        for _ in range(12):
            await ann.round()
            await trio.sleep(3)
        assert asked[0][:2] == ("", None)
        now, bandwidth, seconds = asked[-1]
        assert now == "float32"
        assert bandwidth is not None and 0.9e6 < bandwidth < 2e6, "what buffers swallow makes a link look faster"
        assert seconds == pytest.approx(3 / 4, rel=0.1), "four receivers share a round"
        assert bob.mesh.stats.merges >= 3

    play(scenario, link=Link(delay=fixed(0.01), bandwidth=1e6))


def test_models_are_merged_together_once_there_are_enough_and_one_of_each_sender() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        stacked = GossipConfig(stack=2, protocol=parse_protocol("merge-update:2"))  # wishes for no answers
        ann = await peers.start("ann", value=0.0, gossip=stacked)
        bob, eve = await peers.start("bob", value=3.0), await peers.start("eve", value=6.0)
        await introduce(ann, bob, eve)
        for _ in range(3):
            await bob.round()
            await trio.sleep(1)
        await ann.round()
        await trio.sleep(1)
        assert ann.mesh.stats.merges == 0, "three models, but of one sender"
        await eve.round()
        await trio.sleep(1)
        assert ann.mesh.stats.merges == 2
        assert ann.learner.values[0] > 0

    play(scenario)


def test_a_body_that_waited_until_it_was_stale_takes_no_memory() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann", value=1.0, gossip=GossipConfig(stack=2))
        bob = await peers.start("bob", value=2.0, gossip=GossipConfig(protocol=parse_protocol("merge-update:2")))
        await introduce(ann, bob)
        await bob.round()
        await trio.sleep(1)
        assert ann.mesh._exchange.bytes_held == 4 * SIZE
        peers.crash(bob)
        await trio.sleep(60)
        for _ in range(30):
            await ann.round()
        assert ann.mesh.stats.merges == 0
        assert ann.mesh._exchange.bytes_held == 0

    play(scenario)


def test_a_bad_model_among_several_costs_its_sender_a_strike_and_nobody_else() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann", value=1.0, gossip=GossipConfig(stack=2))
        bob, eve = await peers.start("bob", value=2.0), await peers.start("eve", value=float("nan"))
        await introduce(ann, bob, eve)
        await ann.round()
        await bob.round()
        await eve.round()
        await trio.sleep(1)
        assert (info(ann, eve).strikes, info(ann, bob).strikes) == (1, 0)
        assert (info(ann, eve).strike_reason, info(ann, eve).quarantined_until) == ("not finite", None)
        assert np.isfinite(ann.learner.values).all() and ann.learner.values[0] > 1

    play(scenario)
