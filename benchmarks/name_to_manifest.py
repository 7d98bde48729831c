"""From a model's name to its verified manifest, by peers that have never heard of it, in a network of 50 peers.

    python benchmarks/name_to_manifest.py --peers 50 --models 20

Whole peers, all in one process on real sockets (UDP, mutual TLS), with numpy trainers that do nothing; each model is
published by another peer and held by 12. Every peer that does not hold a model looks it up once, and must find the
version that was published. Target: p50 under 20 ms. One process does the work of all who answer.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import trio
from safetensors.numpy import save

from gossipml.daemon.library import Draft
from gossipml.daemon.node import Node, NodeConfig
from gossipml.dht.config import DhtConfig
from gossipml.env import Credentials
from gossipml.env.real import real_env
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.models.trainer import Trainer
from gossipml.simulations.numpy_trainer import NumpyTrainer, make_points
from gossipml.token import JoinToken

KEYS = NetworkKeys.from_token(JoinToken(b"b" * 16, b"benchmark cookie".ljust(32), 0, ()))
TARGET_MS = 20.0


def make_node(index: int, home: Path, first: tuple[Address, ...]) -> Node:
    env = real_env(home, seed=index)
    points = make_points(0, 1)[0]

    @asynccontextmanager
    async def open_trainer() -> AsyncIterator[Trainer]:
        yield NumpyTrainer(env, points, train=False)

    config = NodeConfig(
        name=f"peer-{index}",
        listen=Address("127.0.0.1", 0),
        trains=False,
        first_contacts=first,
        dht=DhtConfig(upkeep_interval=600.0),  # one process answers for all of them
    )
    return Node(env, Credentials(Identity(random.Random(index).randbytes(32)), KEYS), config, open_trainer)


async def measure(peers: int, models: int, folder: Path) -> list[float]:
    """Milliseconds of each lookup."""
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for index in range(peers):
            node = make_node(index, folder / str(index), nodes[0].addresses if nodes else ())
            await stack.enter_async_context(node.running())
            nodes.append(node)
        with trio.fail_after(120):
            while min(node.dht.stats.nodes for node in nodes) < min(20, peers - 1):
                await trio.sleep(0.2)
        published: dict[str, bytes] = {}
        for number in range(models):
            name = f"model-{number}"
            content = save({"weight": np.full(1000, number, np.float32)})
            publisher = nodes[(7 * number) % peers]
            published[name] = (await publisher.library.publish(Draft(name), content)).version
            publisher.replication.poke()
        with trio.move_on_after(90):
            while min(sum(bool(n.library.store.versions(name)) for n in nodes) for name in published) < min(12, peers):
                await trio.sleep(0.5)
        await trio.sleep(5)
        took = []
        for name, right in published.items():
            for node in nodes:
                if not node.library.store.versions(name):
                    begun = time.perf_counter()
                    version = await node.library.latest(name)
                    took.append(1000 * (time.perf_counter() - begun))
                    if version is None or version.version != right:
                        raise SystemExit(f"{name} was not found by {node.config.name}")
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=50)
    parser.add_argument("--models", type=int, default=10)
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    with tempfile.TemporaryDirectory() as folder:
        took = trio.run(measure, options.peers, options.models, Path(folder))
    p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[98]
    print(f"{options.peers} peers, {len(took)} looks, all right: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"p50 under {TARGET_MS:.0f} ms: {'met' if p50 < TARGET_MS else 'NOT met'}")


if __name__ == "__main__":
    main()
