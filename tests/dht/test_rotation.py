"""Nodes while the token is rotated and after a peer was revoked."""

from __future__ import annotations

import random

import pytest
import trio

from gossipml.dht import records
from gossipml.dht.config import DhtConfig
from gossipml.dht.messages import Find, Found, Get, Got, NodeContact, Ping, Store, Stored
from gossipml.dht.node import Answered, DhtNode
from gossipml.dht.records import Kind, Outcome, Record, sign_record
from gossipml.dht.seal import Drop, Dropped, Opened, Opener, Sealer, node_receiver, session_receiver
from gossipml.dht.service import Dht
from gossipml.env import Credentials
from gossipml.env.simulated import World, run_simulation
from gossipml.identity import Identity
from gossipml.ids import Address, NodeId
from gossipml.keys import NetworkKeys
from gossipml.orders import NetworkKey

from .conftest import PORT, WALL, Table

KEY = NetworkKey(b"k" * 32)
A, B, C = (Address(f"10.0.0.{number}", 8711) for number in (1, 2, 3))
TOPIC = records.topic_key(b"topic")
OLD, NEW = b"old".ljust(32), b"new".ljust(32)
SENDER, RECEIVER, NODE = b"s" * 16, b"r" * 16, NodeId(b"n" * 20)


def keys(generation: int) -> NetworkKeys:
    return NetworkKeys.derive(KEY.network_id, generation, f"cookie {generation}".encode().ljust(32))


def member(name: str, generation: int = 1) -> Credentials:
    return Credentials(Identity(name.encode().ljust(32)), keys(generation))


def rotate(who: Credentials, generation: int = 2, *, now: float = WALL, window: float = 86400) -> None:
    who.membership.take(
        KEY.rotation(generation, keys(generation).cookie, made=int(now), old_until=int(now + window)).raw, now
    )


def revoke(who: Credentials, peer: Credentials) -> None:
    who.membership.take(KEY.revocation(peer.identity.peer_id, made=1).raw, WALL)


def node(table: Table, who: Credentials, address: Address) -> DhtNode:
    rng = random.Random(str(address))
    made = DhtNode(who.identity, who.keys, DhtConfig(), rng.randbytes, rng, table.wall, who.membership)
    made.set_addresses((address,))
    table.nodes[address] = made
    return made


def ask(
    table: Table, asker: DhtNode, to: NodeContact | Address, question: Ping | Find | Get | Store
) -> Answered | None:
    """A whole call as `Dht.call` makes it: the newest keys, then all."""
    asked = asker.ask(to, question, table.now, table.wall)
    if asked is None:
        return None
    call, data = asked
    address = to if isinstance(to, Address) else to.address
    answered = table.exchange(asker, data, address)
    if answered is None and (again := asker.again(call, table.wall)) is not None:
        for repeated in (again, *asker.older(call, table.wall)):
            answered = answered or table.exchange(asker, repeated, address)
    asker.forget(call)
    return answered


def announcement(who: Credentials, seq: int = 1) -> Record:
    return sign_record(
        who.identity, KEY.network_id, Kind.ANNOUNCEMENT, TOPIC, seq=seq, expires=int(WALL) + 600, value=b"here"
    )


# The seal


def test_one_window_of_counters_holds_for_a_sender_under_all_its_keys() -> None:
    sealer, opener = Sealer(OLD, SENDER), Opener(OLD, RECEIVER, NODE, WALL)
    for part in (sealer, opener):
        part.set_roots((NEW, OLD))
    sent = [sealer.seal(bytes([i]), node_receiver(NODE), WALL, root) for i, root in enumerate((OLD, NEW, b"", OLD))]
    opened = [opener.open(data, WALL) for data in sent]
    assert [one.root for one in opened if isinstance(one, Opened)] == [OLD, NEW, NEW, OLD]
    assert len(opener) == 1
    assert [opener.open(data, WALL) for data in sent] == [Dropped(Drop.REPLAYED)] * 4


def test_an_ended_key_opens_nothing_for_senders_old_and_new() -> None:
    sealer, opener = Sealer(OLD, SENDER), Opener(OLD, RECEIVER, NODE, WALL)
    assert isinstance(opener.open(sealer.seal(b"", node_receiver(NODE), WALL), WALL), Opened)
    opener.set_roots((NEW,))
    assert opener.open(sealer.seal(b"", session_receiver(RECEIVER), WALL), WALL) == Dropped(Drop.UNAUTHENTIC)
    other = Sealer(OLD, b"o" * 16)
    assert opener.open(other.seal(b"", node_receiver(NODE), WALL), WALL) == Dropped(Drop.UNAUTHENTIC)
    sealer.set_roots((NEW,))
    assert isinstance(opener.open(sealer.seal(b"", session_receiver(RECEIVER), WALL), WALL), Opened)


# Nodes


def test_old_and_new_reach_whoever_has_both_in_both_directions() -> None:
    table = Table()
    both, old, new = member("both"), member("old"), member("new", 2)
    rotate(both)
    a, b, c = node(table, both, A), node(table, old, B), node(table, new, C)
    for other, address in ((b, B), (c, C)):
        assert ask(table, other, A, Ping()) is not None, "asked by it"
        assert ask(table, a, address, Ping()) is not None, "asking it"
        sent = len(table.wire)
        assert ask(table, a, NodeContact(other.id, address), Ping()) is not None
        assert len(table.wire) == sent + 2, "the session knows its key"
    assert ask(table, b, C, Ping()) is None


def test_after_the_window_the_old_key_gets_no_answer() -> None:
    table = Table()
    both, old = member("both"), member("old")
    rotate(both)
    a, b = node(table, both, A), node(table, old, B)
    assert ask(table, b, A, Ping()) is not None and ask(table, a, B, Ping()) is not None
    both.membership.tick(WALL + 86400)
    assert ask(table, b, NodeContact(a.id, A), Ping()) is None
    assert ask(table, a, NodeContact(b.id, B), Ping()) is None
    assert a.stats().dropped["unauthentic"] >= 2


def test_a_session_goes_on_under_the_new_key_when_the_old_one_ends() -> None:
    table = Table()
    one, two = member("one"), member("two")
    a, b = node(table, one, A), node(table, two, B)
    assert ask(table, a, B, Ping()) is not None
    for who in (one, two):
        rotate(who)
        who.membership.tick(WALL + 86400)
    assert ask(table, a, NodeContact(b.id, B), Ping()) is not None
    assert b.stats().dropped == {}


@pytest.mark.parametrize("known_before", [True, False])
def test_a_revoked_node_is_neither_asked_nor_answered_nor_passed_on(known_before: bool) -> None:
    table = Table()
    ann, bob, eve = member("ann"), member("bob"), member("eve")
    a, b, e = node(table, ann, A), node(table, bob, B), node(table, eve, C)
    assert ask(table, a, B, Ping()) is not None
    if known_before:
        assert ask(table, a, C, Ping()) is not None
        assert ask(table, a, B, Store(announcement(eve))) is not None
        a.storage.offer(announcement(eve), WALL)
    revoke(ann, eve)
    assert ask(table, a, NodeContact(e.id, C), Ping()) is None and a.pending == 0
    assert ask(table, a, C, Ping()) is None, "it cannot prove to be somebody else"
    assert ask(table, e, A, Ping()) is None
    answered = ask(table, b, A, Find(e.id))
    assert answered is not None and isinstance(answered.answer, Found)
    assert all(contact.node != e.id for contact in answered.answer.contacts)
    answered = ask(table, b, A, Get(TOPIC, 0))
    assert answered is not None and answered.answer == Got(TOPIC, (), 0, ())
    assert a.stats().dropped["revoked"] >= 1 and a.stats().records == 0


def test_records_of_a_revoked_peer_are_not_taken_from_anybody() -> None:
    table = Table()
    ann, bob, eve = member("ann"), member("bob"), member("eve")
    a, b = node(table, ann, A), node(table, bob, B)
    before = announcement(eve)
    assert a.verifier.is_genuine(before)
    revoke(ann, eve)
    for seq in (1, 2):
        answered = ask(table, b, A, Store(announcement(eve, seq)))
        assert answered is not None and isinstance(answered.answer, Stored)
        assert answered.answer.outcome is Outcome.FORGED
    assert not a.verifier.is_genuine(before), "also one that was verified before"
    answered = ask(table, b, A, Store(announcement(bob)))
    assert answered is not None and isinstance(answered.answer, Stored) and answered.answer.outcome is Outcome.STORED


def test_a_network_in_the_middle_of_a_rotation_finds_and_stores_everything() -> None:
    """A third has heard, a third has not, a third came with the new token: all reach each other through the first."""

    async def scenario(world: World) -> None:
        names = [f"n{index}" for index in range(12)]
        who = {name: member(name, 2 if index % 3 == 2 else 1) for index, name in enumerate(names)}
        now = world.env("clock").clock.wall()
        for name in names[::3]:
            rotate(who[name], now=now)
        async with trio.open_nursery() as nursery:
            boot = Address(world.host("n0"), PORT)
            dhts = {}
            for name in names:
                dhts[name] = Dht(world.env(name), who[name], local=Address(world.host(name), PORT), bootstrap=[boot])
                await nursery.start(dhts[name].run)
                await trio.sleep(0.1)
            await trio.sleep(20)
            for name in names:
                key = records.topic_key(name.encode())
                record = sign_record(
                    who[name].identity,
                    KEY.network_id,
                    Kind.ANNOUNCEMENT,
                    key,
                    seq=1,
                    expires=int(now) + 600,
                    value=b"v",
                )
                assert await dhts[name].put(record) > 0
            for name in names[::3]:
                for other in names:
                    assert len(await dhts[name].get(records.topic_key(other.encode()))) == 1, (name, other)
            nursery.cancel_scope.cancel()

    run_simulation(scenario, 1)


@pytest.mark.parametrize("reverse", [False, True])
def test_who_has_heard_finds_who_has_not_and_the_other_way_round(reverse: bool) -> None:
    async def scenario(world: World) -> None:
        who = {"heard": member("heard"), "not": member("not")}
        rotate(who["heard"], now=world.env("clock").clock.wall())
        first, second = ("heard", "not") if reverse else ("not", "heard")
        async with trio.open_nursery() as nursery:
            dhts = [
                Dht(world.env(name), who[name], local=Address(world.host(name), PORT), bootstrap=boot)
                for name, boot in ((first, []), (second, [Address(world.host(first), PORT)]))
            ]
            for dht in dhts:
                await nursery.start(dht.run)
            with trio.fail_after(5):
                for dht in dhts:
                    await dht.wait_for_contacts()
            nursery.cancel_scope.cancel()

    run_simulation(scenario, 1)
