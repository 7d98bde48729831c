"""Models in and out: the encoded model of the round, shared by all receivers, and the bodies that wait for a merge.

Performs what `gossipml.peer.gossip` decides, with the learner. One encoding of our own model and at most
`GossipConfig.incoming` bodies of others are held. Leaves out: streams and sessions (`gossipml.peer.mesh`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from gossipml.errors import GossipmlError, RemoteError
from gossipml.ids import PeerId, short_peer_id
from gossipml.peer.gossip import Gossip, MergeDone, MergeFailed
from gossipml.peer.learner import Learner, NotReady
from gossipml.peer.wire import Update

log = logging.getLogger("gossipml.peer")


@dataclass(frozen=True)
class Snapshot:
    """Our model as it was: body, and the age and round that belong to it."""

    version: int
    body: bytes
    age: float
    round: int


class Exchange:
    def __init__(self, gossip: Gossip) -> None:
        self._gossip = gossip
        self._learner: Learner | None = None
        self._snapshot: Snapshot | None = None
        self._taking = trio.Lock()
        self._bodies: dict[PeerId, tuple[Update, bytearray]] = {}

    @property
    def bytes_held(self) -> int:
        """Memory in bodies."""
        own = len(self._snapshot.body) if self._snapshot else 0
        return own + sum(len(body) for _, body in self._bodies.values())

    def attach(self, learner: Learner) -> None:
        self._learner = learner
        self._snapshot = None

    def detach(self) -> None:
        self._learner = None
        self._snapshot = None
        self._bodies.clear()

    async def snapshot(self) -> Snapshot:
        """The current model, encoded once for each version of it. Raises NotReady."""
        async with self._taking:  # several askers share one encoding
            learner, version = self._learner, self._gossip.version
            if learner is None:
                raise NotReady("the model is not loaded")
            if self._snapshot is None or self._snapshot.version != version:
                age, round_ = self._gossip.age, self._gossip.round  # before, not after: a claim must be covered
                try:
                    body = await learner.snapshot(self._gossip.config.encoding)
                except GossipmlError as error:  # whoever runs the learner deals with it; gossip has nothing to send
                    raise NotReady(f"the model cannot be encoded: {error}") from error
                if self._learner is not learner:
                    raise NotReady("the model was unloaded meanwhile")
                self._snapshot = Snapshot(version, body, age, round_)
            return self._snapshot

    def offer(self, body: bytes) -> None:
        """The current model, encoded already as the round ended."""
        self._snapshot = Snapshot(self._gossip.version, body, self._gossip.age, self._gossip.round)

    def hold(self, sender: PeerId, update: Update, body: bytearray) -> None:
        """Keep a body until its merge."""
        self._bodies[sender] = (update, body)

    async def merge(self, sender: PeerId, weight: float) -> tuple[MergeDone | MergeFailed | None, Update | None]:
        """Merge the body held for the sender: what came of it, and the header it came with.

        The event is None when the learner was replaced meanwhile: gossip has already forgotten the update.
        """
        update, body = self._bodies.pop(sender, (None, bytearray()))
        learner = self._learner
        if update is None or learner is None:
            return MergeFailed(sender), update
        try:
            outcome = await learner.merge(body, update.encoding, weight)
        except RemoteError as error:  # the body itself is no encoding of anything
            return MergeDone(sender, False, str(error), 0.0), update
        except GossipmlError as error:
            log.warning("an update of %s could not be merged: %s", short_peer_id(sender), error)
            return (MergeFailed(sender) if self._learner is learner else None), update
        if self._learner is not learner:
            return None, update
        return MergeDone(sender, outcome.applied, outcome.reason, outcome.distance), update
