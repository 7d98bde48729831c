"""Streams while the token is rotated, over real TLS: who gets through with which generation of the keys."""

from __future__ import annotations

import random
import socket
import ssl
import time

import pytest
import trio

from gossipml.env import GOSSIP, PROTOCOLS, Credentials, Env, Listener, Stream
from gossipml.env.tls import tls_context
from gossipml.errors import RemoteError
from gossipml.identity import Identity
from gossipml.keys import NetworkKeys
from gossipml.orders import NetworkKey

from .test_tls import assert_member_can_talk, echo, receive_exactly, serving

pytestmark = pytest.mark.real

KEY = NetworkKey(b"k" * 32)
DAY = 86400


def keys(generation: int) -> NetworkKeys:
    return NetworkKeys.derive(KEY.network_id, generation, f"cookie {generation}".encode().ljust(32))


def member(name: str, generation: int = 1) -> Credentials:
    return Credentials(Identity(name.encode().ljust(32)), keys(generation))


def rotate(who: Credentials, generation: int, now: float, window: float = DAY) -> None:
    order = KEY.rotation(generation, keys(generation).cookie, made=int(now), old_until=int(now + window))
    who.membership.take(order.raw, now)


async def key_of(env: Env, to: Listener, who: Credentials, protocol: str = GOSSIP) -> str:
    """The keys by which the dial of `who` gets through, as both sides see them."""
    stream = await env.net.connect(to.local, None, who, protocol)
    heard = (await receive_exactly(stream, 16)).decode()
    assert heard == stream.key_id
    await stream.aclose()
    return heard


async def tell_key(stream: Stream) -> None:
    await stream.send_all(stream.key_id.encode())


async def test_each_side_uses_the_newest_keys_that_both_have(real: Env) -> None:
    now = time.time()
    both, old, new = member("both"), member("old"), member("new", 2)
    rotate(both, 2, now)
    for protocol in PROTOCOLS:
        async with serving(real, both, tell_key) as listener:
            assert await key_of(real, listener, old, protocol) == keys(1).key_id
            assert await key_of(real, listener, new, protocol) == keys(2).key_id
            assert await key_of(real, listener, old, protocol) == keys(1).key_id
        for other, generation in ((old, 1), (new, 2)):
            async with serving(real, other, tell_key) as listener:
                assert await key_of(real, listener, both, protocol) == keys(generation).key_id


async def test_a_running_listener_takes_up_new_keys_and_drops_old_ones(real: Env) -> None:
    now = time.time()
    ann, old, new = member("ann"), member("old"), member("new", 2)
    async with serving(real, ann, tell_key) as listener:
        assert await key_of(real, listener, old) == keys(1).key_id
        with pytest.raises(RemoteError, match="holds another token"):
            await key_of(real, listener, new)
        rotate(ann, 2, now)
        assert await key_of(real, listener, old) == keys(1).key_id
        assert await key_of(real, listener, new) == keys(2).key_id
        ann.membership.tick(now + DAY)
        assert await key_of(real, listener, new) == keys(2).key_id
        with pytest.raises(RemoteError, match="If the token was rotated while this peer was off"):
            await key_of(real, listener, old)


async def test_a_running_dialler_takes_up_new_keys_and_drops_old_ones(real: Env) -> None:
    now = time.time()
    ann = member("ann")
    async with serving(real, member("old"), tell_key) as old, serving(real, member("new", 2), tell_key) as new:
        assert await key_of(real, old, ann) == keys(1).key_id
        rotate(ann, 2, now)
        assert await key_of(real, old, ann) == keys(1).key_id
        assert await key_of(real, new, ann) == keys(2).key_id
        ann.membership.tick(now + DAY)
        with pytest.raises(RemoteError, match="holds another token"):
            await key_of(real, old, ann)


async def test_the_name_alone_lets_nobody_in(real: Env) -> None:
    now = time.time()
    ann, old = member("ann"), member("old")
    rotate(ann, 2, now)
    ann.membership.tick(now + DAY)
    old.membership.take(KEY.rotation(2, b"a guess".ljust(32), made=int(now), old_until=int(now + DAY)).raw, now)
    async with serving(real, ann, echo) as listener:
        with pytest.raises(RemoteError, match="holds another token"):
            await real.net.connect(listener.local, None, old)
        context = tls_context(old, server=False, protocols=(GOSSIP,), keys=keys(1))
        context.verify_mode = ssl.CERT_NONE
        for name in (None, "example.org", "k" + "0" * 32):
            stream = await trio.open_tcp_stream(*listener.local)
            tls = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
            with pytest.raises(trio.BrokenResourceError):
                await tls.do_handshake()
                await tls.receive_some(1)
            await stream.aclose()
        await assert_member_can_talk(real, listener, member("new", 2))


async def test_a_revoked_peer_is_not_dialled(real: Env) -> None:
    ann, bob = member("ann"), member("bob")
    async with serving(real, bob, echo) as listener:
        await assert_member_can_talk(real, listener, ann)
        ann.membership.take(KEY.revocation(bob.identity.peer_id, made=1).raw, 1)
        with pytest.raises(RemoteError, match="was revoked"):
            await real.net.connect(listener.local, None, ann)


async def test_a_hello_in_single_bytes_and_one_that_never_ends_are_met(real: Env) -> None:
    now = time.time()
    ann, bob = member("ann"), member("bob")
    rotate(ann, 2, now)
    async with serving(real, ann, echo) as listener:
        stuck = [socket.create_connection((listener.local.host, listener.local.port)) for _ in range(5)]
        for index, one in enumerate(stuck):
            one.sendall(b"\x16\x03\x01\x02\x00"[: index + 1])
        await assert_member_can_talk(real, listener, bob)
        for one in stuck:
            one.close()
        context = tls_context(bob, server=False, protocols=(GOSSIP,))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        stream = await trio.open_tcp_stream(*listener.local)
        for byte in outgoing.read():
            await stream.send_all(bytes([byte]))
        with trio.fail_after(5):
            incoming.write(await stream.receive_some())
        with pytest.raises(ssl.SSLCertVerificationError):  # without a name it is answered with the newest keys
            tls.do_handshake()
        await stream.aclose()


async def test_a_thousand_wrong_tokens_let_nobody_in(real: Env) -> None:
    now = time.time()
    ann = member("ann")
    rotate(ann, 2, now - 2 * DAY)
    ann.membership.tick(now)
    rng = random.Random(1)
    handled: list[Stream] = []

    async def handler(stream: Stream) -> None:
        handled.append(stream)

    async def knock(who: Credentials) -> None:
        with pytest.raises(RemoteError, match="holds another token"):
            await real.net.connect(listener.local, None, who)

    async with serving(real, ann, handler) as listener:
        for start in range(0, 1000, 50):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 50):
                    identity = Identity(rng.randbytes(32))
                    made_up = NetworkKeys.derive(KEY.network_id, rng.randrange(1, 5), rng.randbytes(32))
                    nursery.start_soon(knock, Credentials(identity, made_up if number % 2 else keys(1)))
    assert handled == []
