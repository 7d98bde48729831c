"""One open stream to one peer: a task that reads, another that writes, and the session between them.

Writing: what is small goes out at once when nothing is on its way; else small messages queue ahead of updates. At most
one update waits behind the one being sent, a second is refused to the caller (`post_update` is False), so a slow peer
costs one body of memory and nobody's time.
Reading: never waits for anything but the stream. The body of an accepted update is received in place; the body
of a refused one is read away through 64 KiB, which costs the sender's bandwidth and keeps the session: a
round trip for permission before each update would delay every accepted one instead. Bodies that stall or
trickle, in either direction, end the session; so does everything that breaks the wire specification. While a
body comes in, pongs that nobody asked for tell the sender that we live: its own probes wait behind the body, on a
slow line for minutes. Nothing raised here reaches the task that runs the link, except cancellation and bugs.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from gossipml.env import Clock, Stream
from gossipml.errors import RemoteError
from gossipml.ids import PeerId, short_peer_id
from gossipml.peer import session as s
from gossipml.peer.rates import Bandwidth
from gossipml.peer.session import Session
from gossipml.peer.wire import Body, Decoder, Goodbye, Hello, Message, Pong, Profile, Update, encode

log = logging.getLogger("gossipml.peer")

READ_AHEAD = 4096  # bytes: most headers, and the bodies of tiny models with them
AT_ONCE = 32 * 1024  # bytes of a body that is sent without its task: less than any buffer of a socket
CLOCK_ERROR = 0.001  # seconds by which a deadline may come too early
HEARD_SECONDS = 0.2  # how exactly it is known when a peer was last heard; its failure takes seconds to be believed


@dataclass(frozen=True)
class LinkConfig:
    stall: float = 10.0
    """Seconds without one byte of progress inside a frame, in either direction (guess)."""
    slowest: float = 64 * 1024
    """Bytes per second that a body must make on the whole, after `stall` seconds of grace (guess: ISDN). A
    trickle of a byte now and then does not hold a buffer for ever."""
    slice: int = 256 * 1024
    """Bytes handed to the stream at once: what the TLS pump encrypts at once; progress is judged by it."""
    beat: float = 2.0
    """Seconds without a word from us, while a body comes in, before a sign of life: well within the failure
    detector's silence and answer."""
    control: int = 64
    """Small messages waiting to be sent; a peer that reads none of 64 is stuck."""
    goodbye: float = 1.0
    """Seconds that the last words may take."""


@dataclass
class Traffic:
    """Bytes of frames; TLS adds about one per cent. What is counted here is counted in `total` too."""

    sent: int = 0
    received: int = 0
    total: Traffic | None = None

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        self.sent += sent
        self.received += received
        if self.total is not None:
            self.total.add(sent=sent, received=received)


@dataclass(frozen=True)
class Parcel:
    """An update on its way out."""

    update: Update
    body: bytes
    made: float
    """Monotonic seconds."""


class Owner(Protocol):
    """Who decides what a link does not: the mesh, or a test."""

    def on_introduced(self, link: Link, hello: Hello) -> s.Admit | s.Decline: ...

    def on_opened(self, link: Link, profile: Profile) -> None: ...

    def on_profile(self, link: Link, profile: Profile) -> None: ...

    def on_message(self, link: Link, message: Message) -> None: ...

    def on_heard(self, link: Link) -> None: ...

    def on_asked(self, link: Link, update: Update) -> None:
        """The other side asks for our model without sending its own."""

    def on_offer(self, link: Link, update: Update) -> bool:
        """Whether the body is to be kept."""

    def on_body(self, link: Link, update: Update, body: bytearray) -> None: ...

    def on_body_lost(self, link: Link, update: Update) -> None: ...

    def on_sent(self, link: Link, parcel: Parcel, reason: str) -> None:
        """A posted update has come to its end; the reason is empty when it was sent whole."""

    def on_fault(self, link: Link, reason: str) -> None:
        """The other side broke the protocol."""

    def body_length(self, update: Update) -> int | None: ...


class Link:
    """A stream and its session. `run` returns when it is over, for whatever reason, and closes the stream."""

    def __init__(
        self, stream: Stream, session: Session, owner: Owner, clock: Clock, traffic: Traffic, config: LinkConfig
    ) -> None:
        self.stream = stream
        self.session = session
        self.peer: PeerId = stream.peer_id
        self.traffic = traffic
        self.opened_at: float | None = None
        self.used_at = clock.now()
        """When an update last went either way."""
        self.renew_at = 0.0
        """When the mesh may next try to open it anew with newer keys."""
        self.heard_at = clock.now()
        self.hints_due = clock.now()
        """When contacts may be attached to an update again."""
        self.bandwidth = Bandwidth()
        """Of the bodies that we sent."""
        self.encoding = ""
        """Of the last body that was queued."""
        self._said_at = clock.now()
        self.end_code = ""
        """Why it ended: a refusal's code, goodbye, timeout, local, broken, fault."""
        self.end_reason = ""
        self._owner = owner
        self._clock = clock
        self._config = config
        self._control: deque[bytes] = deque()
        self._waiting: Parcel | None = None
        self._sending: Parcel | None = None
        self._receiving: Update | None = None  # its body is under way
        self._keeping = False  # and it is wanted
        self._wake = trio.Event()
        self._scope: trio.CancelScope | None = None
        self._stalling = trio.CancelScope()  # of the writer; one for all that it sends, as each costs what a send does
        self._lingering = trio.CancelScope()  # of the reader, likewise
        self._decoder = Decoder(owner.body_length)
        self._frame_ends = math.inf  # when what is being received must be there
        self._finishing = False
        self._buffer = memoryview(bytearray(READ_AHEAD))
        self._in_place = False  # what comes next comes into the decoder's own buffer
        self._in_frame = False  # a frame is partly sent: nothing else can be said any more

    @property
    def is_open(self) -> bool:
        return self.session.state is s.State.OPEN and not self._finishing

    def post(self, message: Message) -> None:
        """Queue a small message. A peer that lets too many pile up is cut off."""
        if self._finishing:
            return
        if len(self._control) >= self._config.control:
            self._end("broken", f"{len(self._control)} messages wait unread")
            self._cancel()
            return
        self._say(encode(message))

    def post_news(self, message: Message) -> None:
        """Send a small message that the next one replaces: nothing when others still wait to be sent."""
        if self.is_open and not self._control:
            self.post(message)

    def post_update(self, parcel: Parcel) -> bool:
        """Queue an update; False when another one is waiting already. True promises one `on_sent`."""
        if not self.is_open or self._waiting is not None:
            return False
        begun = self._clock.now()
        if self._is_idle and len(parcel.body) <= AT_ONCE and self._post(_header(parcel.update), parcel.body):
            self.used_at, self._sending = begun, parcel
            if not self._in_frame:
                self._update_sent(begun)
        else:
            self._waiting = parcel
            self._wake.set()
        return True

    def finish(self, reason: str, *, code: str = "local") -> None:
        """Say goodbye and end."""
        if not self._finishing:
            self._end(code, reason)
            self._act(self.session.handle(s.End(reason), self._clock.now()))

    def break_off(self, reason: str) -> None:
        """End without a word: the other side does not listen."""
        self._end("broken", reason)
        self._cancel()

    def announce(self, profile: Profile) -> None:
        """Tell the other side that our profile has changed."""
        self._act(self.session.handle(s.ProfileChanged(profile), self._clock.now()))

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                self._act(self.session.handle(s.Started(), self._clock.now()))
                nursery.start_soon(self._write)
                await self._read()
        finally:
            await self._part()

    # Reading.

    async def _read(self) -> None:
        try:
            self._set_deadline()
            with self._lingering:
                await self.stream.serve(self._target, self._came)
                return
            self._act(self.session.handle(s.Deadline(), self._clock.now() + CLOCK_ERROR))
            self._end("broken", "a message came too slowly")  # unless it was the hello
        except RemoteError as error:
            self._owner.on_fault(self, str(error))
            self.finish(str(error), code="fault")
            return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._end("broken", str(error) or "the connection broke")
        self._cancel()

    def _target(self) -> memoryview:
        """Where the next bytes belong.

        A small message is received whole, with what follows it, instead of its length first; a body in its place.
        """
        target = self._decoder.target()
        self._in_place = len(target) >= READ_AHEAD
        return target if self._in_place else self._buffer

    def _came(self, count: int) -> bool:
        """Take in what was received; whether there is more to hear."""
        decoder = self._decoder
        if count == 0:
            if not decoder.between_frames:
                raise trio.BrokenResourceError("the connection ended in the middle of a message")
            raise trio.BrokenResourceError("the other side closed the connection")
        self._heard(count)
        ahead = self._buffer[:count]
        while count:
            taken = count
            if not self._in_place:
                target = decoder.target()
                taken = min(len(target), count)
                target[:taken] = ahead[:taken]
                ahead = ahead[taken:]
            count -= taken
            event = decoder.received(taken)
            if event is None:
                self._give_a_sign()
                continue
            if isinstance(event, Body):
                self._body_done(event)
            elif not self._finishing:  # else it crossed our own last words
                self._received(event)
            if self._finishing:
                return False  # the writer sends the last words and ends the link
            self._frame_ends = math.inf
        self._set_deadline()
        return True

    def _set_deadline(self) -> None:
        """Inside a frame the next bytes are due; moved on with each piece. The hello has a time of its own."""
        due, hello = math.inf, self.session.next_deadline()
        if not self._decoder.between_frames:
            now = trio.current_time()
            if self._frame_ends == math.inf:
                self._frame_ends = now + self._body_seconds(self._receiving)
            due = min(now + self._config.stall, self._frame_ends)
        if hello is not None:
            due = min(due, trio.current_time() + max(0.0, hello - self._clock.now()))
        if due != self._lingering.deadline:
            self._lingering.deadline = due

    def _heard(self, count: int) -> None:
        self.traffic.add(received=count)
        now = self._clock.now()
        if now - self.heard_at > HEARD_SECONDS or self._decoder.between_frames:
            self.heard_at = now
            self._owner.on_heard(self)

    def _give_a_sign(self) -> None:
        """Of life, while a long body comes in."""
        if self._receiving is not None and self._clock.now() - self._said_at > self._config.beat:
            self._said_at = self._clock.now()
            self.post(Pong(0))

    def _received(self, message: Message) -> None:
        is_update = isinstance(message, Update)
        if not (is_update and self.session.is_open):
            self._act(self.session.handle(s.Received(message), self._clock.now()))
        if isinstance(message, Update) and not self._finishing:
            self.used_at = self._clock.now()
            if not message.body_length:
                self._owner.on_asked(self, message)
                return
            self._keeping = self._owner.on_offer(self, message)
            self._receiving = message
            if self._keeping:
                self._decoder.keep_body()
            else:
                self._decoder.discard_body()

    def _body_done(self, body: Body) -> None:
        self._receiving = None
        if body.data is not None:
            self._owner.on_body(self, body.update, body.data)

    def _act(self, actions: list[s.Action]) -> None:
        for action in actions:
            match action:
                case s.Send(message):
                    if len(self._control) < self._config.control:
                        self._say(encode(message))
                case s.Introduced(hello):
                    self._act(self.session.handle(self._owner.on_introduced(self, hello), self._clock.now()))
                case s.Opened(profile):
                    self.opened_at = self._clock.now()
                    self._owner.on_opened(self, profile)
                case s.PeerProfile(profile):
                    self._owner.on_profile(self, profile)
                case s.Deliver(message):
                    if not isinstance(message, Update):
                        self._owner.on_message(self, message)
                case s.Closed(code, reason):
                    self._end(code, reason)

    # Writing.

    @property
    def _is_idle(self) -> bool:
        """Whether nothing is being sent or waits for it."""
        return not (self._in_frame or self._control or self._waiting or self._sending)

    def _say(self, message: bytes) -> None:
        if not (self._is_idle and self._post(message)):
            self._control.append(message)
            self._wake.set()

    def _post(self, *parts: bytes) -> bool:
        """Send a whole frame at once, if that can be."""
        if not self.stream.post(*parts):
            return False
        self._note_sent(parts)
        if self.stream.unsent:
            self._in_frame = True
            self._wake.set()
        return True

    async def _write(self) -> None:
        try:
            with self._stalling:
                await self._send_all()
            if self._stalling.cancelled_caught:
                raise trio.TooSlowError
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._end("broken", str(error) or "the connection broke")
        except trio.TooSlowError:
            self._end("broken", "the other side reads too slowly")
        self._cancel()

    async def _send_all(self) -> None:
        """Until the last words are said."""
        while True:
            if self.stream.unsent:
                await self._send()  # the rest of what was sent at once
                self._update_sent(self.used_at)
            elif self._control:
                await self._send(self._control.popleft())
            elif self._finishing:
                break
            elif self._waiting is not None:
                await self._send_update()
            else:
                self._wake = trio.Event()
                await self._wake.wait()

    async def _send_update(self) -> None:
        parcel, self._waiting = self._waiting, None
        if parcel is None:
            return
        self._sending = parcel
        self.used_at = begun = self._clock.now()
        view = memoryview(parcel.body)
        if len(view) <= self._config.slice:  # one stall bounds it all: two time-outs less for each small update
            await self._send(_header(parcel.update), view)
        else:
            with trio.fail_after(self._body_seconds(parcel.update)):
                await self._send(_header(parcel.update), view[: self._config.slice], more=True)
                for start in range(self._config.slice, len(view), self._config.slice):
                    await self._send(view[start : start + self._config.slice], more=True)
            self._in_frame = False
        self._update_sent(begun)

    def _update_sent(self, begun: float) -> None:
        """If it was an update."""
        parcel, self._sending = self._sending, None
        if parcel is not None:
            self.bandwidth.learn(len(parcel.body), self._clock.now() - begun)
            self._owner.on_sent(self, parcel, "")

    async def _send(self, *parts: bytes | memoryview, more: bool = False) -> None:
        self._in_frame = True
        self._stalling.deadline = trio.current_time() + self._config.stall
        await self.stream.send_all(*parts)
        self._stalling.deadline = math.inf
        self._note_sent(parts)
        self._in_frame = more

    def _note_sent(self, parts: Sequence[bytes | memoryview]) -> None:
        self.traffic.add(sent=sum(map(len, parts)))
        self._said_at = self._clock.now()

    def _body_seconds(self, update: Update | None) -> float:
        return self._config.stall + (update.body_length / self._config.slowest if update else 0.0)

    # Ending.

    def _end(self, code: str, reason: str) -> None:
        if not self._finishing:
            self._finishing = True
            self.end_code, self.end_reason = code, reason
            log.debug("session with %s ends: %s (%s)", short_peer_id(self.peer), reason, code)
        self._wake.set()
        if self._sending is not None:  # the last words cannot overtake half a body
            self._cancel()
        elif self._scope is not None:
            last = trio.current_time() + self._config.goodbye
            self._scope.deadline = min(self._scope.deadline, last)

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def _part(self) -> None:
        """Give back what was promised, say goodbye if it can still be said, close the stream."""
        for parcel in (self._sending, self._waiting):
            if parcel is not None:
                self._owner.on_sent(self, parcel, self.end_reason or "stopping")
        self._sending = self._waiting = None
        if self._receiving is not None and self._keeping:
            self._owner.on_body_lost(self, self._receiving)
        with trio.CancelScope(shield=True), trio.move_on_after(self._config.goodbye):
            if not self._finishing and not self._in_frame and self.session.state is s.State.OPEN:
                self._end("local", "stopping")
                try:
                    await self.stream.send_all(encode(Goodbye("stopping")))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # it is gone already
            await self.stream.aclose()


@functools.lru_cache(64)  # a push, and answers until the next round, have one header for most of their receivers
def _header(update: Update) -> bytes:
    return encode(update)
