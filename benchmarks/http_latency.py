"""How long `GET /healthz` takes: alone, at a steady rate over 32 connections, and 32 clients asking at full speed.

    python benchmarks/http_latency.py [IP:PORT]

With an address: against that running peer, as it is. Without: against the endpoint over a node that has nothing
to do, in a process of its own, beside a process at nice 10 that multiplies matrices on all cores, as a training
worker does. The client is a third process and takes its share of the cores, so the figures are upper bounds.
The promise is the first two rows: p99 under 10 ms. The last is throughput; its latency is the queue it makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter

import trio

from gossipml.api.broadcast import Broadcast
from gossipml.api.ports import JSON, Event, Health, Metric, ModelCard, PredictAnswer, PredictRequest, UnknownModel
from gossipml.api.server import ApiConfig, serve
from gossipml.ids import Address, parse_address

CONNECTIONS = 32
SECONDS = 5.0


class IdleNode:
    """A node that is well and has no models."""

    def __init__(self) -> None:
        self._events = Broadcast()

    def status(self) -> dict[str, JSON]:
        return {"name": "idle"}

    def peers(self) -> list[dict[str, JSON]]:
        return []

    def health(self) -> Health:
        return Health(True, "alive")

    def readiness(self) -> Health:
        return Health(True, "ready")

    async def models(self, names: Iterable[str]) -> Sequence[ModelCard]:
        return ()

    def metrics(self) -> Sequence[Metric]:
        return ()

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        raise UnknownModel(f"there is no model {model!r}")

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[Event]]:
        with self._events.subscribe() as events:
            yield events


async def run_server() -> None:
    """Serve an idle node on a free port, print the port, stop when standard input ends."""
    async with trio.open_nursery() as nursery:
        bound: Address = await nursery.start(serve, IdleNode(), ApiConfig(Address("127.0.0.1", 0)))
        print(bound.port, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


def run_load() -> None:
    """Keep all cores busy at nice 10 until killed."""
    import numpy as np

    os.nice(10)
    a = np.ones((512, 512), np.float32)
    while True:
        np.matmul(a, a)


async def measure(address: Address) -> bool:
    """Print the rows; whether the promise holds."""
    request = f"GET /healthz HTTP/1.1\r\nhost: {address}\r\n\r\n".encode()
    print(f"{'GET /healthz':44}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'req/s':>8}")
    rows = (
        ("one connection, every 5 ms", 1, 0.005),
        (f"{CONNECTIONS} connections, each every 100 ms", CONNECTIONS, 0.1),
        (f"{CONNECTIONS} connections, full speed", CONNECTIONS, 0.0),
    )
    held = True
    for title, connections, pause in rows:
        times: list[float] = []
        started = perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(connections):
                nursery.start_soon(_ask, address, request, pause, number / connections * pause, times)
        seconds = perf_counter() - started
        times.sort()
        p50, p99, slowest = (times[int((len(times) - 1) * share)] * 1e3 for share in (0.5, 0.99, 1.0))
        print(f"{title:44}{p50:8.2f}{p99:8.2f}{slowest:8.2f}{len(times) / seconds:8.0f}")
        held &= pause == 0.0 or p99 < 10.0
    return held


async def _ask(address: Address, request: bytes, pause: float, delay: float, times: list[float]) -> None:
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await trio.sleep(delay)
        end = trio.current_time() + SECONDS
        while trio.current_time() < end:
            started = perf_counter()
            await stream.send_all(request)
            answer = b""
            while b"}" not in answer and (data := await stream.receive_some(4096)):
                answer += data
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"no health at {address}: {answer!r}")
            times.append(perf_counter() - started)
            await trio.sleep(pause)


def main() -> None:
    match sys.argv[1:]:
        case ["--server"]:
            trio.run(run_server)
        case ["--load"]:
            run_load()
        case [text]:
            sys.exit(not trio.run(measure, parse_address(text)))
        case _:
            with ExitStack() as stack:
                for role in ("--load", "--server"):
                    process = subprocess.Popen(
                        [sys.executable, __file__, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    )
                    stack.enter_context(process)
                    stack.callback(process.kill)
                assert process.stdout is not None
                port = int(process.stdout.readline())
                sys.exit(not trio.run(measure, Address("127.0.0.1", port)))


if __name__ == "__main__":
    main()
