"""Orders of the network key: what they say, and every way in which one is refused."""

from __future__ import annotations

import random

import pytest

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.ids import PeerId
from gossipml.orders import (
    HEAD_SIZE,
    MAX_ORDER,
    MAX_WINDOW,
    NetworkKey,
    Revocation,
    Rotation,
    network_id_of,
    read_order,
)
from gossipml.token import MAX_GENERATION

KEY = NetworkKey(b"k" * 32)
OTHER = NetworkKey(b"o" * 32)
COOKIE = b"c" * 32
ANN = PeerId(b"a" * 32)


def test_a_rotation_is_read_as_it_was_made() -> None:
    made = KEY.rotation(2, COOKIE, made=1000, old_until=2000)
    assert read_order(made.raw, KEY.network_id) == made == Rotation(2, COOKIE, 1000, 2000, made.raw)
    assert len(made.raw) <= MAX_ORDER


def test_a_revocation_is_read_as_it_was_made() -> None:
    made = KEY.revocation(ANN, made=1000)
    assert read_order(made.raw, KEY.network_id) == made == Revocation(ANN, 1000, made.raw)


def test_the_largest_order_fits_the_bound() -> None:
    made = KEY.rotation(MAX_GENERATION, COOKIE, made=1 << 40, old_until=(1 << 40) + MAX_WINDOW)
    assert len(made.raw) <= MAX_ORDER


def test_the_network_id_vouches_for_the_key() -> None:
    assert KEY.network_id == network_id_of(KEY.public_key) != OTHER.network_id
    with pytest.raises(RemoteError, match="not this network's"):
        read_order(OTHER.rotation(2, COOKIE, made=1, old_until=2).raw, KEY.network_id)


def test_no_flipped_bit_and_no_cut_passes() -> None:
    for raw in (KEY.rotation(2, COOKIE, made=1000, old_until=2000).raw, KEY.revocation(ANN, made=7).raw):
        for index in range(len(raw)):
            for bit in range(8):
                forged = bytearray(raw)
                forged[index] ^= 1 << bit
                with pytest.raises(RemoteError):
                    read_order(bytes(forged), KEY.network_id)
        for length in range(len(raw)):
            with pytest.raises(RemoteError):
                read_order(raw[:length], KEY.network_id)
        with pytest.raises(RemoteError):
            read_order(raw + b"\0", KEY.network_id)


def test_the_head_of_one_order_does_not_fit_the_body_of_another() -> None:
    one, two = KEY.revocation(ANN, made=1).raw, KEY.revocation(PeerId(b"b" * 32), made=1).raw
    with pytest.raises(RemoteError, match="forged"):
        read_order(one[:HEAD_SIZE] + two[HEAD_SIZE:], KEY.network_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"t": "rotate", "generation": 1, "cookie": COOKIE, "made": 1, "old_until": 2},
        {"t": "rotate", "generation": MAX_GENERATION + 1, "cookie": COOKIE, "made": 1, "old_until": 2},
        {"t": "rotate", "generation": 2, "cookie": b"short", "made": 1, "old_until": 2},
        {"t": "rotate", "generation": 2, "cookie": COOKIE, "made": 2, "old_until": 1},
        {"t": "rotate", "generation": 2, "cookie": COOKIE, "made": 1, "old_until": 2 + MAX_WINDOW},
        {"t": "rotate", "generation": 2, "cookie": COOKIE, "made": 1 << 41, "old_until": 1 << 41},
        {"t": "rotate", "generation": 2, "cookie": COOKIE, "made": 1},
        {"t": "rotate", "generation": 2, "cookie": COOKIE, "made": 1, "old_until": 2, "more": 1},
        {"t": "revoke", "peer": b"short", "made": 1},
        {"t": "revoke", "peer": ANN},
        {"t": "revoke", "peer": ANN, "made": 1, "more": 1},
        {"t": "other", "made": 1},
        {"made": 1},
        {},
    ],
)
def test_even_the_network_key_cannot_order_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(RemoteError):
        KEY._sign(fields)


def test_garbage_is_refused() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        body = rng.randbytes(rng.randrange(0, 300))
        for data in (body, KEY.public_key + body):
            with pytest.raises(RemoteError):
                read_order(data, KEY.network_id)
    with pytest.raises(RemoteError):
        read_order(KEY.public_key + bytes(64) + codec.pack([1]), KEY.network_id)


def test_a_damaged_network_key_says_so() -> None:
    with pytest.raises(UserError, match="holds 5 bytes instead of 32"):
        NetworkKey(b"short")


def test_no_secret_is_shown() -> None:
    shown = f"{KEY!r} {KEY} {KEY.rotation(2, COOKIE, made=1, old_until=2)!r}"
    assert "cccc" not in shown and "kkkk" not in shown and COOKIE.hex()[:8] not in shown
