"""The library as the HTTP endpoint and the command line see it: names and versions as text, answers as JSON."""

from __future__ import annotations

import re

import trio

from gossipml.api.ports import JSON, UnknownModel
from gossipml.daemon.library import Draft, Fetch, Library
from gossipml.daemon.node import Node
from gossipml.errors import UserError
from gossipml.ids import Contact, PeerId, format_peer_id
from gossipml.models.manifest import MAX_NOTE, Manifest

INCOMING = "models/incoming"  # under the home: where the command line puts files that are to be imported
_FILE = re.compile(r"[0-9a-f]{1,64}\.import")
LOOK_SECONDS = 5.0  # for what the network says; what is known here is answered anyway


class LibraryFace:
    """Implements `gossipml.api.ports.Library`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def _library(self) -> Library:
        return self._node.library

    async def names(self) -> list[str]:
        with trio.move_on_after(LOOK_SECONDS):
            return await self._library.names()
        return sorted({version.name for version in self._library.store.versions()})

    async def table(self) -> list[dict[str, JSON]]:
        latest: dict[str, Manifest] = {version.name: version for version in reversed(self._library.store.versions())}
        found: dict[str, Manifest] = {}

        async def look(name: str) -> None:
            version = await self._library.latest(name)
            if version is not None:
                found[name] = version

        with trio.move_on_after(LOOK_SECONDS):
            async with trio.open_nursery() as nursery:
                for name in await self._library.names():
                    nursery.start_soon(look, name)
        latest |= found
        lines = {name: self._line(version) for name, version in latest.items()}
        unseen = [latest[name] for name, line in lines.items() if line["replicas"] is None]
        for identity, count in (await self._count(unseen)).items():
            name = next(version.name for version in unseen if version.version == identity)
            lines[name]["replicas"] = count
        return [lines[name] for name in sorted(lines)]

    async def show(self, name: str) -> dict[str, JSON]:
        versions = await self._library.history(name)
        if not versions:
            raise UnknownModel(f"no version of a model {name!r} is published; see `gossipml models list`")
        heads = {head.version for head in await self._library.heads(name)}
        lines: list[JSON] = []
        holders: list[JSON] = []
        live: dict[bytes, list[Contact]] = {}
        with trio.move_on_after(LOOK_SECONDS):
            live = await self._node.replication.holders(versions)
        for version in versions:
            line = self._line(version)
            if version.version in live:
                line["replicas"] = len(live[version.version]) + self._library.is_here(version)
            line["head"] = version.version in heads
            lines.append(line)
        newest = versions[0]
        if self._library.is_here(newest):
            holders.append({"peer": format_peer_id(self._own), "name": self._node.config.name})
        holders += [
            {"peer": format_peer_id(contact.peer), "name": self._name_of(contact.peer)}
            for contact in live.get(newest.version, [])
        ]
        return {"name": name, "latest": newest.version.hex(), "versions": lines, "holders": holders}

    async def publish(self, name: str, file: str, note: str) -> dict[str, JSON]:
        if len(note.encode()) > MAX_NOTE or not note.isprintable():
            raise UserError(f"the note has {len(note.encode())} bytes; at most {MAX_NOTE} printable ones")
        if file:
            if _FILE.fullmatch(file) is None:
                raise UserError(f"{file[:80]!r} is not the name of a file in HOME/{INCOMING}")
            version = await self._library.publish_file(Draft(name, note=note or "imported"), f"{INCOMING}/{file}")
        else:
            version = await self._publish_model(name, note)
        return self._done(version)

    async def pull(self, name: str, version: str) -> dict[str, JSON]:
        wanted = await self._library.find(name, version)
        fetch = self._library.start_fetch(wanted)
        return {**self._done(wanted), "state": "here" if fetch is None else _state(fetch)}

    async def rollback(self, name: str, version: str) -> dict[str, JSON]:
        if not version:
            raise UserError("say which version is to be the latest again; see `gossipml models show NAME`")
        old = await self._library.find(name, version)
        new = await self._library.roll_back(old)
        return {**self._done(new), "of": old.version.hex()}

    async def pin(self, name: str, version: str, pinned: bool) -> dict[str, JSON]:
        wanted = await self._library.find(name, version)
        await self._library.pin(wanted, pinned)
        return self._done(wanted)

    async def remove(self, name: str, version: str) -> dict[str, JSON]:
        versions = self._library.store.versions(name)
        if version:
            versions = [self._library.store.find(name, version)] if versions else []
        if not versions:
            raise UnknownModel(f"no version of {name} is on this peer; see `gossipml models list`")
        freed = await self._library.remove(versions)
        removed: list[JSON] = [gone.version.hex() for gone in versions]
        return {"name": name, "removed": removed, "freed": freed}

    def transfers(self) -> list[dict[str, JSON]]:
        moving = {transfer.root: transfer for transfer in self._library.swarm.transfers()}
        lines: list[dict[str, JSON]] = []
        for fetch in self._library.fetches():
            version, transfer = fetch.manifest, moving.get(fetch.manifest.root)
            lines.append(
                {
                    "name": version.name,
                    "version": version.version.hex(),
                    "size": version.size,
                    "done": version.size if fetch.ended is not None and not fetch.error else fetch.done,
                    "rate": transfer.rate_down if transfer else 0.0,
                    "peers": transfer.sources if transfer else 0,
                    "state": _state(fetch),
                    "error": fetch.error,
                }
            )
        return lines

    async def _publish_model(self, name: str, note: str) -> Manifest:
        trainer, learner = self._node.learner.trainer, self._node.learner
        if not self._node.config.trains:
            raise UserError(
                "this peer trains nothing (--no-train); publish a file with --file, or ask a peer that does"
            )
        if trainer is None or self._node.gossip.age <= 0:
            raise UserError("the model has not been trained yet; try again in a few seconds")
        if trainer.layout.model != name:
            raise UserError(f"this peer trains {trainer.layout.model!r}, not {name!r}; publish a file with --file")
        export = await trainer.export()
        metrics = {**export.metrics, "round": float(learner.progress.round)}
        draft = Draft(name, bytes.fromhex(trainer.layout.digest), self._node.gossip.age, metrics, note)
        return await self._library.publish(draft, export.content)

    async def _count(self, versions: list[Manifest]) -> dict[bytes, int]:
        """Live replicas of versions that are not held here."""
        with trio.move_on_after(LOOK_SECONDS):
            live = await self._node.replication.holders(versions)
            return {version: len(contacts) for version, contacts in live.items()}
        return {}

    def _line(self, version: Manifest) -> dict[str, JSON]:
        store, identity = self._library.store, version.version
        content = store.content(version.root)
        here = "whole" if store.holds(identity) else "part" if store.get(identity) and content else "no"
        done = 1.0 if here == "whole" else 1 - content.missing / content.count if content and here == "part" else 0.0
        parents: list[JSON] = [parent.hex() for parent in version.parents]
        metrics: dict[str, JSON] = {**version.metrics}
        return {
            **self._done(version),
            "created": version.created,
            "parents": parents,
            "publisher": format_peer_id(version.peer),
            "publisher_name": self._name_of(version.peer),
            "age": version.age,
            "metrics": metrics,
            "note": version.note,
            "replicas": self._node.replication.count(identity),
            "wanted": self._node.replication.wanted(),
            "here": here,
            "done": done,
            "pinned": identity in store.pins,
        }

    def _done(self, version: Manifest) -> dict[str, JSON]:
        return {
            "name": version.name,
            "version": version.version.hex(),
            "height": version.height,
            "size": version.size,
            "root": version.root.hex(),
        }

    def _name_of(self, peer: PeerId) -> str:
        if peer == self._own:
            return self._node.config.name
        entry = self._node.view.get(peer)
        if entry is not None and entry.contact.name:
            return entry.contact.name
        return next((contact.name for contact in self._node.directory.known() if contact.peer == peer), "")

    @property
    def _own(self) -> PeerId:
        return self._node.credentials.identity.peer_id


def _state(fetch: Fetch) -> str:
    if fetch.ended is None:
        return "fetching"
    return "failed" if fetch.error else "done"
