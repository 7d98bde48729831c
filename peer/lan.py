"""The trio shell of the beacons: sends them on each interface, hears others, hands on contacts.

Never a reason for the daemon to fail: a network without multicast, a port that a program has for itself, an
interface that comes and goes are said once, and tried again. Of a flood so much is read a second and no more; the
rest is left to the kernel, which drops it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from gossipml.env import Credentials, Env, sleep_until
from gossipml.env.lan import Beacons, Interface
from gossipml.errors import UserError
from gossipml.ids import Address, Contact
from gossipml.peer.beacon import (
    NONCE_SIZE,
    Beacon,
    Drop,
    LocalNetwork,
    Opened,
    Opener,
    addresses_to_announce,
    is_near,
    seal,
)
from gossipml.peer.discovery import Discovery, DiscoveryConfig, Found

log = logging.getLogger("gossipml.lan")

BEACON_PORT = 18711  # unassigned at IANA, below the ports that systems give out by themselves


@dataclass(frozen=True)
class LanConfig:
    port: int = BEACON_PORT
    """The same for all peers."""
    look: float = 10.0
    """Seconds between looks at the interfaces: how soon a machine is found after it has changed networks (guess)."""
    retry: float = 60.0
    """Seconds until the port is tried again that another program has for itself (guess)."""
    datagrams_per_second: int = 200
    """Looked at; a LAN of a thousand peers sends 20. 200 of garbage cost 0.7 % of a core, 200 of a member 4 %
    (measured; 15,000 of garbage a second cost no more)."""
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)


class Lan:
    """Finds the peers of our network on the local networks of this machine."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        local: Address,
        on_contact: Callable[[Contact], None],
        *,
        describe: Callable[[], tuple[str, str]] = lambda: ("", ""),
        config: LanConfig | None = None,
    ) -> None:
        """`local`: where our listener is bound; `describe`: the names of our model and of ourselves, asked each
        time; `on_contact` hears of each peer again and again, as long as it is there."""
        self.config = config or LanConfig()
        self.counts: Counter[str] = Counter()
        """Beacons sent and heard, and why others were dropped."""
        self.problem = ""
        """Why nobody can be found, in a sentence; empty while all is well."""
        self._env = env
        self._clock = env.clock
        self._credentials = credentials
        self._own = credentials.identity.peer_id
        self._local = local
        self._on_contact = on_contact
        self._describe = describe
        self._discovery = Discovery(env.rng, env.clock.now(), self.config.discovery)
        self._opener = Opener((), self._own, env.clock.wall())
        self._interfaces: tuple[Interface, ...] = ()
        self._silent: dict[str, str] = {}  # interfaces that take nothing, and why
        self._earlier = trio.Event()  # a deadline has come nearer

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Shout and listen until cancelled."""
        task_status.started()
        while True:
            try:
                beacons = await self._env.net.bind_beacons(self.config.port)
            except UserError as error:
                self._say(str(error))
                await trio.sleep(self.config.retry)
                continue
            try:
                self._look(beacons)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._listen, beacons)
                    await self._shout(beacons)
            finally:
                with trio.CancelScope(shield=True):
                    await beacons.aclose()

    def peers(self) -> int:
        """How many others are heard."""
        return self._discovery.peers(self._clock.now())

    def clock_difference(self) -> float | None:
        """Seconds by which the clocks of the others are ahead of ours (median); None when nobody is heard."""
        return self._discovery.clock_difference(self._clock.now())

    def status(self) -> dict[str, object]:
        """For `GET /v1/status`."""
        return {
            "port": self.config.port,
            "interfaces": [interface.name for interface in self._interfaces if interface.name not in self._silent],
            "peers": self.peers(),
            "deaf": self._discovery.deaf(self._clock.now()),
            "clock_difference": self.clock_difference(),
            "problem": self.problem,
        }

    # Shouting.

    async def _shout(self, beacons: Beacons) -> None:
        look_at = self._clock.now() + self.config.look
        while True:
            deadline = min(self._discovery.next_deadline(), look_at)
            self._earlier = trio.Event()
            with trio.move_on_after(max(0.0, deadline - self._clock.now())):
                await self._earlier.wait()
            now = self._clock.now()
            if now >= look_at:
                look_at = now + self.config.look
                self._look(beacons)
            if self._discovery.due(now):
                await self._send(beacons)

    def _look(self, beacons: Beacons) -> None:
        """See what interfaces there are; a new address means another network, where nobody knows us."""
        before = self._networks()
        try:
            self._interfaces = beacons.interfaces()
        except OSError as error:
            log.debug("the interfaces cannot be read: %s", error)
        if not set(self._networks()) <= set(before):
            self._discovery.restart(self._clock.now())

    async def _send(self, beacons: Beacons) -> None:
        model, name = self._describe()
        asks, silent, reached = self._discovery.asks, {}, 0
        for interface in self._interfaces:
            addresses = addresses_to_announce(self._local, interface.addresses, self._networks())
            if not addresses:
                continue
            beacon = Beacon(self._own, addresses, model, name, asks)
            try:
                for key in self._keys():
                    nonce = self._env.secrets(NONCE_SIZE)
                    await beacons.send(seal(beacon, key, nonce, self._clock.wall()), interface)
                reached += 1
                self.counts["sent"] += 1
            except OSError as error:
                silent[interface.name] = error.strerror or str(error)
        for name, why in silent.items():
            if name not in self._silent:
                log.info("no beacons on %s: %s", name, why)
        self._silent = silent
        if reached:
            self._say("")
        elif silent:
            self._say("no interface takes multicast or broadcast: " + "; ".join(f"{k}: {v}" for k, v in silent.items()))
        elif self._interfaces:
            self._say(f"no interface of this machine leads to {self._local}, so there is nothing to announce")
        else:
            self._say("this machine shows no network interface that takes multicast or broadcast")

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("peers on the local network are not found: %s", problem)
        self.problem = problem

    # Hearing.

    async def _listen(self, beacons: Beacons) -> None:
        left, until = 0, -math.inf
        while True:
            data, source = await beacons.receive()
            now = self._clock.now()
            if now >= until:
                left, until = self.config.datagrams_per_second, now + 1.0
            self._hear(data, source, now)
            left -= 1
            if left <= 0:
                await sleep_until(self._clock, until)

    def _hear(self, data: bytes, source: Address, now: float) -> None:
        networks = self._networks()
        if not is_near(source.host, networks):
            self.counts[Drop.FOREIGN] += 1
            return
        self._opener.set_keys(self._keys())
        heard = self._opener.open(data, self._clock.wall())
        self.counts["heard" if isinstance(heard, Opened) else heard.reason] += 1
        before = self._discovery.next_deadline()
        for action in self._discovery.hear(heard, source.host, networks, now):
            if isinstance(action, Found):
                if not self._credentials.membership.is_revoked(action.contact.peer):
                    self._on_contact(action.contact)
            else:
                log.warning("%s", action.text)
        if self._discovery.next_deadline() < before:
            self._earlier.set()

    def _keys(self) -> list[bytes]:
        """Newest first; old and new while the token is rotated."""
        return [keys.beacon_key for keys in self._credentials.membership.accepted]

    def _networks(self) -> list[LocalNetwork]:
        return [address for interface in self._interfaces for address in interface.addresses]
