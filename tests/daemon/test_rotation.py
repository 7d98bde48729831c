"""Whole peers while the token is rotated and peers are revoked, on virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from gossipml.daemon.node import Node
from gossipml.daemon.orders import order_name
from gossipml.env import Credentials
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import RemoteError
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.orders import NetworkKey, Rotation
from gossipml.peer.wire import Decoder, Hello, Profile, Refusal, encode
from gossipml.simulations.cluster import PORT, Cluster
from gossipml.token import JoinToken

WINDOW = 600
COOKIE = b"the second".ljust(32)


def play(scenario: Callable[[World, Cluster], Awaitable[None]], *, peers: int) -> None:
    async def run(world: World) -> None:
        async with Cluster.of(world, peers=peers) as cluster:
            await trio.sleep(60)
            await scenario(world, cluster)

    run_simulation(run, seed=5)


def node(cluster: Cluster, name: str) -> Node:
    running = cluster.members[name].node
    assert running is not None
    return running


def rotation(cluster: Cluster, generation: int = 2, cookie: bytes = COOKIE, window: int = WINDOW) -> Rotation:
    now = int(node(cluster, "peer-0").env.clock.wall())
    return cluster.network_key.rotation(generation, cookie, made=now, old_until=now + window)


def generations(cluster: Cluster, name: str) -> list[int]:
    return [keys.generation for keys in node(cluster, name).credentials.membership.accepted]


def links(cluster: Cluster, name: str) -> int:
    return len(node(cluster, name).mesh.links())


def rounds(cluster: Cluster) -> dict[str, int]:
    return {m.name: m.node.learner.progress.round for m in cluster.running() if m.node is not None}


def test_a_rotation_cuts_off_nobody_who_was_on_within_the_window() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        names = list(cluster.members)
        old = cluster.token
        cluster.crash("peer-4")  # away for the first half of the window
        cluster.crash("peer-5")  # away for the whole of it
        await trio.sleep(30)
        await cluster.leave_order("peer-0", rotation(cluster))
        await trio.sleep(15)
        for name in names[:4]:
            assert generations(cluster, name) == [2, 1], "without a restart, in seconds"
        assert await world.disk("peer-0").list("orders") == []

        await trio.sleep(WINDOW / 2)
        await cluster.start("peer-4")  # with the old token, which is all it has
        cluster.token = replace(old, cookie=COOKIE, generation=2)
        await cluster.join("newcomer", parts=6)
        await trio.sleep(60)
        assert generations(cluster, "peer-4") == [2, 1]
        assert links(cluster, "peer-4") >= 4 and links(cluster, "newcomer") >= 4
        least = min(links(cluster, name) for name in names[:5])
        before = rounds(cluster)
        for _ in range(WINDOW // 2):
            await trio.sleep(1)
            least = min(least, *(links(cluster, name) for name in names[:5]))
        assert least >= 4, "nobody was alone for a moment"
        for name in (*names[:5], "newcomer"):
            assert generations(cluster, name) == [2]
            assert links(cluster, name) == 5
            keys = {link.stream.key_id for link in node(cluster, name).mesh._links.values()}
            assert keys == {node(cluster, name).credentials.membership.newest.key_id}
            assert len(await node(cluster, name).directory.members()) >= 5, "the DHT goes on, too"
        assert all(after > before[name] + 20 for name, after in rounds(cluster).items()), "and so does training"

        cluster.token = old
        await cluster.start("peer-5")
        await trio.sleep(60)
        assert links(cluster, "peer-5") == 0 and generations(cluster, "peer-5") == [1]
        assert all("holds another token" in why for why in node(cluster, "peer-5").mesh.strangers.values())
        assert node(cluster, "peer-5").mesh.strangers

        cluster.crash("peer-5")  # its owner asks for a new token
        cluster.token = replace(old, cookie=COOKIE, generation=2)
        await cluster.start("peer-5")
        await trio.sleep(60)
        assert links(cluster, "peer-5") >= 5 and generations(cluster, "peer-5") == [2]

    play(scenario, peers=6)


def test_what_was_ordered_outlives_restarts_of_everybody() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        names = list(cluster.members)
        eve = cluster.members["peer-3"].identity.peer_id
        await cluster.leave_order("peer-1", cluster.network_key.revocation(eve, made=1_800_000_000))
        await cluster.leave_order("peer-1", rotation(cluster))
        await trio.sleep(20)
        assert generations(cluster, "peer-3") == [1] and links(cluster, "peer-3") == 0
        for name in names:
            cluster.power_off(name)
        await trio.sleep(WINDOW)
        for name in names:
            await cluster.start(name)  # with the token of before the rotation
        await trio.sleep(120)
        for name in names[:3]:
            assert generations(cluster, name) == [2] and links(cluster, name) == 2
            assert node(cluster, name).credentials.membership.is_revoked(eve)
        assert links(cluster, "peer-3") == 0

    play(scenario, peers=4)


def test_a_revoked_peer_is_out_of_gossip_dht_and_views_and_the_others_never_notice() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        others = list(cluster.members)[:4]
        eve = node(cluster, "peer-4")
        closed = {name: node(cluster, name).mesh.stats.sessions_closed for name in others}
        assert links(cluster, "peer-4") == 4
        peer = eve.credentials.identity.peer_id
        before = rounds(cluster)
        await cluster.leave_order("peer-2", cluster.network_key.revocation(peer, made=1_800_000_000))
        await trio.sleep(600)
        assert eve.mesh.links() == []
        reasons = [info.reason for info in eve.mesh.neighbours() if info.state == "refused"]
        assert reasons and all("gossipml token revoke" in reason for reason in reasons)
        for name in others:
            other = node(cluster, name)
            assert links(cluster, name) == 3 and peer not in other.view
            assert other.mesh.stats.sessions_closed == closed[name] + 1
            assert peer not in {contact.peer for contact in await other.directory.members()}
            assert eve.credentials.identity.node_id not in {n.node for n in await other.dht.nearest(b"x" * 20)}
            assert rounds(cluster)[name] > before[name] + 20
        assert await eve.dht.nearest(b"x" * 20) == [], "nobody answers it"

    play(scenario, peers=5)


def test_an_order_of_another_key_is_thrown_away_and_the_peer_goes_on() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        now = int(node(cluster, "peer-0").env.clock.wall())
        foreign = NetworkKey(b"foreign".ljust(32)).rotation(2, COOKIE, made=now, old_until=now + 60)
        await cluster.leave_order("peer-0", foreign)
        disk = world.disk("peer-0")
        await disk.write("orders/1-garbage.order", b"garbage")
        await disk.write("orders/2-long.order", b"x" * 5000)
        await disk.write("orders/.half.order.tmp", b"not to be looked at")
        await trio.sleep(10)
        assert await disk.list("orders") == [".half.order.tmp"]
        assert generations(cluster, "peer-0") == [1] and links(cluster, "peer-0") == 1
        assert node(cluster, "peer-0").supervisor.problems() == []

    play(scenario, peers=2)


def test_a_full_disk_delays_the_keeping_and_loses_no_order() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        order = rotation(cluster)
        await cluster.leave_order("peer-0", order)
        disk = world.disk("peer-0")
        disk.capacity = disk.used
        await trio.sleep(10)
        assert await disk.list("orders") == [order_name(order)]
        assert generations(cluster, "peer-1") == [2, 1], "the others are told all the same"
        disk.capacity = None
        await trio.sleep(10)
        assert await disk.list("orders") == []
        cluster.power_off("peer-0")
        await cluster.start("peer-0")
        assert generations(cluster, "peer-0") == [2, 1]

    play(scenario, peers=2)


def test_a_thousand_tries_with_wrong_old_and_revoked_credentials_join_nothing() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        eve = cluster.members["peer-2"].identity
        cluster.crash("peer-2")
        old = NetworkKeys.from_token(cluster.token)
        await cluster.leave_order("peer-0", cluster.network_key.revocation(eve.peer_id, made=1_800_000_000))
        await cluster.leave_order("peer-0", rotation(cluster, window=60))
        await trio.sleep(120)
        new = node(cluster, "peer-0").credentials.membership.newest
        target = Address(world.host("peer-0"), PORT)
        rng = world.rng("attacker")
        net = world.env("attacker").net
        opened = node(cluster, "peer-0").mesh.stats.sessions_opened
        refused = 0

        async def try_once(number: int) -> None:
            nonlocal refused
            match number % 3:
                case 0:
                    token = JoinToken(old.network_id, rng.randbytes(32), 0, (), rng.randrange(1, 9))
                    who = Credentials(Identity(rng.randbytes(32)), NetworkKeys.from_token(token))
                case 1:
                    who = Credentials(Identity(rng.randbytes(32)), old)
                case _:
                    who = Credentials(eve, new)  # it has stolen the new secret, too
            try:
                stream = await net.connect(target, None, who)
            except RemoteError:
                refused += 1
                return
            assert who.identity is eve
            await stream.send_all(encode(Hello(1, 1, b"eve.boot", Profile("eve", "", "", 0, ()))))
            decoder = Decoder(lambda update: None)
            while (message := decoder.received(await stream.receive_into(decoder.target()))) is None:
                pass
            assert isinstance(message, Refusal) and message.code == "revoked"
            refused += 1
            await stream.aclose()

        for start in range(0, 1000, 50):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 50):
                    nursery.start_soon(try_once, number)
        assert refused == 1000
        assert node(cluster, "peer-0").mesh.stats.sessions_opened == opened
        assert links(cluster, "peer-0") == 1

    play(scenario, peers=3)
