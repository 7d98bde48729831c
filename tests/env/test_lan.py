"""Beacon sockets on the interfaces of this machine, and between network namespaces: real multicast and broadcast."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_interface

import pytest
import trio

from gossipml.env import Env
from gossipml.env.interfaces import find_interfaces
from gossipml.env.lan import Interface
from gossipml.errors import UserError

pytestmark = pytest.mark.real


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_the_interfaces_are_those_that_the_system_shows() -> None:
    found = {interface.name: interface for interface in find_interfaces()}
    names = {name for _, name in socket.if_nameindex()}
    assert set(found) <= names
    loopback = next(interface for interface in found.values() if ip_interface("127.0.0.1/8") in interface.addresses)
    assert "127.255.255.255" in loopback.broadcasts or not sys.platform.startswith("linux")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        ours = probe.getsockname()[0]
        assert any(ours == str(a.ip) for interface in found.values() for a in interface.addresses)


async def test_all_who_share_the_port_hear_on_each_interface_what_one_sends(real: Env) -> None:
    port = free_port()
    a, b = await real.net.bind_beacons(port), await real.net.bind_beacons(port)
    assert any(interface.is_loopback for interface in a.interfaces())
    b.interfaces()
    for interface in a.interfaces():
        if not any(address.version == 4 for address in interface.addresses):
            continue
        data = f"by {interface.name}".encode()
        await a.send(data, interface)
        with trio.fail_after(2):
            for ears in (a, b):
                while (heard := await ears.receive())[0] != data:
                    pass
                assert any(heard[1].host == str(address.ip) for address in interface.addresses)
    await a.aclose()
    await b.aclose()


async def test_a_waiting_receiver_is_woken_when_the_socket_closes(real: Env) -> None:
    beacons = await real.net.bind_beacons(free_port())
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await beacons.receive()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await beacons.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await beacons.send(b"x", Interface("lo", ()))


async def test_what_was_not_read_stays_when_the_reader_is_cancelled(real: Env) -> None:
    beacons = await real.net.bind_beacons(free_port())
    loopback = next(interface for interface in beacons.interfaces() if interface.is_loopback)
    with trio.move_on_after(0.05):
        await beacons.receive()
    await beacons.send(b"still there", loopback)
    with trio.fail_after(2):
        assert (await beacons.receive())[0] == b"still there"
    await beacons.aclose()


async def test_a_port_that_a_program_has_for_itself_is_a_clear_error(real: Env) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as rude:
        rude.bind(("::", 0))  # both families, not shared
        port = rude.getsockname()[1]
        with pytest.raises(UserError, match=rf"UDP port {port}.*--no-lan"):
            await real.net.bind_beacons(port)


async def test_an_interface_that_is_gone_is_an_error_of_that_interface(real: Env) -> None:
    beacons = await real.net.bind_beacons(free_port())
    beacons.interfaces()
    with pytest.raises(OSError, match="gone"):
        await beacons.send(b"x", Interface("nosuch0", ()))
    await beacons.aclose()


# Two machines, as two network namespaces that a cable joins.

PEER = """
import json, sys, hashlib
from pathlib import Path
import trio
from gossipml.env import Credentials
from gossipml.env.real import real_env
from gossipml.identity import Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.peer.lan import Lan
from gossipml.token import JoinToken

async def main(name, host, network):
    env = real_env(Path("/nonexistent"))
    token = JoinToken(b"n" * 16, hashlib.sha256(network.encode()).digest(), 0, ())
    credentials = Credentials(Identity(hashlib.sha256(name.encode()).digest()), NetworkKeys.from_token(token))
    listener = await env.net.listen(Address(host, 0), credentials)
    met = set()

    async def accept(stream):
        await trio.sleep(0.1)

    async def dial(contact):
        for address in contact.addresses:
            stream = await env.net.connect(address, contact.peer, credentials)
            print(json.dumps({"met": contact.name, "at": address.host}), flush=True)
            await stream.aclose()

    def on_contact(contact):
        if contact.peer not in met:
            met.add(contact.peer)
            nursery.start_soon(dial, contact)

    lan = Lan(env, credentials, listener.local, on_contact, describe=lambda: ("", name))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, accept)
        nursery.start_soon(lan.run)
        await trio.to_thread.run_sync(sys.stdin.read)
        print(json.dumps({"status": lan.status(), "counts": lan.counts}), flush=True)
        nursery.cancel_scope.cancel()

trio.run(main, *sys.argv[1:])
"""


@dataclass
class Cable:
    """Two namespaces joined by a pair of virtual Ethernet devices."""

    names: tuple[str, str]
    devices: tuple[str, str]

    def ip(self, side: int, *arguments: str) -> None:
        ip("-n", self.names[side], *arguments)

    @contextlib.contextmanager
    def peer(self, side: int, host: str, network: str = "ours") -> Iterator[Peer]:
        command = [
            "ip",
            "netns",
            "exec",
            self.names[side],
            sys.executable,
            "-P",
            "-c",
            PEER,
            f"peer{side}",
            host,
            network,
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield Peer(process)
            finally:
                process.kill()


@dataclass
class Peer:
    process: subprocess.Popen[str]

    def says(self, seconds: float = 20) -> dict[str, object]:
        """Its next line."""
        assert self.process.stdout is not None
        late = threading.Timer(seconds, self.process.kill)
        late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        assert line, f"it said nothing within {seconds} s"
        told: dict[str, object] = json.loads(line)
        return told

    def stop(self) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.says()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@pytest.fixture
def cable() -> Iterator[Cable]:
    mark = uuid.uuid4().hex[:6]
    names = (f"gml{mark}a", f"gml{mark}b")
    devices = (f"gv{mark}a", f"gv{mark}b")
    made = []
    try:
        if shutil.which("ip") is None:
            pytest.skip("no `ip` command: network namespaces are Linux's")
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip(
                "link",
                "add",
                devices[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                devices[1],
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here (as root they can): {error.stderr.decode().strip()}")
        for name, device in zip(names, devices, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        yield Cable(names, devices)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


def with_both(cable: Cable) -> None:
    for side in (0, 1):
        cable.ip(side, "addr", "add", f"10.77.0.{side + 1}/24", "dev", cable.devices[side])
        cable.ip(side, "addr", "add", f"fd77::{side + 1}/64", "dev", cable.devices[side], "nodad")


def with_ipv6_alone(cable: Cable) -> None:
    for side in (0, 1):
        cable.ip(side, "addr", "add", f"fd77::{side + 1}/64", "dev", cable.devices[side], "nodad")


def with_broadcast_alone(cable: Cable) -> None:
    with_both(cable)
    for side in (0, 1):
        cable.ip(side, "link", "set", cable.devices[side], "multicast", "off")


@pytest.mark.parametrize(
    ("prepare", "host", "place"),
    [
        (with_both, "::", "10.77.0.{}"),
        (with_both, "0.0.0.0", "10.77.0.{}"),
        (with_ipv6_alone, "::", "fd77::{}"),
        (with_broadcast_alone, "0.0.0.0", "10.77.0.{}"),
    ],
    ids=["both families", "ipv4", "ipv6 alone", "broadcast alone"],
)
def test_two_machines_on_a_cable_find_each_other(
    cable: Cable, prepare: Callable[[Cable], None], host: str, place: str
) -> None:
    prepare(cable)
    with cable.peer(0, host) as a, cable.peer(1, host) as b:
        assert a.says() == {"met": "peer1", "at": place.format(2)}
        assert b.says() == {"met": "peer0", "at": place.format(1)}


def test_peers_of_two_networks_on_one_cable_do_not_meet(cable: Cable) -> None:
    with_both(cable)
    with cable.peer(0, "0.0.0.0") as a, cable.peer(1, "0.0.0.0", "theirs") as b:
        with contextlib.suppress(subprocess.TimeoutExpired):
            a.process.wait(3)
        for peer in (a, b):
            told = peer.stop()
            assert "met" not in told
            counts, status = told["counts"], told["status"]
            assert isinstance(counts, dict) and isinstance(status, dict)
            assert counts["unauthentic"] > 0, "it was heard and not understood"
            assert status["peers"] == 0


def test_machines_of_two_networks_behind_a_router_do_not_hear_each_other(cable: Cable) -> None:
    """Addresses of different subnets on one cable: the source is on no network of ours, so nothing is opened."""
    for side in (0, 1):
        cable.ip(side, "addr", "add", f"10.77.{side}.1/24", "dev", cable.devices[side])
        cable.ip(side, "route", "add", f"10.77.{1 - side}.0/24", "dev", cable.devices[side])
    with cable.peer(0, "0.0.0.0") as a, cable.peer(1, "0.0.0.0"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            a.process.wait(3)
        told = a.stop()
        assert "met" not in told
        counts = told["counts"]
        assert isinstance(counts, dict)
        assert counts.get("foreign", 0) > 0
