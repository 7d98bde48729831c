"""A connection of the simulated network: two pipes with flow control, and the ways in which they break."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import outcome
import trio

from gossipml.env import Credentials
from gossipml.ids import Address, PeerId

if TYPE_CHECKING:
    from gossipml.env.simulated_net import Machine, Network, Process

CHUNK_BYTES = 1 << 18  # what travels as one piece; small, so that a stream can break in the middle of a message
WINDOW_BYTES = 1 << 21  # sent and not yet read: send buffer, wire and receive buffer together
SHORT_READS = 0.1  # share of reads that give a part of what is there, as any real socket may


class Pipe:
    """One direction of a connection."""

    def __init__(self, network: Network, source: Process, target: Process) -> None:
        self.network = network
        self.source = source
        self.target = target
        self.reader_open = True
        self._chunks: deque[memoryview] = deque()
        self._unread = 0  # bytes sent and not yet read
        self._under_way: deque[Callable[[], None]] = deque()
        self._last_arrival = 0.0
        self._stalled = 0  # arrivals that wait for a partition or a pause to end
        self._ended = False
        self._broken: str | None = None  # for the reader
        self._writer_broken: str | None = None
        self._reader: trio.lowlevel.Task | None = None
        self._serving: tuple[Callable[[], memoryview], Callable[[int], bool]] | None = None
        self._writer: trio.lowlevel.Task | None = None

    # The writer's side.

    async def send(self, parts: tuple[bytes | bytearray | memoryview, ...]) -> None:
        # No turn of the loop for each message: the window makes a writer wait who writes and writes.
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._writer is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        if sum(map(len, parts)) <= CHUNK_BYTES:
            parts = (b"".join(parts),)  # a small message with its header travels in one piece
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                while self._unread >= WINDOW_BYTES and self._writer_broken is None:
                    await self._wait_for_room()
                if self._writer_broken is not None:
                    raise trio.BrokenResourceError(self._writer_broken)
                chunk = bytes(view[start : start + CHUNK_BYTES])  # a copy: the caller goes on writing to its buffer
                self._unread += len(chunk)
                self._transmit(len(chunk), lambda chunk=chunk: self._arrive(chunk))  # type: ignore[misc]

    def post(self, parts: tuple[bytes | bytearray | memoryview, ...]) -> bool:
        if self._writer is not None or self._writer_broken is not None or self._unread >= WINDOW_BYTES:
            return False
        chunk = b"".join(parts)
        if len(chunk) > CHUNK_BYTES:
            return False
        self._unread += len(chunk)
        self._transmit(len(chunk), lambda: self._arrive(chunk))
        return True

    async def _wait_for_room(self) -> None:
        self._writer = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def end(self) -> None:
        """The writer closed in good order: the reader gets what was sent, then the end."""
        self._transmit(0, self._arrive_end)
        self.break_writer("the stream is closed")

    def reset(self, reason: str, opposite: Pipe) -> None:
        """The other side gets what was sent, then errors in both directions."""

        def arrive() -> None:
            self.break_reader(reason)
            opposite.break_writer(reason)

        self._transmit(0, arrive)

    def abandon_writer(self) -> None:
        """The writer died: a send that waits does not come back, a new one fails."""
        self._writer_broken = "this process is dead"

    def break_writer(self, reason: str) -> None:
        if self._writer_broken is None:
            self._writer_broken = reason
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task)

    # Under way.

    def _transmit(self, size: int, arrive: Callable[[], None]) -> None:
        machine = self.source.machine
        if machine.paused:
            machine.held.append(lambda: self._transmit(size, arrive))
            return
        self._under_way.append(arrive)
        self._schedule(size)

    def _schedule(self, size: int) -> None:
        arrival = self.network.stream_arrival(self.source.machine, self.target.machine, size)
        # A stream keeps its order, whatever the delays of its pieces: each arrival takes the oldest piece.
        self._last_arrival = max(arrival, self._last_arrival)
        self.network.time.call_at(self._last_arrival, self._reach)

    def _reach(self) -> None:
        target = self.target.machine
        if self._stalled:
            self._stalled += 1
        elif not self.network.reachable(self.source.machine, target):
            self._stalled = 1
            self.network.stalled.append(self._resume)
        elif target.paused:
            self._stalled = 1
            target.held.append(self._resume)
        else:
            self._under_way.popleft()()

    def _resume(self) -> None:
        stalled, self._stalled = self._stalled, 0
        for _ in range(stalled):
            self._schedule(0)

    def _answer_with_reset(self) -> None:
        """Nobody reads there any more: the writer learns it one way later."""
        target, source = self.target.machine, self.source.machine
        if target.powered:
            when = self.network.stream_arrival(target, source, 40)
            self.network.time.call_at(when, self._reset_arrives)

    def _reset_arrives(self) -> None:
        if self.network.reachable(self.target.machine, self.source.machine):
            self.break_writer("the other side reset the stream")

    # The reader's side.

    def _arrive(self, chunk: bytes) -> None:
        source, target = self.source.machine, self.target.machine
        if not self.target.alive or not self.reader_open:
            self.network.record("tcp-nobody", source.name, target.name, chunk)
            self._answer_with_reset()
            return
        self.network.record("tcp", source.name, target.name, chunk)
        self._chunks.append(memoryview(chunk))
        if self._reader is not None and self._serving is not None:
            self._serve(*self._serving)
        else:
            self._wake_reader()

    def _serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        """At once: a turn of the loop for each message would cost as much as most messages."""
        try:
            while self._chunks and self._reader is not None:
                if not came(self._read(target())):
                    self._wake_reader(outcome.Value(False))
        except BaseException as error:
            self._wake_reader(outcome.Error(error))

    def _arrive_end(self) -> None:
        self._ended = True
        self._wake_reader()

    def break_reader(self, reason: str) -> None:
        if not self._ended and self._broken is None:
            self._broken = reason
        self._wake_reader()

    async def receive_into(self, view: memoryview) -> int:
        return self._read(view) if await self._wait_for_bytes() and self._chunks else 0

    async def serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        self._serving = (target, came)
        try:
            while await self._wait_for_bytes() and came(self._read(target()) if self._chunks else 0):
                pass
        finally:
            self._serving = None

    async def _wait_for_bytes(self) -> bool:
        """True when there are some, or the stream has ended; False when whoever serves wants no more."""
        if self._reader is not None:
            raise trio.BusyResourceError("another task is receiving from this stream")
        if self._chunks:  # otherwise waiting is the checkpoint
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if not self.reader_open:
                raise trio.ClosedResourceError
            if self._ended:
                await trio.lowlevel.checkpoint()
                return True
            if self._broken is not None:
                raise trio.BrokenResourceError(self._broken)
            self._reader = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self._reader = None
                return trio.lowlevel.Abort.SUCCEEDED

            if not await trio.lowlevel.wait_task_rescheduled(abort):
                return False
        return True

    def _read(self, view: memoryview) -> int:
        view = view.cast("B")
        chunk = self._chunks.popleft()
        count = min(len(chunk), len(view))
        rng = self.network.rng
        if count > 1 and rng.random() < SHORT_READS:
            count = rng.randint(1, count - 1)
        view[:count] = chunk[:count]
        if count < len(chunk):
            self._chunks.appendleft(chunk[count:])
        self._unread -= count
        if self._unread < WINDOW_BYTES:
            self._wake_writer()
        return count

    def close_reader(self) -> None:
        if self.reader_open:
            self.reader_open = False
            if self._chunks:
                self._chunks.clear()
                self._answer_with_reset()
            self._wake_reader()

    def abandon_reader(self) -> None:
        """The reader died: a read that waits does not come back."""
        self.reader_open = False
        self._chunks.clear()

    def _wake_reader(self, going_on: outcome.Outcome[bool] | None = None) -> None:
        if self._reader is not None:
            task, self._reader = self._reader, None
            trio.lowlevel.reschedule(task, going_on or outcome.Value(True))


class SimulatedStream:
    """`Stream` of the simulated network."""

    def __init__(
        self,
        process: Process,
        peer_id: PeerId,
        remote: Address,
        protocol: str,
        key_id: str,
        incoming: Pipe,
        outgoing: Pipe,
    ) -> None:
        self.peer_id = peer_id
        self.remote = remote
        self.protocol = protocol
        self.key_id = key_id
        self._process = process
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        process.streams[self] = None

    async def send_all(self, *parts: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        await self._outgoing.send(parts)
        if self._closed:
            raise trio.ClosedResourceError

    def post(self, *parts: bytes | bytearray | memoryview) -> bool:
        return not self._closed and self._outgoing.post(parts)

    @property
    def unsent(self) -> bool:
        return False  # there is room for all of it, or for nothing

    async def receive_into(self, view: memoryview) -> int:
        if self._closed:
            raise trio.ClosedResourceError
        return await self._incoming.receive_into(view)

    async def serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        await self._incoming.serve(target, came)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._process.streams.pop(self, None)
            self._outgoing.end()
            self._incoming.close_reader()

    def die(self, last_words: str | None) -> None:
        """End with the process, or before anybody had the stream. The other side gets an error that says
        `last_words`, or nothing at all."""
        if not self._closed:
            self._closed = True
            self._process.streams.pop(self, None)
            if last_words is not None:
                self._outgoing.reset(last_words, opposite=self._incoming)
            self._outgoing.abandon_writer()
            self._incoming.abandon_reader()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def open_streams(
    network: Network,
    dialler: Process,
    listener: Process,
    remote: Address,
    ours: Credentials,
    theirs: Credentials,
    protocol: str,
    key_id: str,
) -> tuple[SimulatedStream, SimulatedStream]:
    """The two ends of a new connection: the dialler's, then the listener's."""
    there, back = Pipe(network, dialler, listener), Pipe(network, listener, dialler)
    machine: Machine = dialler.machine
    machine.next_port += 1
    near = SimulatedStream(dialler, theirs.identity.peer_id, remote, protocol, key_id, incoming=back, outgoing=there)
    source = Address(machine.host, machine.next_port)
    far = SimulatedStream(listener, ours.identity.peer_id, source, protocol, key_id, incoming=there, outgoing=back)
    return near, far
