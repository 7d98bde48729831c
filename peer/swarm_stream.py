"""One stream of the swarm: whole messages in and out, and by when the other side must have moved.

A body is received in place and sent without a copy. Whoever makes no progress inside a message for `stall` seconds,
or sends a body slower than `slowest` on the whole, is `overdue`: whoever owns the channel looks at that now and then
and ends it. That is coarser than a time-out around each step and costs nothing: there are several steps to each
256 KiB. Waiting for our own limits of rate does not count against the other side.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import trio

from gossipml.env import Clock, Stream
from gossipml.errors import LocalError
from gossipml.peer.rates import TokenBucket
from gossipml.peer.swarm_ports import SwarmConfig
from gossipml.peer.swarm_wire import LENGTH, MAX_HEADER, read_length

T = TypeVar("T")

SLICE = 512 * 1024  # what the TLS pump encrypts at once; progress in sending is judged by it
SCRATCH = 64 * 1024  # an unwanted body is read into this much, over and over

NOBODY = 3  # references to a buffer that is free: of the queue, of a local variable, of `getrefcount` itself


class Channel:
    """Messages on a stream. One task may receive while another sends."""

    def __init__(self, stream: Stream, config: SwarmConfig, clock: Clock) -> None:
        self.stream = stream
        self.received = 0
        """Bytes of wanted bodies so far."""
        self.receive_by = math.inf
        self.send_by = math.inf
        self._config = config
        self._now = clock.now
        # What has been read and belongs to no message yet, mostly the first bytes of a body: `_start` to `_end`.
        self._buffer = memoryview(bytearray(LENGTH.size + MAX_HEADER))
        self._start = self._end = 0

    @property
    def overdue(self) -> bool:
        """Whether the other side has let us wait for too long."""
        return self._now() > min(self.receive_by, self.send_by)

    async def receive(self, decode: Callable[[memoryview], T], *, within: float = math.inf) -> T | None:
        """The next message; None at an orderly end. It must begin `within` seconds.

        Raises RemoteError, trio.BrokenResourceError, trio.ClosedResourceError.
        """
        wanted = LENGTH.size
        if self._start == self._end:
            self._start = self._end = 0
            self.receive_by = self._now() + within
        while True:
            there = self._end - self._start
            if there >= LENGTH.size:
                wanted = LENGTH.size + read_length(self._buffer[self._start : self._start + LENGTH.size])
                if there >= wanted:
                    break
            if there:
                if self._start + wanted > len(self._buffer):
                    self._buffer[:there] = bytes(self._buffer[self._start : self._end])
                    self._start, self._end = 0, there
                self.receive_by = self._now() + self._config.stall
            count = await self.stream.receive_into(self._buffer[self._end :])
            if count == 0:
                if there:
                    raise trio.BrokenResourceError("the connection ended in the middle of a message")
                return None
            self._end += count
        start = self._start + LENGTH.size
        self._start += wanted
        self.receive_by = math.inf
        return decode(self._buffer[start : self._start])

    async def receive_body(
        self,
        view: memoryview,
        limits: tuple[TokenBucket, ...] = (),
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Fill the view with what follows the message just received; `arrived` hears how many bytes came, each time."""
        ready = min(len(view), self._end - self._start)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        now = self._now()
        ends = now + self._config.stall + len(view) / self._config.slowest
        most = min((bucket.slice(SLICE) for bucket in limits if bucket.rate), default=len(view))
        count = ready
        while True:
            self.received += count
            if arrived is not None:
                arrived(count)
            view = view[count:]
            if limits and count:
                self.receive_by = math.inf
                wait = await _pay(limits, count, now)
                now += wait
                ends += wait
            if not view:
                break
            self.receive_by = min(now + self._config.stall, ends)
            count = await self.stream.receive_into(view[:most])
            if count == 0:
                raise trio.BrokenResourceError("the connection ended in the middle of a piece")
            now = self._now()
        self.receive_by = math.inf

    async def skip_body(self, length: int, limits: tuple[TokenBucket, ...] = ()) -> None:
        scratch = memoryview(bytearray(min(length, SCRATCH)))
        while length:
            part = scratch[: min(length, SCRATCH)]
            await self.receive_body(part, limits)
            self.received -= len(part)
            length -= len(part)

    async def send(
        self, frames: bytes, body: bytes | bytearray | memoryview = b"", limits: tuple[TokenBucket, ...] = ()
    ) -> None:
        """Send encoded messages, and the body of the last one."""
        view = memoryview(body)
        if len(body) and not frames:
            raise LocalError("a body follows its message")
        most = min((bucket.slice(SLICE) for bucket in limits if bucket.rate), default=SLICE)
        while frames or view:
            part, view = view[:most], view[most:]
            if limits and part:
                await _pay(limits, len(part), self._now())
            self.send_by = self._now() + self._config.stall + len(part) / self._config.slowest
            if frames:
                await self.stream.send_all(frames, part)
                frames = b""
            else:
                await self.stream.send_all(part)
            self.send_by = math.inf

    async def close(self) -> None:
        """Close, also when we are being cancelled."""
        self.receive_by = self.send_by = math.inf
        with trio.CancelScope(shield=True), trio.move_on_after(1.0):
            await self.stream.aclose()


async def _pay(limits: tuple[TokenBucket, ...], count: int, now: float) -> float:
    """Wait as long as our own limits say; the seconds."""
    wait = max(bucket.take(count, now) for bucket in limits)
    if wait > 0:
        await trio.sleep(wait)
    return wait


class Buffers:
    """Memory for pieces that are received and written, bounded for all downloads together, used again and again.

    A new buffer for each piece costs as much as to decrypt it, because the system clears every page that it gives.
    Whoever is given a buffer may keep it (the store remembers the latest pieces, the server sends them); it is used
    again when nobody has it any more, which CPython's count of references tells.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        """Bytes of pieces that are received or written; what the store keeps is the store's to bound."""
        self.peak = 0
        self._made: deque[bytearray] = deque()
        self._freed = trio.Event()

    async def acquire(self, count: int) -> bytearray:
        """A buffer of that size, once there is room; more than there is at all is given to one alone."""
        while self.used and self.used + count > self.most:
            await self._freed.wait()
        self.used += count
        self.peak = max(self.peak, self.used)
        for _ in range(len(self._made)):
            buffer = self._made.popleft()
            if len(buffer) == count:
                self._made.append(buffer)
                if sys.getrefcount(buffer) == NOBODY:
                    return buffer
        buffer = bytearray(count)
        self._made.append(buffer)
        return buffer

    def release(self, buffer: bytearray) -> None:
        """The piece is written, or given up."""
        self.used -= len(buffer)
        self._freed.set()
        self._freed = trio.Event()

    def clear(self) -> None:
        """Give back to the system what nobody uses."""
        self._made.clear()
