"""A load driver for HTTP: N connections in one process, each asks, waits for the whole answer, and asks again.

Plain sockets and epoll, no HTTP library: on two cores the driver takes what it measures. Used by `serving.py` for every
server alike.
"""

from __future__ import annotations

import selectors
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Load:
    """What was seen."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    """Seconds of each answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    """Connections that the server closed or reset."""

    @property
    def rate(self) -> float:
        return len(self.times) / self.seconds

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        return 1e3 * sorted(self.times)[int((len(self.times) - 1) * share)]


class _Client:
    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.request = request
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = 0.0
        self.answer = b""

    def ask(self) -> None:
        self.answer = b""
        self.sent = perf_counter()
        self.socket.sendall(self.request)

    def status(self) -> int | None:
        """That of the answer; None until it is whole, 0 at the end of the connection."""
        data = self.socket.recv(1 << 16)
        if not data:
            return 0
        self.answer += data
        end = self.answer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.answer[:end].lower()
        at = head.index(b"content-length:") + 15
        length = int(head[at:].split(b"\r\n", 1)[0])
        return int(head[9:12]) if len(self.answer) >= end + 4 + length else None


def run_load(
    host: str,
    port: int,
    request: Callable[[int], bytes],
    *,
    connections: int,
    seconds: float,
    warm: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
) -> Load:
    """Ask for `seconds`, or until `stop()`, after `warm` seconds that do not count. `request(n)` is what connection n
    asks."""
    selector, load = selectors.DefaultSelector(), Load()
    for number in range(connections):
        client = _Client(host, port, request(number))
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.ask()
    begun = perf_counter() + warm
    end = begun + seconds
    while selector.get_map() and (now := perf_counter()) < end and not stop():
        for key, _ in selector.select(min(1.0, end - now)):
            client = key.data
            try:
                status = client.status()
            except OSError:
                status = 0
            if status is None:
                continue
            if client.sent >= begun:
                load.times.append(perf_counter() - client.sent)
                load.statuses[status] += 1
            if status == 0:
                load.broken += 1
                selector.unregister(client.socket)
                continue
            client.ask()
    load.seconds = perf_counter() - begun
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    return load


def post(path: str, body: bytes, media: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
