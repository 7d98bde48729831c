"""The name by which a dialler says which keys it uses, out of real and hostile ClientHellos."""

from __future__ import annotations

import random
import ssl

from hypothesis import given
from hypothesis import strategies as st

from gossipml.env.hello import MAX_HELLO, hello_length, keys_named, name_for, server_name
from gossipml.keys import NetworkKeys

KEYS = [NetworkKeys.derive(b"n" * 16, generation, bytes([generation]) * 32) for generation in (1, 2, 3)]
NONCE = b"12345678"


def client_hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError


def test_the_name_in_a_real_hello_is_found() -> None:
    name = name_for(KEYS[1], NONCE)
    hello = client_hello(name)
    assert hello_length(hello[:5]) == len(hello) <= MAX_HELLO
    assert server_name(hello) == name
    assert keys_named(name, KEYS) is KEYS[1]


def test_a_hello_without_a_name_has_none() -> None:
    assert server_name(client_hello(None)) == ""


def test_a_name_fits_its_own_keys_alone() -> None:
    for index, keys in enumerate(KEYS):
        name = name_for(keys, NONCE)
        assert keys_named(name, KEYS) is KEYS[index]
        assert keys_named(name, KEYS[:index] + KEYS[index + 1 :]) is None


def test_two_dials_do_not_look_alike() -> None:
    one, two = name_for(KEYS[0], NONCE), name_for(KEYS[0], b"87654321")
    assert not {one[i : i + 8] for i in range(1, 26)} & {two[i : i + 8] for i in range(1, 26)}


def test_names_of_others_are_nobodys() -> None:
    for name in ("", "example.org", "k" + "0" * 32, "k" + "z" * 32, "k" + "ä" * 32, name_for(KEYS[0], NONCE) + "0"):
        assert keys_named(name, KEYS) is None


def test_no_cut_and_no_flipped_byte_of_a_hello_raises() -> None:
    hello = client_hello(name_for(KEYS[0], NONCE))
    for length in range(len(hello)):
        assert server_name(hello[:length]) in ("", name_for(KEYS[0], NONCE))
        assert hello_length(hello[:length]) in (5, len(hello))
    rng = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(hello)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert isinstance(server_name(bytes(damaged)), str)


@given(st.binary(max_size=200))
def test_garbage_has_no_name(data: bytes) -> None:
    assert server_name(data) == ""
    assert 0 <= hello_length(data) <= MAX_HELLO


def test_what_is_no_hello_is_not_waited_for() -> None:
    assert hello_length(b"") == 5
    assert hello_length(b"GET / HTTP/1.1") == 0
    assert hello_length(b"\x16\x03\x01\xff\xff") == 0, "longer than any hello of ours"
