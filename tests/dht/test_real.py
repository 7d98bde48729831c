"""The DHT on real UDP sockets of this machine's loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gossipml.dht.config import DhtConfig
from gossipml.dht.directory import Announcement, Directory
from gossipml.dht.messages import NodeContact, Ping
from gossipml.dht.node import Answered
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


def stand_still() -> None:
    """As when the machine is busy, or the process was stopped and goes on."""
    time.sleep(0.5)


async def test_what_came_while_the_process_stood_still_is_heard_before_anybody_is_given_up(
    tmp_path: Path, credentials: Callable[..., Credentials]
) -> None:
    config = DhtConfig(soft_wait=(0.1, 0.1), hard_wait=0.3)
    first_env, second_env = real_env(tmp_path / "a"), real_env(tmp_path / "b")
    local = Address("127.0.0.1", 0)
    with trio.fail_after(20):
        async with running(Dht(first_env, credentials("a"), local=local, config=config)) as first:
            second = Dht(second_env, credentials("b"), local=local, bootstrap=[first.local], config=config)
            async with running(second):
                await first.wait_for_contacts()
                heard: list[Answered | None] = []
                first._calls.begin(NodeContact(second.id, second.local), Ping(), heard.append)
                stand_still()
                await trio.sleep(0.5)
                assert heard and heard[0] is not None
