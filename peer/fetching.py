"""The dialler's side of the swarm: fetch one content from whoever has it.

Finds sources (the caller's providers, and those who ask us for the same content), dials as many as the size is
worth, keeps their lines busy as `gossipml.peer.download` says, hands whole pieces to the store, which verifies
them, and gives up when for a long time nobody gave anything. What was verified stays: the next download of the
same content goes on from there. A source that breaks the rules is reported and left alone for a while.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from gossipml.env import SWARM, Credentials, Env, Stream
from gossipml.errors import GossipmlError, RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Contact, PeerId, short_peer_id
from gossipml.peer import download as d
from gossipml.peer import swarm_wire as w
from gossipml.peer.rates import Meter, TokenBucket
from gossipml.peer.serving import FLOOD_BURST, FLOOD_RATE
from gossipml.peer.swarm_ports import Content, Hasher, SwarmConfig, SwarmStats
from gossipml.peer.swarm_stream import Buffers, Channel

log = logging.getLogger("gossipml.peer")

Providers = Callable[[], Awaitable[Iterable[Contact]]]
Progress = Callable[[int, int], None]

TICK = 0.1  # seconds between looks at what is overdue and who is to be dialled
MAX_CANDIDATES = 256
PIECES_A_SOURCE = 2  # a content of two pieces is not worth eight handshakes; when one is slow, more are dialled
FEW_SOURCES = 3  # are begun with, and one more is dialled
GROW_SECONDS = 0.5  # each time that in so many seconds
FAST = 24e6  # fewer bytes a second came: each source costs a handshake and what it announces, and more of them
# help where their lines are the limit, not where the processors are (guess: a fifth of gigabit Ethernet)
BACKOFF, BACKOFF_MOST = 0.5, 15.0  # seconds before a source is dialled again, doubled with each failure
FAULT_SECONDS = 60.0  # a source that broke the rules is left alone
MAX_FAULTS = 3  # and after so many for the rest of the download
FULL_SECONDS = 5.0  # when it said that it has no room
NO_SOURCE_SECONDS = 2.0  # between two looks for providers while there is nobody
PROVIDERS_SECONDS = 30.0


async def dial(env: Env, credentials: Credentials, contact: Contact, seconds: float, protocol: str = SWARM) -> Stream:
    """A stream to a contact, at the first of its addresses that answers. RemoteError says why not."""
    trouble = "no address is known"
    for address in contact.addresses[:MAX_CONTACT_ADDRESSES]:
        try:
            with trio.fail_after(seconds):
                return await env.net.connect(address, contact.peer, credentials, protocol)
        except (OSError, RemoteError, trio.TooSlowError) as error:
            trouble = f"{address}: {error or 'no answer'}"
    raise RemoteError(f"cannot reach {short_peer_id(contact.peer)} ({trouble})")


@dataclass
class _Candidate:
    """Somebody who may have pieces."""

    contact: Contact
    not_before: float = -math.inf
    failures: int = 0
    faults: int = 0


class Fetching:
    """One download. `run` returns when the content is complete and finished."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        content: Content,
        providers: Providers,
        config: SwarmConfig,
        stats: SwarmStats,
        buffers: Buffers,
        limit: TokenBucket,
        port: int,
        on_fault: Callable[[PeerId, str], None],
        on_piece: Callable[[bytes, int], None],
        on_progress: Progress | None,
    ) -> None:
        self.content = content
        self.meter = Meter()
        have = w.read_bits(content.have(), content.count)
        self.download = d.Download(content.count, have, content.size, content.piece_length, env.rng)
        self.done = sum(self.download.length(index) for index in range(content.count) if have >> index & 1)
        """Bytes that are verified."""
        self._env = env
        self._clock = env.clock
        self._credentials = credentials
        self._own = credentials.identity.peer_id
        self._providers = providers
        self._config = config
        self._stats = stats
        self.buffers = buffers
        self._limit = limit
        self.port = port
        self._on_fault = on_fault
        self._on_piece = on_piece
        self._on_progress = on_progress
        self._candidates: dict[PeerId, _Candidate] = {}
        self._sessions: dict[PeerId, _Session] = {}  # also while they are being dialled
        self._moved_at = self._clock.now()
        """When a byte of a wanted piece last came."""
        self._most = min(FEW_SOURCES, config.peers)
        """Sources at once."""
        self._grown_at, self._since = self._moved_at, 0
        """When that was last looked at, and the bytes that have come since then."""
        self._trouble = "no provider is known"
        self._failure: Exception | None = None
        self._news = trio.Event()
        """Somebody new may have pieces."""
        self._over = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        if not self.download.complete:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._find)
                nursery.start_soon(self._keep_up)
                await self._over.wait()
                nursery.cancel_scope.cancel()
            if self._failure is not None:
                raise self._failure
        await self.content.finish()

    def learn(self, contacts: Iterable[Contact]) -> None:
        """Those who may have pieces."""
        for contact in contacts:
            known = self._candidates.get(contact.peer)
            if known is not None:
                known.contact = contact
            elif contact.peer != self._own and contact.addresses and len(self._candidates) < MAX_CANDIDATES:
                self._candidates[contact.peer] = _Candidate(contact)
                self._news.set()

    @property
    def sources(self) -> int:
        return len(self.download.sources)

    # Finding sources.

    async def _find(self) -> None:
        while True:
            try:
                with trio.move_on_after(PROVIDERS_SECONDS):
                    self.learn(await self._providers())
            except (GossipmlError, OSError) as error:
                self._trouble = str(error)
            # Look again soon while there is nobody.
            again = trio.current_time() + self._config.ask_again
            while trio.current_time() < again:
                await trio.sleep(NO_SOURCE_SECONDS)
                if not self.download.sources:
                    break

    async def _keep_up(self) -> None:
        while True:
            now = self._clock.now()
            for session in list(self._sessions.values()):
                self._watch(session, now)
            self._perform(self.download.handle(d.Tick(), now))
            self._grow(now)
            self._dial_some(now)
            if now - self._moved_at > self._config.patience:
                self._fail(RemoteError(self._why()))
            self._news = trio.Event()
            with trio.move_on_after(TICK):
                await self._news.wait()

    def _watch(self, session: _Session, now: float) -> None:
        """Count what has come, and end a session that is stuck."""
        channel = session.channel
        if channel is None:
            return
        if self._credentials.membership.is_revoked(session.peer):
            session.end("it was revoked")
        if channel.received > session.counted:
            self.meter.add(channel.received - session.counted, now)
            self._since += channel.received - session.counted
            session.counted = channel.received
            self.download.progressed(session.peer, now)
            self._moved_at = now
        if channel.overdue:
            session.end("it sent nothing for too long")

    def _grow(self, now: float) -> None:
        """One source more while those that are there are slow."""
        seconds = now - self._grown_at
        if seconds < GROW_SECONDS:
            return
        fast = min(FAST, self._limit.rate / 2 or math.inf)  # our own limit: others cannot make it faster
        if self._since < fast * seconds:
            self._most = min(self._config.peers, self._most + 1)
        self._grown_at, self._since = now, 0

    def _dial_some(self, now: float) -> None:
        config, quiet = self._config, now - self._moved_at
        wanted = min(self._most, math.ceil(self.download.left / PIECES_A_SOURCE) + int(quiet))
        eligible = [
            candidate
            for peer, candidate in self._candidates.items()
            if peer not in self._sessions and candidate.not_before <= now and candidate.faults < MAX_FAULTS
        ]
        if eligible and len(self._sessions) >= wanted:
            for peer in self.download.useless(now, config.useless)[: len(eligible)]:
                self._sessions[peer].end("it sent nothing for a while, and there are others")
        self._env.rng.shuffle(eligible)
        for candidate in eligible[: max(0, wanted - len(self._sessions))]:
            session = _Session(self, candidate.contact.peer, config, self._limit)
            self._sessions[session.peer] = session
            assert self._nursery is not None
            self._nursery.start_soon(self._run_session, session, candidate)

    def _why(self) -> str:
        root = self.content.root.hex()[:12]
        known = f"{len(self._candidates)} peers are known to provide it" if self._candidates else "nobody provides it"
        return (
            f"{self.download.left} of {self.content.count} pieces of content {root} are missing, and for "
            f"{self._config.patience:.0f} s nobody sent any; {known} (last trouble: {self._trouble}); what has come "
            "is kept: try again when a peer that has it is online"
        )

    # Sessions.

    async def _run_session(self, session: _Session, candidate: _Candidate) -> None:
        """Dial, fetch, part; nothing that goes wrong leaves this task."""
        peer, faults, pause = session.peer, candidate.faults, None
        try:
            with session.scope:
                pause = await self._fetch_from(session, candidate)
        except Exception:
            log.exception("fetching from %s failed in an unexpected way", short_peer_id(peer))
        finally:
            del self._sessions[peer]
            source = self.download.sources.get(peer)
            gave = source is not None and source.pieces > 0
            self._perform(self.download.handle(d.Left(peer), self._clock.now()))
        if session.trouble:
            self._trouble = f"{short_peer_id(peer)}: {session.trouble}"
            log.debug("fetching from %s ends: %s", short_peer_id(peer), session.trouble)
        candidate.failures = 1 if gave else candidate.failures + 1
        if candidate.faults > faults:
            pause = FAULT_SECONDS
        elif pause is None:
            pause = min(BACKOFF * 2.0 ** min(candidate.failures, 8), BACKOFF_MOST) * (0.5 + self._env.rng.random())
        candidate.not_before = self._clock.now() + pause

    async def _fetch_from(self, session: _Session, candidate: _Candidate) -> float | None:
        """Seconds until this source should be dialled again; None to let its failures decide."""
        try:
            stream = await dial(self._env, self._credentials, candidate.contact, self._config.dial_seconds)
        except RemoteError as error:  # dead, or another one lives at that address: nobody's fault
            session.trouble = str(error)
            return None
        session.channel = channel = Channel(stream, self._config, self._clock)
        try:
            return await session.run(channel)
        except RemoteError as error:
            session.trouble = str(error)
            self.fault(session.peer, str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            session.trouble = str(error) or "the connection broke"
        finally:
            await channel.close()
        return None

    def fault(self, peer: PeerId, reason: str) -> None:
        """That peer broke the rules."""
        self._stats.faults += 1
        candidate = self._candidates.get(peer)
        if candidate is not None:
            candidate.faults += 1
            candidate.not_before = self._clock.now() + FAULT_SECONDS
        log.warning("%s broke the protocol of the swarm: %s", short_peer_id(peer), reason)
        self._on_fault(peer, reason)

    def now(self) -> float:
        return self._clock.now()

    # Pieces.

    def handle(self, event: d.Event) -> list[d.Action]:
        """Tell the state machine and do what it asks for; what concerns the caller's own message comes back."""
        return self._perform(self.download.handle(event, self._clock.now()))

    def _perform(self, actions: list[d.Action]) -> list[d.Action]:
        own: list[d.Action] = []
        for action in actions:
            match action:
                case d.AskPieces(peer, indexes):
                    self._sessions[peer].post(w.Ask(indexes))
                case d.CancelPieces(peer, indexes):
                    self._sessions[peer].post(w.Cancel(indexes))
                case d.Misbehaved(peer, reason):
                    self.fault(peer, reason)
                    if peer in self._sessions:
                        self._sessions[peer].end(reason)
                case _:
                    own.append(action)
        return own

    def check(self, peer: PeerId, index: int, data: bytearray, hasher: Hasher) -> None:
        """Verify and write a piece in a task of its own; its buffer is given back afterwards."""
        assert self._nursery is not None
        self._nursery.start_soon(self._check, peer, index, data, hasher)

    async def _check(self, peer: PeerId, index: int, data: bytearray, hasher: Hasher) -> None:
        length = len(data)
        try:
            right = await self.content.write(index, data, hasher)
        except (GossipmlError, OSError) as error:  # the quota, a full disk: it would go on like that
            self._fail(error)
            return
        finally:
            self.buffers.release(data)
        if not right:
            self._stats.pieces_bad += 1
            self.handle(d.Bad(peer, index))
            return
        self._stats.pieces_down += 1
        self._stats.bytes_down += length
        self.done += length
        self.handle(d.Kept(index))
        self._on_piece(self.content.root, index)
        if self._on_progress is not None:
            self._on_progress(self.done, self.content.size)
        if self.download.complete:
            self._over.set()

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        self._over.set()


class _Session:
    """One source, from its answer to its end."""

    def __init__(self, fetching: Fetching, peer: PeerId, config: SwarmConfig, limit: TokenBucket) -> None:
        self.peer = peer
        self.scope = trio.CancelScope()
        self.trouble = ""
        """Why it ended."""
        self.channel: Channel | None = None
        """None while it is dialled."""
        self.counted = 0
        """Bytes that have been noted."""
        self._fetching = fetching
        self._config = config
        both = (limit, TokenBucket(config.download_rate_peer))
        self._limits = both if any(bucket.rate for bucket in both) else ()
        self._flood = TokenBucket(FLOOD_RATE, burst=FLOOD_BURST)
        self._out = bytearray()  # encoded messages; bounded by what may be asked for
        self._wake = trio.Event()
        self._error: Exception | None = None

    def post(self, message: w.Message) -> None:
        self._out += w.encode(message)
        self._wake.set()

    def end(self, reason: str) -> None:
        self.trouble = reason
        self.scope.cancel()

    async def run(self, channel: Channel) -> float | None:
        """Fetch until one side ends it; the seconds to stay away when it has nothing for us now."""
        content = self._fetching.content
        await channel.send(w.encode(w.Open(content.root, self._fetching.port)))
        answer: w.FromOwner | None = w.Alive()
        while isinstance(answer, w.Alive):
            answer = await channel.receive(w.from_owner, within=self._config.answer_seconds)
            self._charge()
        match answer:
            case None:
                raise trio.BrokenResourceError("it hung up")
            case w.No(code, reason):
                self.trouble = reason
                return FULL_SECONDS if code == "full" else None
            case w.Bits(count) if count == content.count:
                body = memoryview(bytearray(w.body_length(answer)))
                await channel.receive_body(body)
                self._fetching.handle(d.Joined(self.peer, w.read_bits(body, count)))
            case w.Bits(count):
                raise RemoteError(f"it says that the content has {count} pieces; it has {content.count}")
            case _:
                raise RemoteError(f"{type(answer).__name__} as the answer to an open")
        async with trio.open_nursery() as nursery:
            for part in (self._read, self._write):
                nursery.start_soon(self._guarded, part, channel, nursery.cancel_scope)
        if self._error is not None:
            raise self._error
        return None

    async def _guarded(
        self, part: Callable[[Channel], Awaitable[None]], channel: Channel, scope: trio.CancelScope
    ) -> None:
        """Keep the first error, so that it is not wrapped into a group, and end the other part."""
        try:
            await part(channel)
        except Exception as error:
            self._error = self._error or error
        scope.cancel()

    async def _write(self, channel: Channel) -> None:
        while True:
            while self._out:
                frames, self._out = bytes(self._out), bytearray()
                await channel.send(frames)
            self._wake = trio.Event()
            await self._wake.wait()

    async def _read(self, channel: Channel) -> None:
        fetching, peer = self._fetching, self.peer
        while True:
            message = await channel.receive(w.from_owner, within=self._config.stall)
            match message:
                case w.Piece():
                    await self._piece(channel, message)
                    continue
                case w.Have(indexes):
                    fetching.handle(d.Had(peer, indexes))
                case w.NoPiece(indexes, lost):
                    fetching.handle(d.Refused(peer, indexes, lost))
                case w.Alive():
                    pass
                case None:
                    raise trio.BrokenResourceError("it hung up")
                case _:
                    raise RemoteError(f"{type(message).__name__} without a question")
            self._charge()

    async def _piece(self, channel: Channel, piece: w.Piece) -> None:
        fetching, peer = self._fetching, self.peer
        if d.Skip() in fetching.handle(d.Arriving(peer, piece.index, piece.length)):
            await channel.skip_body(piece.length, self._limits)
            fetching.handle(d.Arrived(peer, piece.index))
            return
        data = await fetching.buffers.acquire(piece.length)
        try:
            hasher = fetching.content.hasher(data)
            # Hashed here while it is warm: a thread for a whole piece would take the interpreter's lock again for
            # each of its leaves, and a swarm a twelfth more of CPU (docs/decisions/0012).
            await channel.receive_body(memoryview(data), self._limits, hasher.arrived)
            wanted = d.Check() in fetching.handle(d.Arrived(peer, piece.index))
        except BaseException:
            fetching.buffers.release(data)
            raise
        if wanted:
            fetching.check(peer, piece.index, data, hasher)  # takes the buffer over
        else:
            fetching.buffers.release(data)

    def _charge(self) -> None:
        if self._flood.take(1, self._fetching.now()) > 0:
            raise RemoteError(f"more than {FLOOD_RATE:.0f} messages a second that are no pieces")
