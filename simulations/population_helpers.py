"""Forked copies of this process that train peers beside it, in memory that all of them share.

Threads wait for Python's lock at each of the dozen small operations of a step: a round of 100 peers of 784-10 takes two
threads 56 ms and two processes 38. A helper has its peers for good, and with them what training alone changes and
nobody else needs: the order of their batches, the state of their optimisers. It begins with what its parent had when it
was forked, code of the user's and data and all; between the two go numbers of peers, nothing else.

Where processes are not forked (Windows, macOS) there are no helpers, and threads train.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

import numpy as np
import torch

from gossipml.errors import UserError

CAN_FORK = sys.platform == "linux"

Work: TypeAlias = Sequence[tuple[int, int]]
"""Peers, and how many steps each takes."""
Job: TypeAlias = Callable[[Work], list[int]]
"""Trains them; which of them diverged."""

GONE = "a helper of the simulator has ended; perhaps the machine had no memory left for it"

_HEAD = struct.Struct("<BQ")  # what follows, and its bytes
_NUMBERS, _REFUSED, _FAILED = range(3)


def shared(count: int, size: int) -> torch.Tensor:
    """Zeros (count, size) that a forked process has in common with this one."""
    memory = mmap.mmap(-1, max(1, 4 * count * size))
    return torch.frombuffer(memory, dtype=torch.float32, count=count * size).view(count, size)


class Helpers:
    """`count` processes, this one included, which do the job for the peers p with p % count the same."""

    def __init__(self, count: int, job: Job) -> None:
        self._job = job
        self._others: list[tuple[int, int, int]] = []  # process, where it reads, where it writes
        for _ in range(count - 1):
            self._others.append(self._fork())

    def do(self, work: Work) -> list[int]:
        """UserError where the job says so, or where a helper is gone."""
        count = 1 + len(self._others)
        shares: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for peer, steps in work:
            shares[peer % count].append((peer, steps))
        asked = [(other, share) for other, share in zip(self._others, shares[1:], strict=True) if share]
        for (_, to, _), share in asked:
            try:
                _write(to, _NUMBERS, np.array(share, dtype=np.int64).tobytes())
            except BrokenPipeError:
                raise UserError(GONE) from None
        failure: Exception | None = None
        found: list[int] = []
        try:
            found += self._job(shares[0]) if shares[0] else []
        except Exception as error:
            failure = error
        for (_, _, answers), _ in asked:  # all of them, or the next answer would be taken for this one
            kind, body = _read(answers)
            if kind == _NUMBERS:
                found += np.frombuffer(body, dtype=np.int64).tolist()
            elif failure is None:
                failure = (UserError if kind == _REFUSED else RuntimeError)(body.decode())
        if failure is not None:
            raise failure
        return found

    def close(self) -> None:
        """At once, whatever they are at: nobody wants it any more."""
        for process, to, answers in self._others:
            os.close(to)
            os.close(answers)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._others.clear()

    def _fork(self) -> tuple[int, int, int]:
        work, to = os.pipe()
        answers, back = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: ours are idle now, and the copy uses none
            process = os.fork()
        if process == 0:
            _help(self._job, work, back, [to, answers, *(end for _, *ends in self._others for end in ends)])
        os.close(work)
        os.close(back)
        return process, to, answers


def _help(job: Job, work: int, back: int, others: Sequence[int]) -> NoReturn:
    """What a helper does until its parent ends, which is the end of what it reads. `others`: ends of pipes that are not
    its own."""
    try:
        for end in others:
            os.close(end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
        torch.set_num_threads(1)
        while (message := _read_all(work, _HEAD.size)) is not None:
            _, length = _HEAD.unpack(message)
            numbers = np.frombuffer(_read_all(work, length) or b"", dtype=np.int64).reshape(-1, 2)
            try:
                found = job([(peer, steps) for peer, steps in numbers.tolist()])
                _write(back, _NUMBERS, np.array(found, dtype=np.int64).tobytes())
            except UserError as error:
                _write(back, _REFUSED, str(error).encode())
            except Exception:
                _write(back, _FAILED, traceback.format_exc().encode())
    finally:
        os._exit(0)  # nothing of the parent's is ended, flushed or removed here


def _write(to: int, kind: int, body: bytes) -> None:
    left = memoryview(_HEAD.pack(kind, len(body)) + body)
    while left:
        left = left[os.write(to, left) :]


def _read(source: int) -> tuple[int, bytes]:
    head = _read_all(source, _HEAD.size)
    if head is not None:
        kind, length = _HEAD.unpack(head)
        body = _read_all(source, length)
        if body is not None:
            return kind, body
    raise UserError(GONE)


def _read_all(source: int, length: int) -> bytes | None:
    """None at the end."""
    data = bytearray()
    while len(data) < length:
        more = os.read(source, min(length - len(data), 1 << 20))
        if not more:
            return None
        data += more
    return bytes(data)
