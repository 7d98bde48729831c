"""The network interfaces of this machine, by `getifaddrs` (Linux, macOS, the BSDs): Python has no call for it.

Left out: Windows, which has another call; there is no interface there, and so no finding of peers on the LAN.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface
from typing import Any

LINUX: bool = sys.platform.startswith("linux")
UP, BROADCAST, LOOPBACK = 0x1, 0x2, 0x8  # the same in net/if.h of Linux and BSD
MULTICAST = 0x1000 if LINUX else 0x8000
MAX_INTERFACES = 32  # a host of containers has hundreds; the first ones are the machine's own


class _Entry(ctypes.Structure):
    """`struct ifaddrs`."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("broadcast", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


@dataclass
class Found:
    """An interface that is up, and how it reaches everybody on its link."""

    name: str
    index: int
    addresses: list[IPv4Interface | IPv6Interface]
    multicast: bool
    broadcasts: list[str]


def find_interfaces() -> list[Found]:
    """Interfaces that are up, have an address, and take multicast or broadcast; the loopback one always does."""
    library = _library()
    if library is None:
        return []
    first = ctypes.POINTER(_Entry)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "the interfaces of this machine cannot be read")
    try:
        return _read(first)
    finally:
        library.freeifaddrs(first)


def _library() -> Any:  # Any: a ctypes library, whose functions have no types
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.getifaddrs.restype = ctypes.c_int
        library.getifaddrs.argtypes = [ctypes.POINTER(ctypes.POINTER(_Entry))]
        library.freeifaddrs.restype = None
        library.freeifaddrs.argtypes = [ctypes.POINTER(_Entry)]
    except (OSError, TypeError, AttributeError):  # Windows
        return None
    return library


def _read(entry: Any) -> list[Found]:  # Any: a pointer of ctypes
    found: dict[str, Found] = {}
    while entry:
        item = entry.contents
        entry = item.next
        usable = item.flags & UP and item.flags & (MULTICAST | BROADCAST | LOOPBACK)
        address = _interface(item.address, item.netmask) if usable else None
        if address is None:
            continue
        name = item.name.decode(errors="replace")
        if name not in found:
            if len(found) == MAX_INTERFACES:
                continue
            try:
                index = socket.if_nametoindex(name)
            except OSError:  # it went away in between
                continue
            # Linux takes multicast on its loopback interface, though the flag says otherwise; others have the flag.
            multicast = bool(item.flags & (MULTICAST | LOOPBACK))
            found[name] = Found(name, index, [], multicast, [])
        interface = found[name]
        interface.addresses.append(address)
        if isinstance(address, IPv4Interface) and item.flags & (BROADCAST | LOOPBACK):
            broadcast = str(address.network.broadcast_address)
            if address.network.prefixlen < 31 and broadcast not in interface.broadcasts:
                interface.broadcasts.append(broadcast)
    return list(found.values())


def _interface(address: int | None, netmask: int | None) -> IPv4Interface | IPv6Interface | None:
    """The address with its network out of two `sockaddr`; None for other families."""
    if not address or not netmask:
        return None
    family = _family(address)
    if family == socket.AF_INET:
        host, mask = (ctypes.string_at(place + 4, 4) for place in (address, netmask))
        return IPv4Interface((host, _prefix(mask)))
    if family == socket.AF_INET6:
        host, mask = (ctypes.string_at(place + 8, 16) for place in (address, netmask))
        ip = IPv6Address(host)
        if ip.is_link_local:  # BSD hides the interface in the third and fourth byte
            ip = IPv6Address(host[:2] + bytes(6) + host[8:])
        return IPv6Interface((ip, _prefix(mask)))
    return None


def _family(address: int) -> int:
    if LINUX:
        return ctypes.c_ushort.from_address(address).value
    return ctypes.c_ubyte.from_address(address + 1).value  # BSD: length, then family


def _prefix(mask: bytes) -> int:
    return int.from_bytes(mask, "big").bit_count()
