"""`Dht`: the trio shell of a DHT node. Serves, looks up, stores, keeps its table alive.

One loop receives datagrams and hands them to `DhtNode`, whose handlers are synchronous; an `OSError` of the
network is waited out. Calls (`calls`) have a soft wait, after which the datagram is sent once more, and a hard wait;
lookups (`search`) go on in the turn in which an answer comes.
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
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from gossipml.dht.calls import Calls
from gossipml.dht.config import DhtConfig
from gossipml.dht.lookup import Lookup
from gossipml.dht.messages import (
    GET_ROOM,
    MAX_PARTS,
    Answer,
    Find,
    Get,
    Got,
    NodeContact,
    Ping,
    Question,
    Store,
    Stored,
)
from gossipml.dht.node import MAX_CHECKS, Action, Answered, Check, DhtNode, DhtStats, Send, Warn
from gossipml.dht.records import Outcome, Record, refused_by_time
from gossipml.dht.search import Search
from gossipml.dht.storage import MAX_RECORDS_PER_KEY
from gossipml.env import Credentials, Datagrams, Env
from gossipml.ids import NODE_ID_SIZE, Address, NodeId, checked_address

MAX_OPERATIONS = 16  # lookups and puts at once; more wait
MAX_KNOWN = 64  # addresses from the token and the last run
MAX_LOST = 64  # contacts that left the table, to be tried again
CROWDED = 0.5  # of the distance within which the k nearest of a key are to be expected: ten nodes, and rarely twenty
FULL_ROUNDS = 4  # the first finds most; later ones what was lost, or is not held by all, or is kept back by liars
USUAL_RECORD = 200  # bytes
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
            env.verify,
        )
        self._local = local
        self._own: tuple[Address, ...] = ()
        self._known: OrderedDict[Address, None] = OrderedDict()
        self._lost: OrderedDict[NodeContact, None] = OrderedDict()
        self._calls = Calls(env.clock, self._node, self._config.hard_wait, self._lose)
        self._checking = 0
        self._operations = trio.CapacityLimiter(MAX_OPERATIONS)
        self._grown = trio.Event()
        self.on_growth: Callable[[], None] = lambda: None
        """Called when a contact has come into the table."""
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
    def nodes(self) -> int:
        """Proven contacts in the table."""
        return len(self._node.table)

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
            self._local = socket.local
            self._learn_own_addresses()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._calls.run, socket)
                nursery.start_soon(self._serve, socket)
                nursery.start_soon(self._upkeep)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await socket.aclose()

    # What others use

    async def put(self, record: Record) -> int:
        """Store a record with the nodes nearest to its key; on how many it is, when most have answered.

        The rest is still being told when this returns. Zero when nobody, not even this node, took it: it is
        expired, older than what they hold, or they keep others of a long list.
        """
        outcomes: dict[NodeId, Outcome] = {}
        goal = int.from_bytes(record.key, "big")

        def distance(node: NodeId) -> int:
            return int.from_bytes(node, "big") ^ goal

        find, store = Find(record.key), Store(record, self._config.k)
        reach = self._node.table.reach()

        def question(contact: NodeContact) -> Question:
            # Whoever is likely among the nearest gets the record at once: half as many datagrams as finding all of
            # them first. One that turns out not to be among them has it too, which harms nobody.
            return store if search.lookup.settled or distance(contact.node) <= reach else find

        def heard(contact: NodeContact, answer: Answer) -> bool:
            if isinstance(answer, Stored):
                outcomes[contact.node] = answer.outcome
            return False

        async with self._operations:
            search = self._search(record.key, question, heard, wide=True, reach=reach)
            await self._run(search)
            holders = search.lookup.nearest()
            stored = 0
            if len(holders) < self._config.k or distance(self.id) < distance(holders[-1].node):
                holders = holders[: max(len(holders), self._config.k) - 1]
                stored += self._node.storage.offer(record, self._env.clock.wall()).held
            told = sum(holder.node in outcomes and outcomes[holder.node].held for holder in holders)
            untold = [holder for holder in holders if holder.node not in outcomes]
            enough = self._config.put_quorum * len(holders) - told
            return stored + told + (await self._store_at(untold, record, enough) if untold else 0)

    async def get(self, key: bytes, *, full: bool = False, enough: int = MAX_RECORDS_PER_KEY) -> list[Record]:
        """Verified live records under a key, the greatest of each publisher, in the order of their public keys.

        Ends when a few nodes gave records; with `full`, for lists of many publishers, all nearest nodes are asked, each
        for a sample. While fewer than `enough` were found and one of them says that it holds more, each is asked for
        another part of the list: samples alone would bring the same records over and over.
        """
        best: dict[tuple[int, bytes], Record] = {}
        givers = most = 0

        def take(asked: object, answer: Answer) -> bool:
            nonlocal givers, most
            if not isinstance(answer, Got):
                return False
            genuine = [record for record in answer.records if self._is_good(record)]
            _keep_greatest(best, genuine)
            givers += bool(genuine)
            most = max(most, min(answer.held, MAX_RECORDS_PER_KEY))
            return not full and givers >= self._config.get_quorum

        def take_part(part: Question, answer: Answer) -> bool:
            parts.remove(part)
            return take(part, answer)

        async with self._operations:
            take(None, Got(key, tuple(self._node.storage.get(key, self._env.clock.wall())), 0, ()))
            get = Get(key, self._config.k)
            reach = self._node.table.reach()
            search = self._search(key, lambda contact: get, take, wide=full, reach=reach)
            await self._run(search)
            holders, parts = search.lookup.nearest(), list[Question]()
            for round in range(FULL_ROUNDS if full and holders else 0):
                if len(best) >= min(most, enough):
                    break
                parts = parts or _in_parts(key, most, best.values())
                turn = [(holders[(index + round) % len(holders)], part) for index, part in enumerate(parts)]
                await self._ask_all(turn, take_part)
        return [best[slot] for slot in sorted(best)]

    async def nearest(self, target: bytes) -> list[NodeContact]:
        """The nodes nearest to `target` that answer now, nearest first, without this one."""
        find = Find(target)
        async with self._operations:
            search = self._search(target, lambda contact: find)
            await self._run(search)
            return search.lookup.nearest()

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
        over = trio.Event()
        reply: Answered | None = None

        def done(answered: Answered | None) -> None:
            nonlocal reply
            reply = answered
            over.set()

        number = self._calls.begin(to, question, done)
        if number is None:
            await trio.lowlevel.checkpoint()
            return None
        try:
            await over.wait()
        finally:
            self._calls.drop(number)
        return reply

    # Receiving

    async def _serve(self, socket: Datagrams) -> None:
        pause = RECEIVE_PAUSE[0]
        while True:
            received = self._node.received
            try:
                await socket.serve(self._heard)
            except OSError as error:  # an ICMP error of an earlier send, or the network is down
                log.debug("receive: %s", error)
                pause = RECEIVE_PAUSE[0] if self._node.received > received else min(2 * pause, RECEIVE_PAUSE[1])
                await trio.sleep(pause)

    def _heard(self, datagram: bytes, source: Address) -> None:
        clock, node = self._env.clock, self._node
        had = node.table.additions
        for action in node.receive(datagram, source, clock.now(), clock.wall()):
            self._perform(action)
        if node.table.additions != had:
            self._grown.set()
            self._grown = trio.Event()
            self.on_growth()

    def _perform(self, action: Action) -> None:
        match action:
            case Send(data, to):
                self._calls.post(data, to)
            case Answered():
                self._calls.answered(action)
            case Check(contact):
                if self._checking < MAX_CHECKS and self._calls.begin(contact, Ping(), self._checked) is not None:
                    self._checking += 1
            case Warn(text):
                log.warning("%s", text)

    def _checked(self, answered: Answered | None) -> None:
        self._checking -= 1

    # Looking up and storing

    def _search(
        self,
        target: bytes,
        question: Callable[[NodeContact], Question],
        heard: Callable[[NodeContact, Answer], bool] = lambda contact, answer: False,
        *,
        wide: bool = False,
        reach: int = 0,
    ) -> Search:
        config, node = self._config, self._node
        seeds = node.table.nearest(target, 2 * config.k)
        lookup = Lookup(
            target, self.id, seeds, node.networks, k=config.k, alpha=config.alpha, wide=wide, reach=int(reach * CROWDED)
        )
        return Search(lookup, self._calls, self._env.clock, lambda: node.soft_wait, question, heard)

    async def _run(self, search: Search) -> None:
        await search.run()
        if search.lookup.nearest():  # one that reached nobody leaves its bucket lonely
            self._node.table.looked_up(search.lookup.target, self._env.clock.now())

    async def _store_at(self, holders: Sequence[NodeContact], record: Record, enough: float) -> int:
        """Tell the holders; how many took it when more than `enough` have, or all answered. The rest goes on."""
        acknowledged = 0

        def heard(store: Question, answer: Answer) -> bool:
            nonlocal acknowledged
            acknowledged += isinstance(answer, Stored) and answer.outcome.held
            return acknowledged > enough

        store = Store(record)
        await self._ask_all([(holder, store) for holder in holders], heard)
        return acknowledged

    async def _ask_all(
        self, questions: Sequence[tuple[NodeContact | Address, Question]], heard: Callable[[Question, Answer], bool]
    ) -> None:
        """Ask all at once; return when all have answered or failed, or `heard` says that it is enough.

        The rest goes on; what is under way when this is cancelled is dropped.
        """
        over = trio.Event()
        waiting = len(questions)

        def done(question: Question, answered: Answered | None) -> None:
            nonlocal waiting
            waiting -= 1
            if (answered is not None and heard(question, answered.answer)) or not waiting:
                over.set()

        calls = [self._calls.begin(to, question, partial(done, question)) for to, question in questions]
        waiting -= calls.count(None)
        try:
            if waiting:
                await over.wait()
        except trio.Cancelled:
            for number in calls:
                if number is not None:
                    self._calls.drop(number)
            raise

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
        others = [one for one in targets if (one if isinstance(one, Address) else one.address) not in self._own]
        await self._ask_all([(other, Ping()) for other in others], lambda ping, answer: False)

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


def _in_parts(key: bytes, held: int, known: Collection[Record]) -> list[Question]:
    """Questions for all that a holder has under a key, each for about as much as fits an answer."""
    size = sum(record.size for record in known) / len(known) if known else USUAL_RECORD
    parts = min(MAX_PARTS, math.ceil(held / max(1, GET_ROOM // size)))
    return [Get(key, 0, (index, parts)) for index in range(parts)]


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
