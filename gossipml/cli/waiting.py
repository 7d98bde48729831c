"""Waiting in a command that has nothing else to do, on trio's clock like everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

import trio

T = TypeVar("T")
INTERVAL = 0.1  # seconds between looks


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""

    async def wait() -> bool:
        with trio.move_on_after(seconds):
            while not condition():
                await trio.sleep(INTERVAL)
            return True
        return condition()

    return trio.run(wait)


def wait_for(
    look: Callable[[], T | None], enough: Callable[[T | None], bool], interval: float, patience: float
) -> T | None:
    """What `look` saw when it was `enough`; None when it saw nothing for `patience` seconds."""

    async def wait() -> T | None:
        seen_at = trio.current_time()
        while not enough(found := look()):
            if found is not None:
                seen_at = trio.current_time()
            elif trio.current_time() - seen_at > patience:
                return None
            await trio.sleep(interval)
        return found

    return trio.run(wait)


def follow_file(path: Path, opened: TextIO, emit: Callable[[str], object]) -> None:
    """Emit what is appended to a log, over its rotation too, until interrupted."""

    async def follow() -> None:
        log = opened
        while True:
            if text := log.read(65536):
                emit(text)
                continue
            await trio.sleep(INTERVAL)
            try:
                rotated = path.stat().st_size < log.tell()  # noqa: ASYNC240  # a local file, looked at ten times a second
            except FileNotFoundError:
                continue
            if rotated:
                log.close()
                log = path.open(encoding="utf-8", errors="replace")

    trio.run(follow)
