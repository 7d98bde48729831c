"""The wire of the swarm: what goes out comes back, and nothing else comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.errors import RemoteError
from gossipml.peer import swarm_wire as w

H = bytes(range(32))

DIALLER: list[w.FromDialler] = [
    w.Open(H, 8711),
    w.Open(H, 0),
    w.Ask((0, 5, 131_071)),
    w.Cancel((7,)),
    w.AskManifest(H),
    w.AskLayer(H),
    w.AskHolds((H,) * 256),
    w.AskHolds(()),
    w.AskHold(b"m" * 720),
]
OWNER: list[w.FromOwner] = [
    w.Bits(17),
    w.Have(tuple(range(512))),
    w.Piece(3, 1 << 20),
    w.NoPiece((3, 4), lost=True),
    w.NoPiece((3,), lost=False),
    w.Alive(),
    w.ManifestIs(b"m" * 720),
    w.LayerIs(64),
    w.HoldsAre((True, False) * 128),
    w.HoldIs("no room"),
    w.HoldIs(""),
    w.No("unknown", "no such version here"),
]


def header(message: w.Message) -> bytes:
    frame = w.encode(message)
    assert w.read_length(frame[:4]) == len(frame) - 4
    return frame[4:]


@pytest.mark.parametrize("message", DIALLER, ids=lambda m: type(m).__name__)
def test_what_a_dialler_says_comes_back(message: w.FromDialler) -> None:
    assert w.from_dialler(header(message)) == message


@pytest.mark.parametrize("message", OWNER, ids=lambda m: type(m).__name__)
def test_what_an_owner_says_comes_back(message: w.FromOwner) -> None:
    assert w.from_owner(header(message)) == message


def test_each_side_may_say_its_own_messages_alone() -> None:
    with pytest.raises(RemoteError, match=r"'piece' from the dialler"):
        w.from_dialler(header(w.Piece(1, 5)))
    with pytest.raises(RemoteError, match=r"'ask' from the owner"):
        w.from_owner(header(w.Ask((1,))))


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "open", "root": b"short", "port": 1},
        {"t": "open", "root": H, "port": 70_000},
        {"t": "open", "root": H},
        {"t": "ask", "n": []},
        {"t": "ask", "n": list(range(65))},
        {"t": "ask", "n": [-1]},
        {"t": "ask", "n": [1 << 17]},
        {"t": "ask", "n": [True]},
        {"t": "ask", "n": ["1"]},
        {"t": "ask", "n": 1},
        {"t": "cancel", "n": [1.0]},
        {"t": "manifest", "id": b"x" * 31},
        {"t": "layer", "root": "x" * 32},
        {"t": "holds", "ids": [b"x"]},
        {"t": "holds", "ids": [b""] * 257},
        {"t": "hold", "data": b"m" * 721},
        {"t": "unheard-of"},
        {"t": 5},
        {},
        [],
    ],
)
def test_a_malformed_message_of_a_dialler_is_an_error(fields: object) -> None:
    with pytest.raises(RemoteError):
        w.from_dialler(codec.pack(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "bits", "count": 0},
        {"t": "bits", "count": (1 << 17) + 1},
        {"t": "have", "n": list(range(513))},
        {"t": "piece", "n": 1, "bytes": 0},
        {"t": "piece", "n": 1, "bytes": 1 << 40},
        {"t": "piece", "n": None, "bytes": 1},
        {"t": "none", "n": [1], "lost": 1},
        {"t": "manifest", "data": b"m" * 721},
        {"t": "layer", "bytes": 31},
        {"t": "layer", "bytes": 1 << 30},
        {"t": "holds", "have": b"\2"},
        {"t": "hold", "reason": "\x1b[2J"},
        {"t": "no", "code": "c" * 17, "reason": ""},
        {"t": "no", "code": "full", "reason": "r" * 601},
    ],
)
def test_a_malformed_message_of_an_owner_is_an_error(fields: object) -> None:
    with pytest.raises(RemoteError):
        w.from_owner(codec.pack(fields))


@given(st.binary(max_size=200))
def test_garbage_is_a_remote_error(data: bytes) -> None:
    for decode in (w.from_dialler, w.from_owner):
        with pytest.raises(RemoteError):
            decode(data)


@pytest.mark.parametrize("length", [0, w.MAX_HEADER + 1, 1 << 31])
def test_the_length_of_a_header_is_bounded(length: int) -> None:
    with pytest.raises(RemoteError, match="header of"):
        w.read_length(length.to_bytes(4, "big"))


def test_bits_are_in_the_order_of_bep_3() -> None:
    assert w.write_bits(0b1, 9) == b"\x80\x00"  # piece 0 is the high bit of the first byte
    assert w.write_bits(1 << 8, 9) == b"\x00\x80"
    assert w.read_bits(b"\x80\x80", 9) == 1 | 1 << 8


@given(st.integers(1, 300).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, (1 << count) - 1))))
def test_bits_come_back(case: tuple[int, int]) -> None:
    count, bits = case
    assert w.read_bits(w.write_bits(bits, count), count) == bits


@pytest.mark.parametrize(("data", "count"), [(b"", 1), (b"\0\0", 8), (b"\x01", 7), (b"\xff\xff", 15)])
def test_a_bitfield_of_another_length_or_with_spare_bits_is_an_error(data: bytes, count: int) -> None:
    with pytest.raises(RemoteError, match="bitfield"):
        w.read_bits(data, count)


def test_bodies_have_the_length_that_the_header_says() -> None:
    assert w.body_length(w.Bits(17)) == 3
    assert w.body_length(w.Piece(0, 77)) == 77
    assert w.body_length(w.LayerIs(64)) == 64
    assert w.body_length(w.Alive()) == 0
