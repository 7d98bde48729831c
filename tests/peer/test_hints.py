"""Contacts attached to updates, for peer sampling."""

from __future__ import annotations

import trio

from gossipml.env.simulated import World, run_simulation
from gossipml.peer.wire import Update

from .peers import RawPeer, cluster, make_profile


def test_a_neighbour_is_told_contacts_once_in_a_second_however_many_updates_it_gets() -> None:
    async def scenario(world: World) -> None:
        async with cluster(world) as peers:
            ann = await peers.start("ann")
            raws = [await RawPeer.dial(world, name, ann, profile=make_profile(name)) for name in ("raw1", "raw2")]
            for _ in range(2):
                for raw in raws:
                    raw.heard.clear()
                for _ in range(10):
                    await ann.round()
                    for raw in raws:
                        await raw.listen_for(0.02)
                for raw in raws:
                    updates = [event for event in raw.heard if isinstance(event, Update)]
                    assert len(updates) >= 8
                    assert sum(bool(update.contacts) for update in updates) == 1
                await trio.sleep(1)

    run_simulation(scenario, seed=1)
