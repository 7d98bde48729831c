"""The routing table: exact walks, caps, eviction, moves."""

from __future__ import annotations

import random

import pytest

from gossipml.dht.messages import NodeContact, pack_contact
from gossipml.dht.routing import Networks, Table
from gossipml.ids import Address, NodeId

OWN = NodeId(b"\x80" + bytes(19))
LOCAL = Networks(["10.0.0.0/8"])
EVERYWHERE = Networks([])


def contact(rng: random.Random, number: int) -> NodeContact:
    return NodeContact(NodeId(rng.randbytes(20)), Address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1))


def node(first: int, *, host: str = "10.0.0.1", port: int = 1, rest: int = 0) -> NodeContact:
    return NodeContact(NodeId(bytes((first, rest)) + bytes(18)), Address(host, port))


def distance(one: bytes, other: bytes) -> int:
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")


@pytest.mark.parametrize("seed", range(5))
def test_nearest_is_exact_for_any_target_and_count(seed: int) -> None:
    rng = random.Random(seed)
    table = Table(OWN, LOCAL)
    for number in range(rng.choice((3, 60, 600))):
        table.add(contact(rng, number), 0.0)
    held = [entry.contact for entry in table.contacts()]
    for _ in range(200):
        target = rng.choice((rng.randbytes(20), rng.choice(held).node, OWN))
        count = rng.randint(1, 30)
        exact = sorted(held, key=lambda c: distance(c.node, target))
        assert table.nearest(target, count) == exact[:count]
        skipped = [c for c in exact if c != exact[0]]
        assert table.nearest_packed(target, count, exact[0].node) == tuple(map(pack_contact, skipped[:count]))


@pytest.mark.parametrize("seed", range(3))
def test_nearest_stays_exact_while_contacts_come_move_and_go(seed: int) -> None:
    rng = random.Random(seed)
    table = Table(OWN, LOCAL)
    known: list[NodeContact] = []
    for number in range(1500):
        match rng.randrange(6) if known else 0:
            case 0 | 1 | 2:
                known.append(contact(rng, number))
                table.add(known[-1], 0.0)
            case 3:  # to a new address, or to one where another was
                index = rng.randrange(len(known))
                there = rng.choice((contact(rng, 5000 + number), rng.choice(known))).address
                known[index] = NodeContact(known[index].node, there)
                table.add(known[index], 0.0)
            case 4:
                gone = rng.choice(known)
                table.missed(gone)
                table.missed(gone)
            case _:
                banned = rng.choice(known).node
                table.remove_all(lambda node, banned=banned: node == banned)  # type: ignore[misc]
        held = [entry.contact for entry in table.contacts()]
        target = rng.choice((rng.randbytes(20), OWN))  # or one that was asked for before
        assert table.nearest(target, 20) == sorted(held, key=lambda c: distance(c.node, target))[:20]
        assert len({c.address for c in held}) == len(held)  # one node an address


def test_the_reach_is_where_the_nearest_of_a_key_end() -> None:
    rng = random.Random(1)
    table = Table(OWN, LOCAL)
    for number in range(39):
        table.add(contact(rng, number), 0.0)
    assert table.reach() == 2**160 - 1  # everybody is a holder
    everybody = [contact(rng, number) for number in range(1000)]
    for one in everybody:
        table.add(one, 0.0)
    within = []
    for _ in range(50):
        key = rng.randbytes(20)
        within.append(sum(distance(one.node, key) <= table.reach() for one in everybody))
    assert 10 < sum(within) / 50 < 40


def test_buckets_stay_disjoint_and_hold_what_is_in_their_range() -> None:
    rng = random.Random(1)
    table = Table(OWN, LOCAL)
    for number in range(1000):
        table.add(contact(rng, number), 0.0)
    assert table.buckets[0].range[0] == 0 and table.buckets[-1].range[1] == 2**160 - 1
    for one, two in zip(table.buckets, table.buckets[1:], strict=False):
        assert one.range[1] + 1 == two.range[0]
    for bucket in table.buckets:
        assert len(bucket) <= 20
        assert all(bucket.range[0] <= entry.long_id <= bucket.range[1] for entry in bucket.nodes.values())
    assert 100 < len(table) < 1000


def test_all_of_the_own_neighbourhood_is_kept() -> None:
    rng = random.Random(2)
    everybody = [contact(rng, number) for number in range(2000)]
    table = Table(OWN, LOCAL)
    for one in everybody:
        table.add(one, 0.0)
    exact = sorted(everybody, key=lambda c: distance(c.node, OWN))[:20]
    assert table.nearest(OWN, 20) == exact


def test_we_are_not_in_our_own_table() -> None:
    table = Table(OWN, LOCAL)
    assert table.add(NodeContact(OWN, Address("10.0.0.9", 1)), 0.0) is None
    assert not table.wants(NodeContact(OWN, Address("10.0.0.9", 1)))
    assert len(table) == 0


def test_a_contact_leaves_after_two_misses_and_an_answer_between_saves_it() -> None:
    table = Table(OWN, LOCAL)
    one = node(1)
    table.add(one, 0.0)
    assert not table.missed(one)
    table.heard(one.node, 1.0)
    assert not table.missed(one)
    assert table.missed(one)
    assert table.get(one.node) is None


def test_a_full_bucket_names_the_one_not_heard_from_for_longest_and_keeps_a_replacement() -> None:
    table = Table(OWN, LOCAL)
    # 15 of our own half so that it splits off, then the other half until nothing more fits at depth 5
    inside = [NodeContact(NodeId(b"\x01" + bytes((i,)) + bytes(18)), Address(f"10.0.0.{i + 1}", 1)) for i in range(21)]
    for near in range(20):
        table.add(node(0x80, rest=near + 1, host=f"10.1.0.{near + 1}"), 0.0)
    probe = None
    for when, one in enumerate(inside):
        probe = table.add(one, float(when))
    assert probe is not None and probe.contact == inside[0]
    assert table.get(inside[20].node) is None
    table.missed(inside[0])
    assert table.missed(inside[0])
    assert table.get(inside[20].node) is not None  # the replacement took the place


def test_a_node_moves_to_the_address_that_it_proved_last() -> None:
    table = Table(OWN, LOCAL)
    table.add(node(1, port=1), 0.0)
    assert table.wants(node(1, port=2)) and not table.wants(node(1, port=1))
    table.add(node(1, port=2), 1.0)
    assert [entry.contact for entry in table.contacts()] == [node(1, port=2)]
    assert not table.missed(node(1, port=1)) and not table.missed(node(1, port=1))  # the old place says nothing
    assert len(table) == 1


def test_another_node_at_the_same_address_takes_the_place() -> None:
    table = Table(OWN, LOCAL)
    table.add(node(1), 0.0)
    table.add(node(200), 1.0)
    assert [entry.contact for entry in table.contacts()] == [node(200)]


@pytest.mark.parametrize(
    ("hosts", "elsewhere"),
    [
        (["203.0.113.1", "203.0.113.2", "203.0.113.3"], "203.0.114.1"),
        (["2001:db8:1:1::1", "2001:db8:1:2::1", "2001:db8:1:3::1"], "2001:db8:2::1"),
    ],
)
def test_one_network_gets_two_places_of_a_bucket(hosts: list[str], elsewhere: str) -> None:
    table = Table(OWN, EVERYWHERE)
    for number, host in enumerate(hosts):
        table.add(node(number, host=host), 0.0)
    assert [entry.contact.address.host for entry in table.contacts()] == hosts[:2]
    assert not table.wants(node(9, host=hosts[2]))
    assert table.wants(node(9, host=elsewhere))
    # Moving into a crowded network is no way around the cap.
    table.add(node(3, host=elsewhere), 0.0)
    table.add(node(3, host=hosts[2]), 1.0)
    assert table.get(node(3).node) is not None
    assert [c.contact.address.host for c in table.contacts()] == [*hosts[:2], elsewhere]


def test_excepted_networks_have_no_cap() -> None:
    table = Table(OWN, LOCAL)
    for number in range(10):
        table.add(node(number, host=f"10.0.0.{number + 1}"), 0.0)
    assert len(table) == 10


def test_a_bucket_is_lonely_until_a_lookup_goes_through_it() -> None:
    table = Table(OWN, LOCAL)
    for number in range(40):
        table.add(contact(random.Random(number), number), 0.0)
    assert len(table.lonely(100.0, 50.0)) == len(table.buckets) > 1
    table.nearest(OWN, 5)  # answering somebody else's request does not count
    assert len(table.lonely(100.0, 50.0)) == len(table.buckets)
    table.looked_up(OWN, 100.0)
    assert len(table.lonely(100.0, 50.0)) == len(table.buckets) - 1
