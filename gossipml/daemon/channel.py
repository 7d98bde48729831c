"""A process that works for the daemon, and the channel to it: requests out, answers in, bulk bytes in shared files.

`open_process` starts `gossipml.models.worker_main` and ends it on leaving: end of input, then SIGTERM, then SIGKILL.
Many requests may be under way; each has an id. Nothing here blocks the loop: bulk bytes are copied in threads. When
the process dies, everything that waits for it raises `WorkerDied`. See `gossipml.models.worker_wire` for the messages.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from gossipml import codec
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.worker_wire import FrameReader, create_shared_file, pack_frame, read_shared, write_shared

log = logging.getLogger("gossipml.worker")

Fields = dict[str, codec.Value]

QUEUED = 64  # frames not yet written: the daemon's own limits on predictions and merges are met first
READ = 1 << 16
SMALL_COPY = 1 << 18  # bytes copied in the loop: 50 us; a thread costs as much to ask
MAX_LOG_LINE = 4096
END_SECONDS = 1.0  # for a batch to end after the end of input, and again after SIGTERM


class WorkerDied(LocalError):
    """The process has ended; what was asked of it has no answer."""


@dataclass(eq=False)
class _Pending:
    """A request without an answer yet. `slot` is given back when the answer has come and been copied out."""

    request: int
    slot: trio.Semaphore | None
    answered: trio.Event = field(default_factory=trio.Event)
    ok: Fields | None = None
    body: bytes = b""
    error: Exception | None = None
    abandoned: bool = False


@asynccontextmanager
async def open_process(threads: int, what: str = "training") -> AsyncIterator[Channel]:
    """The channel to a new process; `what` it does is said when it dies."""
    inbox, outbox = create_shared_file("inbox"), create_shared_file("outbox")
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            process = await _start_process(threads, (inbox, outbox))
            try:
                channel = Channel(process, inbox, outbox, what)
                nursery.start_soon(channel._write_frames)
                nursery.start_soon(channel._read_frames)
                nursery.start_soon(channel._forward_log)
                # An error is carried over the end of the nursery, which would wrap it in a group.
                try:
                    yield channel
                except Exception as error:
                    failure = error
            finally:
                await _end_process(process)
                nursery.cancel_scope.cancel()
    finally:
        os.close(inbox)
        os.close(outbox)
    if failure is not None:
        raise failure


class Channel:
    """Made by `open_process`."""

    def __init__(self, process: trio.Process, inbox: int, outbox: int, what: str) -> None:
        self._process = process
        self.inbox, self.outbox = inbox, outbox
        self._what = what
        # Whoever holds the slot decides what lies in the shared file; the answer to its request gives it back.
        self._inbox_slot, self._outbox_slot = trio.Semaphore(1), trio.Semaphore(1)
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._queue, self._queued = trio.open_memory_channel[bytes](QUEUED)
        self._unwritten = 0  # frames in the queue or partly written: nothing may overtake them
        self._death: str | None = None
        self._last_words = ""
        self._died = trio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_for_death(self) -> None:
        """Raises WorkerDied when the process has ended."""
        await self._died.wait()
        raise WorkerDied(self._death or "")

    async def fetch(self, do: str, asked: dict[str, object]) -> bytes:
        """The bytes that the answer leaves in the outbox."""
        await self._outbox_slot.acquire()
        pending = self._begin(do, asked, self._outbox_slot)
        try:
            await self._send(do, asked, b"", pending)
            ok, _ = await self._result(pending)
            size = codec.get_int(ok, "size")
            if size <= SMALL_COPY:
                return read_shared(self.outbox, size)
            return await trio.to_thread.run_sync(read_shared, self.outbox, size)
        finally:
            if pending.answered.is_set():
                self._outbox_slot.release()
            else:  # the worker may still write into the file
                pending.abandoned = True

    async def deliver(self, do: str, asked: dict[str, object], data: bytes | bytearray) -> Fields:
        """The answer to a request whose bytes lie in the inbox."""
        await self._inbox_slot.acquire()
        try:
            if len(data) <= SMALL_COPY:
                write_shared(self.inbox, data)
            else:
                await trio.to_thread.run_sync(write_shared, self.inbox, data)
            asked = {**asked, "size": len(data)}
            pending = self._begin(do, asked, self._inbox_slot)
        except BaseException:
            self._inbox_slot.release()
            raise
        try:
            await self._send(do, asked, b"", pending)
            ok, _ = await self._result(pending)
            return ok
        finally:
            if pending.answered.is_set():
                self._inbox_slot.release()
            else:  # the worker may still read the file
                pending.abandoned = True

    async def ask(self, do: str, asked: dict[str, object], body: bytes = b"") -> tuple[Fields, bytes]:
        pending = self._begin(do, asked, None)
        try:
            await self._send(do, asked, body, pending)
            return await self._result(pending)
        finally:
            if do == "train" and not pending.answered.is_set():
                self._cancel_round(pending)

    def _begin(self, do: str, asked: dict[str, object], slot: trio.Semaphore | None) -> _Pending:
        self._next_id += 1
        pending = _Pending(self._next_id, slot)
        asked["id"], asked["do"] = self._next_id, do
        self._pending[self._next_id] = pending
        if self._death is not None:
            self._settle(self._next_id, error=WorkerDied(self._death))
        return pending

    async def _send(self, do: str, asked: dict[str, object], body: bytes, pending: _Pending) -> None:
        if pending.answered.is_set():
            return
        whole = pack_frame(asked, body)
        frame = self._write_at_once(whole)
        if not frame:
            return
        self._unwritten += 1  # at once: the writer may take the frame before `send` returns
        with trio.CancelScope(shield=len(frame) < len(whole)):  # never half a frame
            try:
                await self._queue.send(frame)
            except BaseException:
                # Never sent, so there is nothing to wait for.
                self._unwritten -= 1
                self._pending.pop(pending.request, None)
                pending.answered.set()
                raise

    async def _result(self, pending: _Pending) -> tuple[Fields, bytes]:
        await pending.answered.wait()
        if pending.error is not None:
            raise pending.error
        assert pending.ok is not None
        return pending.ok, pending.body

    def _cancel_round(self, pending: _Pending) -> None:
        self._next_id += 1
        try:
            self._queue.send_nowait(pack_frame({"id": self._next_id, "do": "cancel", "job": pending.request}))
        except (trio.WouldBlock, trio.BrokenResourceError):
            return  # the round ends by itself a little later
        self._unwritten += 1
        self._pending[self._next_id] = _Pending(self._next_id, None)

    def _settle(
        self, request: int, ok: Fields | None = None, body: bytes = b"", error: Exception | None = None
    ) -> None:
        pending = self._pending.pop(request, None)
        if pending is None:
            log.warning("the worker answered request %d, which nobody made", request)
            return
        pending.ok, pending.body, pending.error = ok, body, error
        pending.answered.set()
        if pending.abandoned and pending.slot is not None:
            pending.slot.release()

    def _write_at_once(self, frame: bytes) -> bytes:
        """Write what the pipe takes without waiting, which spares a turn of the task that writes the others; what is
        left."""
        stdin = self._process.stdin
        if self._unwritten or not isinstance(stdin, trio.lowlevel.FdStream):
            return frame
        try:
            return frame[os.write(stdin.fileno(), frame) :]  # does not block: trio has seen to that
        except BlockingIOError:
            return frame
        except OSError:
            return b""  # the process is gone; the reader says why

    # Tasks

    async def _write_frames(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            async for frame in self._queued:  # one task writes: a cancelled caller never cuts a frame
                await stdin.send_all(frame)
                self._unwritten -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The reader says why. Whoever still sends must not wait for room.
            async for _ in self._queued:
                pass

    async def _read_frames(self) -> None:
        stdout, frames = self._process.stdout, FrameReader()
        assert stdout is not None
        reason = ""
        try:
            while data := await stdout.receive_some(READ):
                frames.feed(data)
                while (frame := frames.next_frame()) is not None:
                    self._take(*frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except (LocalError, RemoteError) as error:
            reason = str(error)
            self._process.kill()  # nothing that it says can be understood any more
        code = await self._process.wait()
        self._death = f"the {self._what} process ended: {reason or _describe_exit(code)}"
        if self._last_words:
            self._death += f"; its last words: {self._last_words}"
        for request in list(self._pending):
            self._settle(request, error=WorkerDied(self._death))
        self._died.set()

    def _take(self, header: Fields, body: bytes) -> None:
        request = codec.get_int(header, "id")
        if "ok" in header:
            self._settle(request, ok=codec.as_map(header["ok"]), body=body)
            return
        text = codec.get_str(header, "error", limit=65536)
        kind = UserError if codec.get_str(header, "fault") == "user" else LocalError
        self._settle(request, error=kind(text))

    async def _forward_log(self) -> None:
        """What the worker and the user's code print, line by line, to the log."""
        stderr, line = self._process.stderr, bytearray()
        assert stderr is not None
        try:
            while data := await stderr.receive_some(READ):
                for piece in data.splitlines(keepends=True):
                    line += piece
                    if piece.endswith((b"\n", b"\r")) or len(line) > MAX_LOG_LINE:
                        self._log_line(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._log_line(line)

    def _log_line(self, line: bytearray) -> None:
        text = line[:MAX_LOG_LINE].decode(errors="replace").rstrip()
        line.clear()
        if text:
            self._last_words = text[:200]
            log.info("%s", text)


async def _start_process(threads: int, shared: tuple[int, int]) -> trio.Process:
    # torch's libraries read these when they load.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # -P: nothing in the working folder may stand in for an installed package (a numpy.py, a models/).
    command = [sys.executable, "-P", "-m", "gossipml.models.worker_main"]
    return await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=shared,
        env=environment,
    )


async def _end_process(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        await process.stdin.aclose()
        for end in (process.terminate, process.kill):
            with trio.move_on_after(END_SECONDS):
                await process.wait()
                break
            end()
        await process.wait()
        await process.stdout.aclose()
        await process.stderr.aclose()


def _describe_exit(code: int) -> str:
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit status {code}"
