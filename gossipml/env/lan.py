"""What `Env.net` gives of the local networks: interfaces, and datagrams to everybody on them.

Types alone; `gossipml.env.real_lan` and `gossipml.env.simulated_lan` are the two implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Protocol

from gossipml.ids import Address


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and can send to everybody on its link."""

    name: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    """Ours on it, each with its network; IPv6 without scope ids."""

    @property
    def is_loopback(self) -> bool:
        return any(address.is_loopback for address in self.addresses)


class Beacons(Protocol):
    """Datagrams to and from everybody on the local networks, on one port that all peers of a machine share."""

    def interfaces(self) -> tuple[Interface, ...]:
        """What there is now. From here on we hear what arrives on them, so ask again from time to time."""

    async def send(self, data: bytes, interface: Interface) -> None:
        """To everybody on the link, ourselves too, by whatever it has of multicast and broadcast (so it may arrive
        more than once). OSError when it has taken none."""

    async def receive(self) -> tuple[bytes, Address]:
        """A datagram and its source, which anybody on the link may have forged."""

    async def aclose(self) -> None: ...
