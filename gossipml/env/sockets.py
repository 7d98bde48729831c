"""UDP sockets for `Env.net`, and what IPv4 and IPv6 sockets need to look alike.

An IPv6 wildcard socket takes IPv4 too (dual stack); addresses are always shown as what they are, never as
IPv4-mapped. Left out: IPv6 link-local addresses, which mean nothing without an interface.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket as stdlib_socket
from typing import Any

import trio

from gossipml.env import Heard
from gossipml.errors import UserError
from gossipml.ids import Address

MAX_DATAGRAM = 2048  # ours are at most 1,232 bytes; what is longer may be cut, it is refused anyway
RECEIVE_BUFFER = 1 << 20  # a burst of about 500 datagrams, counted as the kernel counts, while the loop is busy
PROBE_V4 = ("192.0.2.1", 9)  # RFC 5737 and RFC 3849: documentation addresses; nothing is sent there
PROBE_V6 = ("2001:db8::1", 9)
ERROR_PAUSE = 0.05  # seconds after an error of receive: an error that stays must not spin
AT_ONCE = 16  # datagrams read before other tasks have a turn


def from_sockaddr(sockaddr: Any) -> Address:  # Any: a tuple of 2 (IPv4) or 4 (IPv6) elements
    """The address in what the socket module gives."""
    if len(sockaddr) == 2:  # IPv4: the kernel writes it as we do
        return Address(*sockaddr)
    host = str(sockaddr[0]).partition("%")[0]
    ip = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Address(str(ip), int(sockaddr[1]))


def to_sockaddr(address: Address, family: int) -> tuple[str, int]:
    """What a socket of `family` calls the address; OSError when it cannot reach it."""
    is_v6 = ":" in address.host
    if family == stdlib_socket.AF_INET6:
        return (address.host if is_v6 else f"::ffff:{address.host}", address.port)
    if is_v6:
        raise OSError(errno.EAFNOSUPPORT, f"an IPv4 socket cannot reach {address}")
    return (address.host, address.port)


async def bound_socket(local: Address, kind: stdlib_socket.SocketKind) -> trio.socket.SocketType:
    """A socket bound to `local`; UserError when the port or the address cannot be had."""
    is_tcp = kind == stdlib_socket.SOCK_STREAM
    family = stdlib_socket.AF_INET6 if ":" in local.host else stdlib_socket.AF_INET
    try:
        socket = trio.socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"cannot use {local}: {error.strerror}; listen on an IPv4 address instead") from error
    try:
        if family == stdlib_socket.AF_INET6:
            v6_only = 0 if local.host == "::" else 1
            socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, v6_only)
        if is_tcp and hasattr(stdlib_socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where REUSEADDR means stealing
            socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_EXCLUSIVEADDRUSE, 1)
        elif is_tcp:
            socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)  # past TIME_WAIT
        await socket.bind((local.host, local.port))
    except OSError as error:
        socket.close()
        raise UserError(why_not(error, local, "TCP" if is_tcp else "UDP")) from error
    except BaseException:
        socket.close()
        raise
    return socket


def why_not(error: OSError, local: Address, protocol: str) -> str:
    """Why a socket could not be bound, and what to do about it."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"{protocol} port {local.port} on {local.host} is in use; stop the program that has it, or choose "
            f"another with --listen {Address(local.host, 0)} (0 takes any free one)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{local.host} is no address of this machine; use one of its own, or 0.0.0.0 for all"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{protocol} port {local.port} is not allowed to this user; choose one above 1023"
    return f"cannot listen on {local}: {error.strerror or error}"


def own_addresses(bound: Address) -> tuple[Address, ...]:
    """Where others may reach a socket bound to `bound`; loopback only when there is nothing else."""
    if bound.host not in ("0.0.0.0", "::"):
        return (bound,)
    probes = [(stdlib_socket.AF_INET, PROBE_V4)]
    if bound.host == "::":
        probes.insert(0, (stdlib_socket.AF_INET6, PROBE_V6))
    found: list[Address] = []
    for family, probe in probes:
        # connect() on a UDP socket sends nothing: it asks the routing table which address would be ours.
        with contextlib.suppress(OSError), stdlib_socket.socket(family, stdlib_socket.SOCK_DGRAM) as socket:
            socket.connect(probe)
            host = from_sockaddr(socket.getsockname()).host
            ip = ipaddress.ip_address(host)
            if not (ip.is_link_local or ip.is_loopback or ip.is_unspecified):
                found.append(Address(host, bound.port))
    return tuple(found) or (Address("127.0.0.1", bound.port),)


class RealDatagrams:
    """`Datagrams` over a bound UDP socket, which it takes over.

    A plain non-blocking socket and not trio's: a DHT node sends and receives thousands of small datagrams, and each
    of trio's calls is a turn of the scheduler.
    """

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self.local = from_sockaddr(socket.getsockname())
        self._socket = stdlib_socket.socket(socket.family, socket.type, socket.proto, fileno=socket.detach())
        self._socket.setblocking(False)
        self._family = self._socket.family
        self._at_once = 0
        self._closed = False
        with contextlib.suppress(OSError):
            self._socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, RECEIVE_BUFFER)

    def post(self, data: bytes, to: Address) -> None:
        self._socket.sendto(data, to_sockaddr(to, self._family))

    async def send(self, data: bytes, to: Address) -> None:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.post(data, to)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def receive(self) -> tuple[bytes, Address]:
        while True:
            try:
                data, sender = self._socket.recvfrom(MAX_DATAGRAM)
            except BlockingIOError:
                self._at_once = 0
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except OSError:
                # An ICMP error for something that we sent (ECONNREFUSED, WSAECONNRESET), a network that went
                # down, a datagram longer than the buffer on Windows: none of them is about the next datagram.
                if self._closed:
                    raise trio.ClosedResourceError("this socket is closed") from None
                await trio.sleep(ERROR_PAUSE)
                continue
            self._at_once += 1
            if self._at_once % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            return data, from_sockaddr(sender)

    async def serve(self, heard: Heard) -> None:
        while True:
            heard(*await self.receive())

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()
