"""What this peer publishes, kept alive: signed anew, with a greater `seq`, well before it expires.

Only the owner republishes a record, so it lives as long as its owner does, and no longer. `seq` is one counter
for all records of a publisher; it never falls, not even when the process is killed or the wall clock is set back: a
ceiling is on disk before a number below it is used, and a lost file is made up for by the clock.

A peer that holds a hundred model versions has as many records. They are told at a steady pace, what is new before
what is repeated, so that a start or a network that has grown is no storm of datagrams.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import trio

from gossipml.dht.records import MAX_TTL, Kind, Record, sign_record
from gossipml.dht.service import Dht
from gossipml.env import Credentials, Env, write_atomic

SEQ_STEP = 1000  # numbers reserved with one write to the disk
REPUBLISH_SHARE = 1 / 3  # of the time to live: two republications may be lost
FIRST_RETRY = 2.0
LOOK_EVERY = 2.0  # seconds between looks at what is due, at least: while contacts come, many of them
LAST_FOR = 60  # seconds that a withdrawal lives at least
PUTS_PER_SECOND = 10.0  # a put is some 40 datagrams and 15 ms of CPU; 10 keep 3,000 providers alive for half an hour
PUTS_AT_ONCE = 8  # half of what the DHT does at once: gets of others go on meanwhile

log = logging.getLogger("gossipml.dht")


class SequenceNumbers:
    """Numbers that only grow, over restarts."""

    def __init__(self, env: Env, path: str) -> None:
        self._env = env
        self._path = path
        self._last = 0
        self._ceiling = 0
        self._lock = trio.Lock()

    async def next(self) -> int:
        async with self._lock:
            if self._last >= self._ceiling:
                await self._reserve()
            self._last += 1
            return self._last

    async def _reserve(self) -> None:
        if not self._ceiling:
            self._last = max(await self._stored(), int(self._env.clock.wall() * 1000))
        ceiling = self._last + SEQ_STEP
        try:
            await write_atomic(self._env.disk, self._path, str(ceiling).encode())
        except OSError as error:  # disk full: the clock alone keeps the numbers growing over a restart
            log.warning("cannot write %s (%s); sequence numbers go on from the clock", self._path, error)
        self._ceiling = ceiling

    async def _stored(self) -> int:
        try:
            return max(0, int(await self._env.disk.read(self._path, limit=32)))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            log.warning("cannot read %s (%s); sequence numbers go on from the clock", self._path, error)
            return 0


@dataclass
class _Published:
    kind: Kind
    key: bytes
    salt: bytes
    value: bytes
    ttl: float
    last: bool = False
    """Published once more, then forgotten."""
    expires: int = 0
    next_time: float = 0.0
    pause: float = FIRST_RETRY
    told: int = 0
    """Size of our table when it was last published."""

    def outgrown(self, nodes: int) -> bool:
        """Whether the network is now so much larger than then that others are nearest to the key."""
        return nodes > 2 * self.told

    def urgency(self) -> tuple[bool, float]:
        """What goes first: withdrawals, then news, then what waits for longest."""
        return (not self.last, self.next_time)


class Publisher:
    """Publishes under the keys it is told, until told otherwise."""

    def __init__(self, env: Env, dht: Dht, credentials: Credentials, *, seq_path: str = "state/dht-seq") -> None:
        self._env = env
        self._dht = dht
        self._credentials = credentials
        self._seq = SequenceNumbers(env, seq_path)
        self._published: dict[tuple[int, bytes], _Published] = {}
        self._turns = trio.CapacityLimiter(PUTS_AT_ONCE)
        self._changed = trio.Event()
        self._pause = trio.CancelScope()  # until the next look

    def publish(self, kind: Kind, key: bytes, value: bytes, *, ttl: float, salt: bytes = b"") -> None:
        """Keep `value` under `key`; it reaches the network while `run` runs."""
        if not 1 <= ttl <= MAX_TTL[kind]:
            raise ValueError(f"time to live of {ttl} s is not between 1 and {MAX_TTL[kind]}")
        self._set(_Published(kind, key, salt, value, ttl))

    def withdraw(self, kind: Kind, key: bytes, value: bytes = b"") -> None:
        """Replace what is kept under `key` by `value` one last time, for as long as the old one may be held."""
        held = self._published.get((kind, key))
        if held is not None:
            self._set(_Published(kind, key, held.salt, value, held.ttl, last=True))

    async def flush(self) -> None:
        """Publish what has changed now, withdrawals first, without waiting for `run`; once, whatever comes of it."""
        await self._publish_all([item for item in self._published.values() if item.next_time == 0.0])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish and republish until cancelled."""
        task_status.started()
        clock = self._env.clock
        allowed, then = float(PUTS_AT_ONCE), clock.now()
        self._dht.on_growth = self._grown
        while True:
            self._changed = trio.Event()
            now, nodes = clock.now(), self._dht.nodes
            allowed, then = min(PUTS_AT_ONCE, allowed + (now - then) * PUTS_PER_SECOND), now
            due = [item for item in self._published.values() if item.next_time <= now or item.outgrown(nodes)]
            due.sort(key=_Published.urgency)
            turn = due[: int(allowed)]
            allowed -= len(turn)
            if turn:
                await self._publish_all(turn)
            next_time = min((item.next_time for item in self._published.values()), default=math.inf) - clock.now()
            wait = max(LOOK_EVERY, next_time) if len(turn) == len(due) else 1 / PUTS_PER_SECOND
            with trio.move_on_after(wait) as self._pause:
                self._grown()  # meanwhile
                await self._changed.wait()

    def _grown(self) -> None:
        """The DHT has more contacts: others may be nearest to what was published."""
        nodes = self._dht.nodes
        if any(item.outgrown(nodes) for item in self._published.values()):
            self._pause.deadline = min(self._pause.deadline, trio.current_time() + LOOK_EVERY)

    def _set(self, item: _Published) -> None:
        held = self._published.get((item.kind, item.key))
        item.expires = held.expires if held is not None else 0
        self._published[item.kind, item.key] = item
        self._changed.set()

    async def _publish_all(self, items: list[_Published]) -> None:
        async with trio.open_nursery() as nursery:
            # Withdrawals get the smaller numbers: who leaves one list for another is not gone.
            for item in sorted(items, key=_Published.urgency):
                seq = await self._seq.next()
                if self._published.get((item.kind, item.key)) is item:  # not replaced or forgotten meanwhile
                    nursery.start_soon(self._put, item, self._sign(item, seq))

    async def _put(self, item: _Published, record: Record) -> None:
        nodes = item.told = self._dht.nodes
        async with self._turns:
            stored = await self._dht.put(record)
        interval = item.ttl * REPUBLISH_SHARE
        if nodes and stored > min(nodes, self._dht.k) / 2:
            item.pause, wait = FIRST_RETRY, interval
        else:
            wait, item.pause = min(item.pause, interval), 2 * item.pause
        item.next_time = self._env.clock.now() + wait * self._env.rng.uniform(0.8, 1.0)
        if item.last and self._published.get((item.kind, item.key)) is item:
            del self._published[item.kind, item.key]

    def _sign(self, item: _Published, seq: int) -> Record:
        item.expires = max(item.expires, math.ceil(self._env.clock.wall() + (LAST_FOR if item.last else item.ttl)))
        return sign_record(
            self._credentials.identity,
            self._credentials.keys.network_id,
            item.kind,
            item.key,
            seq=seq,
            expires=item.expires,
            value=item.value,
            salt=item.salt,
        )
