"""Models in and out: the encoded model of the round, shared by all receivers, and the bodies that wait for a merge.

Performs what `gossipml.peer.gossip` decides, with the learner. Of our own model one version is held, whole or in
parts, and at most `GossipConfig.incoming` bodies of others. Leaves out: streams and sessions (`gossipml.peer.mesh`).
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
    """Our model, or a part of it, as it was: body, and the age and round that belong to it."""

    version: int
    encoding: str
    body: bytes
    age: float
    round: int


class Exchange:
    def __init__(self, gossip: Gossip) -> None:
        self._gossip = gossip
        self._learner: Learner | None = None
        self._snapshots: dict[str, Snapshot] = {}  # of one version, by encoding
        self._taking = trio.Lock()
        self._bodies: dict[PeerId, tuple[Update, bytearray]] = {}

    @property
    def bytes_held(self) -> int:
        """Memory in bodies."""
        own = sum(len(snapshot.body) for snapshot in self._snapshots.values())
        return own + sum(len(body) for _, body in self._bodies.values())

    def attach(self, learner: Learner) -> None:
        self._learner = learner
        self._snapshots.clear()

    def detach(self) -> None:
        self._learner = None
        self._snapshots.clear()
        self._bodies.clear()

    async def snapshot(self, encoding: str) -> Snapshot:
        """The current model in this encoding, which is done once for each version of it. Raises NotReady."""
        async with self._taking:  # several askers share one encoding
            learner, version = self._learner, self._gossip.version
            if learner is None:
                raise NotReady("the model is not loaded")
            known = self._snapshots.get(encoding)
            if known is None or known.version != version:
                age, round_ = self._gossip.age, self._gossip.round  # before, not after: a claim must be covered
                try:
                    body = await learner.snapshot(encoding)
                except GossipmlError as error:  # whoever runs the learner deals with it; gossip has nothing to send
                    raise NotReady(f"the model cannot be encoded: {error}") from error
                if self._learner is not learner:
                    raise NotReady("the model was unloaded meanwhile")
                known = self._keep(Snapshot(version, encoding, body, age, round_))
            return known

    def offer(self, body: bytes) -> None:
        """The current model, encoded already, as `Gossip.round_encoding` says, when the round ended."""
        encoding = self._gossip.config.encoding
        self._keep(Snapshot(self._gossip.version, encoding, body, self._gossip.age, self._gossip.round))

    def _keep(self, snapshot: Snapshot) -> Snapshot:
        old = [encoding for encoding, kept in self._snapshots.items() if kept.version != snapshot.version]
        for encoding in old:
            del self._snapshots[encoding]
        self._snapshots[snapshot.encoding] = snapshot
        return snapshot

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
