"""A handshake and a 100 MB update between two processes, over our stream and over a plain blocking TLS socket.

    python benchmarks/transport.py [--runs 5] [--megabytes 100]

Both use the same certificates, on loopback, in turns in the same run. The update is a float32 vector that the
sender has in memory and the receiver reads into a buffer made before; it is over when the receiver's answer of
one byte is back. A handshake is TCP, mutual TLS 1.3 and one byte there and back, because a client's own
handshake ends before the server has judged its certificate. Takes some seconds; bounded by TIME_LIMIT.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import trio

from gossipml.env import Credentials, Stream
from gossipml.env.real import real_env
from gossipml.env.tls import tls_context
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken

TIME_LIMIT = 120
HANDSHAKES = 30
KEYS = NetworkKeys.from_token(JoinToken(b"n" * 16, b"c" * 32, 0, ()))
SERVER, CLIENT = Credentials(Identity(b"s" * 32), KEYS), Credentials(Identity(b"c" * 32), KEYS)
LOOPBACK = Address("127.0.0.1", 0)

# What one connection does: one byte there and back, then updates, each answered with its checksum.


async def receive_exactly(stream: Stream, view: memoryview) -> bool:
    while view:
        count = await stream.receive_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


async def serve_ours(size: int) -> None:
    update = memoryview(bytearray(size))  # one sender at a time

    async def handler(stream: Stream) -> None:
        await receive_exactly(stream, memoryview(bytearray(1)))
        await stream.send_all(b"!")
        while await receive_exactly(stream, update):
            await stream.send_all(b"!")
            await stream.send_all(zlib.crc32(update).to_bytes(4))

    with TemporaryDirectory() as home:
        listener = await real_env(Path(home)).net.listen(LOOPBACK, SERVER)
        print(listener.local.port, flush=True)
        await listener.serve(handler)


def receive_exactly_raw(sock: ssl.SSLSocket, view: memoryview) -> bool:
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def serve_raw(size: int) -> None:
    context = tls_context(SERVER, server=True)
    update = memoryview(bytearray(size))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            plain, _ = server.accept()
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(plain, server_side=True) as sock:
                receive_exactly_raw(sock, memoryview(bytearray(1)))
                sock.sendall(b"!")
                while receive_exactly_raw(sock, update):
                    sock.sendall(b"!")
                    sock.sendall(zlib.crc32(update).to_bytes(4))


class Figures:
    """Seconds of each handshake and each update of one kind of transport."""

    def __init__(self) -> None:
        self.handshakes: list[float] = []
        self.updates: list[float] = []


async def measure_ours(port: int, update: memoryview, checksum: int, figures: Figures, handshakes: int) -> None:
    with TemporaryDirectory() as home:
        env = real_env(Path(home))
        byte, answer = memoryview(bytearray(1)), bytearray(4)
        for number in range(handshakes):
            started = time.perf_counter()
            stream = await env.net.connect(Address("127.0.0.1", port), SERVER.identity.peer_id, CLIENT)
            await stream.send_all(b"?")
            await receive_exactly(stream, byte)
            figures.handshakes.append(time.perf_counter() - started)
            if number == handshakes - 1:
                started = time.perf_counter()
                await stream.send_all(update)
                await receive_exactly(stream, byte)
                figures.updates.append(time.perf_counter() - started)
                await receive_exactly(stream, memoryview(answer))
                if int.from_bytes(answer) != checksum:
                    raise SystemExit("the update arrived changed")
            await stream.aclose()


def measure_raw(port: int, update: memoryview, checksum: int, figures: Figures, handshakes: int) -> None:
    context = tls_context(CLIENT, server=False)
    byte, answer = memoryview(bytearray(1)), bytearray(4)
    for number in range(handshakes):
        started = time.perf_counter()
        plain = socket.create_connection(("127.0.0.1", port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain) as sock:
            sock.sendall(b"?")
            receive_exactly_raw(sock, byte)
            figures.handshakes.append(time.perf_counter() - started)
            if number == handshakes - 1:
                started = time.perf_counter()
                sock.sendall(update)
                receive_exactly_raw(sock, byte)
                figures.updates.append(time.perf_counter() - started)
                receive_exactly_raw(sock, memoryview(answer))
                if int.from_bytes(answer) != checksum:
                    raise SystemExit("the update arrived changed")


def start_server(kind: str, size: int) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, __file__, "--serve", kind, "--size", str(size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def report(ours: Figures, raw: Figures, megabytes: float) -> None:
    print(f"{'median of':<28}{'ours':>12}{'raw TLS':>12}{'ratio':>8}")
    a, b = (1000 * statistics.median(figures.handshakes) for figures in (ours, raw))
    print(f"{f'{len(ours.handshakes)} handshakes, ms':<28}{a:>12.2f}{b:>12.2f}{a / b:>8.2f}")
    a, b = (1000 * statistics.median(figures.updates) for figures in (ours, raw))
    print(f"{f'{len(ours.updates)} updates of {megabytes:g} MB, ms':<28}{a:>12.1f}{b:>12.1f}{a / b:>8.2f}")
    a, b = 1000 * megabytes / a, 1000 * megabytes / b
    print(f"{'the same in MB/s':<28}{a:>12.0f}{b:>12.0f}{a / b:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--serve", choices=["ours", "raw"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve == "ours":
        trio.run(serve_ours, arguments.size)
    elif arguments.serve == "raw":
        serve_raw(arguments.size)
    else:
        values = np.random.default_rng(1).standard_normal(int(arguments.megabytes * 1e6 / 4), dtype=np.float32)
        update = memoryview(values.data).cast("B")
        checksum = zlib.crc32(update)
        ours, raw = Figures(), Figures()
        servers = [start_server(kind, len(update)) for kind in ("ours", "raw")]
        try:
            per_run = max(1, HANDSHAKES // arguments.runs)
            started = time.monotonic()
            for _ in range(arguments.runs):
                trio.run(measure_ours, servers[0][1], update, checksum, ours, per_run)
                measure_raw(servers[1][1], update, checksum, raw, per_run)
                if time.monotonic() - started > TIME_LIMIT:
                    print(f"stopped after {TIME_LIMIT} s; the medians are over fewer runs")
                    break
            report(ours, raw, arguments.megabytes)
        finally:
            for process, _ in servers:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
