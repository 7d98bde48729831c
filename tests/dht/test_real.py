"""The DHT on real UDP sockets of this machine's loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gossipml.dht.directory import Announcement, Directory
from gossipml.dht.service import Dht, running
from gossipml.env import Credentials
from gossipml.env.real import real_env
from gossipml.ids import Address

pytestmark = pytest.mark.real


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_two_peers_find_each_other_and_leave(
    tmp_path: Path, credentials: Callable[..., Credentials], host: str
) -> None:
    first_env, second_env = real_env(tmp_path / "a"), real_env(tmp_path / "b")
    with trio.fail_after(20):
        async with running(Dht(first_env, credentials("a"), local=Address(host, 0))) as first:
            reachable = Address("127.0.0.1", first.local.port)
            second = Dht(second_env, credentials("b"), local=Address(host, 0), bootstrap=[reachable])
            async with running(second):
                await second.wait_for_contacts()
                await first.wait_for_contacts()
                assert second.contacts() == [reachable]
                one = Directory(first_env, first, credentials("a"))
                other = Directory(second_env, second, credentials("b"))
                other.announce(Announcement((Address("127.0.0.1", second.local.port),), "digits-mlp", "ab" * 32, "b"))
                await other.publisher.flush()
                (contact,) = await one.providers("digits-mlp", "ab" * 32)
                assert contact.peer == credentials("b").identity.peer_id
                assert (tmp_path / "b" / "state" / "dht-seq").is_file()
                await other.leave()
                assert await one.members() == []
