"""DHT nodes in one process on real UDP sockets: how long joining, putting and getting take, and who survives.

    python benchmarks/dht_nodes.py --nodes 200

Prints p50 and p99 of each step, the exactness of lookups, then stops a quarter and half of the nodes (their
sockets close without a word) and gets everything again. Beside the figures stand those of `kademlia` 2.2.3 on
asyncio with 200 nodes, k = 20, on the machine of the decision, two cores: trust the ratios, not the numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import tempfile
import time
from pathlib import Path

import trio

from gossipml.dht.config import DhtConfig
from gossipml.dht.records import Kind, Record, sign_record, topic_key
from gossipml.dht.service import Dht
from gossipml.env import Credentials
from gossipml.env.real import real_env
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken

KEYS = NetworkKeys.from_token(JoinToken(b"b" * 16, b"benchmark cookie".ljust(32), 0, ()))
PACKAGE = {
    "bootstrap_ms": "18.6 p50",
    "put_ms": "21 / 37",
    "get_ms": "1.0 / 5.5 (local hits unasked)",
    "get_ms_25_stopped": "p99 10,000",
    "get_ms_50_stopped": "p99 15,000",
}


class Node:
    def __init__(self, number: int, home: Path, bootstrap: list[Address], upkeep: float = 60.0) -> None:
        identity = Identity(random.Random(number).randbytes(32))
        self.credentials = Credentials(identity, KEYS)
        env = real_env(home, seed=number)
        local = Address("127.0.0.1", 0)
        # One process answers for all nodes: at 10 s each, upkeep of hundreds would be most of the load.
        config = DhtConfig(upkeep_interval=upkeep)
        self.dht = Dht(env, self.credentials, local=local, bootstrap=bootstrap, config=config)
        self.scope = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await self.dht.run(task_status=task_status)

    def record(self, key: bytes) -> Record:
        return sign_record(
            self.credentials.identity,
            KEYS.network_id,
            Kind.ANNOUNCEMENT,
            key,
            seq=1,
            expires=int(time.time()) + 3600,
            value=b"v" * 60,
        )


def spread(samples: list[float]) -> str:
    """p50 / p99 in milliseconds."""
    ordered = sorted(samples)
    return f"{1000 * ordered[len(ordered) // 2]:.1f} / {1000 * ordered[int(len(ordered) * 0.99)]:.1f}"


async def measure(count: int, values: int, home: Path) -> dict[str, str]:
    rng = random.Random(1)
    results: dict[str, str] = {}
    nodes: list[Node] = []
    async with trio.open_nursery() as nursery:
        took = []
        for number in range(count):
            node = Node(number, home, [rng.choice(nodes).dht.local] if nodes else [])
            start = time.perf_counter()
            await nursery.start(node.run)
            if nodes:
                await node.dht.wait_for_contacts(1)
                await node.dht.nearest(node.dht.id)
                took.append(time.perf_counter() - start)
            nodes.append(node)
        results["bootstrap_ms"] = spread(took)
        await trio.sleep(2)

        exact = 0.0
        for _ in range(50):
            asker, target = rng.choice(nodes), rng.randbytes(20)
            goal = int.from_bytes(target, "big")
            others = [n.dht.id for n in nodes if n is not asker]
            truth = sorted(others, key=lambda node: int.from_bytes(node, "big") ^ goal)[:20]
            found = [contact.node for contact in await asker.dht.nearest(target)]
            exact += len([node for node in truth if node in found]) / len(truth) / 50
        results["exact_nearest"] = f"{exact:.3f}"

        keys = [topic_key(b"%d" % number) for number in range(values)]
        took, cpu = [], time.process_time()
        for key in keys:
            node = rng.choice(nodes)
            record = node.record(key)
            start = time.perf_counter()
            await node.dht.put(record)
            took.append(time.perf_counter() - start)
        results["put_ms"] = spread(took)
        await trio.sleep(1)
        results["put_cpu_ms"] = f"{1000 * (time.process_time() - cpu) / values:.1f}"

        for stopped, name in ((0, "get_ms"), (count // 4, "get_ms_25_stopped"), (count // 4, "get_ms_50_stopped")):
            for node in rng.sample(nodes, stopped):
                node.scope.cancel()
                nodes.remove(node)
            took, right = [], 0
            for key in keys:
                node = rng.choice(nodes)
                start = time.perf_counter()
                right += len(await node.dht.get(key)) == 1
                took.append(time.perf_counter() - start)
            results[name] = f"{spread(took)} ({100 * right / values:.0f} % found)"
        dropped = sum((node.dht.stats.dropped for node in nodes), start=nodes[0].dht.stats.dropped)
        results["dropped"] = json.dumps(dropped)
        nursery.cancel_scope.cancel()
    results["peak_rss_mb"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}"
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--values", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300, help="give up after so long")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    async def bounded() -> dict[str, str]:
        with trio.fail_after(arguments.seconds), tempfile.TemporaryDirectory() as home:
            return await measure(arguments.nodes, arguments.values, Path(home))

    print(f"{arguments.nodes} nodes, {arguments.values} records, milliseconds p50 / p99")
    for name, value in trio.run(bounded).items():
        print(f"{name:20} {value:36} {PACKAGE.get(name, '')}")


if __name__ == "__main__":
    main()
