"""Beacons: who is heard, and what an outsider, a replay and a wrong clock cannot do."""

from __future__ import annotations

import hmac
import random
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.ids import Address, PeerId
from gossipml.peer import beacon as b
from gossipml.peer.beacon import Beacon, Drop, Dropped, Opened, Opener

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
ME, YOU = PeerId(b"m" * 32), PeerId(b"y" * 32)
WALL = 1_800_000_000.0
BEACON = Beacon(YOU, (Address("192.168.1.7", 8711), Address("fd00::7", 8711)), "mnist-mlp", "kitchen", True)
LAN = (IPv4Interface("192.168.1.9/24"), IPv6Interface("fd00::9/64"), IPv6Interface("fe80::9/64"))


def nonce(number: int) -> bytes:
    return number.to_bytes(b.NONCE_SIZE, "big")


def opener(*keys: bytes, started: float = WALL - 1000) -> Opener:
    return Opener(keys or (KEY,), ME, started)


def shout(number: int, wall: float = WALL, key: bytes = KEY, beacon: Beacon = BEACON) -> bytes:
    return b.seal(beacon, key, nonce(number), wall)


def reason(result: Opened | Dropped) -> Drop:
    assert isinstance(result, Dropped)
    return result.reason


def test_a_beacon_is_heard_whole_once() -> None:
    ears = opener()
    heard = ears.open(shout(1, WALL - 2.5), WALL)
    assert isinstance(heard, Opened)
    assert heard.beacon == BEACON
    assert heard.skew == pytest.approx(-2.5, abs=0.002)
    assert reason(ears.open(shout(1, WALL - 2.5), WALL + 1)) is Drop.REPEATED


@given(st.integers(0, 2**32), st.text(max_size=64), st.text(max_size=64), st.booleans(), st.integers(0, 4))
def test_what_is_sealed_is_opened(seed: int, model: str, name: str, asks: bool, count: int) -> None:
    rng = random.Random(seed)
    places = tuple(
        Address(f"10.{rng.randrange(256)}.0.{rng.randrange(1, 255)}", rng.randrange(1, 65536)) for _ in range(count)
    )
    beacon = Beacon(PeerId(rng.randbytes(32)), places, model, name, asks)
    datagram = b.seal(beacon, KEY, rng.randbytes(b.NONCE_SIZE), WALL)
    assert len(datagram) <= b.MAX_BEACON
    heard = opener().open(datagram, WALL)
    assert isinstance(heard, Opened)
    assert heard.beacon == beacon


def test_nothing_of_the_content_or_the_key_can_be_read() -> None:
    datagram = shout(1)
    for secret in (YOU, YOU[:8], b"mnist", b"kitchen", b"192.168", KEY[:8]):
        assert secret not in datagram
    assert shout(1)[b.HEADER_SIZE :] != shout(2)[b.HEADER_SIZE :]


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    datagram, ears = shout(1), opener()
    for bit in range(8 * len(datagram)):
        forged = bytearray(datagram)
        forged[bit // 8] ^= 1 << bit % 8
        assert reason(ears.open(bytes(forged), WALL)) in (Drop.UNAUTHENTIC, Drop.VERSION)
    for length in range(len(datagram)):
        assert reason(ears.open(datagram[:length], WALL)) in (Drop.UNAUTHENTIC, Drop.SIZE)
    assert reason(ears.open(datagram + bytes(2000), WALL)) is Drop.SIZE
    assert isinstance(ears.open(datagram, WALL), Opened)


def test_ten_thousand_pieces_of_garbage_are_refused() -> None:
    ears, rng = opener(), random.Random(1)
    for _ in range(10_000):
        garbage = bytes((b.VERSION,)) + rng.randbytes(rng.randrange(b.MAX_BEACON))
        assert reason(ears.open(garbage, WALL)) in (Drop.UNAUTHENTIC, Drop.SIZE)


def test_another_network_is_not_heard() -> None:
    assert reason(opener(OTHER_KEY).open(shout(1), WALL)) is Drop.UNAUTHENTIC


def test_while_a_token_is_rotated_both_keys_open_and_afterwards_the_old_one_does_not() -> None:
    ears = opener(OTHER_KEY, KEY)
    assert isinstance(ears.open(shout(1), WALL), Opened)
    assert isinstance(ears.open(shout(2, key=OTHER_KEY), WALL), Opened)
    ears.set_keys((OTHER_KEY,))
    assert reason(ears.open(shout(3), WALL)) is Drop.UNAUTHENTIC


def test_our_own_beacon_is_known_as_such() -> None:
    heard = opener().open(shout(1, beacon=replace(BEACON, peer=ME)), WALL)
    assert heard == Dropped(Drop.OWN, ME, 0.0)


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_a_day_off_is_told_apart_from_garbage(days: int) -> None:
    heard = opener().open(shout(1, WALL + 86400 * days), WALL)
    assert heard == Dropped(Drop.SKEWED, YOU, 86400 * days)


def test_two_minutes_of_skew_are_accepted_and_no_more() -> None:
    ears = opener()
    assert isinstance(ears.open(shout(1, WALL + 120), WALL), Opened)
    assert isinstance(ears.open(shout(2, WALL - 120), WALL), Opened)
    assert reason(ears.open(shout(3, WALL + 121), WALL)) is Drop.SKEWED
    assert reason(ears.open(shout(4, WALL - 121), WALL)) is Drop.SKEWED


def test_a_capture_has_no_effect_later_nor_after_a_restart() -> None:
    capture = [shout(number, WALL + number / 10) for number in range(500)]
    ears = opener()
    assert all(isinstance(ears.open(datagram, WALL + 50), Opened) for datagram in capture)
    for later in (50, 60, 119, 170, 300, 86400):
        assert not any(isinstance(ears.open(datagram, WALL + later), Opened) for datagram in capture)
    restarted = opener(started=WALL + 60)
    assert {reason(restarted.open(datagram, WALL + 61)) for datagram in capture} == {Drop.BEFORE_START}


def test_what_was_forgotten_for_lack_of_room_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b, "MAX_NONCES", 8)
    ears = opener()
    capture = [shout(number, WALL + number / 10) for number in range(50)]
    for datagram in capture:
        assert isinstance(ears.open(datagram, WALL + 5), Opened)
    assert {reason(ears.open(datagram, WALL + 5)) for datagram in capture} == {Drop.REPEATED, Drop.BEFORE_START}
    assert isinstance(ears.open(shout(99, WALL + 6), WALL + 6), Opened), "news gets through"


def test_nonces_are_forgotten_when_their_time_is_over() -> None:
    ears = opener()
    for number in range(200):
        assert isinstance(ears.open(shout(number, WALL + 10 * number), WALL + 10 * number), Opened)
    assert len(ears._nonces) <= 14


def test_a_member_with_a_fast_clock_makes_nobody_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b, "MAX_NONCES", 4)
    ears = opener()
    for number in range(20):
        ears.open(shout(number, WALL + 119), WALL)
    assert isinstance(ears.open(shout(99, WALL + 1), WALL + 1), Opened)


def test_setting_the_clock_back_does_not_make_deaf() -> None:
    ears = opener(started=WALL + 86400)  # the clock was a day ahead when we started
    assert isinstance(ears.open(shout(1, WALL), WALL - 1), Opened)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"a": [], "m": "", "n": "", "p": YOU},
        {"a": [], "m": "", "n": "", "p": YOU, "q": True, "z": 1},
        {"a": [], "m": "", "n": "", "p": YOU[:31], "q": True},
        {"a": [], "m": "x" * 65, "n": "", "p": YOU, "q": True},
        {"a": [], "m": "", "n": b"", "p": YOU, "q": True},
        {"a": [], "m": "", "n": "", "p": YOU, "q": 1},
        {"a": [["192.168.1.7", 8711]] * 5, "m": "", "n": "", "p": YOU, "q": True},
        {"a": [["192.168.1.7"]], "m": "", "n": "", "p": YOU, "q": True},
        {"a": [["host.example", 8711]], "m": "", "n": "", "p": YOU, "q": True},
        {"a": [["192.168.1.7", 0]], "m": "", "n": "", "p": YOU, "q": True},
        {"a": [["239.255.71.77", 1]], "m": "", "n": "", "p": YOU, "q": True},
    ],
)
def test_a_member_that_breaks_the_form_is_refused(fields: dict[str, object]) -> None:
    body = int(WALL * 1000).to_bytes(8, "big") + codec.pack(fields)
    assert reason(opener().open(sealed_body(body), WALL)) is Drop.MALFORMED
    assert reason(opener().open(sealed_body(bytes(8) + b"\xc1"), WALL)) is Drop.MALFORMED


def sealed_body(body: bytes) -> bytes:
    """Any body, under the network's key."""
    encryption, authentication = b._subkeys(KEY)
    told = bytes((b.VERSION,)) + nonce(7) + b._cipher(encryption, nonce(7), body)
    return told + hmac.digest(authentication, told, "sha256")


# Which addresses belong where.


def test_a_source_must_be_on_one_of_our_networks() -> None:
    assert b.is_near("192.168.1.200", LAN)
    assert b.is_near("fd00::1234", LAN)
    assert b.is_near("fe80::1", LAN), "no router passes link-local addresses on"
    assert not b.is_near("192.168.2.1", LAN)
    assert not b.is_near("8.8.8.8", LAN)
    assert not b.is_near("fd01::1", LAN)
    assert not b.is_near("127.0.0.1", LAN)


def test_only_addresses_on_our_networks_are_dialled() -> None:
    places = [("192.168.1.7", 1), ("10.0.0.7", 1), ("fd00::7", 1), ("fe80::7", 1)]
    beacon = replace(BEACON, addresses=tuple(Address(*place) for place in places))
    assert b.addresses_to_dial(beacon, "192.168.1.7", LAN) == (Address("192.168.1.7", 1), Address("fd00::7", 1))


def test_a_loopback_address_counts_only_from_this_machine() -> None:
    beacon = replace(BEACON, addresses=(Address("127.0.0.1", 1), Address("192.168.1.7", 1)))
    networks = (*LAN, IPv4Interface("127.0.0.1/8"))
    assert b.addresses_to_dial(beacon, "192.168.1.7", networks) == (Address("192.168.1.7", 1),)
    assert b.addresses_to_dial(beacon, "127.0.0.1", networks) == (Address("127.0.0.1", 1),)


LOOPBACK = (IPv4Interface("127.0.0.1/8"), IPv6Interface("::1/128"))
BRIDGE = (IPv4Interface("172.17.0.1/16"),)
ALL = (*LOOPBACK, *LAN, *BRIDGE)


@pytest.mark.parametrize(
    ("bound", "here", "expected"),
    [
        ("0.0.0.0", LAN, ["192.168.1.9"]),
        ("::", LAN, ["192.168.1.9", "fd00::9"]),
        ("0.0.0.0", BRIDGE, ["172.17.0.1"]),
        ("0.0.0.0", LOOPBACK, []),
        ("192.168.1.9", LAN, ["192.168.1.9"]),
        ("192.168.1.9", BRIDGE, []),
        ("fd00::9", LAN, ["fd00::9"]),
        ("127.0.0.1", LAN, []),
        ("127.0.0.1", LOOPBACK, ["127.0.0.1"]),
    ],
)
def test_each_link_hears_of_our_addresses_on_it(
    bound: str, here: tuple[b.LocalNetwork, ...], expected: list[str]
) -> None:
    announced = b.addresses_to_announce(Address(bound, 8711), here, ALL)
    assert announced == tuple(Address(host, 8711) for host in expected)


def test_a_machine_without_a_network_announces_loopback_to_itself() -> None:
    assert b.addresses_to_announce(Address("0.0.0.0", 1), LOOPBACK, LOOPBACK) == (Address("127.0.0.1", 1),)


def test_addresses_of_a_link_without_dhcp_come_last() -> None:
    here = (IPv4Interface("169.254.3.4/16"), IPv4Interface("10.0.0.4/8"))
    hosts = [address.host for address in b.addresses_to_announce(Address("0.0.0.0", 1), here, here)]
    assert hosts == ["10.0.0.4", "169.254.3.4"]
