"""Join tokens: what goes in comes out, and every kind of damage is told apart."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml import token as tokens
from gossipml.errors import UserError
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken

ADDRESSES = st.builds(
    Address,
    st.ip_addresses().filter(lambda ip: not ip.is_unspecified and not ip.is_multicast).map(str),
    st.integers(1, 65535),
)
TOKENS = st.builds(
    JoinToken,
    network_id=st.binary(min_size=16, max_size=16),
    cookie=st.binary(min_size=32, max_size=32),
    expires=st.integers(0, 2**40),
    addresses=st.lists(ADDRESSES, max_size=5).map(tuple),
)
TOKEN = JoinToken(bytes(16), b"c" * 32, 1_800_000_000, (Address("192.0.2.7", 8711),))


@given(TOKENS)
def test_decode_undoes_encode(token: JoinToken) -> None:
    assert tokens.decode(token.encode()) == token
    assert tokens.decode("  " + token.encode().upper().replace("GML1", "gml1") + "\n") == token


@given(st.data())
def test_every_single_mistyped_character_is_noticed(data: st.DataObject) -> None:
    text = TOKEN.encode()
    place = data.draw(st.integers(len(tokens.PREFIX), len(text) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != text[place]))
    mistyped = text[:place] + other + text[place + 1 :]
    try:
        decoded = tokens.decode(mistyped)
    except UserError as error:
        assert "mistyped" in str(error) or "damaged" in str(error)
    else:
        # the last character carries bits that base32 does not use
        assert place == len(text) - 1 and decoded == TOKEN


@pytest.mark.parametrize("text", ["", "hello", "gml2-abc", "gml1-", "gml1-!!!!", "gml1-a", "gml1-" + "a" * 5000])
def test_what_is_no_token_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(UserError, match="gossipml token new"):
        tokens.decode(text)


def test_a_token_of_another_version_says_so() -> None:
    body = codec.pack({"v": 2})
    text = tokens.PREFIX + base64.b32encode(body + tokens._checksum(body)).decode().rstrip("=").lower()
    with pytest.raises(UserError, match="version 2"):
        tokens.decode(text)


def test_an_expired_token_names_the_day_and_the_remedy() -> None:
    TOKEN.check_expiry(1_799_999_999)
    with pytest.raises(UserError, match=r"expired on 2027-01-15.*gossipml token new"):
        TOKEN.check_expiry(1_800_000_001)
    JoinToken(bytes(16), bytes(32), 0, ()).check_expiry(1e12)  # 0 never expires


def test_loopback_addresses_stay_only_where_there_is_no_other() -> None:
    loopback, other = Address("127.0.0.1", 1), Address("192.0.2.1", 2)
    assert TOKEN.with_addresses((loopback, other, other)).addresses == (other,)
    assert TOKEN.with_addresses((loopback,)).addresses == (loopback,)


def test_no_repr_shows_a_secret() -> None:
    token = JoinToken(bytes(16), b"\x5a" * 32, 0, ())
    keys = NetworkKeys.from_token(token)
    for shown in (repr(token), str(token), repr(keys), f"{keys}"):
        assert "5a5a" not in shown and "ZZZ" not in shown
        assert keys.datagram_key.hex()[:6] not in shown


def test_each_purpose_has_its_own_key_and_each_network_too() -> None:
    keys = NetworkKeys.from_token(TOKEN)
    other = NetworkKeys.from_token(JoinToken(b"n" * 16, TOKEN.cookie, 0, ()))
    secrets = [keys.authority_seed, keys.datagram_key, keys.beacon_key]
    secrets += [other.authority_seed, other.datagram_key, other.beacon_key]
    assert len(set(secrets)) == 6
    assert all(len(secret) == 32 for secret in secrets)
    assert NetworkKeys.from_token(TOKEN) == keys
