"""Whole DHT nodes on virtual time: loss, death, restarts, partitions, lies, cancellation."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio

from gossipml.dht import records
from gossipml.dht.config import DhtConfig
from gossipml.dht.messages import Find, Found, Get, Got, NodeContact, Store, Stored
from gossipml.dht.node import Check
from gossipml.dht.records import Kind, Outcome, Record, sign_record
from gossipml.dht.service import Dht, running
from gossipml.env import Datagrams, Heard
from gossipml.env.link import Link, fixed, uniform
from gossipml.identity import Identity
from gossipml.ids import Address, NodeId

if TYPE_CHECKING:
    from tests.dht.conftest import Cluster, Member

Simulate = Callable[..., Any]  # what a scenario returns

PORT = 8711
KEYS = [records.topic_key(bytes((i,))) for i in range(20)]


def nearest(cluster: Cluster, target: bytes, count: int, *, without: Member | None = None) -> list[NodeId]:
    """The truth, from outside."""
    goal = int.from_bytes(target, "big")
    ids = [member.dht.id for member in cluster.members if member is not without]
    return sorted(ids, key=lambda node: int.from_bytes(node, "big") ^ goal)[:count]


async def put_all(cluster: Cluster) -> None:
    for index, key in enumerate(KEYS):
        member = cluster.members[index % len(cluster.members)]
        assert await member.dht.put(cluster.announcement(member, key)) > 1
        await trio.sleep(0.5)  # a put returns when most have it; the rest has it soon after


def test_two_nodes_find_each_other_and_share_records(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, second = await cluster.grow(2)
        assert first.dht.contacts() == [second.dht.local]
        assert second.dht.contacts() == [first.dht.local]
        record = cluster.announcement(first, KEYS[0])
        assert await first.dht.put(record) == 2
        assert await second.dht.get(KEYS[0]) == [record]
        assert first.dht.stats.records == second.dht.stats.records == 1

    simulate(scenario)


def test_a_lone_node_keeps_its_own_records(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        alone = await cluster.start("alone")
        record = cluster.announcement(alone, KEYS[0])
        assert await alone.dht.put(record) == 1
        assert await alone.dht.get(KEYS[0], full=True) == [record]
        assert await alone.dht.get(KEYS[1]) == []

    simulate(scenario)


def test_with_five_percent_loss_every_get_finds_what_was_put(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(40, settle=5.0)
        await put_all(cluster)
        took = []
        for index, key in enumerate(KEYS * 2):
            start = trio.current_time()
            assert len(await members[index % 40].dht.get(key)) == 1
            took.append(trio.current_time() - start)
        assert max(took) < 2.0
        assert min(member.dht.stats.nodes for member in members) >= 20

    simulate(scenario, link=Link(delay=uniform(0.001, 0.003), loss=0.05))


def test_64_nodes_find_exactly_the_nearest_and_go_on_when_half_of_them_stop(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.grow(64, settle=5.0)
        rng = random.Random(1)
        for _ in range(20):
            member, target = rng.choice(cluster.members), rng.randbytes(20)
            found = await member.dht.nearest(target)
            assert [contact.node for contact in found] == nearest(cluster, target, 20, without=member)
        await put_all(cluster)
        for stopped in (16, 16):  # 25 %, then 50 %
            for member in rng.sample(cluster.members, stopped):
                cluster.stop(member)
            for key in KEYS:
                start = trio.current_time()
                assert len(await rng.choice(cluster.members).dht.get(key)) == 1
                assert trio.current_time() - start < 1.0  # nobody waits for the dead
        # And new records find holders among those that live.
        owner = cluster.members[0]
        assert await owner.dht.put(cluster.announcement(owner, KEYS[0], seq=2)) > 5

    simulate(scenario, link=Link(delay=uniform(0.001, 0.003)))


def test_the_first_node_may_die_and_others_join_through_saved_contacts(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(8)
        saved = members[3].dht.contacts()
        cluster.stop(members[0])
        late = await cluster.start("late")  # knows the second member, by the cluster's rule
        late.dht.add_bootstrap(saved)
        await late.dht.wait_for_contacts(7)
        assert late.dht.stats.nodes == 7

    simulate(scenario)


def test_a_node_restarted_on_a_new_port_proves_itself_again_and_is_reached_there(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(6)
        moving = members[2]
        cluster.stop(moving)
        await trio.sleep(1)
        moved = await cluster.start(moving.name, port=9999)
        await trio.sleep(60)
        assert moved.dht.id == moving.dht.id
        for member in cluster.members:
            if member is not moved:
                assert moved.dht.local in member.dht.contacts()
                assert moving.dht.local not in member.dht.contacts()
        record = cluster.announcement(moved, KEYS[0])
        assert await moved.dht.put(record) > 3

    simulate(scenario)


def test_a_network_cut_in_two_grows_together_again(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(10)
        left, right = members[:5], members[5:]
        cluster.world.partition([m.name for m in left], [m.name for m in right])
        await trio.sleep(1200)
        assert {member.dht.stats.nodes for member in members} == {4}  # the other half was evicted
        record = cluster.announcement(left[0], KEYS[0])
        assert await left[0].dht.put(record) > 2
        assert await right[0].dht.get(KEYS[0]) == []
        cluster.world.heal()
        await trio.sleep(120)
        assert {member.dht.stats.nodes for member in members} == {9}
        assert await right[0].dht.get(KEYS[0]) == [record]

    simulate(scenario)


def test_dead_contacts_leave_the_table_without_anybody_looking_for_them(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(6)
        cluster.stop(members[5])
        await trio.sleep(600)
        assert {member.dht.stats.nodes for member in cluster.members} == {4}

    simulate(scenario)


def test_lists_longer_than_a_reply_are_gathered_from_all_holders(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(24)
        for member in members:
            await member.dht.put(cluster.announcement(member, KEYS[0], value=bytes(60)))
        sent = members[0].dht.stats.sent
        found = await members[0].dht.get(KEYS[0], full=True)
        assert len(found) == 24
        assert members[0].dht.stats.sent - sent <= 23 + 2 * 6, "all others, and twice the parts of five records"
        assert found == sorted(found, key=lambda record: record.public_key)
        few = await members[0].dht.get(KEYS[0])
        assert 4 <= len(few) <= 24

    simulate(scenario)


def test_where_some_of_a_list_are_enough_it_is_not_asked_for_part_by_part(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(24)
        for member in members:
            await member.dht.put(cluster.announcement(member, KEYS[0], value=bytes(600)))
        asker = min(members, key=lambda member: member.dht.stats.records).dht
        assert asker.stats.records == 0, "it has the list from others alone"
        sent = []
        for enough in (8, 24):
            before = asker.stats.sent
            assert len(await asker.get(KEYS[0], full=True, enough=enough)) >= enough
            sent.append(asker.stats.sent - before)
        assert sent[0] <= 23 < sent[1], "all others once, and no more"

    simulate(scenario)


def test_get_returns_the_newest_of_a_mutable_record(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        owner, *others = await cluster.grow(8)
        identity, keys = owner.credentials.identity, owner.credentials.keys
        key = records.mutable_key(identity.public_key, b"head")
        for seq in (1, 2, 3):
            record = sign_record(
                identity,
                keys.network_id,
                Kind.MUTABLE,
                key,
                seq=seq,
                expires=int(owner.env.clock.wall()) + 3600,
                value=b"%d" % seq,
                salt=b"head",
            )
            assert await owner.dht.put(record) > 4
            await trio.sleep(1)
        for other in others:
            assert [found.value for found in await other.dht.get(key)] == [b"3"]

    simulate(scenario)


# Hostile surroundings


def test_a_living_node_answers_garbage_with_nothing_and_goes_on(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, second = await cluster.grow(2)
        attacker = await cluster.world.env("attacker").net.bind_datagrams(Address("0.0.0.0", 0))
        heard = []

        async def listen() -> None:
            while True:
                heard.append(await attacker.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            rng = random.Random(1)
            for index in range(10_000):
                await attacker.send(rng.randbytes(rng.randrange(1, 1400)), first.dht.local)
                if index % 100 == 0:
                    await trio.sleep(0.05)
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert heard == []
        assert first.dht.stats.dropped.total() == 10_000
        assert await second.dht.put(cluster.announcement(second, KEYS[0])) == 2

    simulate(scenario)


def test_a_network_with_another_cookie_stays_apart(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        member = await cluster.start("member")
        stranger = await cluster.start("stranger", network="theirs")
        await trio.sleep(60)
        assert member.dht.stats.nodes == stranger.dht.stats.nodes == 0
        assert member.dht.stats.sent == 0
        assert member.dht.stats.dropped["unauthentic"] > 3

    simulate(scenario)


def test_a_clock_that_is_a_day_off_is_said_in_the_log(simulate: Simulate, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.start("right")
        wrong = await cluster.start("wrong", skew=86_400.0)
        await trio.sleep(30)
        assert wrong.dht.stats.nodes == 0
        assert cluster.members[0].dht.stats.dropped["skewed"] > 0

    with caplog.at_level(logging.WARNING, "gossipml.dht"):
        simulate(scenario)
    assert "86400 s ahead of ours" in caplog.text
    assert len(caplog.records) == 1


def test_errors_of_the_network_are_waited_out(simulate: Simulate) -> None:
    class Failing:
        """A socket that says no at every other call."""

        def __init__(self, inner: Datagrams) -> None:
            self.local = inner.local
            self._inner = inner
            self._calls = 0

        def _maybe_fail(self) -> None:
            self._calls += 1
            if self._calls % 2:
                raise OSError(101, "network is unreachable")

        def post(self, data: bytes, to: Address) -> None:
            self._maybe_fail()
            self._inner.post(data, to)

        async def send(self, data: bytes, to: Address) -> None:
            await self._inner.send(data, to)

        async def receive(self) -> tuple[bytes, Address]:
            self._maybe_fail()
            return await self._inner.receive()

        async def serve(self, heard: Heard) -> None:
            while True:
                heard(*await self.receive())

        async def aclose(self) -> None:
            await self._inner.aclose()

    async def scenario(cluster: Cluster) -> None:
        await cluster.grow(2)
        env = cluster.world.env("unlucky")

        class Net:
            def __getattr__(self, name: str) -> object:
                return getattr(env.net, name)

            async def bind_datagrams(self, local: Address) -> Datagrams:
                return Failing(await env.net.bind_datagrams(local))

        member = cluster.members[0]
        unlucky = Dht(
            dataclasses.replace(env, net=Net()),  # type: ignore[arg-type]
            dataclasses.replace(
                member.credentials, identity=cluster.members[1].credentials.identity.__class__(b"u" * 32)
            ),
            local=Address("0.0.0.0", 8711),
            bootstrap=[member.dht.local],
        )
        async with running(unlucky):
            await unlucky.wait_for_contacts(2)
            for _ in range(10):
                await unlucky.get(KEYS[0])

    simulate(scenario)


def lie(member: Member, liars: list[Member]) -> None:
    """From now on the member tells of liars alone, takes every record, and gives none."""
    contacts = tuple(NodeContact(liar.dht.id, liar.dht.local) for liar in liars if liar is not member)[:20]
    handlers = member.dht._node._handlers
    handlers[Find] = lambda question, sender, wall: Found(contacts)
    handlers[Get] = lambda question, sender, wall: Got(question.key, (), 0, contacts)
    handlers[Store] = lambda question, sender, wall: Stored(Outcome.STORED, contacts)


def test_ids_ground_next_to_a_key_do_not_hide_what_is_under_it(simulate: Simulate) -> None:
    """20 honest nodes in networks of their own; 20 liars nearest to the key, in four networks, who tell only of
    each other and give nothing."""

    async def scenario(cluster: Cluster) -> None:
        def skip(count: int) -> None:  # machines that are never booted: each /24 of the world has 255
            for _ in range(count):
                cluster.world.host(f"unused-{len(unused)}")
                unused.append(None)

        unused: list[None] = []
        for index in range(20):
            await cluster.start(f"honest-{index}")
            skip(255)
        honest = list(cluster.members)
        liars = []
        for index in range(20):
            liars.append(await cluster.start(f"liar-{index}"))
            if index % 5 == 4:
                skip(251)
        await trio.sleep(20)
        # A key to which the liars are nearest: with ids drawn at random it is the key that is ground.
        rng = random.Random(1)

        def hostile(key: bytes) -> int:
            near = nearest(cluster, key, 20)
            return sum(liar.dht.id in near for liar in liars)

        keys = sorted((rng.randbytes(20) for _ in range(4000)), key=hostile)[-25:]
        assert hostile(keys[0]) >= 13
        for liar in liars:
            lie(liar, liars)
        right = 0
        for index, key in enumerate(keys):
            owner = honest[index % 20]
            await owner.dht.put(cluster.announcement(owner, key))
            await trio.sleep(1)
            for step in (3, 7, 11, 16):
                right += len(await honest[(index + step) % 20].dht.get(key)) == 1
        assert right >= 99

    simulate(scenario, config=DhtConfig(excepted_networks=()), link=Link(delay=uniform(0.001, 0.003)))


@pytest.mark.parametrize("count", [20, 60])
def test_ids_ground_next_to_a_key_do_not_hide_it_where_networks_are_not_told_apart(
    simulate: Simulate, count: int
) -> None:
    """Honest nodes and 20 liars on one home network, whose ids are ground until the 20 nearest are theirs."""
    target = records.topic_key(b"the victim")
    names = sorted((f"liar-{number}" for number in range(3000)), key=lambda name: _distance(name, target))[:20]

    async def scenario(cluster: Cluster) -> None:
        honest = [await cluster.start(f"honest-{index}") for index in range(count)]
        liars = [await cluster.start(name) for name in names]
        await trio.sleep(20)
        for liar in liars:
            lie(liar, liars)
        rng = random.Random(1)
        right = 0
        for index in range(25):
            key = target[:1] + rng.randbytes(19)
            assert set(nearest(cluster, key, 20)) == {liar.dht.id for liar in liars}
            owner = honest[index % count]
            await owner.dht.put(cluster.announcement(owner, key))
            await trio.sleep(1)
            for step in (3, 7, 11, 16):
                right += len(await honest[(index + step) % count].dht.get(key)) == 1
        assert right >= 99

    simulate(scenario, link=Link(delay=uniform(0.001, 0.003)))


def _distance(name: str, target: bytes) -> int:
    node = Identity(hashlib.sha256(name.encode()).digest()).node_id
    return int.from_bytes(node, "big") ^ int.from_bytes(target, "big")


@pytest.mark.parametrize("full", [False, True])
def test_readers_take_none_of_thousands_of_bad_records_that_holders_give_them(simulate: Simulate, full: bool) -> None:
    """One liar of ten without `full`, five with it: forged, future-dated, expired and rolled-back records."""

    async def scenario(cluster: Cluster) -> None:
        owner, *others = await cluster.grow(10)
        key, rng = KEYS[0], random.Random(1)
        wall = int(owner.env.clock.wall())
        old = [cluster.announcement(owner, key, b"old", seq=seq) for seq in range(1, 20)]
        newest = cluster.announcement(owner, key, b"new", seq=100)
        assert await owner.dht.put(newest) > 5
        await trio.sleep(1)
        strangers = [Identity(rng.randbytes(32)) for _ in range(5)]
        network = owner.credentials.keys.network_id

        def signed(identity: Identity, expires: int) -> Record:
            return sign_record(identity, network, Kind.ANNOUNCEMENT, key, seq=200, expires=expires, value=b"evil")

        bad = [dataclasses.replace(record, seq=300) for record in old]
        bad += [dataclasses.replace(newest, value=b"evil"), dataclasses.replace(newest, signature=bytes(64))]
        bad += [signed(identity, wall + 10**6) for identity in strangers]
        bad += [signed(identity, wall - 1) for identity in strangers]
        bad += old
        given = 0

        def give(question: Get, sender: NodeId, wall: float) -> Got:
            nonlocal given
            chosen = tuple(rng.sample(bad, 4))
            given += len(chosen)
            return Got(question.key, chosen, 4, ())

        near = nearest(cluster, key, 10)
        liars = sorted(others, key=lambda member: near.index(member.dht.id))[: 5 if full else 1]
        for liar in liars:
            liar.dht._node._handlers[Get] = give
        readers = [member for member in others if member not in liars]
        for turn in range(100):
            assert await rng.choice(readers[turn % 3 :]).dht.get(key, full=full) == [newest]
        assert given >= (1000 if full else 100)

    simulate(scenario, link=Link(delay=uniform(0.001, 0.003)))


# Ends


def test_a_cancelled_get_or_put_leaves_no_call_under_way(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(8)
        for member in members[4:]:
            cluster.stop(member)
        asker = members[0].dht
        record = cluster.announcement(members[0], KEYS[0])
        while asker.pending:  # upkeep may be at work
            await trio.sleep(0.01)
        for patience in (0.001, 0.011, 0.05, 0.2):
            with trio.move_on_after(patience) as scope:
                await asker.get(KEYS[1], full=True)
            assert scope.cancelled_caught or patience > 0.1
            with trio.move_on_after(patience):
                await asker.put(record)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(2.5)  # a put that was not cancelled goes on for the hard wait at most
            assert asker.pending == 0

    simulate(scenario, link=Link(delay=fixed(0.01)))


def test_stopping_with_calls_under_way_ends_at_once(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(4)
        for member in members[1:]:
            cluster.world.crash(member.name)  # their tasks are the test's; the network is dead for them
        first = members[0]
        ended = []

        async def ask() -> None:
            ended.append(await first.dht.get(KEYS[0]))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.sleep(0.05)
            assert first.dht.pending > 0
            start = trio.current_time()
            first.scope.cancel()
            nursery.cancel_scope.cancel()
        assert trio.current_time() == start
        assert first.dht.pending == 0
        assert await first.dht.get(KEYS[0]) == []  # not running: nobody is reached, nothing hangs
        assert await first.dht.put(cluster.announcement(first, KEYS[0])) == 1

    simulate(scenario)


def test_a_put_ends_when_its_node_is_stopped(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, *others = await cluster.grow(4)
        stored = []

        async def put() -> None:
            stored.append(await first.dht.put(cluster.announcement(first, KEYS[0])))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            while not any(other.dht.stats.requests and other.dht.stats.records for other in others):
                await trio.sleep(0.001)
            first.scope.cancel()
        assert 1 <= stored[0] <= 4

    simulate(scenario, link=Link(delay=uniform(0.01, 0.03)))


def test_one_dead_address_does_not_delay_joining_through_another(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.grow(5)
        late = await cluster.start("late")
        late.dht.add_bootstrap([Address(cluster.world.host("nobody"), PORT)])
        start = trio.current_time()
        await late.dht.wait_for_contacts(5)
        assert trio.current_time() - start < 1.0

    simulate(scenario)


def test_at_most_64_challenges_are_under_way(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        alone = await cluster.start("alone")
        rng = random.Random(1)
        for number in range(300):
            claimed = NodeContact(NodeId(rng.randbytes(20)), Address("10.9.9.9", 1000 + number))
            alone.dht._perform(Check(claimed))
        await trio.sleep(0.1)
        assert alone.dht.pending == 64
        await trio.sleep(5)
        assert alone.dht.pending == 0
        assert alone.dht.stats.nodes == 0

    simulate(scenario)


def test_a_node_can_be_run_again(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, second = await cluster.grow(2)
        first.scope.cancel()
        await trio.sleep(1)
        local = first.dht.local
        async with running(first.dht):
            assert first.dht.local == local
            await trio.sleep(30)
            assert await second.dht.put(cluster.announcement(second, KEYS[0])) == 2

    simulate(scenario)


def test_operations_are_bounded_and_all_finish(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await cluster.grow(10)
        done = []
        most = 0

        async def one(number: int) -> None:
            key = records.topic_key(b"n%d" % number)
            await members[number % 10].dht.put(cluster.announcement(members[number % 10], key))
            done.append(len(await members[(number + 5) % 10].dht.get(key)))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
            for _ in range(100):
                await trio.sleep(0.01)
                most = max(most, *(member.dht.pending for member in members))
        assert done == [1] * 100
        assert 0 < most <= 16 * 10

    simulate(scenario, link=Link(delay=uniform(0.001, 0.003)))


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> str:
        members = await cluster.grow(10)
        cluster.world.partition([member.name for member in members[:4]])
        await put_all(cluster)
        cluster.stop(members[7])
        cluster.world.heal()
        await trio.sleep(200)
        for key in KEYS:
            await members[1].dht.get(key, full=True)
        return cluster.world.digest

    link = Link(delay=uniform(0.01, 0.05), loss=0.05, duplicate=0.02, reorder=0.02)
    first, again, other = (simulate(scenario, seed=seed, link=link) for seed in (1, 1, 2))
    assert first == again != other
