"""The world as it is: `real_env` gives the `Env` of a daemon on this machine."""

from __future__ import annotations

import functools
import os
import random
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from gossipml.env import GOSSIP, Check, Credentials, Env, files
from gossipml.env.connections import HandshakeLimits, TlsListener, connect, listen
from gossipml.env.paths import checked_path
from gossipml.env.real_lan import RealBeacons, bind_beacons
from gossipml.env.sockets import RealDatagrams, bound_socket, own_addresses
from gossipml.env.tls import RECEIVE_BYTES, Contexts, TlsStream
from gossipml.ids import Address, PeerId

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DISK_THREADS = 4  # enough to keep a disk busy; a limiter of its own, so that slow disks delay nothing else


def real_env(home: Path, *, seed: int | None = None, limits: HandshakeLimits | None = None) -> Env:
    """Real clock, sockets, threads, and the disk under `home`. `seed` is for repeatable choices of neighbours."""
    return Env(
        clock=RealClock(),
        rng=random.Random(seed),
        secrets=secrets.token_bytes,
        net=RealNet(limits or HandshakeLimits()),
        disk=RealDisk(home),
        compute=RealCompute(),
    )


class RealClock:
    """`Clock` of this machine."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class RealNet:
    """`Net` over UDP, and over TCP with mutual TLS."""

    def __init__(self, limits: HandshakeLimits) -> None:
        self._limits = limits
        self._buffer = bytearray(RECEIVE_BYTES)  # one for all streams; see gossipml.env.tls
        self._contexts: Contexts | None = None

    async def bind_datagrams(self, local: Address) -> RealDatagrams:
        return RealDatagrams(await bound_socket(local, socket.SOCK_DGRAM))

    async def bind_beacons(self, port: int) -> RealBeacons:
        await trio.lowlevel.checkpoint()
        return bind_beacons(port)

    async def listen(self, local: Address, credentials: Credentials) -> TlsListener:
        return await listen(local, credentials, self._limits, self._buffer)

    def own_addresses(self, bound: Address) -> tuple[Address, ...]:
        return own_addresses(bound)

    async def connect(
        self, remote: Address, expected: PeerId | None, credentials: Credentials, protocol: str = GOSSIP
    ) -> TlsStream:
        if self._contexts is None or self._contexts.credentials.membership is not credentials.membership:
            self._contexts = Contexts(credentials)  # one for all dials of a peer
        return await connect(remote, expected, protocol, self._contexts, self._buffer)


class RealDisk:
    """`Disk` under one folder, through threads."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._limiter = trio.CapacityLimiter(DISK_THREADS)

    async def read(self, path: str, *, limit: int) -> bytes:
        return await self._run(functools.partial(files.read, self._path(path), limit=limit))

    async def write(self, path: str, data: bytes | memoryview, *, private: bool = False) -> None:
        await self._run(functools.partial(files.write, self._path(path), data, private=private))

    async def read_at(self, path: str, offset: int, size: int, *, check: Check | None = None) -> bytes:
        return await self._run(files.read_at, self._path(path), offset, size, check)

    async def write_at(self, path: str, offset: int, data: bytes | memoryview, *, check: Check | None = None) -> bool:
        return await self._run(files.write_at, self._path(path), offset, data, check)

    async def size(self, path: str) -> int | None:
        return await self._run(files.size, self._path(path))

    async def free(self) -> int:
        return await self._run(files.free, self._home)

    async def fsync(self, path: str) -> None:
        await self._run(files.fsync, self._path(path))

    async def rename(self, old: str, new: str) -> None:
        await self._run(os.replace, self._path(old), self._path(new))

    async def fsync_folder(self, path: str) -> None:
        await self._run(files.fsync_folder, self._home / checked_path(path, folder=True))

    async def remove(self, path: str) -> None:
        await self._run(os.unlink, self._path(path))

    async def list(self, path: str) -> list[str]:
        return await self._run(files.list_folder, self._home / checked_path(path, folder=True))

    def _path(self, path: str) -> Path:
        return self._home / checked_path(path)

    async def _run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)


class RealCompute:
    """`Compute` in threads, as many as there are cores."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(max(1, os.cpu_count() or 1))

    async def run(self, function: Callable[[*Ts], T], *args: *Ts, cost: float = 0.0) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)
