"""Processes that work at one step together: how they start, call each other, and share memory.

The caller and its helpers meet twice in a step of a millisecond, so a call must take microseconds. Threads of one
process would wait for Python's lock at every operation: two that share a step of 784-512-256-10 take 1.9 ms, two
processes 1.5. A process that slept would be woken in 50 us; so who waits asks again and again, for a while, and only
then sleeps. Calls go through pipes: the kernel orders what was written to memory before them, on every processor, and
tells when the other side has died.

What they do together is in `crew_work`; the helpers' loop is `crew_main`.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from gossipml.errors import LocalError
from gossipml.models.worker_wire import SharedView, create_shared_file

SPIN = 1e-3  # seconds of asking: as long as a step of what is worth sharing; then other programs may have the core


class Link:
    """One side of two pipes. Owns the descriptors."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        os.set_blocking(reading, False)
        self._sleep = select.poll()
        self._sleep.register(reading, select.POLLIN)

    def send(self, data: bytes) -> None:
        """BrokenPipeError when nobody reads any more."""
        while data:
            data = data[os.write(self._writing, data) :]

    def receive(self, size: int) -> bytes:
        """So many bytes; fewer when the other side has ended."""
        data, until = b"", 0.0
        while len(data) < size:
            try:
                more = os.read(self._reading, size - len(data))
            except BlockingIOError:
                now = time.perf_counter()
                until = until or now + SPIN
                if now > until:
                    self._sleep.poll()
                continue
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


class Crew:
    """The helpers, seen by the caller. They end when it does, or is forgotten."""

    def __init__(self, links: Sequence[Link], descriptor: int, dismiss: Callable[[], None]) -> None:
        """`links` to helpers that have the shared file `descriptor`, too; `dismiss` is called when the links have been
        closed."""
        self.size = 1 + len(links)
        self._links = links
        self._view = SharedView(descriptor)
        weakref.finalize(self, _end, links, descriptor, dismiss)

    def room(self, count: int) -> torch.Tensor:
        """Shared memory: (count,) float32, in the place of what was there."""
        return as_floats(self._view.for_writing(4 * count))

    def tell(self, message: bytes) -> None:
        """To all helpers."""
        try:
            for link in self._links:
                link.send(message)
        except BrokenPipeError:
            raise LocalError(_ENDED) from None

    def wait(self) -> None:
        """Until each has answered once more. LocalError when one has died."""
        for link in self._links:
            if not link.receive(1):
                raise LocalError(_ENDED)


_ENDED = "a process that shares the training has ended; the log says why. Start the peer again, or use --workers 1"


def hire(helpers: int, threads: int) -> Crew:
    """Starts the processes, each with so many threads of torch. They import torch, which takes seconds, by and by: the
    first answer comes late."""
    descriptor = create_shared_file("crew")
    processes: list[subprocess.Popen[bytes]] = []
    links: list[Link] = []
    for number in range(1, helpers + 1):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gossipml.models.crew_main", str(descriptor), str(number), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[descriptor],
        )
        assert process.stdin is not None and process.stdout is not None
        processes.append(process)
        with process.stdin, process.stdout:
            links.append(Link(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())))

    def dismiss() -> None:
        for process in processes:
            process.kill()  # it would end by itself, but not before torch is imported, and has nothing to save
            process.wait()

    return Crew(links, descriptor, dismiss)


def as_floats(memory: memoryview) -> torch.Tensor:
    """A view of it that keeps it mapped (`torch.frombuffer` would not)."""
    return torch.from_numpy(np.frombuffer(memory, dtype=np.float32))


def _end(links: Sequence[Link], descriptor: int, dismiss: Callable[[], None]) -> None:
    for link in links:
        link.close()
    os.close(descriptor)
    dismiss()
