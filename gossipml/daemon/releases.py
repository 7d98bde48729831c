"""When a trainer publishes its model: at most every T in the whole network, when the model improved, and at the end.

Every trainer of a model holds its head version, so it can score the head on its own validation data and compare: what
is published is better than the head by a margin, or it stays at home. All trainers of a network look at the same
head, each after a random pause of its own; so one of them publishes, and the others see that the head is young.
Published is the neighbourhood average or the local model, whichever the trainer finds better (`Trainer.export`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from gossipml.daemon.library import Draft, Library
from gossipml.env import Env
from gossipml.errors import GossipmlError
from gossipml.models.manifest import Manifest
from gossipml.models.trainer import Trainer

log = logging.getLogger("gossipml.library")


@dataclass(frozen=True)
class ReleaseConfig:
    seconds: float = 300.0
    """Least time between two versions of a model, network-wide (guess)."""
    first_seconds: float = 20.0
    """After the start of a peer, while the model has no version at all: until then nobody else holds it (guess)."""
    gain: float = 0.002
    """Of validation accuracy, over the head: half a sample of 250 (guess)."""
    spread: float = 0.2
    """Share of `seconds` over which the trainers of a network spread themselves."""


class Releases:
    """The publishing of one trainer."""

    def __init__(self, env: Env, library: Library, config: ReleaseConfig) -> None:
        self._env = env
        self._library = library
        self._config = config
        self._next = env.clock.now() + config.first_seconds * env.rng.uniform(0.5, 1.5)
        self._warned = False

    @property
    def wait(self) -> float:
        """Seconds until it is time to consider."""
        return max(0.0, self._next - self._env.clock.now())

    async def consider(self, trainer: Trainer, age: float, round: int, *, final: bool = False) -> Manifest | None:
        """Publish if it is time and worth it; `final` asks for the worth alone. Never raises for a full disk, a
        network that is away or a model that cannot be exported: it says so and goes on."""
        if not final and self.wait:
            return None
        try:
            return await self._consider(trainer, age, round, final=final)
        except (OSError, GossipmlError) as error:
            self._pause()
            log.warning("the model was not published: %s; it is tried again", error)
            return None

    async def _consider(self, trainer: Trainer, age: float, round: int, *, final: bool) -> Manifest | None:
        config, layout = self._config, trainer.layout
        head = await self._library.latest(layout.model)
        if head is not None and head.spec.hex() not in ("", layout.digest):
            if not self._warned:
                log.warning(
                    "the network knows another model by the name %r (specification %s, ours is %s); nothing is "
                    "published until one of them is called otherwise",
                    layout.model, head.spec.hex()[:12], layout.digest[:12],
                )  # fmt: skip
            self._warned = True
            self._pause()
            return None
        if head is not None and not final:
            young = head.created + config.seconds - self._env.clock.wall()
            if young > 0:
                self._next = self._env.clock.now() + young + self._jitter()
                return None
        export = await trainer.export()
        if head is not None:
            content = await self._library.content(head)
            score = await trainer.score(content) if content is not None else None
            if score is not None and export.score < score + config.gain:
                self._pause()
                log.debug("version %s is still as good as ours", head.version.hex()[:12])
                return None
        self._pause()
        metrics = {name: value for name, value in export.metrics.items() if math.isfinite(value)}
        draft = Draft(layout.model, bytes.fromhex(layout.digest), age, {**metrics, "round": float(round)})
        return await self._library.publish(draft, export.content)

    def _pause(self) -> None:
        self._next = self._env.clock.now() + self._config.seconds + self._jitter()

    def _jitter(self) -> float:
        return self._env.rng.uniform(0.0, self._config.spread * self._config.seconds)
