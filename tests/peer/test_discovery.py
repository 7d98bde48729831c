"""When a peer shouts on the local network, whom it answers, and what it makes of what it hears."""

from __future__ import annotations

import itertools
import random
from ipaddress import IPv4Interface

import pytest

from gossipml.ids import Address, Contact, PeerId
from gossipml.peer.beacon import Beacon, Drop, Dropped, Opened
from gossipml.peer.discovery import Discovery, DiscoveryConfig, Found, Warn

LAN = (IPv4Interface("192.168.1.9/24"),)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def from_peer(number: int, *, asks: bool = False, skew: float = 0.0, host: str = "192.168.1.7") -> Opened:
    return Opened(Beacon(peer(number), (Address(host, 8711),), "m", "n", asks), skew)


def shouts(discovery: Discovery, until: float) -> list[tuple[float, bool]]:
    """When it shouts up to then, and whether it asks."""
    times = []
    while (now := discovery.next_deadline()) <= until:
        if discovery.due(now):
            times.append((now, discovery.asks))
    return times


def test_a_newcomer_shouts_at_once_and_then_less_and_less() -> None:
    times = [at for at, _ in shouts(Discovery(random.Random(1), 100.0), 400.0)]
    assert 100 <= times[0] <= 100.3
    assert sum(at < 110 for at in times) in (4, 5)
    late = [b - a for a, b in itertools.pairwise(times)][6:]
    assert all(24 <= gap <= 36 for gap in late)


def test_nothing_is_due_before_its_time() -> None:
    discovery = Discovery(random.Random(1), 0.0)
    at = discovery.next_deadline()
    assert not discovery.due(at - 0.001)
    assert discovery.due(at)
    assert not discovery.due(at)


def test_the_first_beacons_ask_and_later_ones_only_while_nobody_is_heard() -> None:
    discovery = Discovery(random.Random(2), 0.0)
    assert all(asks for _, asks in shouts(discovery, 60))
    discovery.hear(from_peer(1), "192.168.1.7", LAN, 60.0)
    assert not any(asks for _, asks in shouts(discovery, 200))


def test_who_asks_is_answered_once_within_a_moment() -> None:
    discovery = Discovery(random.Random(3), 0.0)
    shouts(discovery, 100)
    discovery.hear(from_peer(1), "192.168.1.7", LAN, 101.0)
    before = discovery.next_deadline()
    assert before > 101.3, "nobody asked"
    discovery.hear(from_peer(2, asks=True), "192.168.1.7", LAN, 101.0)
    at = discovery.next_deadline()
    assert 101.0 <= at <= 101.3
    assert discovery.due(at)
    assert not discovery.asks
    assert discovery.next_deadline() == before, "an answer does not change the steady pace"
    discovery.hear(from_peer(3, asks=True), "192.168.1.7", LAN, at + 0.5)
    assert discovery.next_deadline() == before, "the last beacon has told that one, too"


def test_two_newcomers_do_not_answer_each_other_for_ever() -> None:
    a, b = Discovery(random.Random(4), 0.0), Discovery(random.Random(5), 0.0)
    count, now = 0, 0.0
    while now < 120:
        now = min(a.next_deadline(), b.next_deadline())
        for ours, theirs, number in ((a, b, 1), (b, a, 2)):
            if ours.due(now):
                count += 1
                theirs.hear(from_peer(number, asks=ours.asks), "192.168.1.7", LAN, now)
    assert count < 30


@pytest.mark.parametrize("size", [5, 1000])
def test_a_lan_of_any_size_answers_a_newcomer_with_few_beacons(size: int) -> None:
    answers = 0
    for number in range(size):
        discovery = Discovery(random.Random(number), 0.0)
        shouts(discovery, 100)
        for other in range(size):
            discovery.hear(from_peer(other), "192.168.1.7", LAN, 100.0)
        discovery.hear(from_peer(9999, asks=True), "192.168.1.7", LAN, 102.0)
        answers += discovery.next_deadline() < 102.31
        if number == 99:
            break
    assert answers == 5 if size == 5 else answers < 10, "of a hundred out of a thousand: 1.6 each hundred"


def test_the_pace_falls_with_the_number_of_peers() -> None:
    discovery = Discovery(random.Random(6), 0.0)
    shouts(discovery, 300)
    for number in range(1000):
        discovery.hear(from_peer(number), "192.168.1.7", LAN, 300.0)
    assert discovery.peers(300.0) == 1000
    times = [at for at, _ in shouts(discovery, 900)]
    assert len(times) <= 5, "a thousand peers shout every 200 seconds, five a second"


def test_a_new_network_is_greeted_at_once() -> None:
    discovery = Discovery(random.Random(7), 0.0)
    shouts(discovery, 300)
    discovery.restart(301.0)
    assert 301.0 <= discovery.next_deadline() <= 301.3
    assert shouts(discovery, 310)[0][1]


def test_a_beacon_gives_a_contact_each_time() -> None:
    discovery = Discovery(random.Random(8), 0.0)
    found = [Found(Contact(peer(1), (Address("192.168.1.7", 8711),), "m", "n"))]
    assert discovery.hear(from_peer(1), "192.168.1.7", LAN, 1.0) == found
    assert discovery.hear(from_peer(1), "192.168.1.7", LAN, 2.0) == found
    assert discovery.hear(from_peer(1, host="10.9.9.9"), "192.168.1.7", LAN, 3.0) == [], "on no network of ours"


def test_a_wrong_clock_is_said_once_and_not_for_a_replay() -> None:
    discovery = Discovery(random.Random(9), 0.0)
    late = Dropped(Drop.SKEWED, peer(1), 86400.0)
    (warning,) = discovery.hear(late, "192.168.1.7", LAN, 1.0)
    assert isinstance(warning, Warn)
    assert "86400 s ahead of ours" in warning.text
    assert "NTP" in warning.text
    assert discovery.hear(late, "192.168.1.7", LAN, 2.0) == []
    assert (discovery.peers(2.0), discovery.deaf(2.0)) == (0, 1)
    assert discovery.clock_difference(2.0) == 86400.0
    discovery.hear(from_peer(2), "192.168.1.7", LAN, 3.0)
    assert discovery.hear(Dropped(Drop.SKEWED, peer(2), -500.0), "192.168.1.7", LAN, 4.0) == [], "it is heard well"
    assert discovery.peers(4.0) == 1


def test_the_difference_of_clocks_is_that_of_most() -> None:
    discovery = Discovery(random.Random(10), 0.0)
    assert discovery.clock_difference(0.0) is None
    for number, skew in enumerate([0.01, 0.02, -0.01, 50.0, 0.03]):
        discovery.hear(from_peer(number, skew=skew), "192.168.1.7", LAN, 1.0)
    assert discovery.clock_difference(1.0) == 0.02
    assert discovery.clock_difference(700.0) is None


def test_a_member_that_invents_peers_costs_no_memory() -> None:
    discovery = Discovery(random.Random(11), 0.0, DiscoveryConfig(peers=16))
    for number in range(1000):
        discovery.hear(from_peer(number), "192.168.1.7", LAN, 1.0)
        discovery.hear(Dropped(Drop.SKEWED, peer(5000 + number), 500.0), "192.168.1.7", LAN, 1.0)
    assert len(discovery._heard) == 16
