"""`Beacons` of a simulated machine: what it sends reaches all machines that `World.lan` put on the same LAN.

Each copy travels over the link between the two machines, with its delay and its losses. Left out: several
interfaces, IPv6, and several sockets on the port of one machine.
"""

from __future__ import annotations

from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

from gossipml.env.lan import Interface
from gossipml.ids import Address

if TYPE_CHECKING:
    from gossipml.env.simulated_net import Network, Process
    from gossipml.env.simulated_sockets import SimulatedDatagrams

SIMULATED_NETWORK = 8  # bits of 10.0.0.0/8, where all simulated machines are


class SimulatedBeacons:
    """`Beacons` over the simulated network."""

    def __init__(self, network: Network, process: Process, socket: SimulatedDatagrams) -> None:
        self._network = network
        self._process = process
        self._socket = socket

    def interfaces(self) -> tuple[Interface, ...]:
        machine = self._process.machine
        prefix = SIMULATED_NETWORK if machine.name in self._network.lans else 32
        return (Interface("eth0", (IPv4Interface((machine.host, prefix)),)),)

    async def send(self, data: bytes, interface: Interface) -> None:
        machine, lans = self._process.machine, self._network.lans
        lan = lans.get(machine.name)
        everybody = [name for name in lans if lans[name] == lan] if lan is not None else [machine.name]
        for name in everybody:
            await self._socket.send(data, Address(self._network.machines[name].host, self._socket.local.port))

    async def receive(self) -> tuple[bytes, Address]:
        return await self._socket.receive()

    async def aclose(self) -> None:
        await self._socket.aclose()
