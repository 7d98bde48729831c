"""The catalogue: heads, providers and names of models, as others find them."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio

from gossipml import codec
from gossipml.dht import catalogue as catalogue_module
from gossipml.dht.catalogue import YEAR_2020, Catalogue, HeadClaim, Provider
from gossipml.dht.messages import Get, Got
from gossipml.dht.publish import PUTS_AT_ONCE, PUTS_PER_SECOND, Publisher
from gossipml.dht.records import MAX_VALUE, mutable_key
from gossipml.env.link import Link, uniform
from gossipml.ids import Address, Contact

if TYPE_CHECKING:
    from tests.dht.conftest import Cluster, Member

Simulate = Callable[..., Any]  # what a scenario returns

NAME = "digits-mlp"


def version(number: int) -> bytes:
    return hashlib.sha256(b"manifest %d" % number).digest()


def claim(member: Member, height: int, number: int) -> HeadClaim:
    identity = member.credentials.identity
    return HeadClaim(identity.peer_id, identity.public_key, height, version(number))


def provider(member: Member, complete: bool = True) -> Provider:
    return Provider(Contact(member.credentials.identity.peer_id, (member.dht.local,), "", ""), complete)


class Catalogues:
    def __init__(self, cluster: Cluster, nursery: trio.Nursery, ttl: float) -> None:
        self.cluster = cluster
        self.scopes: dict[str, trio.CancelScope] = {}
        self.publishers: dict[str, Publisher] = {}
        self._nursery = nursery
        self._ttl = ttl

    def of(self, member: Member) -> Catalogue:
        publisher = self.publishers[member.name] = Publisher(member.env, member.dht, member.credentials)
        scope = self.scopes[member.name] = trio.CancelScope()

        async def run() -> None:
            with scope:
                await publisher.run()

        self._nursery.start_soon(run)
        return Catalogue(member.env, member.dht, publisher, member.credentials, ttl=self._ttl)

    async def grow(self, count: int) -> tuple[list[Member], list[Catalogue]]:
        members = await self.cluster.grow(count)
        return members, [self.of(member) for member in members]

    def kill(self, member: Member) -> None:
        self.scopes[member.name].cancel()
        self.cluster.stop(member)


def catalogued(
    simulate: Simulate, scenario: Callable[[Catalogues], Any], *, ttl: float = 120.0, loss: float = 0.0
) -> None:
    async def main(cluster: Cluster) -> None:
        async with trio.open_nursery() as nursery:
            await scenario(Catalogues(cluster, nursery, ttl))
            nursery.cancel_scope.cancel()

    simulate(main, link=Link(delay=uniform(0.001, 0.003), loss=loss))


def test_heads_and_their_manifests_are_found_the_greatest_first(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(6)
        catalogues[1].set_head(NAME, 3, version(1), b"manifest 1")
        catalogues[2].set_head(NAME, 4, version(2), b"manifest 2")
        catalogues[3].set_head("xor", 9, version(3), b"manifest 3")
        await trio.sleep(5)
        heads = await catalogues[0].heads(NAME)
        assert heads == [claim(members[2], 4, 2), claim(members[1], 3, 1)]
        assert await catalogues[0].head_manifest(heads[0], NAME) == b"manifest 2"
        assert await catalogues[0].head_manifest(heads[1], NAME) == b"manifest 1"
        assert await catalogues[0].head_manifest(heads[0], "xor") is None
        assert await catalogues[0].heads("nothing") == []
        assert await catalogues[2].heads(NAME) == [claim(members[1], 3, 1)]  # not our own

    catalogued(simulate, scenario)


def test_a_new_head_takes_the_place_of_the_old_one_and_a_dropped_one_is_gone(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(5)
        catalogues[1].set_head(NAME, 1, version(1), b"manifest 1")
        await trio.sleep(5)
        before = await catalogues[0].heads(NAME)
        catalogues[1].set_head(NAME, 2, version(2), b"manifest 2")
        await trio.sleep(5)
        after = await catalogues[0].heads(NAME)
        assert (before, after) == ([claim(members[1], 1, 1)], [claim(members[1], 2, 2)])
        assert await catalogues[0].head_manifest(before[0], NAME) == b"manifest 2"
        catalogues[1].drop_head(NAME)
        await trio.sleep(5)
        assert await catalogues[0].heads(NAME) == []
        assert await catalogues[0].head_manifest(after[0], NAME) is None
        await trio.sleep(200)
        assert await catalogues[0].heads(NAME) == []

    catalogued(simulate, scenario)


def test_a_name_lives_while_one_holder_lives_and_a_dead_holder_is_forgotten(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(8)
        for catalogue in catalogues[1:5]:
            catalogue.set_head(NAME, 1, version(1), b"manifest 1")
            catalogue.provide(version(1), [members[0].dht.local], True)
        await trio.sleep(5)
        assert len(await catalogues[0].heads(NAME)) == 4
        for member in members[1:4]:
            world.kill(member)
        await trio.sleep(200)
        heads = await catalogues[0].heads(NAME)
        assert heads == [claim(members[4], 1, 1)]
        assert await catalogues[0].head_manifest(heads[0], NAME) == b"manifest 1"
        assert len(await catalogues[0].providers(version(1))) == 1

    catalogued(simulate, scenario)


def test_providers_come_with_their_addresses_and_the_whole_ones_first(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(5)
        for index, complete in ((1, False), (2, True), (3, False)):
            catalogues[index].provide(version(1), [members[index].dht.local], complete)
        await trio.sleep(5)
        found = await catalogues[0].replicas(version(1))
        assert found[0] == provider(members[2])
        assert sorted(found[1:], key=lambda p: p.contact) == sorted(
            [provider(members[1], False), provider(members[3], False)], key=lambda p: p.contact
        )
        assert await catalogues[0].providers(version(1)) == [p.contact for p in found]
        catalogues[1].provide(version(1), [members[1].dht.local], True)
        catalogues[2].unprovide(version(1))
        await trio.sleep(5)
        found = await catalogues[0].replicas(version(1))
        assert found == [provider(members[1]), provider(members[3], False)]

    catalogued(simulate, scenario)


def test_names_of_all_holders_are_found(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        _, catalogues = await world.grow(4)
        catalogues[1].set_names(["xor", NAME])
        catalogues[2].set_names(["xor", "iris"])
        catalogues[3].set_names([])
        await trio.sleep(5)
        assert await catalogues[0].names() == [NAME, "iris", "xor"]
        catalogues[2].set_names([])
        await trio.sleep(5)
        assert await catalogues[0].names() == [NAME, "xor"]

    catalogued(simulate, scenario)


def test_of_more_names_than_fit_each_holder_tells_others(simulate: Simulate) -> None:
    names = [f"{'n' * 50}{number:03}" for number in range(60)]

    async def scenario(world: Catalogues) -> None:
        _, catalogues = await world.grow(16)
        for catalogue in catalogues[1:]:
            catalogue.set_names(names)
        await trio.sleep(5)
        found = await catalogues[0].names()
        assert set(found) <= set(names)
        assert len(found) > 50

    catalogued(simulate, scenario)


def test_a_hundred_versions_are_told_at_a_steady_pace_and_all_kept_alive(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(6)
        dht = members[1].dht
        versions = [version(number) for number in range(100)]
        for item in versions:
            catalogues[1].provide(item, [dht.local], True)
        sent = [dht.stats.sent]
        for _ in range(15):
            await trio.sleep(1)
            sent.append(dht.stats.sent)
        most = max(after - before for before, after in itertools.pairwise(sent))
        # A put in this network is a find and a store at each of five nodes.
        assert most <= (PUTS_AT_ONCE + PUTS_PER_SECOND) * 2 * 5 + 20
        for item in versions:
            assert await catalogues[0].replicas(item) == [provider(members[1])]
        await trio.sleep(700)  # more than twice times the time to live
        busiest = 0
        for _ in range(30):
            before = dht.stats.sent
            await trio.sleep(1)
            busiest = max(busiest, dht.stats.sent - before)
        assert busiest <= (PUTS_AT_ONCE + PUTS_PER_SECOND) * 2 * 5 + 20
        for item in versions:
            assert await catalogues[0].replicas(item) == [provider(members[1])]

    catalogued(simulate, scenario, ttl=300.0)


def test_news_overtakes_what_waits_to_be_told(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(4)
        for number in range(200):
            catalogues[1].provide(version(number), [members[1].dht.local], True)
        await trio.sleep(60)
        for number in range(8):  # the network has doubled: everything is to be told again
            await world.cluster.start(f"later-{number}")
        await trio.sleep(1)
        catalogues[1].set_head(NAME, 1, version(1), b"manifest 1")
        await trio.sleep(1)
        assert await catalogues[0].heads(NAME) == [claim(members[1], 1, 1)]

    catalogued(simulate, scenario, ttl=1800.0)


def test_what_is_said_again_costs_nothing(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(3)

        def tell() -> None:
            catalogues[1].set_head(NAME, 1, version(1), b"manifest 1")
            catalogues[1].provide(version(1), [members[1].dht.local], True)
            catalogues[1].set_names([NAME])

        tell()
        await trio.sleep(5)
        seqs = [record.seq for record in await members[0].dht.get(catalogues[1].names_key)]
        tell()
        await trio.sleep(5)
        assert [record.seq for record in await members[0].dht.get(catalogues[1].names_key)] == seqs

    catalogued(simulate, scenario, ttl=1800.0)


def test_who_leaves_withdraws_everything(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(5)
        catalogues[1].set_head(NAME, 1, version(1), b"manifest 1")
        catalogues[1].provide(version(1), [members[1].dht.local], True)
        catalogues[1].set_names([NAME])
        await trio.sleep(5)
        catalogues[1].leave()
        await world.publishers[members[1].name].flush()
        world.kill(members[1])
        assert await catalogues[0].heads(NAME) == []
        assert await catalogues[0].providers(version(1)) == []
        assert await catalogues[0].names() == []

    catalogued(simulate, scenario)


def test_everything_is_found_when_datagrams_are_lost(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(10)
        for catalogue in catalogues[1:]:
            catalogue.set_head(NAME, 7, version(7), b"manifest 7")
        await trio.sleep(10)
        assert sorted(c.peer for c in await catalogues[0].heads(NAME)) == sorted(
            member.credentials.identity.peer_id for member in members[1:]
        )

    catalogued(simulate, scenario, loss=0.05)


def test_the_one_newest_of_fifty_heads_is_found_by_everybody(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(51)
        for catalogue in catalogues[1:]:
            catalogue.set_head(NAME, 1, version(1), b"manifest 1")
        await trio.sleep(20)
        newest = random.Random(1).randrange(1, 51)
        catalogues[newest].set_head(NAME, 2, version(2), b"manifest 2")
        await trio.sleep(5)
        for catalogue in [*catalogues[:newest:7], *catalogues[newest + 1 :: 7]]:
            heads = await catalogue.heads(NAME)
            assert heads[0] == claim(members[newest], 2, 2)

    catalogued(simulate, scenario, ttl=1800.0)


def test_liars_who_give_an_older_manifest_do_not_hide_the_newest(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(10)
        key = mutable_key(members[1].credentials.identity.public_key, NAME.encode())
        catalogues[1].set_head(NAME, 1, version(1), b"manifest 1")
        await trio.sleep(5)
        rolled_back = tuple(await members[0].dht.get(key))
        assert len(rolled_back) == 1
        catalogues[1].set_head(NAME, 2, version(2), b"manifest 2")
        await trio.sleep(5)
        for liar in members[2:8]:
            liar.dht._node._handlers[Get] = lambda question, sender, wall: Got(
                question.key, rolled_back if question.key == key else (), 1, ()
            )
        for reader in (catalogues[0], catalogues[8], catalogues[9]):
            assert await reader.head_manifest(claim(members[1], 2, 2), NAME) == b"manifest 2"

    catalogued(simulate, scenario)


def test_claims_of_a_wrong_form_are_passed_over(simulate: Simulate) -> None:
    good = version(1)
    heads = [
        b"garbage",
        codec.pack({}),
        codec.pack([1]),
        codec.pack([True, good]),
        codec.pack([-1, good]),
        codec.pack([1, good[:-1]]),
        codec.pack([2**62, good]),  # higher than any name can be
        codec.pack([1, good, 1]),
    ]
    providers = [
        b"\xc1",
        codec.pack([]),
        codec.pack({"a": [], "c": 1}),
        codec.pack({"a": [1], "c": True}),
        codec.pack({"a": [bytes(6)], "c": True}),
        codec.pack({"a": [b"\x0a\0\0\1\0\1"] * 5, "c": True}),
        codec.pack({"c": True}),
    ]
    names = [b"x", codec.pack("xor"), codec.pack(["../x", "X", 1, "", "a" * 65, "..", "\n", "xor\n"])]

    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(9)
        first = catalogues[0]
        for key, values in (
            (first.head_key(NAME), heads),
            (first.version_key(good), providers),
            (first.names_key, names),
        ):
            for member, value in zip(members[1:], values, strict=False):
                assert await member.dht.put(world.cluster.announcement(member, key, value)) > 3
        await trio.sleep(1)
        assert await first.heads(NAME) == []
        assert await first.replicas(good) == []
        assert await first.names() == []

    catalogued(simulate, scenario)


def test_what_others_tell_of_names_is_bounded(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_NAMES", 3)

    async def scenario(world: Catalogues) -> None:
        _, catalogues = await world.grow(4)
        catalogues[1].set_names([f"a{number}" for number in range(100)])
        for catalogue in catalogues[2:]:
            catalogue.set_names(["xor", "iris", NAME])
        await trio.sleep(5)
        assert await catalogues[0].names() == [NAME, "iris", "xor"]  # those that most peers tell

    catalogued(simulate, scenario)


def test_what_nobody_would_take_is_an_error(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        _, (catalogue,) = await world.grow(1)
        for name in ("", "-x", "X", "a/b", "a" * 65, "x\n", "é"):
            with pytest.raises(ValueError, match="no name of a model"):
                catalogue.set_head(name, 1, version(1), b"m")
            with pytest.raises(ValueError, match="no name of a model"):
                catalogue.set_names([name])
            with pytest.raises(ValueError, match="no name of a model"):
                await catalogue.heads(name)
        with pytest.raises(ValueError, match="31 bytes"):
            catalogue.set_head(NAME, 1, version(1)[:-1], b"m")
        for size in (0, MAX_VALUE + 1):
            with pytest.raises(ValueError, match="manifest"):
                catalogue.set_head(NAME, 1, version(1), bytes(size))
        catalogue.drop_head(NAME)  # never set: nothing
        catalogue.unprovide(version(1))
        assert await catalogue.heads(NAME) == []

    catalogued(simulate, scenario)


def test_the_height_that_a_claim_may_have_follows_the_clock(simulate: Simulate) -> None:
    async def scenario(world: Catalogues) -> None:
        members, catalogues = await world.grow(4)
        highest = int(members[0].env.clock.wall()) - YEAR_2020
        catalogues[1].set_head(NAME, highest, version(1), b"manifest 1")
        catalogues[2].set_head(NAME, highest + 1000, version(2), b"manifest 2")
        await trio.sleep(5)
        assert await catalogues[0].heads(NAME) == [claim(members[1], highest, 1)]
        catalogues[3].provide(version(1), [Address("10.0.0.1", number) for number in range(1, 9)], True)
        await trio.sleep(5)
        assert len((await catalogues[0].providers(version(1)))[0].addresses) == 4

    catalogued(simulate, scenario)
