"""`Dht`: the trio shell of a DHT node. Serves, looks up, stores, keeps its table alive.

One loop receives datagrams and hands them to `DhtNode`, whose handlers are synchronous; an `OSError` of the
network is waited out. Calls have a soft wait, after which the datagram is sent once more, and a hard wait.
Upkeep: find the network (again) when the table is nearly empty, ping quiet contacts, try somebody who was lost
(so that two halves of a partition meet again), refresh lonely buckets, drop expired records.

    dht = Dht(env, credentials, local=Address("0.0.0.0", 8711), bootstrap=[...])
    await nursery.start(dht.run)
    await dht.put(record); await dht.get(key)
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio

from gossipml.dht.config import DhtConfig
from gossipml.dht.lookup import MAX_QUERIES, Lookup
from gossipml.dht.messages import Answer, Find, Found, Get, Got, NodeContact, Ping, Question, Store, Stored
from gossipml.dht.node import MAX_CHECKS, Action, Answered, Check, DhtNode, DhtStats, Send, Warn
from gossipml.dht.records import Outcome, Record, refused_by_time
from gossipml.dht.storage import MAX_RECORDS_PER_KEY
from gossipml.env import Credentials, Datagrams, Env
from gossipml.ids import NODE_ID_SIZE, Address, NodeId, checked_address

MAX_OPERATIONS = 16  # lookups and puts at once; more wait
MAX_KNOWN = 64  # addresses from the token and the last run
MAX_LOST = 64  # contacts that left the table, to be tried again
FULL_ROUNDS = 4  # each finds nine of ten that were missing; a liar who says that he holds more costs no more
PINGS_PER_UPKEEP = 8  # spreads the pings of a full table over a few minutes
BOOTSTRAP_PAUSE = (2.0, 60.0)  # seconds between two searches for the network: first, longest
SELF_LOOKUPS = 3  # with one contact a lookup ends where its first datagrams are lost
RECEIVE_PAUSE = (0.05, 2.0)  # seconds after an OSError of the socket: first, longest

log = logging.getLogger("gossipml.dht")


class Dht:
    """A DHT node on an `Env`."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        *,
        local: Address,
        bootstrap: Iterable[Address] = (),
        config: DhtConfig | None = None,
    ) -> None:
        self._env = env
        self._config = config or DhtConfig()
        self._node = DhtNode(
            credentials.identity,
            credentials.keys,
            self._config,
            env.secrets,
            env.rng,
            env.clock.wall(),
            credentials.membership,
        )
        self._local = local
        self._own: tuple[Address, ...] = ()
        self._known: OrderedDict[Address, None] = OrderedDict()
        self._lost: OrderedDict[NodeContact, None] = OrderedDict()
        self._socket: Datagrams | None = None
        self._nursery: trio.Nursery | None = None
        self._waiting: dict[bytes, Callable[[Answered], None]] = {}
        self._checking = 0
        self._operations = trio.CapacityLimiter(MAX_OPERATIONS)
        self._grown = trio.Event()
        self._fresh: list[Address] = []
        self._told = trio.Event()
        self.add_bootstrap(bootstrap)

    @property
    def id(self) -> NodeId:
        return self._node.id

    @property
    def local(self) -> Address:
        """Where the socket is bound; the port is final once `run` has started."""
        return self._local

    @property
    def k(self) -> int:
        return self._config.k

    @property
    def stats(self) -> DhtStats:
        return self._node.stats()

    @property
    def pending(self) -> int:
        """Calls under way."""
        return self._node.pending

    def contacts(self) -> list[Address]:
        """Where the proven contacts are, those heard from most recently first: to be saved for the next start."""
        contacts = sorted(self._node.table.contacts(), key=lambda c: (c.misses, -c.heard, c.long_id))
        return [contact.contact.address for contact in contacts]

    def add_bootstrap(self, addresses: Iterable[Address]) -> None:
        """Addresses at which a member may be found; the oldest beyond 64 are forgotten."""
        for address in addresses:
            address = checked_address(*address)
            if address not in self._known:
                self._fresh.append(address)
            self._known[address] = None
            self._known.move_to_end(address)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        del self._fresh[:-MAX_KNOWN]
        if self._fresh:
            self._told.set()

    async def wait_for_contacts(self, count: int = 1) -> None:
        """Return when the table holds `count` contacts."""
        while len(self._node.table) < count:
            await self._grown.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. UserError when the port is in use."""
        socket = await self._env.net.bind_datagrams(self._local)
        try:
            self._socket, self._local = socket, socket.local
            self._learn_own_addresses()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._serve, socket)
                nursery.start_soon(self._upkeep)
                task_status.started()
        finally:
            self._socket = self._nursery = None
            with trio.CancelScope(shield=True):
                await socket.aclose()

    # What others use

    async def put(self, record: Record) -> int:
        """Store a record with the nodes nearest to its key; on how many it is, when most have answered.

        The rest is still being told when this returns. Zero when nobody, not even this node, took it: it is
        expired, older than what they hold, or they keep others of a long list.
        """
        async with self._operations:
            found = await self._look_up(record.key, Find(record.key))
            goal = int.from_bytes(record.key, "big")

            def distance(node: NodeId) -> int:
                return int.from_bytes(node, "big") ^ goal

            holders = found.nearest()
            stored = 0
            if len(holders) < self._config.k or distance(self.id) < distance(holders[-1].node):
                holders = holders[: self._config.k - 1]
                stored += self._node.storage.offer(record, self._env.clock.wall()).held
            return stored + await self._store_at(holders, record)

    async def get(self, key: bytes, *, full: bool = False) -> list[Record]:
        """Verified live records under a key, the greatest of each publisher, in the order of their public keys.

        Ends when a few nodes gave records; with `full`, for lists of many publishers, all nearest nodes are
        asked, each for another sample, and again while one of them says that it holds more than was found.
        """
        best: dict[tuple[int, bytes], Record] = {}
        givers = most = 0

        def take(answer: Answer) -> bool:
            nonlocal givers, most
            if not isinstance(answer, Got):
                return False
            genuine = [record for record in answer.records if self._is_good(record)]
            _keep_greatest(best, genuine)
            givers += bool(genuine)
            most = max(most, min(answer.held, MAX_RECORDS_PER_KEY))
            return not full and givers >= self._config.get_quorum

        async def ask_again(holder: NodeContact) -> None:
            answered = await self.call(holder, Get(key, 0))
            if answered is not None:
                take(answered.answer)

        async with self._operations:
            take(Got(key, tuple(self._node.storage.get(key, self._env.clock.wall())), 0, ()))
            found = await self._look_up(key, Get(key, self._config.k), until=take)
            for _ in range(FULL_ROUNDS if full else 0):
                if len(best) >= most:
                    break
                async with trio.open_nursery() as nursery:
                    for holder in found.nearest():
                        nursery.start_soon(ask_again, holder)
        return [best[slot] for slot in sorted(best)]

    async def nearest(self, target: bytes) -> list[NodeContact]:
        """The nodes nearest to `target` that answer now, nearest first, without this one."""
        async with self._operations:
            return (await self._look_up(target, Find(target))).nearest()

    async def bootstrap(self) -> int:
        """Look for the network at the known addresses; how many contacts the table has then."""
        addresses = [*self._known, *(contact.address for contact in self._lost)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ping_all, list(dict.fromkeys(addresses)))
            if addresses:
                with trio.move_on_after(self._config.hard_wait):  # the first answer is enough to begin
                    await self.wait_for_contacts()
            for _ in range(SELF_LOOKUPS if len(self._node.table) else 0):
                if await self.nearest(self.id):
                    break
        return len(self._node.table)

    async def call(self, to: NodeContact | Address, question: Question) -> Answered | None:
        """Ask one node; None when it is silent, gone, or cannot prove its id."""
        now, wall = self._env.clock.now(), self._env.clock.wall()
        asked = self._node.ask(to, question, now, wall) if self._socket is not None else None
        if asked is None:
            await trio.lowlevel.checkpoint()
            return None
        call, datagram = asked
        answered = trio.Event()
        reply: Answered | None = None

        def deliver(action: Answered) -> None:
            nonlocal reply
            reply = action
            answered.set()

        self._waiting[call] = deliver
        address = to if isinstance(to, Address) else to.address
        soft = self._node.soft_wait
        try:
            await self._send(datagram, address)
            with trio.move_on_after(soft):
                await answered.wait()
            again = None if reply is not None else self._node.again(call, self._env.clock.wall())
            if again is not None:
                for repeated in (again, *self._node.older(call, self._env.clock.wall())):
                    await self._send(repeated, address)
                with trio.move_on_after(max(0.0, self._config.hard_wait - soft)):
                    await answered.wait()
        finally:
            del self._waiting[call]
            self._node.forget(call)
        if reply is None and isinstance(to, NodeContact) and self._node.missed(to):
            self._lose(to)
        return reply

    # Receiving

    async def _serve(self, socket: Datagrams) -> None:
        pause = RECEIVE_PAUSE[0]
        while True:
            try:
                datagram, source = await socket.receive()
            except OSError as error:  # an ICMP error of an earlier send, or the network is down
                log.debug("receive: %s", error)
                await trio.sleep(pause)
                pause = min(2 * pause, RECEIVE_PAUSE[1])
                continue
            pause = RECEIVE_PAUSE[0]
            had = len(self._node.table)
            for action in self._node.receive(datagram, source, self._env.clock.now(), self._env.clock.wall()):
                await self._perform(action)
            if len(self._node.table) > had:
                self._grown.set()
                self._grown = trio.Event()

    async def _perform(self, action: Action) -> None:
        match action:
            case Send(data, to):
                await self._send(data, to)
            case Answered(call):
                deliver = self._waiting.get(call)
                if deliver is not None:
                    deliver(action)
            case Check(contact):
                if self._checking < MAX_CHECKS and self._nursery is not None:
                    self._checking += 1
                    self._nursery.start_soon(self._check, contact)
            case Warn(text):
                log.warning("%s", text)

    async def _send(self, data: bytes, to: Address) -> None:
        if self._socket is None:
            return
        try:
            await self._socket.send(data, to)
        except OSError as error:  # no route, a full buffer: as good as lost
            log.debug("send to %s: %s", to, error)

    async def _check(self, contact: NodeContact) -> None:
        try:
            await self.call(contact, Ping())
        finally:
            self._checking -= 1

    # Looking up and storing

    async def _look_up(
        self, target: bytes, question: Question, until: Callable[[Answer], bool] | None = None
    ) -> Lookup:
        """Run a lookup; `until` sees each answer and may end it."""
        table, clock = self._node.table, self._env.clock
        seeds = table.nearest(target, 2 * self._config.k)
        lookup = Lookup(target, self.id, seeds, self._node.networks, k=self._config.k, alpha=self._config.alpha)
        # Room for every query, so that none waits to hand over its answer.
        send, receive = trio.open_memory_channel[tuple[NodeContact, Answered | None]](MAX_QUERIES)

        async def query(contact: NodeContact) -> None:
            send.send_nowait((contact, await self.call(contact, question)))

        async with trio.open_nursery() as nursery:
            while True:
                for contact in lookup.ask(clock.now(), self._node.soft_wait):
                    nursery.start_soon(query, contact)
                if lookup.done:
                    break
                deadline = lookup.next_deadline()
                with trio.move_on_after(math.inf if deadline is None else max(0.0, deadline - clock.now())):
                    contact, answered = await receive.receive()
                    if answered is None:
                        lookup.failed(contact)
                        continue
                    answer = answered.answer
                    lookup.answered(contact, answer.contacts if isinstance(answer, Found | Got) else ())
                    if until is not None and until(answer):
                        break
            nursery.cancel_scope.cancel()
        if lookup.nearest():  # one that reached nobody leaves its bucket lonely
            table.looked_up(target, clock.now())
        return lookup

    async def _store_at(self, holders: Sequence[NodeContact], record: Record) -> int:
        """Tell the holders; how many took it when most have answered. The rest goes on in our nursery."""
        if not holders or self._nursery is None:
            return 0
        send, receive = trio.open_memory_channel[Outcome | None](len(holders))
        scope = trio.CancelScope()

        async def store() -> None:
            with scope, send:  # closed at the end, so that a put does not wait for a node that was stopped
                async with trio.open_nursery() as nursery:
                    for holder in holders:
                        nursery.start_soon(store_one, holder)

        async def store_one(holder: NodeContact) -> None:
            answered = await self.call(holder, Store(record))
            stored = answered is not None and isinstance(answered.answer, Stored)
            send.send_nowait(answered.answer.outcome if stored else None)  # type: ignore[union-attr]

        self._nursery.start_soon(store)
        acknowledged = 0
        try:
            async for outcome in receive:
                acknowledged += outcome is not None and outcome.held
                if acknowledged > self._config.put_quorum * len(holders):
                    break
        except trio.Cancelled:
            scope.cancel()
            raise
        return acknowledged

    def _is_good(self, record: Record) -> bool:
        return refused_by_time(record, self._env.clock.wall()) is None and self._node.verifier.is_genuine(record)

    # Upkeep

    async def _upkeep(self) -> None:
        pause, next_search = BOOTSTRAP_PAUSE[0], 0.0
        while True:
            now = self._env.clock.now()
            fresh, self._fresh, self._told = self._fresh, [], trio.Event()
            self._learn_own_addresses()
            self._node.storage.sweep(self._env.clock.wall())
            wait = self._config.upkeep_interval * self._jitter()
            if len(self._node.table) < self._config.sparse:
                if fresh or now >= next_search:
                    before = len(self._node.table)
                    found = await self.bootstrap()
                    pause = BOOTSTRAP_PAUSE[0] if found > before else min(2 * pause, BOOTSTRAP_PAUSE[1])
                    next_search = self._env.clock.now() + pause * self._jitter()
                wait = min(wait, max(0.0, next_search - self._env.clock.now()))
            else:
                next_search, pause = 0.0, BOOTSTRAP_PAUSE[0]
                await self._ping_all(fresh)
                await self._refresh_one(now)
            await self._ping_quiet(now)
            await self._ping_lost()
            with trio.move_on_after(wait):
                await self._told.wait()

    def _jitter(self) -> float:
        return self._env.rng.uniform(0.75, 1.25)

    def _learn_own_addresses(self) -> None:
        """Interfaces come and go; a forwarded port is known by configuration only."""
        bound = self._local
        loopback = {"0.0.0.0": ["127.0.0.1"], "::": ["127.0.0.1", "::1"]}.get(bound.host, [])
        own = [Address(host, bound.port) for host in loopback]
        self._own = tuple(dict.fromkeys((*self._config.also_at, *own, *self._env.net.own_addresses(bound))))
        self._node.set_addresses(self._own)

    async def _refresh_one(self, now: float) -> None:
        lonely = self._node.table.lonely(now, self._config.refresh_after)
        if lonely:
            low, high = self._env.rng.choice(lonely).range
            await self.nearest(self._env.rng.randint(low, high).to_bytes(NODE_ID_SIZE, "big"))

    async def _ping_quiet(self, now: float) -> None:
        contacts = [c for c in self._node.table.contacts() if now - c.heard >= self._config.quiet_after]
        contacts.sort(key=lambda c: (c.heard, c.long_id))
        await self._ping_all([contact.contact for contact in contacts[:PINGS_PER_UPKEEP]])

    async def _ping_all(self, targets: Sequence[NodeContact | Address]) -> None:
        async with trio.open_nursery() as nursery:
            for target in targets:
                if (target if isinstance(target, Address) else target.address) not in self._own:
                    nursery.start_soon(self.call, target, Ping())

    async def _ping_lost(self) -> None:
        """Try one that was lost, or one of the addresses we began with: after a partition somebody must ask."""
        in_table = {contact.contact.address for contact in self._node.table.contacts()}
        candidates = [*(contact.address for contact in self._lost), *self._known]
        candidates = [address for address in candidates if address not in in_table]
        if candidates:
            await self._ping_all([self._env.rng.choice(candidates)])

    def _lose(self, contact: NodeContact) -> None:
        self._lost[contact] = None
        self._lost.move_to_end(contact)
        if len(self._lost) > MAX_LOST:
            self._lost.popitem(last=False)


def _keep_greatest(best: dict[tuple[int, bytes], Record], records: Iterable[Record]) -> None:
    for record in records:
        held = best.get(record.slot)
        if held is None or record.order > held.order:
            best[record.slot] = record


@asynccontextmanager
async def running(dht: Dht) -> AsyncIterator[Dht]:
    """The DHT served for the length of a block."""
    async with trio.open_nursery() as nursery:
        await nursery.start(dht.run)
        yield dht
        nursery.cancel_scope.cancel()
