"""The checks of `gossipml peer doctor` that need a network: ports, reachability, members, LAN.

They dial as a member with an identity of its own, made for the moment: the handshake shows that the other side is
there and of this network, and no session is opened. Left out: whether machines outside our networks reach us. Only
they can tell; a session that another peer has dialled is the proof, and is looked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address

import trio

from gossipml.daemon.doctor_patient import Check, Patient, count, known_contacts, split
from gossipml.env import Credentials, Stream
from gossipml.env.lan import Beacons, Interface
from gossipml.errors import RemoteError, UserError
from gossipml.ids import Address, PeerId, short_peer_id
from gossipml.peer.beacon import NONCE_SIZE, Beacon, Drop, Dropped, Opened, Opener, addresses_to_announce, seal
from gossipml.peer.lan import LanConfig

DIAL_SECONDS = 3.0
SHOWN = 3  # of several failures
MAX_MEMBERS = 8  # dialled at once; one that answers would do
LISTEN_SECONDS = 2.5  # others answer within 0.3 s, unless they have just shouted
PROBES = (0.0, 1.2)
LONG_ENOUGH = 600.0  # seconds of running after which somebody should have dialled us


# Ports.


async def check_ports(patient: Patient) -> Check:
    """That the TCP and UDP port for peers and the port of the endpoint are the peer's, or can be had."""
    if patient.is_running:
        places = patient.addresses()
        if not places:
            return Check("ports", "warning", "the running peer names no address", "look at `gossipml peer logs`")
        port = places[0].port
        held = Address(patient.config.listen.host, port)
        if await _can_bind(patient, held):
            fix = "look at `gossipml peer logs`, then start it again"
            return Check("ports", "failed", f"the peer runs, but UDP port {port} is not in use", fix)
        return Check("ports", "ok", f"TCP and UDP port {port} are held by the peer")
    listen, api = patient.config.listen, patient.config.api
    try:
        await _try_ports(patient, listen, api)
    except UserError as error:
        seen, fix = split(error)
        if "in use" in seen:
            fix += f". Who has it: `ss -ltnup | grep :{api.port if str(api.port) in seen else listen.port}`"
        return Check("ports", "failed", seen, fix)
    seen = f"TCP and UDP port {listen.port or '(any)'} and TCP port {api.port or '(any)'} for the endpoint are free"
    return Check("ports", "ok", seen)


async def _try_ports(patient: Patient, listen: Address, api: Address) -> None:
    """Bind them for a moment; UserError when one cannot be had."""
    net = patient.env.net
    listener = await net.listen(listen, patient.credentials())
    try:
        socket = await net.bind_datagrams(listener.local)
        await socket.aclose()
        if api.port:
            endpoint = await net.listen(api, patient.credentials())
            await endpoint.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await listener.aclose()


async def _can_bind(patient: Patient, place: Address) -> bool:
    try:
        socket = await patient.env.net.bind_datagrams(place)
    except UserError:
        return False
    await socket.aclose()
    return True


# Reachability.


async def check_reachable(patient: Patient) -> Check:
    """That the addresses that others are told lead to our listener, and that others have come by them."""
    patient.contacts = await known_contacts(patient)
    if patient.is_running:
        return await _check_addresses(patient, patient.addresses(), patient.peer)
    try:
        listener = await patient.env.net.listen(patient.config.listen, patient.credentials())
    except UserError:
        return Check("reachable", "warning", "not tried: the port cannot be had", "mend the port first")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, _accept)
            places = patient.env.net.own_addresses(listener.local)
            check = await _check_addresses(patient, places, None)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await listener.aclose()
    return check


async def _accept(stream: Stream) -> None:
    await trio.sleep(DIAL_SECONDS)  # the dialler hangs up


async def _check_addresses(patient: Patient, places: tuple[Address, ...], expected: PeerId | None) -> Check:
    if not places:
        return Check("reachable", "warning", "there is no address to try", "look at `gossipml peer logs`")
    wrong = await _dial(patient, [(place, expected) for place in places])
    shown = ", ".join(str(place) for place in places)
    port = places[0].port
    opening = f"let TCP and UDP port {port} through the firewall: `sudo ufw allow {port}` or `sudo firewall-cmd " + (
        f"--add-port={port}/tcp --add-port={port}/udp`"
    )
    if wrong:
        fix = opening
        if any(failure.answered for failure in wrong.values()):
            fix = f"another program has that address and port: stop it, or choose another with --listen (now {port})"
        return Check("reachable", "failed", f"our own address does not lead to us: {_shown(wrong)}", fix)
    if all(place.is_loopback for place in places):
        fix = "for other machines: `gossipml peer start --listen 0.0.0.0:8711` on a machine with a network"
        return Check("reachable", "warning", f"{shown} answers, but is for this machine alone", fix)
    status = patient.status or {}
    accepted, neighbours = status.get("accepted"), status.get("neighbours", 0)
    if isinstance(accepted, int) and accepted:
        return Check("reachable", "ok", f"{shown} answers; other peers have dialled us {count(accepted, 'time')}")
    if accepted == 0 and neighbours and status.get("uptime", 0) > LONG_ENOUGH:
        seen = f"{shown} answers here, but of {count(neighbours, 'neighbour')} none has ever dialled us"
        return Check("reachable", "warning", seen, opening)
    private = all(ip_address(place.host).is_private for place in places)
    beyond = " Private addresses: from outside a forwarded port leads to them." if private else ""
    return Check("reachable", "ok", f"{shown} answers from this machine; only others can try from outside.{beyond}")


async def check_members(patient: Patient) -> Check:
    """That those whom we know, from the token and from the last run, answer."""
    own = set(patient.addresses()) | set(patient.env.net.own_addresses(patient.config.listen))
    targets: dict[Address, PeerId | None] = {}
    for contact in patient.contacts:
        if contact.addresses and contact.peer != patient.peer:
            targets.setdefault(contact.addresses[0], contact.peer)
    for place in patient.token.addresses if patient.token else ():
        if place not in own:
            targets.setdefault(place, None)
    if not targets:
        return Check("members", "ok", "no other member is known yet")
    tried = list(targets.items())[:MAX_MEMBERS]
    wrong = await _dial(patient, tried)
    seen = f"{len(tried) - len(wrong)} of {len(tried)} known members answer"
    if not wrong:
        return Check("members", "ok", seen)
    if len(wrong) < len(tried):
        return Check("members", "ok", f"{seen} ({_shown(wrong)})")
    fix = "see that one of them runs (`gossipml peer status` there) and that its firewall lets its port through"
    if all(failure.answered for failure in wrong.values()):
        fix = "ask a member for a token of the network as it is now: `gossipml token new --out FILE`"
    return Check("members", "warning", f"{seen}: {_shown(wrong)}", fix)


@dataclass(frozen=True)
class _Failure:
    why: str
    answered: bool
    """Somebody is there, but not whom we wanted."""


async def _dial(patient: Patient, targets: Iterable[tuple[Address, PeerId | None]]) -> dict[Address, _Failure]:
    """Those of the addresses that could not be reached."""
    credentials, failures = patient.credentials(), dict[Address, _Failure]()

    async def dial(place: Address, expected: PeerId | None) -> None:
        failure = await _try(patient, place, expected, credentials)
        if failure is not None:
            failures[place] = failure

    async with trio.open_nursery() as nursery:
        for place, expected in targets:
            nursery.start_soon(dial, place, expected)
    return dict(sorted(failures.items()))


async def _try(patient: Patient, place: Address, expected: PeerId | None, ours: Credentials) -> _Failure | None:
    try:
        with trio.fail_after(DIAL_SECONDS):
            stream = await patient.env.net.connect(place, expected, ours)
    except trio.TooSlowError:
        return _Failure(f"no answer within {DIAL_SECONDS:.0f} s", False)
    except OSError as error:
        return _Failure(os.strerror(error.errno).lower() if error.errno else str(error), False)
    except RemoteError as error:
        return _Failure(str(error).partition("; ")[0].removeprefix(f"{place} "), True)
    await stream.aclose()
    return None


def _shown(failures: dict[Address, _Failure]) -> str:
    return "; ".join(f"{place}: {failure.why}" for place, failure in list(failures.items())[:SHOWN])


# The local network.


@dataclass
class _Heard:
    """What came in answer to our probes."""

    interfaces: set[str] = field(default_factory=set)
    """Where our own came back."""
    peers: dict[PeerId, str] = field(default_factory=dict)
    """Others, and what people call them."""
    deaf: dict[PeerId, float] = field(default_factory=dict)
    """Those whose clock is off, and by how much."""


async def check_lan(patient: Patient) -> Check:
    """Send beacons that ask, see whether they come back, and who answers."""
    if not patient.config.lan:
        return Check("lan", "ok", "switched off (lan = false, or --no-lan)")
    status = (patient.status or {}).get("lan")
    if isinstance(status, dict) and status.get("problem"):
        seen, _, fix = str(status["problem"]).partition("; ")
        return Check("lan", "warning", seen, fix or "connect the machine to a network that allows multicast")
    beacons = await patient.env.net.bind_beacons(LanConfig().port)
    try:
        listen = patient.config.listen
        everywhere = [address for interface in beacons.interfaces() for address in interface.addresses]
        used = [i for i in beacons.interfaces() if addresses_to_announce(listen, i.addresses, everywhere)]
        if not used:
            fix = "connect the machine to a network, or listen on one of its addresses: --listen 0.0.0.0:8711"
            return Check("lan", "warning", f"no interface of this machine leads to {listen.host}", fix)
        heard = await _probe(patient, beacons, used)
    finally:
        with trio.CancelScope(shield=True):
            await beacons.aclose()
    deaf = status.get("deaf", 0) if isinstance(status, dict) else 0
    return _judge(patient, used, heard, max(deaf, len(heard.deaf)))


async def _probe(patient: Patient, beacons: Beacons, used: list[Interface]) -> _Heard:
    env, credentials = patient.env, patient.credentials()
    keys = [keys.beacon_key for keys in credentials.membership.accepted]
    opener = Opener(keys, PeerId(b""), env.clock.wall() - LISTEN_SECONDS)  # ours are to be opened, too
    own, heard = credentials.identity.peer_id, _Heard()
    sent: dict[bytes, str] = {}

    async def listen() -> None:
        while True:
            data, _ = await beacons.receive()
            opened = opener.open(data, env.clock.wall())
            if isinstance(opened, Opened) and opened.beacon.peer == own:
                heard.interfaces.add(sent[data[1 : 1 + NONCE_SIZE]])
            elif isinstance(opened, Opened):
                heard.peers[opened.beacon.peer] = opened.beacon.name
                if opened.beacon.peer != patient.peer:
                    patient.skews[opened.beacon.peer] = opened.skew
            elif isinstance(opened, Dropped) and opened.reason is Drop.SKEWED and opened.peer is not None:
                heard.deaf[opened.peer] = opened.skew

    with trio.move_on_after(LISTEN_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            begun = env.clock.now()
            for at in PROBES:
                await trio.sleep(max(0.0, begun + at - env.clock.now()))
                for interface in used:
                    nonce = env.secrets(NONCE_SIZE)
                    sent[nonce] = interface.name
                    try:
                        probe = Beacon(own, (), "", "", asks=True)
                        await beacons.send(seal(probe, keys[0], nonce, env.clock.wall()), interface)
                    except OSError:
                        continue  # not heard back, then
            await trio.sleep_forever()
    patient.skews |= heard.deaf
    return heard


def _judge(patient: Patient, used: list[Interface], heard: _Heard, deaf: int) -> Check:
    port = LanConfig().port
    opening = (
        f"let UDP port {port} through the firewall: `sudo ufw allow {port}/udp` or `sudo firewall-cmd "
        f"--add-port={port}/udp`"
    )
    names = [interface.name for interface in used]
    mute = [name for name in names if name not in heard.interfaces]
    if len(mute) == len(names):
        return Check("lan", "failed", f"our beacon on {', '.join(names)} was not heard back", opening)
    others = {peer: name for peer, name in heard.peers.items() if peer != patient.peer}
    here = "; the peer of this home is, too" if patient.peer in heard.peers else ""
    shown = ", ".join(sorted(name or short_peer_id(peer) for peer, name in others.items())[:5])
    who = f"{count(len(others), 'other peer')} heard: {shown}" if others else "no other peer heard"
    seen = f"our beacons come back on {', '.join(sorted(heard.interfaces))}; {who}{here}"
    if deaf:
        seen += f"; {count(deaf, 'peer')} more not understood, for a clock there or here is wrong"
        fix = "set the clocks of all machines by network time; `gossipml peer logs` names the peer"
        return Check("lan", "warning", seen, fix)
    if mute:
        return Check("lan", "warning", f"{seen}; not on {', '.join(mute)}", opening)
    return Check("lan", "ok", seen)
