"""The learning of one peer: train a round, gossip, look how good it is, keep it; and again.

A peer without a saved state begins with the newest published version of its model instead of from scratch.
The rounds go on until the target accuracy or the number of rounds is reached; then the peer only averages with
its neighbours, so that stragglers and peers that come back catch up. The same goes on while training is paused
(`gossipml.daemon.pausing`). What is needed to go on after a `kill -9` lies in `state/resume`, written as one file so
that parameters, age and round always belong together.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from gossipml.daemon.library import name_of
from gossipml.daemon.pausing import Pausing
from gossipml.daemon.releases import ReleaseConfig, Releases
from gossipml.daemon.replication import Replication
from gossipml.daemon.resume import Resume, load_resume, save_resume
from gossipml.env import Env
from gossipml.errors import GossipmlError, RemoteError, UserError
from gossipml.models.compression import packed_size, parse_form
from gossipml.models.compression_auto import choose
from gossipml.models.trainer import Evaluation, Layout, RoundReport, Trainer
from gossipml.models.tuning import LocalSteps
from gossipml.peer.gossip_events import ModelFacts
from gossipml.peer.mesh import Mesh

log = logging.getLogger("gossipml.learner")

LOG_SECONDS = 5.0  # between two lines about it

State = Literal["starting", "training", "paused", "averaging", "serving", "stopped"]


@dataclass(frozen=True)
class LearnerConfig:
    """How long things take. Rounds are sized in time, so that a slow machine and a fast one train together."""

    max_rounds: int | None = None
    target_accuracy: float | None = None
    local_steps: LocalSteps | None = None
    """None: sized as the following says, so that fast and slow machines keep step."""
    round_seconds: float = 0.035
    """Work of the processor in a first round, when an epoch is not shorter and sending takes no longer. Rounds get
    shorter with the square root of the loss, measured by that of the first (Wang and Joshi: Adaptive communication
    strategies, 2019): far from the goal all peers go the same way, near it they need each other more."""
    shortest_round: float = 0.35
    """... but no shorter than this share. See docs/decisions/0005 for what both cost and gain."""
    most_round: float = 60.0
    """A round lasts as long as sending an update takes, but no longer than this (guess)."""
    least_round: float = 0.05
    """A round of a whole epoch takes at least this long: twenty pushes a second are enough for a tiny dataset."""
    first_steps: int = 8
    """Of the first round, which shows the pace of this machine."""
    evaluate_seconds: float = 0.5
    """Between two looks at the accuracy ..."""
    evaluate_share: float = 0.05
    """... and more where a look is slow: no more than this share of the time goes into it."""
    save_seconds: float = 5.0
    """At most this much training is lost with the machine (guess)."""
    last_save_seconds: float = 20.0
    """For the save at a clean stop."""
    release_look_seconds: float = 2.0
    """Between two looks whether a version is to be published."""
    hand_over_seconds: float = 5.0
    """At a clean stop, for another peer to take a version that was just published."""
    releases: ReleaseConfig = field(default_factory=ReleaseConfig)


@dataclass(frozen=True)
class Progress:
    """What the learner has come to; what status, probes and events show."""

    state: State = "starting"
    round: int = 0
    samples: int = 0
    loss: float | None = None
    seconds: float = 0.0
    """Spent in training."""
    evaluation: Evaluation | None = None
    paused: str = ""
    """Why, in the state "paused", in words that follow "paused: "."""


class Learner:
    """Runs the rounds of one peer. `on_progress` is told of every step."""

    def __init__(
        self,
        env: Env,
        open_trainer: Callable[[], AbstractAsyncContextManager[Trainer]],
        config: LearnerConfig,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        replication: Replication | None = None,
        pausing: Pausing | None = None,
    ) -> None:
        """Without `replication` nothing is published, and nothing begun from a published version.

        Without `pausing` only `pause` pauses.
        """
        self.progress = Progress()
        self.trainer: Trainer | None = None
        self.pausing = pausing or Pausing(env.clock)
        self._env = env
        self._open_trainer = open_trainer
        self._config = config
        self._replication = replication
        self._library = replication.library if replication else None
        self._on_progress = on_progress
        self._pace = 0.0  # seconds of work a step, smoothed; 0 before the first
        self._first_loss: float | None = None  # of the first round since the start
        self._saved_at = -math.inf
        self._evaluated_at = -math.inf
        self._evaluate_pause = config.evaluate_seconds
        self._logged_at = -math.inf

    async def run(self, mesh: Mesh, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Train and average until cancelled, then save. Raises what the trainer raises when it dies."""
        task_status.started()
        self._tell(state="starting")
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            trainer: Trainer = await nursery.start(self._hold_trainer, done)
            releases = Releases(self._env, self._library, self._config.releases) if self._library else None
            try:
                await self._begin(trainer, mesh)
                self.trainer = trainer
                mesh.attach(trainer, model_facts(trainer.layout))
                if releases is not None:
                    nursery.start_soon(self._release, releases, trainer, mesh)
                await self.pausing.look()
                nursery.start_soon(self.pausing.watch)
                await self._train(trainer, mesh)
                if releases is not None:
                    await releases.consider(trainer, mesh.age, self.progress.round, final=True)
                await self._average(trainer, mesh)
            finally:
                mesh.detach()
                with trio.CancelScope(shield=True), trio.move_on_after(self._config.last_save_seconds):
                    await self._save(trainer, mesh)
                    if releases is not None:
                        await self._last_release(releases, trainer, mesh)
                self.trainer = None
                self._tell(state="stopped")
                done.set()

    def pause(self, reason: str = "by its user") -> None:
        """Train no more after this round, until `resume`; averaging and answering go on."""
        self.pausing.pause(reason)

    def resume(self) -> str:
        """Train again; the reason why not yet, if the machine gives one: that passes by itself."""
        return self.pausing.resume()

    async def _hold_trainer(self, done: trio.Event, *, task_status: trio.TaskStatus[Trainer]) -> None:
        """Keep the trainer alive until `done`, through a cancellation too: its state is still to be saved then."""
        with trio.CancelScope() as scope:
            async with self._open_trainer() as trainer:
                scope.shield = True
                task_status.started(trainer)
                await done.wait()

    async def _release(self, releases: Releases, trainer: Trainer, mesh: Mesh) -> None:
        """Beside the training: publish when it is time."""
        while True:
            await trio.sleep(max(self._config.release_look_seconds, releases.wait))
            if self.progress.evaluation is not None:
                await releases.consider(trainer, mesh.age, self.progress.round)

    async def _last_release(self, releases: Releases, trainer: Trainer, mesh: Mesh) -> None:
        """At a clean stop: publish what is better than the head, and wait until somebody else has it."""
        if self.progress.evaluation is None or self._replication is None:
            return
        version = await releases.consider(trainer, mesh.age, self.progress.round, final=True)
        if version is not None and mesh.links():
            await self._replication.hand_over(version, self._config.hand_over_seconds)

    async def _train(self, trainer: Trainer, mesh: Mesh) -> None:
        self._saved_at = self._evaluated_at = self._env.clock.now()  # there is nothing to see or lose yet
        self._tell(state="training")
        while not self._finished():
            if self.pausing.reason:
                await self._rest(trainer, mesh)
                continue
            begun = self._env.clock.now()
            steps = self._steps(trainer, mesh.send_seconds)
            report = await trainer.train(steps, mesh.gossip.round_encoding)
            self._count(report, mesh.gossip.neighbourhood_round)
            await mesh.gossip_round(report.samples, self.progress.round, report.snapshot)
            if self._due(self._evaluated_at, self._evaluate_pause) or self._is_last_round():
                await self._evaluate(trainer)
            if self._due(self._saved_at, self._config.save_seconds):
                await self._save(trainer, mesh)
            if steps == trainer.steps_per_epoch or self._config.local_steps:
                await trio.sleep(max(0.0, begun + self._config.least_round - self._env.clock.now()))
        log.info(
            "training is over after %d rounds with %s; averaging with the neighbours goes on",
            self.progress.round,
            describe(self.progress.evaluation),
        )

    async def _rest(self, trainer: Trainer, mesh: Mesh) -> None:
        """Average and answer without training, until there is no reason left, or enough accuracy has come."""
        log.info("training is paused: %s; averaging with the neighbours goes on", self.pausing.reason)
        self._tell(state="paused", paused=self.pausing.reason)
        await self._save(trainer, mesh)
        mesh.training_finished()
        merges = mesh.stats.merges
        while not self._finished():
            changed, reason = self.pausing.changed, self.pausing.reason
            if not reason:
                break
            if reason != self.progress.paused:
                self._tell(paused=reason)
            merges = await self._look_at_merges(trainer, mesh, merges)
            with trio.move_on_after(self._evaluate_pause):
                await changed.wait()
        self._tell(state="training", paused="")
        if not self._finished():
            mesh.training_resumed()
        log.info("training goes on" if not self._finished() else "the averaging was enough, meanwhile")

    async def _average(self, trainer: Trainer, mesh: Mesh) -> None:
        """Look at and keep what merging makes of the model, until cancelled."""
        self._tell(state="averaging")
        mesh.training_finished()
        merges = -1
        while True:
            merges = await self._look_at_merges(trainer, mesh, merges)
            await trio.sleep(self._evaluate_pause)

    async def _look_at_merges(self, trainer: Trainer, mesh: Mesh, seen: int) -> int:
        """Look at the model, and keep it, if there were more merges than `seen`; how many there have been."""
        merges = mesh.stats.merges
        if merges != seen:
            await self._evaluate(trainer)
            if self._due(self._saved_at, self._config.save_seconds):
                await self._save(trainer, mesh)
        return merges

    def _finished(self) -> bool:
        config, progress = self._config, self.progress
        if config.max_rounds is not None and progress.round >= config.max_rounds:
            return True
        evaluation = progress.evaluation
        return config.target_accuracy is not None and (
            evaluation is not None and evaluation.accuracy >= config.target_accuracy
        )

    def _is_last_round(self) -> bool:
        return self._config.max_rounds is not None and self.progress.round >= self._config.max_rounds

    def _steps(self, trainer: Trainer, send_seconds: float) -> int:
        """Optimiser steps of the next round at the pace so far: as long as sending takes, at most one epoch."""
        config = self._config
        if config.local_steps:
            return config.local_steps.of(trainer.steps_per_epoch)
        if not self._pace:
            return min(trainer.steps_per_epoch, config.first_steps)
        share = 1.0
        if self._first_loss and self.progress.loss is not None:
            share = min(1.0, max(config.shortest_round, math.sqrt(max(0.0, self.progress.loss / self._first_loss))))
        seconds = max(config.round_seconds * share, min(send_seconds, config.most_round))
        return max(1, min(trainer.steps_per_epoch, round(seconds / self._pace)))

    def _count(self, report: RoundReport, neighbourhood: int) -> None:
        pace = report.work / report.steps
        self._pace = pace if not self._pace else 0.7 * self._pace + 0.3 * pace
        if self._first_loss is None:
            self._first_loss = report.loss
        self._tell(
            round=max(self.progress.round + 1, neighbourhood),
            samples=self.progress.samples + report.samples,
            loss=report.loss,
            seconds=self.progress.seconds + report.seconds,
        )

    async def _evaluate(self, trainer: Trainer) -> None:
        begun = self._env.clock.now()
        evaluation = await trainer.evaluate()
        self._evaluated_at = now = self._env.clock.now()
        took = now - begun
        self._evaluate_pause = max(self._config.evaluate_seconds, took / self._config.evaluate_share)
        self._tell(evaluation=evaluation)
        if self._due(self._logged_at, LOG_SECONDS):
            self._logged_at = now
            log.info("round %d: %s", self.progress.round, describe(evaluation))

    async def _begin(self, trainer: Trainer, mesh: Mesh) -> None:
        """Go on where the last run ended, or begin with the newest version of the network, or from scratch."""
        resume = await load_resume(self._env, trainer.layout)
        if resume is not None:
            try:
                await trainer.restore(resume.trainer)
            except UserError as error:
                log.warning("state/resume cannot be used (%s); training starts anew", error)
            else:
                mesh.restore(resume.age, resume.round)
                self._tell(round=resume.round, samples=resume.samples, seconds=resume.seconds)
                log.info("going on at round %d, age %.0f", resume.round, resume.age)
                return
        if self._library is None:
            return
        try:
            head = await self._library.newcomers_head(trainer.layout.model, trainer.layout.digest)
            content = await self._library.content(head) if head is not None else None
            if head is None or content is None:
                return
            await trainer.load(content)
        except (OSError, GossipmlError) as error:
            log.warning("cannot begin with the newest version (%s); training starts from scratch", error)
            return
        round = int(head.metrics.get("round", 0.0))
        mesh.restore(head.age, round)
        self._tell(round=round)
        log.info("beginning with %s, round %d, age %.0f", name_of(head), round, head.age)

    async def _save(self, trainer: Trainer, mesh: Mesh) -> None:
        """Keep the state; a full or broken disk is said and tried again, and costs nothing else."""
        self._saved_at = self._env.clock.now()
        progress = self.progress
        try:
            state = await trainer.save()
            resume = Resume(mesh.age, progress.round, progress.samples, progress.seconds, state)
            await save_resume(self._env, trainer.layout, resume)
        except OSError as error:
            log.error("cannot keep the state of training: %s; free or mend the disk, it is tried again", error)
        except GossipmlError as error:
            log.error("cannot keep the state of training: %s", error)

    def _due(self, last: float, interval: float) -> bool:
        return self._env.clock.now() - last >= interval

    def _tell(self, **changes: object) -> None:
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]  # fields of Progress
        self._on_progress(self.progress)


def model_facts(layout: Layout) -> ModelFacts:
    """What gossip must know of the model."""

    @functools.lru_cache(64)  # asked with each update; whoever invents encodings only empties it
    def body_length(encoding: str) -> int | None:
        try:
            return packed_size(parse_form(encoding), layout.size, layout.buffers)
        except RemoteError:
            return None

    def choose_encoding(now: str, bandwidth: float | None, seconds: float) -> str:
        form = parse_form(now) if now else None
        return choose(bandwidth, seconds, layout.size, exact=layout.buffers, now=form).name

    return ModelFacts(layout.model, layout.digest, layout.size, body_length, choose_encoding)


def describe(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "nothing measured yet"
    return f"accuracy {100 * evaluation.accuracy:.1f} % ({evaluation.served}), loss {evaluation.loss:.4f}"
