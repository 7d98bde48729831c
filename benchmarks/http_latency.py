"""How long `GET /healthz` takes: alone, at a steady rate over 32 connections, 32 clients asking at full speed, and all
of them at the same moment.

    python benchmarks/http_latency.py [IP:PORT]

With an address: against that running peer, as it is. Without: against the endpoint over a node that has nothing
to do, in a process of its own, beside a process at nice 10 that multiplies matrices on all cores, as a training
worker does. The client is a third process and takes its share of the cores, so the figures are upper bounds.
The promise is the first two rows: p99 under 10 ms. The other two are throughput; their latency is the queue that they
make, and of the last one what it costs a client to read 32 answers.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter, sleep

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
        times = list[float]()
        started = perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(connections):
                nursery.start_soon(_ask, address, request, pause, number / connections * pause, times)
        p99 = _say(title, times, perf_counter() - started)
        held &= pause == 0.0 or p99 < 10.0
    started = perf_counter()
    _say(f"{CONNECTIONS} connections at once, every 100 ms", _together(address, request), perf_counter() - started)
    return held


def _say(title: str, times: list[float], seconds: float) -> float:
    """Print a row; its p99 in milliseconds."""
    times.sort()
    p50, p99, slowest = (times[int((len(times) - 1) * share)] * 1e3 for share in (0.5, 0.99, 1.0))
    print(f"{title:44}{p50:8.2f}{p99:8.2f}{slowest:8.2f}{len(times) / seconds:8.0f}", flush=True)
    return p99


def _together(address: Address, request: bytes) -> list[float]:
    """By plain sockets, the lightest client."""
    times: list[float] = []
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(address)) for _ in range(CONNECTIONS)]
        for one in sockets:
            selector.register(one, selectors.EVENT_READ)
        for _ in range(round(10 * SECONDS)):
            started = perf_counter()
            for one in sockets:
                one.sendall(request)
            left = CONNECTIONS
            while left:
                for key, _events in selector.select(10.0):
                    assert isinstance(key.fileobj, socket.socket)
                    answer = key.fileobj.recv(4096)
                    if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"}"):
                        raise SystemExit(f"no health at {address}: {answer!r}")
                    times.append(perf_counter() - started)
                    left -= 1
            sleep(max(0.0, started + 0.1 - perf_counter()))
    return times


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
