"""Fair turns among askers."""

from __future__ import annotations

from collections import Counter

import pytest

from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.peer.upload import Grant, Uploads

from .peers import peer_id

ANN, BOB, CID = peer_id(1), peer_id(2), peer_id(3)
MB = 1 << 20


def make(slots: int = 8, most: int = 1 << 40, **streams: PeerId) -> Uploads:
    uploads = Uploads(slots, most)
    for key, peer in streams.items():
        uploads.join(int(key[1:]), peer)
    return uploads


def grants(uploads: Uploads) -> list[Grant]:
    found = []
    while (grant := uploads.next()) is not None:
        found.append(grant)
    return found


def test_one_peer_gets_one_piece_and_the_next_is_read_ahead() -> None:
    uploads = make(_1=ANN)
    for index in range(5):
        uploads.ask(1, index, MB)
    assert grants(uploads) == [Grant(1, 0), Grant(1, 1)]
    uploads.done(Grant(1, 0), sent=True)
    assert grants(uploads) == [Grant(1, 2)]


def test_nobody_reads_ahead_while_another_has_no_slot() -> None:
    uploads = make(slots=1, _1=ANN, _2=BOB)
    for index in range(5):
        uploads.ask(1, index, MB)
    assert uploads.next() == Grant(1, 0)
    uploads.ask(2, 0, MB)
    assert uploads.next() is None
    uploads.done(Grant(1, 0), sent=True)
    assert grants(uploads) == [Grant(2, 0)]


def test_askers_get_equal_bytes_over_any_window_whatever_their_pieces() -> None:
    uploads = make(slots=1, _1=ANN, _2=BOB, _3=CID)
    size = {1: MB, 2: MB // 16, 3: 3 * MB}
    asked: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    for _ in range(4000):
        for key in size:
            while uploads.waiting(key) < 20:
                uploads.ask(key, asked[key], size[key])
                asked[key] += 1
        grant = uploads.next()
        assert grant is not None
        sent[grant.key] += size[grant.key]
        uploads.done(grant, sent=True)
        assert max(sent.values()) - min(sent[key] for key in size) <= 2 * 3 * MB


def test_a_peer_with_many_streams_gets_the_share_of_one() -> None:
    uploads = make(slots=1, _1=ANN, _2=BOB, _3=BOB, _4=BOB)
    sent: Counter[int] = Counter()
    for turn in range(60):
        for key in (1, 2, 3, 4):
            uploads.ask(key, turn, MB)
    for _ in range(60):
        grant = uploads.next()
        assert grant is not None
        sent[grant.key] += 1
        uploads.done(grant, sent=True)
    assert sent == {1: 30, 2: 10, 3: 10, 4: 10}


def test_turns_are_not_saved_up_while_away_nor_won_by_leaving() -> None:
    uploads = make(slots=1, _1=ANN, _2=BOB)
    for index in range(60):
        uploads.ask(1, index, MB)
    for _ in range(30):
        uploads.done(uploads.next() or pytest.fail("no grant"), sent=True)
    for index in range(20):
        uploads.ask(2, index, MB)  # away until now
    keys = []
    for turn in range(20):
        grant = uploads.next()
        assert grant is not None
        keys.append(grant.key)
        uploads.done(grant, sent=True)
        if turn == 9:  # comes back with a new stream: no new turns
            uploads.leave(2)
            uploads.join(2, BOB)
            for index in range(20):
                uploads.ask(2, index, MB)
    assert 9 <= keys.count(1) <= 11


def test_one_that_was_slow_has_no_claim_on_what_it_did_not_take() -> None:
    uploads = make(slots=2, _1=ANN, _2=BOB)
    for index in range(50):
        uploads.ask(1, index, MB)
        uploads.ask(2, index, MB)
    slow = uploads.next()
    assert slow is not None
    for _ in range(30):  # the other one goes on alone meanwhile
        grant = uploads.next()
        assert grant is not None
        assert grant.key != slow.key
        uploads.done(grant, sent=True)
    uploads.done(slow, sent=True)
    uploads.slots = 1
    keys = []
    for _ in range(12):
        grant = uploads.next()
        assert grant is not None
        keys.append(grant.key)
        uploads.done(grant, sent=True)
    assert 4 <= keys.count(slow.key) <= 9


def test_a_piece_that_could_not_be_read_costs_nothing() -> None:
    uploads = make(slots=1, _1=ANN, _2=BOB)
    for index in range(10):
        uploads.ask(1, index, MB)
        uploads.ask(2, index, MB)
    for _ in range(5):
        grant = uploads.next()
        assert grant is not None
        uploads.done(grant, sent=grant.key != 1)
    grant = uploads.next()
    assert grant is not None
    assert grant.key == 1


def test_memory_of_granted_pieces_is_bounded_and_one_is_always_granted() -> None:
    uploads = make(most=3 * MB, _1=ANN, _2=BOB, _3=CID)
    for key in (1, 2, 3):
        uploads.ask(key, 0, 2 * MB)
    first = grants(uploads)
    assert len(first) == 1
    uploads.leave(first[0].key)  # what it had is free again
    assert len(grants(uploads)) == 1
    huge = make(most=1, _1=ANN)
    huge.ask(1, 0, MB)
    assert grants(huge) == [Grant(1, 0)]


def test_a_cancelled_piece_leaves_the_queue_unless_it_is_granted() -> None:
    uploads = make(_1=ANN)
    for index in range(4):
        uploads.ask(1, index, MB)
    grants(uploads)
    assert not uploads.cancel(1, 0)
    assert uploads.cancel(1, 3)
    assert not uploads.cancel(1, 3)
    assert uploads.waiting(1) == 3


def test_asking_for_too_much_or_twice_is_an_error() -> None:
    uploads = make(_1=ANN)
    for index in range(64):
        uploads.ask(1, index, MB)
    with pytest.raises(RemoteError, match="more than 64"):
        uploads.ask(1, 64, MB)
    other = make(_1=ANN)
    other.ask(1, 0, MB)
    with pytest.raises(RemoteError, match="twice"):
        other.ask(1, 0, MB)
    other.next()
    with pytest.raises(RemoteError, match="twice"):
        other.ask(1, 0, MB)


def test_what_is_known_of_peers_that_left_is_bounded() -> None:
    uploads = make()
    for number in range(1000):
        uploads.join(number, peer_id(number))
        uploads.leave(number)
    assert len(uploads._away) <= 256
