"""What the swarm serves: the store as `gossipml.peer.swarm_ports.Shelf`."""

from __future__ import annotations

from gossipml.daemon.library import Library
from gossipml.ids import PeerId
from gossipml.models.store import Store
from gossipml.models.store_content import Content


class LibraryShelf:
    """The library is set once it is made: it needs the swarm, which needs the shelf."""

    library: Library

    def __init__(self, store: Store) -> None:
        self._store = store

    async def content(self, root: bytes) -> Content | None:
        return self._store.content(root)

    async def layer(self, root: bytes) -> bytes | None:
        return self._store.layer(root)

    async def manifest(self, version: bytes) -> bytes | None:
        return self._store.manifest(version)

    def holds(self, version: bytes) -> bool:
        return self._store.holds(version)

    async def hold(self, peer: PeerId, manifest: bytes) -> str:
        return await self.library.hold(peer, manifest)
