"""Forked copies of this process that train peers and merge their models beside it, in memory that all of them share.

Threads wait for Python's lock at each of the dozen small operations of a step: a round of 100 peers of 784-10 takes two
threads 56 ms and two processes 38; two threads merge no faster than one. A helper has its peers for good, and with them
what nobody else needs: the order of their batches, the state of their optimisers, how far their neighbours' models
usually are. It begins with what its parent had when it was forked, code of the user's and data and all; between the two
go what is to be done for which peer, and what came of it.

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
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import msgpack
import torch

from gossipml.errors import UserError

CAN_FORK = sys.platform == "linux"

Job: TypeAlias = Callable[[list[Any]], list[Any]]
"""Of tuples that begin with a peer, one result each; Any: whatever msgpack carries, tuples as tuples."""

GONE = "a helper of the simulator has ended; perhaps the machine had no memory left for it"

_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # all pages at once: one by one they take a third of the first round

_HEAD = struct.Struct("<BQ")  # what follows, and its bytes
_DONE, _REFUSED, _FAILED = range(3)


class Helpers:
    """`count` processes, this one included, which do what they are offered for the peers p with p % count the same."""

    def __init__(self, count: int, device: torch.device) -> None:
        """More than one only where the device is the CPU, and `CAN_FORK`."""
        self.count, self._device = count, device
        self._jobs: dict[str, Job] = {}
        self._others: list[tuple[int, int, int]] = []  # process, where it reads, where it writes
        self._forked = False

    @property
    def forked(self) -> bool:
        return self._forked

    def memory(self, rows: int, size: int) -> torch.Tensor:
        """Zeros (rows, size) that all of them have in common."""
        if self.count == 1 or not rows * size:
            return torch.zeros(rows, size, device=self._device)
        return _mapped(mmap.mmap(-1, 4 * rows * size, flags=mmap.MAP_SHARED | _POPULATE), rows, size)

    def blocks(self, rows: int, size: int) -> Callable[[int], torch.Tensor]:
        """The same in pieces, by number: (rows, size) each, also where one was first asked for after the fork."""
        if self.count == 1:
            return lambda number: torch.empty(rows, size, device=self._device)
        page = mmap.ALLOCATIONGRANULARITY
        length = -(-4 * rows * size // page) * page
        file = os.memfd_create("models")

        def block(number: int) -> torch.Tensor:
            if os.fstat(file).st_size < (number + 1) * length:
                os.ftruncate(file, (number + 1) * length)
            there = mmap.mmap(file, length, flags=mmap.MAP_SHARED | _POPULATE, offset=number * length)
            return _mapped(there, rows, size)

        weakref.finalize(block, os.close, file)
        return block

    def offer(self, name: str, job: Job) -> None:
        """What `do` may be asked for; before it is asked for the first time, since then the others are forked."""
        assert not self._forked, "they know only what there was when they were forked"
        assert name not in self._jobs, "somebody else's"
        self._jobs[name] = job

    def begin(self) -> None:
        """Forks the others, if that has not been done; `do` does it, too."""
        if self.count > 1 and not self._forked:
            self._forked = True
            for _ in range(self.count - 1):
                self._others.append(self._fork())

    def do(self, name: str, items: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Each item by the process that has its peer; what came of each. UserError where the job says so, or where a
        helper is gone."""
        if self.count == 1:
            return self._jobs[name](list(items))
        self.begin()
        shares: list[list[tuple[Any, ...]]] = [[] for _ in range(self.count)]
        for item in items:
            shares[item[0] % self.count].append(item)
        asked = [(number, *other) for number, other in enumerate(self._others, 1) if shares[number]]
        for number, _, to, _ in asked:
            try:
                _write(to, _DONE, msgpack.packb((name, shares[number])))
            except BrokenPipeError:
                raise UserError(GONE) from None
        failure: Exception | None = None
        found: list[list[Any]] = [[] for _ in shares]
        try:
            found[0] = self._jobs[name](shares[0]) if shares[0] else []
        except Exception as error:
            failure = error
        for number, _, _, answers in asked:  # all of them, or the next answer would be taken for this one
            kind, body = _read(answers)
            if kind == _DONE:
                found[number] = _unpack(body)
            elif failure is None:
                failure = (UserError if kind == _REFUSED else RuntimeError)(body.decode())
        if failure is not None:
            raise failure
        each = [iter(results) for results in found]
        return [next(each[item[0] % self.count]) for item in items]

    def close(self) -> None:
        """At once, whatever they are at: nobody wants it any more."""
        for process, to, answers in self._others:
            os.close(to)
            os.close(answers)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._others.clear()
        self._forked = False

    def _fork(self) -> tuple[int, int, int]:
        work, to = os.pipe()
        answers, back = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: ours are idle now, and the copy uses none
            process = os.fork()
        if process == 0:
            _help(self._jobs, work, back, [to, answers, *(end for _, *ends in self._others for end in ends)])
        os.close(work)
        os.close(back)
        return process, to, answers


def _help(jobs: Mapping[str, Job], work: int, back: int, others: Sequence[int]) -> NoReturn:
    """What a helper does until its parent ends, which is the end of what it reads. `others`: ends of pipes that are not
    its own."""
    try:
        for end in others:
            os.close(end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
        torch.set_num_threads(1)
        while (message := _read_all(work, _HEAD.size)) is not None:
            _, length = _HEAD.unpack(message)
            name, items = _unpack(_read_all(work, length) or b"")
            try:
                _write(back, _DONE, msgpack.packb(jobs[name](list(items))))
            except UserError as error:
                _write(back, _REFUSED, str(error).encode())
            except Exception:
                _write(back, _FAILED, traceback.format_exc().encode())
    finally:
        os._exit(0)  # nothing of the parent's is ended, flushed or removed here


def _mapped(memory: mmap.mmap, rows: int, size: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.float32, count=rows * size).view(rows, size)


def _unpack(body: bytes) -> Any:  # Any: what was packed
    return msgpack.unpackb(body, use_list=False)


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
