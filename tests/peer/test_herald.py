"""Orders of the network key run from session to session; what they end, ends."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio

from gossipml.env import SWARM, Credentials, Stream
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.keys import NetworkKeys
from gossipml.membership import MAX_REVOKED, Membership
from gossipml.orders import NetworkKey
from gossipml.peer.herald import Herald
from gossipml.peer.wire import MAX_ORDERS, Goodbye, Hello, HelloReply, Orders, Refusal

from .peers import NETWORK, Cluster, Peer, RawPeer, cluster, introduce, make_credentials, make_profile

WINDOW = 600
COOKIE = b"new".ljust(32)


def play(scenario: Callable[[World, Cluster], Awaitable[None]], seed: int = 1) -> None:
    async def main(world: World) -> None:
        async with cluster(world) as peers:
            await scenario(world, peers)

    run_simulation(main, seed)


def rotation(peer: Peer, generation: int = 2, cookie: bytes = COOKIE, window: int = WINDOW) -> bytes:
    now = int(peer.env.clock.wall())
    return NETWORK.rotation(generation, cookie, made=now, old_until=now + window).raw


def revocation(peer: Peer | PeerId, made: int = 1_800_000_000) -> bytes:
    return NETWORK.revocation(peer.id if isinstance(peer, Peer) else peer, made=made).raw


def generations(peer: Peer) -> list[int]:
    return [keys.generation for keys in peer.credentials.membership.accepted]


def newcomer(name: str) -> Credentials:
    """Whoever joins with the token of after the rotation."""
    keys = NetworkKeys.derive(NETWORK.network_id, 2, COOKIE)
    return Credentials(make_credentials(name).identity, keys)


# The herald alone.


def test_orders_travel_in_messages_that_keep_their_order() -> None:
    membership = Membership(NetworkKeys.derive(NETWORK.network_id, 1, b"c" * 32))
    herald = Herald(membership)
    assert herald.greeting(membership.digest) == []
    for number in range(MAX_REVOKED):
        membership.take(revocation(PeerId(number.to_bytes(32))), 0)
    membership.take(NETWORK.rotation(2, COOKIE, made=0, old_until=9).raw, 0)
    other = Membership(NetworkKeys.derive(NETWORK.network_id, 1, b"c" * 32))
    messages = herald.greeting(other.digest)
    assert len(messages) == -(-(MAX_REVOKED + 1) // MAX_ORDERS) < 64, "they fit the queue of a session"
    for message in messages:
        assert len(Herald(other).hear(message, 0)) == len(message.orders)
    assert other.digest == membership.digest
    assert herald.greeting(other.digest) == []
    assert "rotate" not in repr(messages[-1]) and COOKIE.hex() not in repr(messages[-1])


def test_what_came_before_a_forged_order_counts() -> None:
    membership = Membership(NetworkKeys.derive(NETWORK.network_id, 1, b"c" * 32))
    good, bad = revocation(PeerId(b"a" * 32)), revocation(PeerId(b"b" * 32))[:-1] + b"x"
    assert Herald(membership).hear(Orders((good, bad, good), b""), 0) == [good]
    with pytest.raises(RemoteError):
        Herald(membership).hear(Orders((good, bad), b""), 0)


# Over sessions.


def test_an_order_reaches_everybody_over_many_steps_and_is_told_once() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        chain = [await peers.start(f"p{index}") for index in range(6)]
        for left, right in itertools.pairwise(chain):
            left.mesh.learn([right.contact])
        await trio.sleep(5)
        assert chain[0].mesh.order(rotation(chain[0]))
        await trio.sleep(5)
        for peer in chain:
            assert generations(peer) == [2, 1]
            assert peer.mesh.stats.faults == 0
        assert not chain[0].mesh.order(chain[3].credentials.membership.orders()[0])

    play(scenario)


def test_sessions_move_to_the_new_key_and_nobody_is_alone_when_the_old_one_ends() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        members = [await peers.start(f"p{index}") for index in range(5)]
        await introduce(*members)
        members[0].mesh.order(rotation(members[0]))
        await trio.sleep(120)
        new = members[0].credentials.membership.newest.key_id
        for peer in members:
            assert len(peer.mesh.links()) == 4
            assert {link.stream.key_id for link in peer.mesh._links.values()} == {new}
        least = 4
        for _ in range(WINDOW):
            await trio.sleep(1)
            least = min(least, *(len(peer.mesh.links()) for peer in members))
        assert [generations(peer) for peer in members] == [[2]] * 5
        assert least == 4, "nobody lost a session over it"

    play(scenario)


def test_who_was_away_hears_of_it_within_the_window_and_who_was_away_longer_does_not() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob = await peers.start("ann"), await peers.start("bob")
        await introduce(ann, bob)
        ann.mesh.order(rotation(ann))
        await trio.sleep(WINDOW / 2)
        late = await peers.start("late")
        late.mesh.bootstrap([ann.address])
        await trio.sleep(5)
        assert generations(late) == [2, 1]
        assert ann.id in late.mesh.links()
        await trio.sleep(WINDOW)
        assert generations(late) == [2] and ann.id in late.mesh.links()

        too_late = await peers.start("too-late")
        too_late.mesh.bootstrap([ann.address])
        await trio.sleep(30)
        assert too_late.mesh.links() == [] and generations(too_late) == [1]
        assert "holds another token" in too_late.mesh.strangers[ann.address]

    play(scenario)


def test_a_newcomer_with_the_new_token_and_a_member_that_has_not_heard_meet_through_the_others() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        ann.mesh.order(rotation(ann))
        bob = await peers.start("bob")
        new = await peers.start("new", credentials=newcomer("new"))
        new.mesh.learn([bob.contact])
        await trio.sleep(20)
        assert bob.id not in new.mesh.links(), "they share no key"
        for peer in (bob, new):
            peer.mesh.learn([ann.contact])
        await trio.sleep(400)
        assert set(new.mesh.links()) == {ann.id, bob.id}
        assert new.credentials.membership.digest == ann.credentials.membership.digest

    play(scenario)


def test_an_old_session_ends_when_its_key_ends() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        raw = await RawPeer.dial(world, "raw", ann, profile=make_profile("raw"))  # never learns anything
        ann.mesh.order(rotation(ann, window=3))
        heard = await raw.listen_for(10)
        assert any(isinstance(message, Orders) for message in heard)
        assert isinstance(heard[-1], Goodbye) and "token was rotated" in heard[-1].reason
        assert ann.mesh.links() == []

    play(scenario)


def test_a_revoked_peer_is_out_and_is_told_why_and_the_others_never_notice() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann, bob, eve = [await peers.start(name) for name in ("ann", "bob", "eve")]
        await introduce(ann, bob, eve)
        assert len(eve.mesh.links()) == 2
        closed = bob.mesh.stats.sessions_closed
        ann.mesh.order(revocation(eve))
        await trio.sleep(2)
        assert eve.mesh.links() == []
        for peer, other in ((ann, bob), (bob, ann)):
            assert peer.mesh.links() == [other.id]
            assert eve.id not in peer.mesh.view and eve.id not in {c.peer for c in peer.mesh.contacts()}
        assert bob.mesh.stats.sessions_closed == closed + 1
        for _ in range(20):  # it knows the addresses and tries again and again
            eve.mesh.learn([ann.contact, bob.contact])
            eve.mesh.bootstrap([ann.address, bob.address])
            ann.mesh.learn([eve.contact])
            ann.mesh.bootstrap([eve.address])
            await trio.sleep(60)
            assert eve.mesh.links() == [] and ann.mesh.links() == [bob.id]
        reasons = [info.reason for info in eve.mesh.neighbours() if info.state == "refused"]
        assert reasons and all("was revoked on 2027-01-15" in reason for reason in reasons)
        assert eve.id not in ann.mesh.view

    play(scenario)


def test_a_rotation_never_reaches_a_revoked_peer() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        members = [await peers.start(f"p{index}") for index in range(4)]
        eve = await peers.start("eve")
        await introduce(*members, eve)
        members[0].mesh.order(revocation(eve))
        members[0].mesh.order(rotation(members[0]))  # at once, while others still have a session with eve
        await trio.sleep(WINDOW + 60)
        assert generations(eve) == [1] and eve.mesh.links() == []
        assert all(generations(peer) == [2] for peer in members)

    play(scenario)


def test_forged_foreign_and_replayed_orders_change_nothing_and_are_faults() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        old = rotation(ann, window=60)
        ann.mesh.order(old)
        await trio.sleep(90)
        ann.mesh.order(rotation(ann, 3, b"third".ljust(32), window=60))
        await trio.sleep(90)
        assert generations(ann) == [3]
        digest = ann.credentials.membership.digest
        third = ann.credentials.membership.newest
        stranger = NetworkKey(b"s" * 32)
        forged = old[:40] + bytes([old[40] ^ 1]) + old[41:]
        foreign = stranger.rotation(4, COOKIE, made=1, old_until=2).raw
        for index, orders in enumerate(((old,), (forged,), (foreign,), (b"",), (old, foreign))):
            identity = make_credentials(f"raw{index}").identity
            stream = await world.env(f"raw{index}").net.connect(ann.address, ann.id, Credentials(identity, third))
            raw = RawPeer(stream, identity.peer_id)
            await raw.say(Hello(1, 1, b"rawpeer.", make_profile("raw")))
            assert isinstance((await raw.listen(1))[0], HelloReply)
            faults = ann.mesh.stats.faults
            await raw.say(Orders(orders, b"12345678"))
            await raw.listen_for(2)
            assert raw.ended == (orders != (old,)), "what is genuine but over is no fault"
            assert ann.mesh.stats.faults == faults + raw.ended
            assert generations(ann) == [3] and ann.credentials.membership.digest == digest

    play(scenario)


def test_streams_of_other_protocols_end_with_the_membership() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        served: list[Stream] = []

        async def serve(stream: Stream) -> None:
            served.append(stream)
            await trio.sleep_forever()

        ann = await peers.start("ann", streams={SWARM: serve})
        streams = {}
        for name in ("bob", "eve"):
            credentials = make_credentials(name)
            streams[name] = await world.env(name).net.connect(ann.address, ann.id, credentials, SWARM)
        await trio.sleep(1)
        ann.mesh.order(revocation(make_credentials("eve").identity.peer_id))
        with trio.fail_after(2):
            assert await streams["eve"].receive_into(memoryview(bytearray(1))) == 0
        again = await world.env("eve2").net.connect(ann.address, ann.id, make_credentials("eve"), SWARM)
        with trio.fail_after(2):
            assert await again.receive_into(memoryview(bytearray(1))) == 0
        assert len(served) == 2
        ann.mesh.order(rotation(ann))
        with trio.move_on_after(WINDOW / 2) as scope:
            await streams["bob"].receive_into(memoryview(bytearray(1)))
        assert scope.cancelled_caught, "within the window it goes on"
        with trio.fail_after(WINDOW):
            assert await streams["bob"].receive_into(memoryview(bytearray(1))) == 0

    play(scenario)


def test_a_revoked_peer_is_refused_in_the_hello() -> None:
    async def scenario(world: World, peers: Cluster) -> None:
        ann = await peers.start("ann")
        ann.mesh.order(revocation(make_credentials("eve").identity.peer_id))
        raw = await RawPeer.dial(world, "eve", ann, profile=make_profile("eve"))
        (refusal,) = raw.heard
        assert isinstance(refusal, Refusal) and refusal.code == "revoked"
        assert "gossipml token revoke" in refusal.reason and "is a new peer" in refusal.reason

    play(scenario)
