"""The owner's side of the swarm: streams on which others ask us for pieces, layers, manifests.

Each stream has a task that reads requests and one that writes; which piece is read from the disk next, and for
whom, is decided for all of them together (`gossipml.peer.upload`). What is announced to an asker is collected for
a moment, because a message for each new piece to each asker would wake both ends thousands of times.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from gossipml.env import Clock, Stream
from gossipml.errors import RemoteError
from gossipml.ids import Address, Contact, PeerId, short_peer_id
from gossipml.peer import swarm_wire as w
from gossipml.peer.rates import Meter, TokenBucket
from gossipml.peer.swarm_ports import Content, Shelf, SwarmConfig, SwarmStats
from gossipml.peer.swarm_stream import Channel
from gossipml.peer.upload import Grant, Uploads

log = logging.getLogger("gossipml.peer")

HAVE_SECONDS = 0.05  # new pieces are announced together
FLOOD_RATE = 200.0  # messages a second, beside requests that get a piece; an honest asker sends a few
FLOOD_BURST = 2000.0
WATCH_SECONDS = 0.5
REFUSAL_SECONDS = 2.0
IDLE_SECONDS = 10.0  # after which a stream that asks for nothing may make room for a newcomer
STARVING = 64 * 1024.0  # bytes a second: under a limit of rate fewer are served at once, none of them slower than this


class Serving:
    """All streams on which we are asked."""

    def __init__(
        self,
        shelf: Shelf,
        config: SwarmConfig,
        clock: Clock,
        stats: SwarmStats,
        on_fault: Callable[[PeerId, str], None],
        on_asker: Callable[[bytes, Contact], None],
    ) -> None:
        self.shelf = shelf
        self.config = config
        self.clock = clock
        self.stats = stats
        self.on_fault = on_fault
        self.on_asker = on_asker
        """Somebody wants this content: whoever fetches it too may have pieces of it."""
        slots = config.slots
        if config.upload_rate:
            slots = max(1, min(slots, int(config.upload_rate / STARVING)))
        self.uploads = Uploads(slots, config.buffers // 2)
        self.limit = TokenBucket(config.upload_rate)
        self.meters: dict[bytes, Meter] = {}  # of contents that are open
        self._sessions: dict[int, _Session] = {}
        self._opened = trio.Event()
        self._keys = itertools.count()
        self._news = trio.Event()

    async def run(self) -> None:
        """Announce new pieces, and say that we live, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            nursery.start_soon(self._beat)

    async def serve(self, stream: Stream) -> None:
        """The whole life of one stream. Raises nothing but cancellation."""
        channel = Channel(stream, self.config, self.clock)
        try:
            if self._is_full(stream.peer_id):
                await self._refuse(channel)
            else:
                await self._run(_Session(self, channel, next(self._keys)))
        finally:
            await channel.close()

    async def _run(self, session: _Session) -> None:
        self._sessions[session.key] = session
        self._opened.set()
        self._opened = trio.Event()
        self.uploads.join(session.key, session.peer)
        try:
            await session.run()
        finally:
            del self._sessions[session.key]
            self.uploads.leave(session.key)
            if session.content is not None and not self.askers(session.content.root):
                self.meters.pop(session.content.root, None)
            self.pump()

    async def _refuse(self, channel: Channel) -> None:
        reason = f"{self.config.askers} streams are open here; come again later"
        try:
            with trio.move_on_after(REFUSAL_SECONDS):
                await channel.send(w.encode(w.No("full", reason)))
                while await channel.receive(w.from_dialler) is not None:
                    pass  # it hangs up when it has read that
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # nothing was expected from it

    def arrived(self, root: bytes, index: int) -> None:
        """We have one more piece: those who want this content hear of it soon."""
        for session in self._sessions.values():
            if session.content is not None and session.content.root == root:
                session.haves.append(index)
                self._news.set()

    def askers(self, root: bytes) -> int:
        return sum(1 for s in self._sessions.values() if s.content is not None and s.content.root == root)

    def roots(self) -> dict[bytes, Content]:
        """What is being asked for."""
        return {s.content.root: s.content for s in self._sessions.values() if s.content is not None}

    def pump(self) -> None:
        """Start what the turns allow."""
        while (grant := self.uploads.next()) is not None:
            self._sessions[grant.key].prepare(grant)

    def _is_full(self, peer: PeerId) -> bool:
        if sum(1 for session in self._sessions.values() if session.peer == peer) >= self.config.askers_peer:
            return True
        if len(self._sessions) < self.config.askers:
            return False
        latest = self.clock.now() - IDLE_SECONDS
        for key, session in self._sessions.items():
            if not self.uploads.waiting(key) and session.used_at < latest:
                session.end()
                return False
        return True

    async def _announce(self) -> None:
        while True:
            await self._news.wait()
            await trio.sleep(HAVE_SECONDS)
            self._news = trio.Event()
            for session in self._sessions.values():
                if session.haves:
                    session.announce()

    async def _beat(self) -> None:
        while True:
            if not self._sessions:  # most of the time: an idle peer need not wake up twice a second
                await self._opened.wait()
            await trio.sleep(WATCH_SECONDS)
            latest = self.clock.now() - w.BEAT + 2 * WATCH_SECONDS
            for session in self._sessions.values():
                if session.channel.overdue:
                    session.end()
                elif session.said_at < latest:
                    session.said_at = self.clock.now()
                    session.post(w.Alive())


class _Session:
    def __init__(self, serving: Serving, channel: Channel, key: int) -> None:
        self.peer = channel.stream.peer_id
        self.key = key
        self.content: Content | None = None
        self.haves: list[int] = []
        now = serving.clock.now()
        self.used_at = now
        """When it last asked for something or was sent something."""
        self.said_at = now
        self._serving = serving
        self.channel = channel
        self._out = bytearray()  # encoded small messages; bounded by what may be asked for, and by the beat
        self._bodies: deque[tuple[w.Message, bytes | bytearray | memoryview, Grant | None]] = deque()
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._flood = TokenBucket(FLOOD_RATE, burst=FLOOD_BURST)
        both = (serving.limit, TokenBucket(serving.config.upload_rate_peer))
        self._limits = both if any(bucket.rate for bucket in both) else ()

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._guarded, self._write)
                nursery.start_soon(self._guarded, self._read)

    def end(self) -> None:
        self._scope.cancel()

    def post(self, message: w.Message) -> None:
        self._out += w.encode(message)
        self._wake.set()

    def announce(self) -> None:
        """Say which pieces have come; those said already are forgotten."""
        haves, self.haves = self.haves, []
        for start in range(0, len(haves), w.MAX_LISTED):
            self.post(w.Have(tuple(haves[start : start + w.MAX_LISTED])))

    def prepare(self, grant: Grant) -> None:
        """Our turn: read the piece from the disk while others are sent."""
        if self._nursery is not None and not self._scope.cancel_called:
            self._nursery.start_soon(self._guarded, self._fetch, grant)

    async def _guarded(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Nothing that goes wrong leaves the session; it ends with whatever ends early."""
        try:
            await function(*args)
            if function == self._fetch:
                return
        except RemoteError as error:
            self._serving.stats.faults += 1
            log.warning("%s broke the protocol of the swarm: %s", short_peer_id(self.peer), error)
            self._serving.on_fault(self.peer, str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("the swarm's stream with %s ends: %s", short_peer_id(self.peer), error)
        except Exception:
            log.exception("serving %s failed in an unexpected way", short_peer_id(self.peer))
        self.end()

    # Reading.

    async def _read(self) -> None:
        while True:
            message = await self.channel.receive(w.from_dialler)
            if message is None:
                return
            self.used_at = self._serving.clock.now()
            await self._handle(message)

    async def _handle(self, message: w.FromDialler) -> None:
        shelf = self._serving.shelf
        match message:
            case w.Ask(indexes):
                self._ask(indexes)
                return
            case w.Cancel(indexes):
                for index in indexes:
                    self._charge()
                    if self._serving.uploads.cancel(self.key, index):
                        self.post(w.NoPiece((index,), lost=False))
                return
        self._charge()
        match message:
            case w.Open(root, port):
                await self._open(root, port)
            case w.AskManifest(version):
                manifest = await shelf.manifest(version)
                self.post(w.No("unknown", "no such version here") if manifest is None else w.ManifestIs(manifest))
            case w.AskLayer(root):
                layer = await shelf.layer(root)
                if layer is None:
                    self.post(w.No("unknown", "no such content here"))
                elif len(self._bodies) < w.MAX_ASKED:  # more questions than answers read: the rest is not answered
                    self._bodies.append((w.LayerIs(len(layer)), layer, None))
                    self._wake.set()
            case w.AskHolds(versions):
                self.post(w.HoldsAre(tuple(shelf.holds(version) for version in versions)))
            case w.AskHold(manifest):
                self.post(w.HoldIs(await shelf.hold(self.peer, manifest)))
        while len(self._out) > w.MAX_HEADER:  # answers pile up unread: no further question until they are gone
            await trio.sleep(0.1)

    async def _open(self, root: bytes, port: int) -> None:
        if self.content is not None:
            raise RemoteError("a stream is for one content")
        content = await self._serving.shelf.content(root)
        if content is None:
            self.post(w.No("unknown", "no such content here"))
            return
        # From here on nothing is awaited: what arrives after this bitfield is announced, and after it in the same
        # queue: the asker takes nothing else for an answer.
        self.content = content
        self._meter = self._serving.meters.setdefault(root, Meter())
        self._out += w.encode(w.Bits(content.count)) + content.have()
        self._wake.set()
        if port:
            remote = Address(self.channel.stream.remote.host, port)
            self._serving.on_asker(root, Contact(self.peer, (remote,), "", ""))

    def _ask(self, indexes: tuple[int, ...]) -> None:
        content = self.content
        if content is None:
            raise RemoteError("pieces are asked for before a content is open")
        for index in indexes:
            if index >= content.count:
                raise RemoteError(f"piece {index} of a content of {content.count} is asked for")
            length = min(content.piece_length, content.size - index * content.piece_length)
            self._serving.uploads.ask(self.key, index, length)
        self._serving.pump()

    def _charge(self) -> None:
        if self._flood.take(1, self._serving.clock.now()) > 0:
            raise RemoteError(f"more than {FLOOD_RATE:.0f} messages a second that ask for nothing")

    # Writing.

    async def _fetch(self, grant: Grant) -> None:
        serving, content, data = self._serving, self.content, None
        try:
            if content is not None:  # nothing is granted before it is open
                data = await content.read(grant.index)
        except OSError as error:
            log.warning("cannot read piece %d for %s: %s", grant.index, short_peer_id(self.peer), error)
        if data is None:
            serving.uploads.done(grant, sent=False)
            self._charge()
            self.post(w.NoPiece((grant.index,), lost=True))
            serving.pump()
        else:
            self._bodies.append((w.Piece(grant.index, len(data)), data, grant))
            self._wake.set()

    async def _write(self) -> None:
        serving, channel = self._serving, self.channel
        while True:
            if self._bodies:
                message, body, grant = self._bodies.popleft()
                frames, self._out = bytes(self._out) + w.encode(message), bytearray()
                await channel.send(frames, body, self._limits)
                if grant is not None:
                    self._sent(grant, len(body))
            elif self._out:
                frames, self._out = bytes(self._out), bytearray()
                await channel.send(frames)
            else:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            self.said_at = serving.clock.now()

    def _sent(self, grant: Grant, length: int) -> None:
        serving = self._serving
        self.used_at = serving.clock.now()
        serving.stats.bytes_up += length
        serving.stats.pieces_up += 1
        self._meter.add(length, self.used_at)
        serving.uploads.done(grant, sent=True)
        serving.pump()
