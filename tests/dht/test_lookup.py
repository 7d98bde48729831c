"""The lookup, stepped by hand, and against a whole population."""

from __future__ import annotations

import random

import pytest

from gossipml.dht.lookup import MAX_QUERIES, Lookup
from gossipml.dht.messages import NodeContact
from gossipml.dht.routing import Networks
from gossipml.ids import Address, NodeId

TARGET = bytes(20)
OWN = NodeId(b"\xff" * 20)
ANYWHERE = Networks(["10.0.0.0/8"])
STRICT = Networks([])


def at(distance: int, host: str | None = None, port: int = 1) -> NodeContact:
    """A node at a distance from the target."""
    return NodeContact(NodeId(distance.to_bytes(20, "big")), Address(host or f"10.0.0.{distance % 250 + 1}", port))


def lookup(seeds: list[NodeContact], *, k: int = 3, alpha: int = 2, networks: Networks = ANYWHERE) -> Lookup:
    return Lookup(TARGET, OWN, seeds, networks, k=k, alpha=alpha)


def test_it_asks_the_nearest_first_and_at_most_alpha_at_once() -> None:
    run = lookup([at(9), at(5), at(7)])
    assert run.ask(0.0, 1.0) == [at(5), at(7)]
    assert run.ask(0.1, 1.0) == []
    run.answered(at(5), [at(1), at(2)])
    assert run.ask(0.2, 1.0) == [at(1)]
    assert not run.done


def test_it_is_done_when_the_k_nearest_have_answered() -> None:
    run = lookup([at(1), at(2), at(3), at(4)])
    for expected in ([at(1), at(2)], [at(3)]):
        asked = run.ask(0.0, 1.0)
        assert asked == expected
        for contact in asked:
            run.answered(contact)
    assert run.done and run.ask(0.0, 1.0) == []
    assert run.nearest() == [at(1), at(2), at(3)]


def test_a_slow_node_gives_its_place_away_and_its_late_answer_still_counts() -> None:
    run = lookup([at(1), at(2), at(3)], alpha=1)
    assert run.ask(0.0, 1.0) == [at(1)]
    assert run.next_deadline() == 1.0
    assert run.ask(0.9, 1.0) == []
    assert run.ask(1.0, 1.0) == [at(2)]
    run.answered(at(2))
    assert run.ask(1.1, 1.0) == [at(3)]
    run.answered(at(1), [at(4)])
    run.answered(at(3))
    assert run.done
    assert run.nearest() == [at(1), at(2), at(3)]


def test_a_slow_node_does_not_hold_up_the_end() -> None:
    run = lookup([at(1), at(2), at(3), at(4)], alpha=4)
    assert run.ask(0.0, 1.0) == [at(1), at(2), at(3)]
    run.answered(at(2))
    run.answered(at(3))
    assert not run.done
    assert run.ask(1.0, 1.0) == [at(4)]
    run.answered(at(4))
    assert (run.done, run.nearest()) == (True, [at(2), at(3), at(4)])


def test_when_too_few_answer_the_slow_ones_get_a_little_longer() -> None:
    run = lookup([at(1), at(2)])
    assert run.ask(0.0, 1.0) == [at(1), at(2)]
    run.answered(at(2))
    run.ask(1.0, 1.0)
    assert not run.done and run.next_deadline() == 3.0
    run.ask(3.0, 1.0)
    assert (run.done, run.nearest()) == (True, [at(2)])
    assert run.next_deadline() is None


def test_a_failed_node_makes_room_for_the_next() -> None:
    run = lookup([at(1), at(2), at(3), at(4)], alpha=4)
    assert run.ask(0.0, 1.0) == [at(1), at(2), at(3)]
    run.failed(at(1))
    assert run.ask(0.0, 1.0) == [at(4)]
    for contact in (at(2), at(3), at(4)):
        run.answered(contact)
    assert (run.done, run.nearest()) == (True, [at(2), at(3), at(4)])


def test_a_node_told_at_a_wrong_address_is_tried_at_the_other() -> None:
    wrong, right = at(1, host="10.9.9.9"), at(1)
    run = lookup([wrong, at(2)], alpha=1)
    assert run.ask(0.0, 1.0) == [wrong]
    run.failed(wrong)
    assert run.ask(0.0, 1.0) == [at(2)]
    run.answered(at(2), [right])
    assert run.ask(0.0, 1.0) == [right]
    run.answered(right)
    assert (run.done, run.nearest()) == (True, [right, at(2)])


def test_many_addresses_for_one_node_are_not_all_tried() -> None:
    run = lookup([at(1)], alpha=1)
    tried = 0
    for number in range(20):
        run.answered(at(200), [at(1, host=f"10.8.0.{number + 1}")])
        for contact in run.ask(0.0, 1.0):
            tried += 1
            run.failed(contact)
    assert tried == 3


def test_one_network_holds_two_of_the_places() -> None:
    crowd = [at(distance, host=f"203.0.113.{distance}") for distance in range(1, 10)]
    others = [at(20, host="198.51.100.1"), at(30, host="192.0.2.1")]
    run = lookup([*crowd, *others], k=4, alpha=9, networks=STRICT)
    asked = run.ask(0.0, 1.0)
    assert asked == [crowd[0], crowd[1], *others]
    run.failed(crowd[0])
    assert run.ask(0.0, 1.0) == [crowd[2]]
    for contact in (crowd[1], crowd[2], *others):
        run.answered(contact)
    assert run.done and run.nearest() == [crowd[1], crowd[2], *others]


def test_we_are_never_asked_ourselves() -> None:
    run = lookup([NodeContact(OWN, Address("10.0.0.1", 1))])
    assert run.done and run.ask(0.0, 1.0) == []


def test_inventions_without_end_are_asked_only_so_often() -> None:
    rng = random.Random(1)
    run = lookup([at(1000)], k=20, alpha=3)
    now = 0.0
    while not run.done:
        for contact in run.ask(now, 0.1):
            # everybody answers with twenty more that are nearer and do not exist
            run.answered(contact, [at(rng.randrange(1 << 100)) for _ in range(20)])
        now += 0.1
    assert run.queries <= MAX_QUERIES


def test_silent_inventions_do_not_keep_the_honest_out() -> None:
    fakes = [at(distance, host=f"10.7.0.{distance + 1}") for distance in range(20)]
    honest = [at(1000 + i) for i in range(20)]
    run = lookup([*fakes, *honest], k=20, alpha=3)
    now = 0.0
    while not run.done:
        for contact in run.ask(now, 0.1):
            if contact in honest:
                run.answered(contact)
        deadline = run.next_deadline()
        now = deadline if deadline is not None else now
    assert run.nearest() == honest


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_exactly_the_k_nearest_of_a_population(seed: int) -> None:
    rng = random.Random(seed)
    everybody = [NodeContact(NodeId(rng.randbytes(20)), Address(f"10.0.{i >> 8}.{i & 255}", 1)) for i in range(500)]

    def nearest(target: bytes, count: int, among: list[NodeContact]) -> list[NodeContact]:
        goal = int.from_bytes(target, "big")
        return sorted(among, key=lambda c: int.from_bytes(c.node, "big") ^ goal)[:count]

    # Each knows its own neighbourhood and some others, as a Kademlia table does.
    knows = {c.node: nearest(c.node, 20, everybody) + rng.sample(everybody, 40) for c in everybody}
    for _ in range(20):
        target = rng.randbytes(20)
        run = Lookup(target, OWN, rng.sample(everybody, 3), ANYWHERE)
        while not run.done:
            for contact in run.ask(0.0, 1.0):
                run.answered(contact, nearest(target, 20, knows[contact.node]))
        assert run.nearest() == nearest(target, 20, everybody)
        assert run.queries < 60
