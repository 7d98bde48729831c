"""Whole clusters in one process on virtual time, the same for the same seed, with faults.

    async def scenario(world: World) -> None:
        alice, bob = world.env("alice"), world.env("bob")
        ...

    run_simulation(scenario, seed=1)

Every random choice comes from a generator derived from the seed and a name, so two runs give identical traces
(`world.digest`), also under different PYTHONHASHSEED, provided that the code under test does not iterate over
sets of text or bytes. Threads have no place here: computation runs inline and is charged virtual seconds.
"""

from __future__ import annotations

import functools
import hashlib
import random
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar, TypeVarTuple

import trio
import trio.testing

from gossipml.env import Env
from gossipml.env.link import Link
from gossipml.env.simulated_disk import SimulatedDisk
from gossipml.env.simulated_net import Machine, Network, Process
from gossipml.env.simulated_sockets import SimulatedNet
from gossipml.env.virtual_time import VirtualTime, deterministic
from gossipml.errors import LocalError
from gossipml.identity import verify

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TraceEntry = tuple[float, str, str, str, int, int]
"""Virtual time, what happened, from, to, size, checksum of the content (0 where there is none)."""

TRACE_ENTRIES = 20_000  # the latest ones are kept for people; the digest covers all
MARKED = 4096  # bytes of a content that its checksum covers
EPOCH = 1_700_000_000.0  # the wall clock when virtual time is 0
MAX_VERIFIED = 1 << 14  # signatures remembered: those of the records of a hundred peers; 10 MB


def run_simulation(
    scenario: Callable[[World], Awaitable[T]], seed: int, *, link: Link | None = None, traced: bool = True
) -> T:
    """Run `scenario(world)` on virtual time with deterministic scheduling; what it returns."""

    async def main() -> T:
        return await scenario(World(seed, link=link, traced=traced))

    with deterministic(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class World:
    """A simulated network and its machines. Make it inside a trio run on virtual time; one for each run."""

    def __init__(self, seed: int, *, link: Link | None = None, traced: bool = True) -> None:
        """Not `traced`: nothing is recorded, which takes a fiftieth of the time away."""
        self.seed = seed
        self._traced = traced
        self.trace: deque[TraceEntry] = deque(maxlen=TRACE_ENTRIES)
        self.events = 0
        """How many trace entries there were, with those forgotten."""
        self._hash = hashlib.sha256()
        self._verify = functools.lru_cache(MAX_VERIFIED)(verify)  # of a pure function: what it says is the same
        self._time = VirtualTime()
        self._network = Network(self._time, self.rng("network"), self._record_content, link or Link())

    # Peers

    def env(self, name: str, *, wall_skew: float = 0.0) -> Env:
        """Boot the machine `name` (again, after a crash, with its disk) and give what its process sees."""
        machine = self._machine(name)
        if machine.process is not None:
            raise LocalError(f"{name} is running; crash it first")
        machine.boots += 1
        machine.powered = True
        machine.process = process = Process(machine)
        self._record("boot", name, "", machine.boots, 0)
        secrets = self.rng(f"{name}/{machine.boots}/secrets")
        return Env(
            clock=_Clock(self._time, wall_skew),
            rng=self.rng(f"{name}/{machine.boots}/rng"),
            secrets=secrets.randbytes,
            net=SimulatedNet(self._network, process),
            disk=machine.disk.mount(lambda: process.alive),
            compute=_Compute(),
            verify=self._verify,
        )

    def host(self, name: str) -> str:
        """The IP literal of a machine, booted or not."""
        return self._machine(name).host

    def disk(self, name: str) -> SimulatedDisk:
        """The disk of a machine, to look at and to break."""
        return self._machine(name).disk

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that one more draw here changes nothing there."""
        return random.Random(hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest())

    def now(self) -> float:
        return self._time.now()

    # The network, and faults

    def set_link(self, source: str, target: str, link: Link, *, both: bool = True) -> None:
        """Give one pair of machines a link of its own."""
        self._network.links[source, target] = link
        if both:
            self._network.links[target, source] = link

    def lan(self, *names: str) -> None:
        """Put machines on one local network, where beacons reach all of them. Without this a machine is on none."""
        lans = self._network.lans
        number = max(lans.values(), default=0) + 1
        for name in names:
            lans[self._machine(name).name] = number

    def set_default_link(self, link: Link) -> None:
        self._network.link = link

    def partition(self, *groups: Iterable[str]) -> None:
        """Let machines of different groups not reach each other; those in no group form one more."""
        network = self._network
        network.group = {name: index for index, group in enumerate(groups) for name in group}
        network.parted = True
        self._record("partition", "", "", len(groups), 0)
        network.release_stalled()

    def heal(self) -> None:
        self._network.parted = False
        self._record("heal", "", "", 0, 0)
        self._network.release_stalled()

    def crash(self, name: str) -> None:
        """Kill the process (as `kill -9`): its streams break at the other side, the disk keeps what it had.

        The tasks of the peer are the scenario's to cancel, best at once. Until then what waits for the network
        waits on, and every new use of network or disk fails or is lost.
        """
        process = self._end(name, "crash")
        for stream in list(process.streams):
            stream.die("the other side died")

    def power_off(self, name: str) -> None:
        """Cut the power: its streams fall silent, and the disk loses what was not synced."""
        process = self._end(name, "power-off")
        process.machine.powered = False
        for stream in list(process.streams):
            stream.die(None)
        process.machine.disk.power_loss(self.rng(f"{name}/{process.machine.boots}/power"))

    def pause(self, name: str) -> None:
        """Stop the machine's network (as SIGSTOP does): what it sends and receives waits for `resume`.

        Its tasks and timers go on, which a real pause would stop too.
        """
        self._machine(name).paused = True
        self._record("pause", name, "", 0, 0)

    def resume(self, name: str) -> None:
        machine = self._machine(name)
        machine.paused = False
        self._record("resume", name, "", 0, 0)
        held, machine.held = machine.held, []
        for action in held:
            action()

    # The trace

    def note(self, kind: str, source: str = "", target: str = "", size: int = 0, mark: int = 0) -> None:
        """Add an entry of the scenario's own to the trace."""
        self._record(kind, source, target, size, mark)

    @property
    def digest(self) -> str:
        """SHA-256 over the whole trace so far: equal for equal runs."""
        return self._hash.hexdigest()

    def _record(self, kind: str, source: str, target: str, size: int, mark: int) -> None:
        if not self._traced:
            return
        entry = (self._time.now(), kind, source, target, size, mark)
        self.trace.append(entry)
        self.events += 1
        self._hash.update(repr(entry).encode())

    def _record_content(self, kind: str, source: str, target: str, content: bytes) -> None:
        if self._traced:
            self._record(kind, source, target, len(content), zlib.crc32(content[:MARKED]))

    def _machine(self, name: str) -> Machine:
        network = self._network
        if name not in network.machines:
            number = len(network.machines) + 1
            machine = Machine(name, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", SimulatedDisk())
            network.machines[name] = network.by_host[machine.host] = machine
        return network.machines[name]

    def _end(self, name: str, kind: str) -> Process:
        machine = self._machine(name)
        process = machine.process
        if process is None:
            raise LocalError(f"{name} is not running")
        machine.process = None
        machine.paused = False
        machine.held.clear()
        process.alive = False
        self._record(kind, name, "", 0, 0)
        # Nothing reaches them any more. Tasks that wait there wait on, as a dead process does not go on to
        # handle an error.
        process.sockets.clear()
        process.listeners.clear()
        return process


class _Clock:
    def __init__(self, time: VirtualTime, skew: float) -> None:
        self.now = time.now  # looked at for all that happens, several times
        self._skew = skew

    def wall(self) -> float:
        return EPOCH + self.now() + self._skew


class _Compute:
    async def run(self, function: Callable[[*Ts], T], *args: *Ts, cost: float = 0.0) -> T:
        await trio.sleep(cost)
        return function(*args)
