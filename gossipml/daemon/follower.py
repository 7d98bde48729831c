"""A peer that does not train: it answers with the newest published version of its model, whatever comes.

The library brings new versions here (it follows the name); this part hands each one that is whole to the trainer, in
the worker process or a simulated one, which answers predictions with it. The old version answers until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import trio

from gossipml.daemon.learner import Progress
from gossipml.daemon.library import Library, name_of
from gossipml.errors import UserError
from gossipml.models.manifest import Manifest
from gossipml.models.trainer import Trainer
from gossipml.peer.mesh import Mesh

log = logging.getLogger("gossipml.follower")


class Follower:
    """Stands where a trainer has its `Learner`."""

    def __init__(
        self,
        open_trainer: Callable[[], AbstractAsyncContextManager[Trainer]],
        library: Library,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.progress = Progress()
        self.trainer: Trainer | None = None
        self.version: Manifest | None = None
        """What answers now."""
        self._open_trainer = open_trainer
        self._library = library
        self._on_progress = on_progress

    async def run(self, mesh: Mesh, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Raises what the trainer raises when it dies."""
        task_status.started()
        self.version = None
        try:
            async with self._open_trainer() as trainer:
                self.trainer = trainer
                name = trainer.layout.model
                self._library.follow(name)
                while True:
                    changed = self._library.changed
                    await self._take_up(trainer, name)
                    await changed.wait()
        finally:
            self.trainer = None
            self._tell(replace(self.progress, state="stopped"))

    async def _take_up(self, trainer: Trainer, name: str) -> None:
        """Serve the newest version that is whole here, if it is not served already."""
        best = next(iter(self._library.store.versions(name)), None)
        if best is None or best == self.version:
            return
        content = await self._library.content(best)
        if content is None:  # damaged on the disk: it is fetched anew, and we are called again
            return
        try:
            await trainer.load(content)
        except UserError as error:
            log.warning("cannot serve %s: %s", name_of(best), error)
            return
        self.version = best
        log.info("serving %s", name_of(best))
        self._tell(replace(self.progress, state="serving", round=int(best.metrics.get("round", 0.0))))

    def _tell(self, progress: Progress) -> None:
        self.progress = progress
        self._on_progress(progress)
