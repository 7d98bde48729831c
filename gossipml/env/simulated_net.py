"""The simulated machines and what lies between them: links, partitions, pauses, and the way of a datagram.

Addresses are data only. Left out: packets (a chunk of a stream arrives whole, after its losses are repaired),
congestion control, the connection time-out of TCP (a partition stalls a stream until it heals, however long
it lasts).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gossipml.env.link import LOCAL, REORDER_SECONDS, Link, stream_delay
from gossipml.env.virtual_time import VirtualTime
from gossipml.errors import UserError
from gossipml.ids import Address

if TYPE_CHECKING:
    from gossipml.env.simulated_disk import SimulatedDisk
    from gossipml.env.simulated_sockets import SimulatedDatagrams, SimulatedListener
    from gossipml.env.simulated_stream import SimulatedStream

FIRST_EPHEMERAL_PORT = 40000

Record = Callable[[str, str, str, bytes], None]
"""What happened, from, to, the content."""


class Process:
    """One life of a machine's process, from boot to crash: what ends with it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.alive = True
        self.sockets: dict[int, SimulatedDatagrams] = {}
        self.listeners: dict[int, SimulatedListener] = {}
        self.streams: dict[SimulatedStream, None] = {}  # a dict, because a set has no order of its own

    def free_port(self, port: int, taken: Mapping[int, object], what: str) -> int:
        if port == 0:
            self.machine.next_port += 1
            return self.machine.next_port
        if port in taken:
            raise UserError(f"{what} port {port} is in use on {self.machine.name}; choose another, or 0 for any")
        return port


class Machine:
    """A place in the network: it outlives the processes that run on it, and so does its disk."""

    def __init__(self, name: str, host: str, disk: SimulatedDisk) -> None:
        self.name = name
        self.host = host
        self.disk = disk
        self.boots = 0
        self.next_port = FIRST_EPHEMERAL_PORT
        self.powered = True
        self.paused = False
        self.process: Process | None = None
        self.held: list[Callable[[], None]] = []  # what waits for the end of a pause


class Network:
    """The machines and what lies between them."""

    def __init__(self, time: VirtualTime, rng: random.Random, record: Record, link: Link) -> None:
        self.time = time
        self.rng = rng
        self.record = record
        self.link = link
        self.links: dict[tuple[str, str], Link] = {}
        self.machines: dict[str, Machine] = {}
        self.by_host: dict[str, Machine] = {}
        self.group: dict[str, int] = {}
        self.parted = False
        self.lans: dict[str, int] = {}  # name of a machine -> its local network
        self.stalled: list[Callable[[], None]] = []  # pieces of streams that wait for a partition to heal
        self._busy_until: dict[tuple[str, str], float] = {}

    # What lies between two machines.

    def between(self, source: Machine, target: Machine) -> Link:
        if source is target:
            return LOCAL
        return self.links.get((source.name, target.name), self.link) if self.links else self.link

    def reachable(self, source: Machine, target: Machine) -> bool:
        if self.parted and source is not target:
            group = self.group
            return group.get(source.name, -1) == group.get(target.name, -1)
        return True

    def departure(self, source: Machine, target: Machine, link: Link, size: int) -> float:
        """When the last byte of a message of `size` leaves a link of limited bandwidth."""
        now = self.time.now()
        if link.bandwidth == math.inf:
            return now
        key = (source.name, target.name)
        leaves = max(now, self._busy_until.get(key, 0.0)) + size / link.bandwidth
        self._busy_until[key] = leaves
        return leaves

    def stream_arrival(self, source: Machine, target: Machine, size: int) -> float:
        link = self.between(source, target)
        return self.departure(source, target, link, size) + stream_delay(link, self.rng)

    def machine_at(self, source: Machine, address: Address) -> Machine | None:
        if address.host in ("127.0.0.1", "::1"):
            return source
        return self.by_host.get(address.host)

    def release_stalled(self) -> None:
        stalled, self.stalled = self.stalled, []
        for arrive in stalled:
            arrive()

    # Datagrams.

    def send_datagram(self, source: Process, data: bytes, local: Address, to: Address) -> None:
        machine = source.machine
        if not source.alive:
            return
        if machine.paused:
            machine.held.append(lambda: self.send_datagram(source, data, local, to))
            return
        target = self.machine_at(machine, to)
        if target is None:
            self.record("udp-nowhere", machine.name, to.host, data)
            return
        link, rng = self.between(machine, target), self.rng
        if link.loss and rng.random() < link.loss:
            self.record("udp-lost", machine.name, target.name, data)
            return
        leaves = self.departure(machine, target, link, len(data))
        copies = 2 if link.duplicate and rng.random() < link.duplicate else 1
        for _ in range(copies):
            arrival = leaves + link.delay(rng)
            if link.reorder and rng.random() < link.reorder:
                arrival += REORDER_SECONDS * rng.random()
            self.time.call_at(arrival, self._datagram_arrives, machine, target, to.port, data, local)

    def _datagram_arrives(self, source: Machine, target: Machine, port: int, data: bytes, sender: Address) -> None:
        if target.paused:
            target.held.append(lambda: self._datagram_arrives(source, target, port, data, sender))
            return
        process = target.process
        socket = process.sockets.get(port) if process is not None else None
        if socket is None or not self.reachable(source, target):
            self.record("udp-lost", source.name, target.name, data)
        elif socket.deliver(data, sender):
            self.record("udp", source.name, target.name, data)
        else:
            self.record("udp-overflow", source.name, target.name, data)
