"""From the name of a model to its latest manifest, in a network of 50 peers: the DHT's part of `models pull`.

    python benchmarks/name_to_manifest.py

50 DHT nodes in one process on real UDP sockets; a dozen of them hold versions of each name, three different heads
a name, as concurrent publishers leave them. Every other node asks for the heads of a name, and for the manifest of
the greatest. Target: p50 under 20 ms. One process does the work of all who answer.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio
from dht_nodes import Node, spread

from gossipml.dht.catalogue import Catalogue
from gossipml.dht.publish import Publisher
from gossipml.env.real import real_env

MANIFEST_SIZE = 700  # the contract allows 720
HOLDERS, HEADS = 12, 3
TARGET = 0.020  # seconds, p50


def manifest(name: str, height: int) -> bytes:
    return f"{name} {height} ".encode().ljust(MANIFEST_SIZE, b".")


async def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds for a fifth of a second."""
    held = 0
    while held < 4:
        await trio.sleep(0.05)
        held = held + 1 if condition() else 0


async def measure(peers: int, names: int, home: Path) -> float:
    rng = random.Random(1)
    nodes: list[Node] = []
    catalogues: list[Catalogue] = []
    took: list[float] = []
    right = 0
    async with trio.open_nursery() as nursery:
        for number in range(peers):
            node = Node(number, home, [rng.choice(nodes).dht.local] if nodes else [])
            await nursery.start(node.run)
            if nodes:
                await node.dht.wait_for_contacts(1)
            nodes.append(node)
            env = real_env(home / f"{number}", seed=number)
            publisher = Publisher(env, node.dht, node.credentials)
            nursery.start_soon(publisher.run)
            catalogues.append(Catalogue(env, node.dht, publisher, node.credentials))
        await wait_until(lambda: not any(node.dht.pending for node in nodes))
        named = [f"model-{number}" for number in range(names)]
        for name in named:
            for index, holder in enumerate(rng.sample(catalogues, HOLDERS)):
                value = manifest(name, index % HEADS)
                holder.set_head(name, index % HEADS, hashlib.sha256(value).digest(), value)
            await wait_until(lambda: not any(node.dht.pending for node in nodes))
        for name in named:
            for catalogue in rng.sample(catalogues, 20):
                start = time.perf_counter()
                heads = await catalogue.heads(name)
                found = await catalogue.head_manifest(heads[0], name) if heads else None
                took.append(time.perf_counter() - start)
                right += found == manifest(name, HEADS - 1)
        nursery.cancel_scope.cancel()
    print(f"{peers} peers, {len(took)} looks: {spread(took)} ms p50 / p99, right {100 * right / len(took):.1f} %")
    return sorted(took)[len(took) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=50)
    parser.add_argument("--names", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=120, help="give up after so long")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)

    async def bounded() -> float:
        with trio.fail_after(arguments.seconds), tempfile.TemporaryDirectory() as home:
            return await measure(arguments.peers, arguments.names, Path(home))

    p50 = trio.run(bounded)
    print(f"p50 under {1000 * TARGET:.0f} ms: {'met' if p50 < TARGET else 'NOT met'}")


if __name__ == "__main__":
    main()
