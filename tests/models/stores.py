"""Contents, manifests and stores for tests: small, real, signed, on a simulated disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
import trio
from safetensors.numpy import save

from gossipml.env.simulated_disk import SimulatedDisk
from gossipml.identity import Identity
from gossipml.models import merkle
from gossipml.models.manifest import Manifest, read_manifest, sign_manifest
from gossipml.models.store import Store, StoreConfig
from gossipml.models.store_content import Content

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NETWORK = b"n" * 16
WALL = 1_790_000_000.0
ALICE = Identity(hashlib.sha256(b"alice").digest())
CONFIG = StoreConfig(spare=0)


class InlineCompute:
    async def run(self, function: Callable[[*Ts], T], *args: *Ts, cost: float = 0.0) -> T:
        await trio.lowlevel.checkpoint()
        return function(*args)


def content_of(size: int, seed: int = 0) -> bytes:
    """A safetensors file with `size` bytes of noise in it."""
    return save({"w": np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)})


def manifest_of(content: bytes, **changes: Any) -> Manifest:
    """`Any`: whatever `sign_manifest` takes."""
    fields: dict[str, Any] = {
        "network_id": NETWORK,
        "name": "digits-mlp",
        "spec": b"s" * 32,
        "height": 1,
        "parents": (),
        "age": 0.0,
        "metrics": {"accuracy": 0.5},
        "size": len(content),
        "root": merkle.root_of(content),
        "created": WALL,
    } | changes
    if fields["height"] > 1 and not fields["parents"]:
        fields["parents"] = (b"p" * 32,)
    return read_manifest(sign_manifest(ALICE, **fields), NETWORK, WALL)


def piece_of(content: bytes, index: int) -> bytes:
    length = merkle.piece_length(len(content))
    return content[index * length : (index + 1) * length]


async def opened(disk: SimulatedDisk, config: StoreConfig = CONFIG) -> Store:
    store = Store(disk, InlineCompute(), config)
    await store.open()
    return store


async def fill(store: Store, manifest: Manifest, content: bytes, *, most: int | None = None) -> Content:
    """Download: write what is missing (at most so many pieces) and finish when all is there."""
    into = await store.begin(manifest, merkle.layer_of(content))
    for index in range(into.count):
        if not into.has(index) and (most is None or most > 0):
            assert await into.write(index, piece_of(content, index))
            most = None if most is None else most - 1
    if into.complete:
        await into.finish()
    return into


async def read_all(content: Content) -> bytes | None:
    """The whole bytes; None when a piece is missing."""
    pieces = [await content.read(index) for index in range(content.count)]
    return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)
