"""The daemon's side of the training process: a `Trainer` whose work happens elsewhere.

`open_worker` starts `gossipml.models.worker_main`, waits until its model is built, and ends it on leaving: end
of input, then SIGTERM, then SIGKILL. Many requests may be under way; each has an id. Nothing here blocks the
loop: bulk bytes are copied in threads. When the process dies, everything that waits for it raises `WorkerDied`.
See `gossipml.models.worker_wire` for the messages.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from gossipml import codec
from gossipml.api.ports import TensorSpec
from gossipml.config import PeerConfig
from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.compression import packed_size, parse_form
from gossipml.models.trainer import Evaluation, Export, Layout, MergeReport, RoundReport
from gossipml.models.worker_wire import (
    MAX_BODY,
    FrameReader,
    create_shared_file,
    pack_frame,
    read_shared,
    write_shared,
)

log = logging.getLogger("gossipml.worker")

Fields = dict[str, codec.Value]

QUEUED = 64  # frames not yet written: the daemon's own limits on predictions and merges are met first
READ = 1 << 16
WHOLE = 512  # bytes that a pipe takes whole or not at all, everywhere (POSIX: PIPE_BUF)
SMALL_COPY = 1 << 18  # bytes copied in the loop: 50 us; a thread costs as much to ask
MAX_LOG_LINE = 4096
END_SECONDS = 1.0  # for a batch to end after the end of input, and again after SIGTERM


class WorkerDied(LocalError):
    """The training process has ended; what was asked of it has no answer."""


@dataclass(frozen=True)
class WorkerInfo:
    """What the worker said when it was ready."""

    layout: Layout
    source: str
    train_samples: int
    validation_samples: int
    test_samples: int
    batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    features: tuple[str, ...]
    picture: tuple[int, ...]
    """Height, width and channels of the pictures that the model takes; empty where it takes none."""
    labels: tuple[str, ...]
    device: str
    threads: int


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
async def open_worker(config: PeerConfig, network_id: bytes) -> AsyncIterator[WorkerTrainer]:
    """The trainer that `config` asks for, ready. UserError when model, data or split are wrong.

    Waits as long as the model and its data take to load; the timeout is the caller's.
    """
    inbox, outbox = create_shared_file("inbox"), create_shared_file("outbox")
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            process = await _start_process(config.threads, (inbox, outbox))
            try:
                worker = WorkerTrainer(process, inbox, outbox)
                nursery.start_soon(worker._write_frames)
                nursery.start_soon(worker._read_frames)
                nursery.start_soon(worker._forward_log)
                # An error is carried over the end of the nursery, which would wrap it in a group.
                try:
                    await worker._configure(config, network_id)
                    yield worker
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


class WorkerTrainer:
    """`gossipml.models.trainer.Trainer` in a process of its own. Made by `open_worker`."""

    info: WorkerInfo

    def __init__(self, process: trio.Process, inbox: int, outbox: int) -> None:
        self._process = process
        self._inbox, self._outbox = inbox, outbox
        # Whoever holds the slot decides what lies in the shared file; the answer to its request gives it back.
        self._inbox_slot, self._outbox_slot = trio.Semaphore(1), trio.Semaphore(1)
        self._exporting, self._scoring = trio.Lock(), trio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._queue, self._queued = trio.open_memory_channel[bytes](QUEUED)
        self._unwritten = 0  # frames in the queue or partly written: nothing may overtake them
        self._death: str | None = None
        self._last_words = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def layout(self) -> Layout:
        return self.info.layout

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.info.train_samples // self.info.batch)

    async def train(self, steps: int, encoding: str = "") -> RoundReport:
        """A round that is cancelled here ends there, too, at the next batch."""
        if encoding and packed_size(parse_form(encoding), self.layout.size, self.layout.buffers) > SMALL_COPY:
            encoding = ""  # would hold up the channel; rounds of large models are long, so asking again costs little
        ok, body = await self._ask("train", {"steps": steps, "encoding": encoding})
        return RoundReport(
            codec.get_int(ok, "steps"),
            codec.get_int(ok, "samples"),
            codec.get_float(ok, "seconds"),
            codec.get_float(ok, "work"),
            codec.get_float(ok, "loss"),
            body,
        )

    async def snapshot(self, encoding: str) -> bytes:
        return await self._fetch("snapshot", {"encoding": encoding})

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeReport:
        if not math.isfinite(weight):
            raise UserError(f"merge weight {weight} is not from 0 to 1")
        return _read_report(await self._deliver("merge", {"encoding": encoding, "weight": float(weight)}, update))

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> list[MergeReport]:
        asked: dict[str, object] = {
            "encodings": [encoding for _, encoding in updates],
            "sizes": [len(update) for update, _ in updates],
        }
        ok = await self._deliver("merge together", asked, b"".join(update for update, _ in updates))
        return [_read_report(codec.as_map(item)) for item in codec.get_list(ok, "reports", limit=len(updates))]

    async def evaluate(self) -> Evaluation | None:
        ok, _ = await self._ask("evaluate", {})
        return _read_evaluation(ok) if ok else None

    async def export(self) -> Export:
        async with self._exporting:  # the worker keeps one choice
            ok, _ = await self._ask("choose", {})
            return Export(await self._fetch("export", {}), _read_evaluation(ok))

    async def load(self, content: bytes) -> None:
        await self._deliver("load", {}, content)

    async def score(self, content: bytes) -> float | None:
        async with self._scoring:  # the worker keeps one candidate
            await self._deliver("read", {}, content)
            ok, _ = await self._ask("score", {})
            return codec.get_float(ok, "validation") if ok else None

    async def predict(self, request: bytes) -> bytes:
        if len(request) > MAX_BODY:
            raise UserError(f"the request has {len(request)} bytes; at most {MAX_BODY} are answered")
        _, body = await self._ask("predict", {}, request)
        return body

    async def save(self) -> bytes:
        return await self._fetch("save", {})

    async def restore(self, state: bytes) -> None:
        await self._deliver("restore", {}, state)

    # Requests

    async def _configure(self, config: PeerConfig, network_id: bytes) -> None:
        asked: dict[str, object] = {
            "model": config.model,
            "train": config.train,
            "source": config.data,
            "split": config.split,
            "part": f"{config.part[0]}/{config.part[1]}",
            "seed": config.seed,
            "network": network_id,
            "threads": config.threads,
            "device": config.device,
            "nice": config.nice,
            "merge": config.merge,
            "inbox": self._inbox,
            "outbox": self._outbox,
        }
        ok, _ = await self._ask("configure", asked)
        self.info = _read_info(ok)

    async def _fetch(self, do: str, asked: dict[str, object]) -> bytes:
        """The bytes that the answer leaves in the outbox."""
        await self._outbox_slot.acquire()
        pending = self._begin(do, asked, self._outbox_slot)
        try:
            await self._send(do, asked, b"", pending)
            ok, _ = await self._result(pending)
            size = codec.get_int(ok, "size")
            if size <= SMALL_COPY:
                return read_shared(self._outbox, size)
            return await trio.to_thread.run_sync(read_shared, self._outbox, size)
        finally:
            if pending.answered.is_set():
                self._outbox_slot.release()
            else:  # the worker may still write into the file
                pending.abandoned = True

    async def _deliver(self, do: str, asked: dict[str, object], data: bytes | bytearray) -> Fields:
        """The answer to a request whose bytes lie in the inbox."""
        await self._inbox_slot.acquire()
        try:
            if len(data) <= SMALL_COPY:
                write_shared(self._inbox, data)
            else:
                await trio.to_thread.run_sync(write_shared, self._inbox, data)
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

    async def _ask(self, do: str, asked: dict[str, object], body: bytes = b"") -> tuple[Fields, bytes]:
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
        frame = pack_frame(asked, body)
        if self._write_at_once(frame):
            return
        self._unwritten += 1  # at once: the writer may take the frame before `send` returns
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

    def _write_at_once(self, frame: bytes) -> bool:
        """Whether the frame has gone without waiting, which spares a turn of the task that writes the others."""
        stdin = self._process.stdin
        if self._unwritten or len(frame) > WHOLE or not isinstance(stdin, trio.lowlevel.FdStream):
            return False
        try:
            os.write(stdin.fileno(), frame)  # does not block: trio has seen to that
        except BlockingIOError:
            return False
        except OSError:
            pass  # the process is gone; the reader says why
        return True

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
        self._death = f"the training process ended: {reason or _describe_exit(code)}"
        if self._last_words:
            self._death += f"; its last words: {self._last_words}"
        for request in list(self._pending):
            self._settle(request, error=WorkerDied(self._death))

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


def _read_report(ok: Fields) -> MergeReport:
    return MergeReport(
        codec.get_bool(ok, "applied"),
        codec.get_str(ok, "reason", limit=4096),
        codec.get_float(ok, "distance"),
        codec.get_bool(ok, "fault"),
    )


def _read_evaluation(ok: Fields) -> Evaluation:
    return Evaluation(
        codec.get_float(ok, "accuracy"),
        codec.get_float(ok, "loss"),
        codec.get_float(ok, "validation"),
        "local" if codec.get_str(ok, "served") == "local" else "average",
    )


def _read_info(ok: Fields) -> WorkerInfo:
    layout, samples = codec.as_map(ok["layout"]), codec.as_map(ok["samples"])
    return WorkerInfo(
        layout=Layout(
            codec.get_str(layout, "model"),
            codec.get_str(layout, "digest"),
            codec.get_int(layout, "size", low=1),
            codec.get_int(layout, "buffers"),
        ),
        source=codec.get_str(ok, "source", limit=4096),
        train_samples=codec.get_int(samples, "train"),
        validation_samples=codec.get_int(samples, "validation"),
        test_samples=codec.get_int(samples, "test"),
        batch=codec.get_int(ok, "batch", low=1),
        inputs=_read_tensors(ok, "inputs"),
        outputs=_read_tensors(ok, "outputs"),
        features=_read_names(ok, "features"),
        picture=tuple(n for n in codec.get_list(ok, "picture", limit=3) if isinstance(n, int)),
        labels=_read_names(ok, "labels"),
        device=codec.get_str(ok, "device"),
        threads=codec.get_int(ok, "threads"),
    )


def _read_tensors(ok: Fields, name: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for item in codec.get_list(ok, name, limit=1000):
        assert isinstance(item, list)
        tensor, datatype, shape = item
        assert isinstance(tensor, str) and isinstance(datatype, str) and isinstance(shape, list)
        tensors.append(TensorSpec(tensor, datatype, tuple(n for n in shape if isinstance(n, int))))
    return tuple(tensors)


def _read_names(ok: Fields, name: str) -> tuple[str, ...]:
    return tuple(str(item) for item in codec.get_list(ok, name, limit=1 << 24))
