"""Who is in the network and who trains what: announced, listed, forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio

from gossipml import codec
from gossipml.dht import directory as directory_module
from gossipml.dht.directory import Announcement, Directory
from gossipml.dht.publish import SEQ_STEP, SequenceNumbers
from gossipml.dht.records import Kind, sign_record
from gossipml.env.link import Link, uniform
from gossipml.env.simulated import World
from gossipml.ids import Address, Contact

if TYPE_CHECKING:
    from tests.dht.conftest import Cluster, Member

Simulate = Callable[..., Any]  # what a scenario returns

DIGITS, XOR = "ab" * 32, "cd" * 32


def announcement(member: Member, model: str = "digits-mlp", digest: str = DIGITS) -> Announcement:
    return Announcement((member.dht.local,), model, digest, member.name)


def contact(member: Member, model: str = "digits-mlp") -> Contact:
    return Contact(member.credentials.identity.peer_id, (member.dht.local,), model, member.name)


class Listed:
    """A cluster in which each member has a directory."""

    def __init__(self, cluster: Cluster, nursery: trio.Nursery, ttl: float) -> None:
        self.cluster = cluster
        self._nursery = nursery
        self._ttl = ttl
        self.scopes: dict[str, trio.CancelScope] = {}

    async def directory(self, member: Member, model: str = "digits-mlp", digest: str = DIGITS) -> Directory:
        made = Directory(member.env, member.dht, member.credentials, ttl=self._ttl)
        scope = self.scopes[member.name] = trio.CancelScope()
        made.announce(announcement(member, model, digest))

        async def run() -> None:
            with scope:
                await made.run()

        self._nursery.start_soon(run)
        return made


def listed(simulate: Simulate, scenario: Callable[[Listed], Any], *, ttl: float = 120.0, loss: float = 0.0) -> None:
    async def main(cluster: Cluster) -> None:
        async with trio.open_nursery() as nursery:
            await scenario(Listed(cluster, nursery, ttl))
            nursery.cancel_scope.cancel()

    simulate(main, link=Link(delay=uniform(0.001, 0.003), loss=loss))


def test_everybody_lists_everybody_else(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(12)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        for member, directory in zip(members, directories, strict=True):
            others = sorted(contact(other) for other in members if other is not member)
            assert await directory.members() == directory.known() == others
            assert await directory.providers("digits-mlp") == others

    listed(simulate, scenario)


def test_providers_are_told_apart_by_model_and_by_specification(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        a, b, c, d = await world.cluster.grow(4)
        directory = await world.directory(a, "")
        await world.directory(b, "digits-mlp", DIGITS)
        await world.directory(c, "digits-mlp", "ef" * 32)
        await world.directory(d, "xor", XOR)
        await trio.sleep(10)
        assert await directory.providers("digits-mlp") == sorted([contact(b), contact(c)])
        assert await directory.providers("digits-mlp", DIGITS) == [contact(b)]
        assert await directory.providers("xor", XOR[:16]) == [contact(d, "xor")]
        assert await directory.providers("mnist-mlp") == []
        assert len(await directory.members()) == 3

    listed(simulate, scenario)


def test_what_was_published_is_told_again_soon_after_the_network_has_grown(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        first, *_ = await world.cluster.grow(2)
        await world.directory(first)
        await trio.sleep(120)  # it would be due again after 300 s
        others = [await world.cluster.start(f"newcomer-{index}") for index in range(10)]
        await trio.sleep(20)
        own = first.credentials.identity.public_key
        for other in others:
            held = other.dht._node.storage._records.values()
            assert any(record.public_key == own for slots in held for record in slots.values()), other.name

    listed(simulate, scenario, ttl=900.0)


def test_who_leaves_is_forgotten_at_once_and_does_not_come_back(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(6)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        assert len(await directories[0].members()) == 5
        await directories[5].leave()
        world.scopes[members[5].name].cancel()
        world.cluster.stop(members[5])
        await trio.sleep(1)
        for directory in directories[:5]:
            for _ in range(3):
                assert contact(members[5]) not in await directory.members()
                assert contact(members[5]) not in await directory.providers("digits-mlp")
        await trio.sleep(400)
        assert contact(members[5]) not in await directories[0].members()
        assert len(directories[0].known()) == 4

    listed(simulate, scenario)


def test_who_is_killed_is_listed_until_the_announcement_expires(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(5)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        world.scopes[members[4].name].cancel()
        world.cluster.stop(members[4])
        await trio.sleep(30)
        assert contact(members[4]) in await directories[0].members()
        await trio.sleep(120)
        assert contact(members[4]) not in directories[0].known()
        assert contact(members[4]) not in await directories[0].members()
        assert len(directories[0].known()) == 3  # the living republished

    listed(simulate, scenario)


def test_announcements_live_as_long_as_their_owner_also_when_datagrams_are_lost(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(8)
        directories = [await world.directory(member) for member in members]
        for _ in range(8):
            await trio.sleep(60)
            assert len(await directories[0].members()) == 7

    listed(simulate, scenario, loss=0.05)


def test_what_is_announced_before_anybody_is_known_is_told_later(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        first = await world.cluster.start("first")
        await world.directory(first)
        await trio.sleep(100)
        second = await world.cluster.start("second")
        await second.dht.wait_for_contacts(1)
        directory = await world.directory(second)
        await trio.sleep(20)
        assert await directory.members() == [contact(first)]

    listed(simulate, scenario, ttl=900.0)


def test_a_peer_that_trains_another_model_now_leaves_one_list_for_the_other(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(4)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        directories[3].announce(announcement(members[3], "xor", XOR))
        await trio.sleep(10)
        for directory in directories[:3]:
            assert contact(members[3]) not in await directory.providers("digits-mlp")
            assert await directory.providers("xor") == [contact(members[3], "xor")]
            assert contact(members[3], "xor") in await directory.members()

    listed(simulate, scenario)


def test_a_restarted_peer_goes_on_with_greater_numbers(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(4)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        old = members[3]
        world.scopes[old.name].cancel()
        world.cluster.stop(old)
        again = await world.cluster.start(old.name, port=9000)
        await again.dht.wait_for_contacts(3)
        await world.directory(again)
        await trio.sleep(10)
        assert contact(again) in await directories[0].members()
        assert contact(old) not in directories[0].known()

    listed(simulate, scenario)


def test_announcements_of_a_wrong_form_are_passed_over(simulate: Simulate) -> None:
    good = {"a": [b"\x0a\0\0\1\0\1"], "m": "m", "d": b"d" * 8, "n": "n"}
    values = [
        b"garbage",
        codec.pack([1]),
        codec.pack({}),
        codec.pack(good | {"a": [b"12345"]}),
        codec.pack(good | {"a": [1]}),
        codec.pack(good | {"a": [bytes(6)] * 5}),
        codec.pack(good | {"m": "m" * 65}),
        codec.pack(good | {"n": 7}),
        codec.pack(good | {"d": b"d" * 9}),
    ]

    async def scenario(world: Listed) -> None:
        first, *others = await world.cluster.grow(1 + len(values))
        directory = await world.directory(first)
        for member, value in zip(others, values, strict=True):
            record = world.cluster.announcement(member, directory.members_key, value)
            assert await member.dht.put(record) > 3
        await trio.sleep(5)
        assert await directory.members() == []

    listed(simulate, scenario)


def test_a_mutable_record_under_the_members_key_is_impossible_and_an_empty_name_is_fine(simulate: Simulate) -> None:
    async def scenario(world: Listed) -> None:
        first, second = await world.cluster.grow(2)
        directory = await world.directory(first)
        other = Directory(second.env, second.dht, second.credentials, ttl=60)
        other.announce(Announcement((), "", "", ""))
        await other.publisher.flush()
        assert await directory.members() == [Contact(second.credentials.identity.peer_id, (), "", "")]
        with pytest.raises(ValueError, match="mutable"):
            sign_record(
                second.credentials.identity,
                second.credentials.keys.network_id,
                Kind.MUTABLE,
                directory.members_key,
                seq=1,
                expires=1,
                value=b"",
            )

    listed(simulate, scenario)


def test_what_is_remembered_is_bounded(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MAX_LISTED", 3)

    async def scenario(world: Listed) -> None:
        members = await world.cluster.grow(8)
        directories = [await world.directory(member) for member in members]
        await trio.sleep(10)
        assert len(await directories[0].members()) == 3

    listed(simulate, scenario)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addresses": (Address("10.0.0.1", 1),) * 5}, "5 addresses"),
        ({"model": "m" * 65}, "longer than 64"),
        ({"name": "n" * 65}, "longer than 64"),
        ({"digest": "xyz"}, "hexadecimal"),
    ],
)
def test_an_announcement_that_nobody_would_take_is_an_error(
    simulate: Simulate, change: dict[str, Any], message: str
) -> None:
    async def scenario(world: Listed) -> None:
        member = await world.cluster.start("one")
        directory = Directory(member.env, member.dht, member.credentials)
        with pytest.raises(ValueError, match=message):
            directory.announce(dataclasses.replace(announcement(member), **change))
        with pytest.raises(ValueError, match="time to live"):
            directory.publisher.publish(Kind.ANNOUNCEMENT, b"k" * 20, b"", ttl=10**6)

    listed(simulate, scenario)


# Sequence numbers


def test_sequence_numbers_grow_over_restarts_and_a_clock_set_back(simulate: Simulate) -> None:
    async def scenario(cluster: Cluster) -> None:
        world: World = cluster.world
        last = 0
        for skew in (0.0, 0.0, -86_400.0, -864_000.0):
            numbers = SequenceNumbers(world.env("one", wall_skew=skew), "state/dht-seq")
            for _ in range(SEQ_STEP + 5):
                number = await numbers.next()
                assert number > last
                last = number
            world.power_off("one")

    simulate(scenario)


def test_a_lost_or_broken_file_of_numbers_is_made_up_for_by_the_clock(
    simulate: Simulate, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(cluster: Cluster) -> None:
        env = cluster.world.env("one")
        last = await SequenceNumbers(env, "seq").next()
        await trio.sleep(5)
        for broken in (b"", b"x" * 100, b"12x", b"-5"):
            await env.disk.write("seq", broken)
            number = await SequenceNumbers(env, "seq").next()
            assert number > last
            await trio.sleep(5)
            last = number
        await env.disk.remove("seq")
        assert await SequenceNumbers(env, "seq").next() > last

    simulate(scenario)
    assert "cannot read seq" in caplog.text


def test_a_full_disk_does_not_silence_a_peer(simulate: Simulate, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster) -> None:
        env = cluster.world.env("one")

        class Full:
            def __getattr__(self, name: str) -> object:
                return getattr(env.disk, name)

            async def write(self, path: str, data: bytes, *, private: bool = False) -> None:
                raise OSError(28, "No space left on device")

        numbers = SequenceNumbers(dataclasses.replace(env, disk=Full()), "seq")  # type: ignore[arg-type]
        first = await numbers.next()
        assert await numbers.next() > first

    simulate(scenario)
    assert "No space left" in caplog.text
