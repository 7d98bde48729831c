"""One content from many sources, stepped by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.peer import download as d

from .peers import peer_id

ANN, BOB, CID = peer_id(1), peer_id(2), peer_id(3)
MB = 1 << 20


def make(count: int = 8, have: int = 0, *, length: int = MB, last: int | None = None) -> d.Download:
    size = count * length if last is None else (count - 1) * length + last
    return d.Download(count, have, size, length, random.Random(1))


def everything(count: int) -> int:
    return (1 << count) - 1


def asked(actions: list[d.Action], peer: PeerId) -> list[int]:
    return [
        index
        for action in actions
        if isinstance(action, d.AskPieces) and action.peer == peer
        for index in action.indexes
    ]


def give(download: d.Download, peer: PeerId, index: int, now: float) -> list[d.Action]:
    """The source sends the piece, and it is right."""
    assert download.handle(d.Arriving(peer, index, download.length(index)), now) == [d.Receive()]
    actions = download.handle(d.Arrived(peer, index), now + 0.01)
    assert actions[0] == d.Check()
    return actions[1:] + download.handle(d.Kept(index), now + 0.02)


def test_a_source_is_asked_for_what_it_has_and_we_miss() -> None:
    download = make(4, 0b0001)
    assert sorted(asked(download.handle(d.Joined(ANN, 0b0011), 0.0), ANN)) == [1]
    assert asked(download.handle(d.Had(ANN, (3,)), 0.1), ANN) == [3]


def test_no_piece_is_asked_of_two_while_there_is_another() -> None:
    download = make(40)
    first = asked(download.handle(d.Joined(ANN, everything(40)), 0.0), ANN)
    second = asked(download.handle(d.Joined(BOB, everything(40)), 0.0), BOB)
    assert first
    assert second
    assert not set(first) & set(second)


def test_a_fast_far_source_gets_more_requests_than_a_slow_near_one() -> None:
    download = make(400)
    download.handle(d.Joined(ANN, everything(400)), 0.0)
    download.handle(d.Joined(BOB, everything(400)), 0.0)
    now = 0.3  # from there on a piece every 10 ms
    for _ in range(30):
        now += 0.01
        index = next(iter(download.sources[ANN].asked))
        download.handle(d.Arriving(ANN, index, MB), now)
        download.handle(d.Arrived(ANN, index), now)
        download.handle(d.Kept(index), now)
    index = next(iter(download.sources[BOB].asked))
    download.handle(d.Arriving(BOB, index, MB), 0.05)
    download.handle(d.Arrived(BOB, index), 11.0)
    assert download.sources[ANN].under_way > 15
    assert download.sources[BOB].under_way == 2
    assert download.sources[BOB].rate < 8e6
    assert len(download.sources[ANN].asked) <= 64


def test_a_piece_of_another_length_is_an_error_before_anything_is_received() -> None:
    download = make(3, last=100)
    download.handle(d.Joined(ANN, everything(3)), 0.0)
    download.handle(d.Left(ANN), 0.0)
    download.handle(d.Joined(ANN, 0b100), 0.0)
    with pytest.raises(RemoteError, match="of 1048576 bytes; it has 100"):
        download.handle(d.Arriving(ANN, 2, MB), 0.1)
    assert download.handle(d.Arriving(ANN, 2, 100), 0.1) == [d.Receive()]


@pytest.mark.parametrize(
    "event",
    [
        d.Arriving(ANN, 7, MB),
        d.Arriving(ANN, 8, MB),
        d.Refused(ANN, (7,), lost=True),
        d.Refused(ANN, (0,), lost=False),
        d.Had(ANN, (8,)),
    ],
    ids=["not asked for", "beyond the end", "answer without question", "refused without reason", "have beyond the end"],
)
def test_what_nobody_asked_for_is_an_error(event: d.Event) -> None:
    download = make(8)
    download.handle(d.Joined(ANN, 0b1), 0.0)
    assert asked(download.handle(d.Tick(), 0.0), ANN) == []
    with pytest.raises(RemoteError):
        download.handle(event, 0.1)


def test_a_wrong_piece_is_a_fault_and_is_asked_of_another() -> None:
    download = make(1)
    download.handle(d.Joined(ANN, 1), 0.0)
    download.handle(d.Joined(BOB, 1), 0.0)
    download.handle(d.Arriving(ANN, 0, MB), 0.1)
    download.handle(d.Arrived(ANN, 0), 0.2)
    actions = download.handle(d.Bad(ANN, 0), 0.3)
    assert d.Misbehaved(ANN, "piece 0 of 1 does not match its hash") in actions
    assert asked(actions + download.handle(d.Left(ANN), 0.3), BOB) == [0]
    give(download, BOB, 0, 0.4)
    assert download.complete


def test_the_pieces_of_a_source_that_left_are_asked_of_others() -> None:
    download = make(6)
    lost = set(asked(download.handle(d.Joined(ANN, everything(6)), 0.0), ANN))
    download.handle(d.Joined(BOB, everything(6)), 0.0)
    download.handle(d.Arriving(ANN, min(lost), MB), 0.0)  # in the middle of a piece
    download.handle(d.Left(ANN), 1.0)
    now, seen = 1.0, set()
    while not download.complete:
        index = next(iter(download.sources[BOB].asked))
        seen.add(index)
        give(download, BOB, index, now)
        now += 0.1
    assert lost <= seen


def test_a_lost_piece_is_not_asked_of_that_source_again() -> None:
    download = make(1)
    download.handle(d.Joined(ANN, 1), 0.0)
    assert asked(download.handle(d.Refused(ANN, (0,), lost=True), 0.1), ANN) == []
    assert asked(download.handle(d.Tick(), 5.0), ANN) == []
    assert asked(download.handle(d.Had(ANN, (0,)), 6.0), ANN) == [0]  # fetched anew


def test_the_endgame_asks_a_second_source_and_cancels_the_loser() -> None:
    download = make(1)
    download.handle(d.Joined(ANN, 1), 0.0)
    assert asked(download.handle(d.Joined(BOB, 1), 0.0), BOB) == []  # not at once
    assert asked(download.handle(d.Tick(), 0.1), BOB) == []
    assert asked(download.handle(d.Tick(), 2.0), BOB) == [0]
    assert download.handle(d.Joined(CID, 1), 2.1) == []  # two are enough
    actions = give(download, BOB, 0, 2.2)
    assert d.CancelPieces(ANN, (0,)) in actions
    assert download.complete
    # The loser's answer is either way in order.
    assert download.handle(d.Refused(ANN, (0,), lost=False), 2.3) == []


def test_a_copy_that_comes_too_late_is_skipped() -> None:
    download = make(2)
    download.handle(d.Joined(ANN, 1), 0.0)
    download.handle(d.Joined(BOB, 1), 0.0)
    download.handle(d.Tick(), 5.0)
    give(download, BOB, 0, 5.1)
    assert download.handle(d.Arriving(ANN, 0, MB), 5.2) == [d.Skip()]
    assert d.Check() not in download.handle(d.Arrived(ANN, 0), 5.3)
    assert download.wasted == 1


def test_when_two_copies_hang_a_third_source_is_asked() -> None:
    download = make(1)
    for peer, now in ((ANN, 0.0), (BOB, 0.0)):
        download.handle(d.Joined(peer, 1), now)
    download.handle(d.Tick(), 2.0)
    assert asked(download.handle(d.Joined(CID, 1), 3.0), CID) == []
    assert asked(download.handle(d.Tick(), 30.0), CID) == [0]


def test_a_request_that_was_cancelled_is_not_made_again_before_its_answer() -> None:
    download = make(1)
    download.handle(d.Joined(ANN, 1), 0.0)
    download.handle(d.Joined(BOB, 1), 0.0)
    download.handle(d.Tick(), 5.0)
    download.handle(d.Arriving(BOB, 0, MB), 5.1)
    download.handle(d.Arrived(BOB, 0), 5.1)
    assert asked(download.handle(d.Tick(), 9.0), BOB) == []
    actions = download.handle(d.Bad(BOB, 0), 9.1)  # ann's request stands all the while
    assert asked(actions, ANN) == []
    give(download, ANN, 0, 9.2)


def test_sources_that_send_nothing_are_named() -> None:
    download = make(4)
    download.handle(d.Joined(ANN, everything(4)), 0.0)
    download.handle(d.Joined(BOB, 0), 0.0)
    download.progressed(ANN, 15.0)
    assert download.useless(21.0, 20.0) == [BOB]


@given(st.data())
def test_every_piece_comes_whatever_the_sources_do(data: st.DataObject) -> None:
    """Sources join, lose pieces, send them right or wrong, refuse, leave: with an honest one at last all is there."""
    count = data.draw(st.integers(1, 12))
    download, now = make(count, data.draw(st.integers(0, everything(count))), length=16 * 1024), 0.0
    peers = [ANN, BOB, CID]
    for _ in range(data.draw(st.integers(0, 40))):
        now += data.draw(st.sampled_from([0.0, 0.01, 1.0, 30.0]))
        peer = data.draw(st.sampled_from(peers))
        source = download.sources.get(peer)
        if source is None:
            download.handle(d.Joined(peer, data.draw(st.integers(0, everything(count)))), now)
            continue
        step = data.draw(st.sampled_from(["right", "wrong", "lost", "left", "had", "tick"]))
        index = next((i for i in source.asked if i != source.receiving), None)
        if step == "left":
            download.handle(d.Left(peer), now)
        elif step == "had":
            download.handle(d.Had(peer, (data.draw(st.integers(0, count - 1)),)), now)
        elif step == "tick":
            download.handle(d.Tick(), now)
        elif index is not None and step == "lost":
            download.handle(d.Refused(peer, (index,), lost=index not in source.cancelled), now)
        elif index is not None:
            download.handle(d.Arriving(peer, index, download.length(index)), now)
            if d.Check() in download.handle(d.Arrived(peer, index), now):
                if step == "right":
                    download.handle(d.Kept(index), now)
                else:
                    download.handle(d.Bad(peer, index), now)
                    download.handle(d.Left(peer), now)
        for source in download.sources.values():
            assert source.cancelled <= set(source.asked)
            assert len(source.asked) <= 64
    for peer in list(download.sources):
        download.handle(d.Left(peer), now)
    download.handle(d.Joined(ANN, everything(count)), now)
    for _ in range(2 * count):
        if download.complete:
            break
        give(download, ANN, next(iter(download.sources[ANN].asked)), now)
        now += 1
    assert download.complete
