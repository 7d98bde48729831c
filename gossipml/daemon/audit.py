"""Keeps a record of every prediction without ever being in its way.

`record` puts it into a bounded queue and returns; a part of the daemon brings the queue to `gossipml.daemon.audit_log`,
many at a time, in a thread. What does not fit the queue, or cannot be written because the disk is full or broken, is
counted, said in the log and the health of the peer, and stands in the audit log as a gap as soon as that can be written
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from gossipml.api.ports import Prediction
from gossipml.daemon import audit_log
from gossipml.daemon.audit_log import AuditLog, Entry
from gossipml.env import Clock

log = logging.getLogger("gossipml.audit")

QUEUE_ENTRIES = 4096  # a second's predictions at full speed
QUEUE_BYTES = 32 << 20  # of inputs and answers that wait; bounds memory
BATCH_SECONDS = 0.1  # between two transactions: at most so much is lost with the process
RETRY_SECONDS = 5.0  # after a disk that took nothing
SAY_SECONDS = 60.0  # between two complaints
LAST_SECONDS = 2.0  # for the last entries, at the stop
MAX_ANSWER = 2048  # bytes of an answer that are kept: ten probabilities have 200


@dataclass(frozen=True)
class AuditConfig:
    inputs: bool = False
    """Keep the inputs themselves, not only their digests."""
    max_bytes: int = 64 << 20
    """Of one file; then the next one is begun (guess: 200,000 predictions)."""
    days: float = 90.0
    """Files whose last entry is older are removed; a file is closed after a third of that (guess)."""


class Audit:
    """`record` for the endpoint, `run` for the supervisor."""

    def __init__(self, folder: Path, clock: Clock, config: AuditConfig, own: str = "") -> None:
        """`own`: this peer, as answers call it; what another one answered is recorded as forwarded to it."""
        self.written = 0
        self.lost = 0
        """Entries that were not written; both only grow."""
        self.problem = ""
        """Why nothing can be written now, in a sentence; empty when it can."""
        self._folder = folder
        self._clock = clock
        self._config = config
        self._own = own
        self._queue: deque[tuple[float, Prediction]] = deque()
        self._bytes = 0
        self._arrived = trio.Event()
        self._gap = 0  # entries lost since the last that was written
        self._log: AuditLog | None = None
        self._said_at = -SAY_SECONDS
        self._one = trio.CapacityLimiter(1)

    def record(self, prediction: Prediction) -> None:
        """Note a prediction; never waits and never fails."""
        size = len(prediction.given) + len(prediction.answer)
        if len(self._queue) >= QUEUE_ENTRIES or self._bytes + size > QUEUE_BYTES:
            self._lose(1, "more predictions than can be written")
            return
        self._queue.append((self._clock.wall(), prediction))
        self._bytes += size
        self._arrived.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is recorded until cancelled, and then the rest."""
        task_status.started()
        try:
            while True:
                if not self._gap:  # else try soon whether the disk takes anything again
                    await self._arrived.wait()
                self._arrived = trio.Event()
                await trio.sleep(BATCH_SECONDS if await self._flush() else RETRY_SECONDS)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LAST_SECONDS):
                await self._flush()
            if self._log is not None:
                self._log.close()
                self._log = None

    async def _flush(self) -> bool:
        """Write what is queued; whether the disk took it."""
        batch, self._queue, self._bytes = self._queue, deque(), 0
        if not batch and not self._gap:
            return True
        try:
            await trio.to_thread.run_sync(self._write, batch, limiter=self._one)
        except (OSError, sqlite3.Error) as error:
            self._lose(len(batch), str(error))
            self.problem = (
                f"the audit log takes nothing ({error}), and answering goes on without; make room on its disk"
            )
            await trio.to_thread.run_sync(self._close_after, error, limiter=self._one)
            return False
        self.written += len(batch)
        if self.problem:
            log.info("the audit log is written again")
            self.problem = ""
        return True

    def _write(self, batch: Sequence[tuple[float, Prediction]]) -> None:
        """In a thread."""
        now = self._clock.wall()
        if self._log is None:
            self._log = AuditLog(self._folder)
        begun = self._log.begun
        if self._log.size() > self._config.max_bytes or (
            begun is not None and now - begun > self._config.days * 86400 / 3
        ):
            self._log = self._log.rotate()
            audit_log.forget(self._folder, now - self._config.days * 86400)
        gap = self._gap
        entries = [(_entry(*item, self._own), item[1].given if self._config.inputs else None) for item in batch]
        if gap:
            since = batch[0][0] if batch else now
            lost = Entry(since, "lost", "", "", "", 0, gap, "", f"{gap} predictions could not be recorded", 0.0)
            entries.insert(0, (lost, None))
        self._log.append(entries)
        self._gap -= gap

    def _close_after(self, error: Exception) -> None:
        """In a thread: open the file anew next time; one that is no database any more is set aside."""
        opened, self._log = self._log, None
        try:
            if opened is not None:
                opened.close()
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                log.error("the audit log is damaged; it lies in %s now", audit_log.set_aside(self._folder))
        except (OSError, sqlite3.Error):
            pass  # tried again with the next batch

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        self._gap += count
        if self._clock.now() - self._said_at >= SAY_SECONDS:
            self._said_at = self._clock.now()
            log.error("%d predictions are not in the audit log (%s); answering goes on", self._gap, why)


def _entry(time: float, prediction: Prediction, own: str) -> Entry:
    version, peer = _origin(prediction)
    forwarded = f" forwarded to {peer[:8]}" if own and peer and peer != own else ""
    return Entry(
        time=time,
        route=prediction.route[:200] + forwarded,
        model=prediction.model[:64],
        version=version,
        peer=peer,
        status=prediction.status,
        size=len(prediction.given),
        input=hashlib.sha256(prediction.given).hexdigest(),
        answer=prediction.answer[: min(MAX_ANSWER, prediction.head or MAX_ANSWER)].decode(errors="replace"),
        seconds=round(prediction.seconds, 6),
    )


def _origin(prediction: Prediction) -> tuple[str, str]:
    """Version and peer, as the answer says."""
    if prediction.status != 200:
        return "", ""
    try:
        answer = json.loads(prediction.answer[: prediction.head])
    except ValueError:
        return "", ""
    if not isinstance(answer, dict):
        return "", ""
    parameters = answer.get("parameters")
    peer = answer.get("peer") or (parameters.get("peer") if isinstance(parameters, dict) else "")
    return str(answer.get("version") or answer.get("model_version") or "")[:64], str(peer or "")[:64]
