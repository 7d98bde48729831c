"""`Beacons` over UDP: IPv4 and IPv6 multicast, and IPv4 broadcast, on each interface.

Both groups stay on the link: RFC 2365's local scope with a TTL of 1, and ff12, link-local scope (RFC 4291). The
port is shared (SO_REUSEADDR): each socket bound to it gets its own copy of what is sent to a group or to all, so
several peers of a machine, also of several users, hear each other and what comes from outside.
"""

from __future__ import annotations

import contextlib
import errno
import socket as stdlib_socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Interface

import trio

from gossipml.env.interfaces import Found, find_interfaces
from gossipml.env.lan import Interface
from gossipml.env.sockets import ERROR_PAUSE, MAX_DATAGRAM, from_sockaddr
from gossipml.errors import UserError
from gossipml.ids import Address

GROUP_V4 = "239.255.71.77"
GROUP_V6 = "ff12::676d:6c62"
_Scoped = tuple[str, int, int, int]  # host, port, flow, interface

RECEIVE_BUFFER = 1 << 16  # a flood is dropped by the kernel, not kept for later


def bind_beacons(port: int) -> RealBeacons:
    """UserError when neither IPv4 nor IPv6 gives a socket on the port."""
    sockets, problem = [], None
    for family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6):
        try:
            sockets.append(_bound(family, port))
        except OSError as error:  # no IPv6 on this machine, or a program that does not share the port
            problem = problem or error
    if not sockets:
        reason = problem.strerror if problem is not None else "no sockets"
        raise UserError(
            f"cannot use UDP port {port} for finding peers on the local network ({reason}); stop the program that has "
            "it, or do without: --no-lan"
        )
    return RealBeacons(sockets, port)


def _bound(family: int, port: int) -> stdlib_socket.socket:
    socket = stdlib_socket.socket(family, stdlib_socket.SOCK_DGRAM)
    try:
        socket.setblocking(False)
        socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        if not sys.platform.startswith("linux") and hasattr(stdlib_socket, "SO_REUSEPORT"):
            # BSD wants this one for sharing; Linux would share with the same user alone.
            socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
        socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, RECEIVE_BUFFER)
        if family == stdlib_socket.AF_INET:
            socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_BROADCAST, 1)
            socket.setsockopt(stdlib_socket.IPPROTO_IP, stdlib_socket.IP_MULTICAST_TTL, 1)
            socket.setsockopt(stdlib_socket.IPPROTO_IP, stdlib_socket.IP_MULTICAST_LOOP, 1)
            socket.bind(("", port))
        else:
            socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
            socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_MULTICAST_HOPS, 1)
            socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_MULTICAST_LOOP, 1)
            socket.bind(("::", port))
    except BaseException:
        socket.close()
        raise
    return socket


class RealBeacons:
    """`Beacons` of this machine."""

    def __init__(self, sockets: list[stdlib_socket.socket], port: int) -> None:
        self._sockets = sockets
        self._port = port
        self._found: dict[str, Found] = {}
        self._joined: set[tuple[int, str]] = set()  # interface index and our address there, or "" for IPv6
        self._closed = False

    def interfaces(self) -> tuple[Interface, ...]:
        self._found = {found.name: found for found in find_interfaces()}
        present: set[tuple[int, str]] = set()
        for found in self._found.values():
            for address in found.addresses:
                is_v4 = isinstance(address, IPv4Interface)
                present.add((found.index, str(address.ip) if is_v4 else ""))
        for index, host in sorted(present - self._joined):
            self._join(index, host)
        self._joined = present  # what went away may come back, and is joined anew then
        return tuple(Interface(found.name, tuple(found.addresses)) for found in self._found.values())

    def _join(self, index: int, host: str) -> None:
        for socket in self._sockets:
            # EADDRINUSE: joined already, by another address of the same interface. Others (an interface that takes
            # no multicast, ENOBUFS beyond 20 groups): broadcasts are heard all the same.
            with contextlib.suppress(OSError):
                if host and socket.family == stdlib_socket.AF_INET:
                    request = stdlib_socket.inet_aton(GROUP_V4) + stdlib_socket.inet_aton(host)
                    socket.setsockopt(stdlib_socket.IPPROTO_IP, stdlib_socket.IP_ADD_MEMBERSHIP, request)
                elif not host and socket.family == stdlib_socket.AF_INET6:
                    request = stdlib_socket.inet_pton(stdlib_socket.AF_INET6, GROUP_V6) + struct.pack("@I", index)
                    socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_JOIN_GROUP, request)

    async def send(self, data: bytes, interface: Interface) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        found = self._found.get(interface.name)
        if found is None:
            raise OSError(errno.ENETDOWN, f"{interface.name} is gone")
        problem = OSError(errno.ENETUNREACH, f"{interface.name} takes neither multicast nor broadcast")
        taken = 0
        for socket, source, target in self._ways(found):
            try:
                if source:
                    socket.setsockopt(stdlib_socket.IPPROTO_IP, stdlib_socket.IP_MULTICAST_IF, source)
                socket.sendto(data, target)
                taken += 1
            except OSError as error:  # no route, a link that is just going down, a full queue
                problem = error
        if not taken:
            raise problem

    def _ways(self, found: Found) -> Iterator[tuple[stdlib_socket.socket, bytes, tuple[str, int] | _Scoped]]:
        """Socket, our IPv4 address where multicast must be told the interface, and where to send."""
        for socket in self._sockets:
            mine = [str(address.ip) for address in found.addresses if address.version == 4]
            if socket.family == stdlib_socket.AF_INET:
                if found.multicast and mine:
                    yield socket, stdlib_socket.inet_aton(mine[0]), (GROUP_V4, self._port)
                for broadcast in found.broadcasts:
                    yield socket, b"", (broadcast, self._port)
            elif found.multicast and len(mine) < len(found.addresses):
                yield socket, b"", (GROUP_V6, self._port, 0, found.index)

    async def receive(self) -> tuple[bytes, Address]:
        await trio.lowlevel.checkpoint()
        while True:
            for socket in self._sockets:
                if self._closed:
                    raise trio.ClosedResourceError
                try:
                    data, sender = socket.recvfrom(MAX_DATAGRAM)
                    return data, from_sockaddr(sender)
                except BlockingIOError:
                    continue
                except OSError:  # a network that went down, or what we sent was refused: not about the next datagram
                    await trio.sleep(ERROR_PAUSE)
            await self._readable()

    async def _readable(self) -> None:
        """Return when one of the sockets has something. Nothing is read here, so nothing is lost by cancelling."""
        async with trio.open_nursery() as nursery:

            async def wait(socket: stdlib_socket.socket) -> None:
                try:
                    await trio.lowlevel.wait_readable(socket)
                except trio.ClosedResourceError:
                    pass  # said by `receive`
                nursery.cancel_scope.cancel()

            for socket in self._sockets:
                nursery.start_soon(wait, socket)

    async def aclose(self) -> None:
        self._closed = True
        for socket in self._sockets:
            trio.lowlevel.notify_closing(socket)
            socket.close()
        await trio.lowlevel.checkpoint()
