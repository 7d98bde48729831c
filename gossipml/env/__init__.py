"""`Env`: the one seam between gossipml and the world.

Clock, randomness, network, disk and heavy computation are reached through an `Env` and nowhere else, so that
a whole cluster of peers runs in one process on a virtual clock, deterministic by seed, with faults
(`gossipml.env.simulated`), and on real machines (`gossipml.env.real`).

Timeouts and sleeping are trio's own (`trio.fail_after`, `trio.sleep`): under the simulated environment trio
itself runs on the virtual clock.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from gossipml.env.lan import Beacons
from gossipml.identity import Identity, Verify, verify
from gossipml.ids import Address, PeerId
from gossipml.keys import NetworkKeys
from gossipml.membership import Membership

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GOSSIP = "gossipml/1"
"""The protocol of sessions (`gossipml.peer.wire`). Another version of a protocol is refused in the handshake, not in
the middle of a message."""
SWARM = "gossipml-swarm/1"
"""The protocol by which the dialler fetches model versions from whom it dialled."""
ASK = "gossipml-ask/1"
"""The protocol by which the dialler asks for predictions (`gossipml.peer.asking_wire`)."""
PROTOCOLS = (GOSSIP, SWARM, ASK)


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds: the only time that protocols see."""

    def wall(self) -> float:
        """Seconds since 1970, as this machine believes: for records and logs alone."""


class Stream(Protocol):
    """A duplex byte stream to a peer whose id is proven."""

    peer_id: PeerId
    remote: Address
    protocol: str
    """What both sides speak on it: one of PROTOCOLS, chosen by the dialler (ALPN, RFC 7301)."""
    key_id: str
    """The generation of the network's keys by which the two proved to be members (`NetworkKeys.key_id`)."""

    async def send_all(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send all bytes of the parts in order; parts are not joined or copied as a whole.

        Raises trio.BrokenResourceError or trio.ClosedResourceError.
        """

    def post(self, *parts: bytes | bytearray | memoryview) -> bool:
        """Send something small at once, without waiting; False, and nothing is sent, when that cannot be.

        What the network has no room for yet is `unsent`: it goes with the next `send_all`, if need be one of nothing.
        """

    @property
    def unsent(self) -> bool:
        """Whether a part of what was posted has not left."""

    async def receive_into(self, view: memoryview) -> int:
        """Read at least one byte into `view`; how many, 0 at the end. Raises trio.BrokenResourceError."""

    async def serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        """Read into `target()` and call `came` with how many bytes, over and over, as long as that is True.

        Neither waits. What they raise is raised here, and what `receive_into` raises.
        """

    async def aclose(self) -> None: ...


Heard = Callable[[bytes, Address], None]
"""What is done about a datagram, at once and without waiting, and from where it came."""


class Datagrams(Protocol):
    """A bound datagram socket."""

    local: Address

    def post(self, data: bytes, to: Address) -> None:
        """Send or lose a datagram at once, without waiting for room; OSError when the network says no."""

    async def send(self, data: bytes, to: Address) -> None:
        """Send or lose a datagram; OSError when the network says no at once."""

    async def receive(self) -> tuple[bytes, Address]: ...

    async def serve(self, heard: Heard) -> None:
        """Call `heard` with each datagram, until cancelled; OSError as from `receive`."""

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Credentials:
    """What proves a peer to others: its own key and the keys of the network."""

    identity: Identity
    keys: NetworkKeys
    """Those it started with. The network id in them stays; which keys count now `membership` knows."""

    @cached_property
    def membership(self) -> Membership:
        """One for all that this peer does; it changes while the peer runs."""
        return Membership(self.keys)


Handler = Callable[[Stream], Awaitable[None]]


class Listener(Protocol):
    local: Address

    async def serve(self, handler: Handler) -> None:
        """Run `handler` for each peer that proved itself, each in a guarded task of its own, until cancelled.

        A stranger, garbage, a slow handshake and an exception of the handler end that connection alone.
        """

    async def aclose(self) -> None: ...


class Net(Protocol):
    async def bind_datagrams(self, local: Address) -> Datagrams:
        """UserError when the port is in use."""

    async def bind_beacons(self, port: int) -> Beacons:
        """What reaches everybody on the local networks; UserError when a program has the port for itself."""

    async def listen(self, local: Address, credentials: Credentials) -> Listener:
        """UserError when the port is in use."""

    def own_addresses(self, bound: Address) -> tuple[Address, ...]:
        """Where others may reach a socket bound to `bound`: itself, or each address of this machine for a
        wildcard; a loopback address only when there is no other."""

    async def connect(
        self, remote: Address, expected: PeerId | None, credentials: Credentials, protocol: str = GOSSIP
    ) -> Stream:
        """A stream to the peer at `remote` that speaks `protocol`.

        Raises OSError when nobody answers, RemoteError when the other side is no member, was revoked, or is not
        `expected`.
        The timeout is the caller's.
        """


Lock = trio.Lock
"""For code behind the seam that waits for disk and network without importing trio."""

Check = Callable[[bytes | memoryview], bool]
"""Whether a part of a file is what it should be; plain code without waiting."""


class Disk(Protocol):
    """Files under one folder, the peer's home. Paths are relative, with `/`.

    A `write` or `write_at` is lasting after `fsync` of the file, a `rename` after `fsync_folder`; see `write_atomic`.
    OSError as the system gives it (`FileNotFoundError`, ENOSPC, EROFS, EIO).
    """

    async def read(self, path: str, *, limit: int) -> bytes:
        """The whole file; OSError(EFBIG) when it is longer than `limit`."""

    async def write(self, path: str, data: bytes | memoryview, *, private: bool = False) -> None:
        """Replace the file's content; `private` gives mode 0600. Makes the folder when it is missing."""

    async def read_at(self, path: str, offset: int, size: int, *, check: Check | None = None) -> bytes:
        """A part of a file; short only at its end.

        With `check`: b"" when `check(part)` says no. It runs where the disk's work runs, off the event loop, so that
        reading and hashing cost one change of threads.
        """

    async def write_at(self, path: str, offset: int, data: bytes | memoryview, *, check: Check | None = None) -> bool:
        """Replace a part of a file; makes the file and its folder, extends it (with zeros up to `offset`).

        With `check`: False, and nothing is written, when `check(data)` says no; it runs as that of `read_at`.
        """

    async def size(self, path: str) -> int | None:
        """Bytes of a file; None when it is missing."""

    async def free(self) -> int:
        """Bytes that may still be written to the disk."""

    async def fsync(self, path: str) -> None: ...

    async def rename(self, old: str, new: str) -> None: ...

    async def fsync_folder(self, path: str) -> None: ...

    async def remove(self, path: str) -> None: ...

    async def list(self, path: str) -> list[str]:
        """Names in a folder, sorted; empty when the folder is missing."""


async def write_atomic(disk: Disk, path: str, data: bytes | memoryview, *, private: bool = False) -> None:
    """Replace a file so that after a crash at any point it holds the old or the new content, whole."""
    temporary = path + ".tmp"
    await disk.write(temporary, data, private=private)
    await disk.fsync(temporary)
    await disk.rename(temporary, path)
    await disk.fsync_folder(path.rpartition("/")[0])


class Compute(Protocol):
    async def run(self, function: Callable[[*Ts], T], *args: *Ts, cost: float = 0.0) -> T:
        """`function(*args)` off the event loop; `cost` is the virtual seconds that a simulation charges."""


@dataclass(frozen=True)
class Env:
    """The world as one peer sees it."""

    clock: Clock
    rng: random.Random
    """For choices that nobody attacks: which neighbour, how much jitter. Seeded per peer in a simulation."""
    secrets: Callable[[int], bytes]
    """That many unpredictable bytes (predictable in a simulation)."""
    net: Net
    disk: Disk
    compute: Compute
    verify: Verify = verify
    """Checks a signature; a simulation checks the same one once for all of its peers."""


async def sleep_until(clock: Clock, deadline: float) -> None:
    await trio.sleep(max(0.0, deadline - clock.now()))
