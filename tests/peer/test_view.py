"""The peer view: what is learnt, who is dialled when, who is sampled, who is forgotten."""

from __future__ import annotations

import random
from collections import Counter

from gossipml.ids import Address
from gossipml.peer.view import MAX_DOORS, View, ViewConfig

from .peers import DIGEST, OTHER_DIGEST, contact, peer_id


def make_view(config: ViewConfig | None = None) -> View:
    return View(peer_id(0), random.Random(1), config)


def test_hints_are_learnt_once_and_never_oneself() -> None:
    view = make_view()
    assert view.learn([contact(0), contact(1), contact(2), contact(1)]) == [peer_id(1), peer_id(2)]
    assert view.learn([contact(1)]) == []
    assert len(view) == 2
    assert view.learn([contact(3)._replace(addresses=())]) == []


def test_what_a_peer_said_itself_is_not_overwritten_by_a_hint() -> None:
    view = make_view()
    view.introduced(contact(1, host="10.9.9.9"), DIGEST, 1.0)
    view.learn([contact(1, host="10.6.6.6", model="evil")._replace(name="mallory")])
    entry = view.get(peer_id(1))
    assert entry is not None
    assert (entry.contact.model, entry.contact.name) == ("digits", "peer1")
    assert [a.host for a in entry.contact.addresses] == ["10.9.9.9", "10.6.6.6"]


def test_news_about_a_peer_that_cannot_be_reached_is_tried_at_once_and_first() -> None:
    view = make_view()
    view.introduced(contact(1), DIGEST, 0.0)
    view.failed(peer_id(1), 1.0)
    assert view.to_dial(5, "digits", 1.0) == []
    view.learn([contact(1)])  # nothing new
    assert view.to_dial(5, "digits", 1.0) == []
    view.learn([contact(1, host="10.9.9.9")])
    assert view.to_dial(5, "digits", 1.0) == [peer_id(1)]
    entry = view.get(peer_id(1))
    assert entry is not None
    assert entry.contact.addresses[0] == Address("10.9.9.9", 8711)
    assert entry.failures == 1


def test_addresses_of_a_contact_are_bounded() -> None:
    view = make_view()
    view.learn(contact(1, host=f"10.1.1.{n}") for n in range(1, 100))
    entry = view.get(peer_id(1))
    assert entry is not None
    assert len(entry.contact.addresses) == 4


def test_backoff_doubles_with_jitter_up_to_its_limit() -> None:
    view = make_view()
    view.introduced(contact(1), DIGEST, 0.0)
    waits = []
    for _ in range(12):
        view.failed(peer_id(1), 0.0)
        entry = view.get(peer_id(1))
        assert entry is not None
        waits.append(entry.retry_at)
    for index, wait in enumerate(waits):
        full = min(2.0**index, 300.0)
        assert full / 2 <= wait <= full
    assert len(set(waits)) == len(waits)


def test_a_hint_that_never_answers_is_forgotten_and_a_proven_peer_is_not() -> None:
    view = make_view()
    view.learn([contact(1)])
    view.introduced(contact(2), DIGEST, 0.0)
    for _ in range(20):
        view.failed(peer_id(1), 0.0)
        view.failed(peer_id(2), 0.0)
    assert peer_id(1) not in view
    assert peer_id(2) in view


def test_the_sample_is_uniform_over_live_peers_of_the_same_model() -> None:
    view = make_view()
    for number in range(1, 11):
        view.introduced(contact(number), DIGEST, 0.0)
    view.introduced(contact(11, model="other"), DIGEST, 0.0)
    view.introduced(contact(12), OTHER_DIGEST, 0.0)
    view.introduced(contact(13), "", 0.0)  # has not loaded it yet
    view.introduced(contact(14), DIGEST, 0.0)
    view.failed(peer_id(14), 0.0)
    view.learn([contact(15)])  # not met, worth a dial
    counts: Counter[bytes] = Counter()
    for _ in range(3000):
        chosen = view.sample(4, "digits", DIGEST, 0.1)
        assert len(set(chosen)) == 4
        counts.update(chosen)
    assert set(counts) == {peer_id(n) for n in (*range(1, 11), 15)}
    expected = 3000 * 4 / 11
    assert all(0.85 * expected < count < 1.15 * expected for count in counts.values())


def test_the_sample_is_everybody_when_there_are_few_and_leaves_out_whom_it_is_told_to() -> None:
    view = make_view()
    for number in (1, 2, 3):
        view.introduced(contact(number), DIGEST, 0.0)
    assert sorted(view.sample(4, "digits", DIGEST, 0.0)) == sorted(peer_id(n) for n in (1, 2, 3))
    assert sorted(view.sample(4, "digits", DIGEST, 0.0, without=[peer_id(2)])) == sorted(map(peer_id, (1, 3)))


def test_a_refused_peer_is_left_alone_for_long() -> None:
    view = make_view()
    view.introduced(contact(1), DIGEST, 0.0)
    view.refused(peer_id(1), "other digest", 0.0)
    assert view.to_dial(5, "digits", 299.0) == []
    assert view.to_dial(5, "digits", 601.0) == [peer_id(1)]


def test_peers_of_our_model_are_dialled_first() -> None:
    view = make_view()
    view.learn(contact(n, model="other") for n in range(1, 20))
    view.learn([contact(50), contact(51)])
    assert set(view.to_dial(2, "digits", 0.0)) == {peer_id(50), peer_id(51)}


def test_the_view_is_bounded_and_made_up_names_do_not_push_out_proven_peers() -> None:
    view = make_view(ViewConfig(capacity=50))
    for number in range(1, 31):
        view.introduced(contact(number), DIGEST, float(number))
        view.left(peer_id(number), float(number))
    view.learn(contact(n) for n in range(1000, 3000))
    assert len(view) == 50
    assert all(peer_id(n) in view for n in range(1, 31))
    for number in range(31, 61):  # proven ones push out hints first, then the proven ones longest unseen
        view.introduced(contact(number), DIGEST, float(number))
        view.left(peer_id(number), float(number))
    assert len(view) == 50
    assert [peer_id(n) in view for n in range(1, 61)] == [False] * 10 + [True] * 50


def test_connected_peers_are_never_pushed_out() -> None:
    view = make_view(ViewConfig(capacity=5))
    for number in range(1, 6):
        view.introduced(contact(number), DIGEST, 0.0)
    view.learn([contact(9)])
    assert peer_id(9) not in view
    assert len(view) == 5


def test_what_is_saved_begins_with_who_is_there() -> None:
    view = make_view(ViewConfig(saved=3))
    view.learn([contact(1)])
    view.introduced(contact(2), DIGEST, 1.0)
    view.failed(peer_id(2), 2.0)
    view.introduced(contact(3), DIGEST, 3.0)
    view.introduced(contact(4), DIGEST, 4.0)
    view.left(peer_id(4), 5.0)
    assert [c.peer for c in view.export()] == [peer_id(3), peer_id(4), peer_id(2)]


def test_a_door_is_knocked_at_with_backoff_until_it_opens() -> None:
    view = make_view()
    door = Address("10.1.1.1", 1)
    view.knock([door, door])
    assert view.doors(0.0) == [door]
    view.door_failed(door, 0.0)
    assert view.doors(0.4) == []
    assert view.doors(1.0) == [door]
    view.door_opened(door)
    assert view.doors(100.0) == []
    view.knock(Address("10.1.1.1", port) for port in range(1, 1000))
    assert len(view.doors(0.0)) == MAX_DOORS


def test_only_connected_peers_are_passed_on() -> None:
    view = make_view()
    view.learn([contact(1)])
    view.introduced(contact(2), DIGEST, 0.0)
    assert [c.peer for c in view.contacts(4, [peer_id(1), peer_id(2), peer_id(3)])] == [peer_id(2)]
    assert view.contacts(0, [peer_id(2)]) == ()
