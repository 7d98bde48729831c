"""Models in and out: the encoded model of the round, shared by all receivers, and the bodies that wait for a merge.

Performs what `gossipml.peer.gossip` decides, with the learner. Of our own model one version is held, whole or in
parts, and at most `GossipConfig.incoming` bodies of others. Leaves out: streams and sessions (`gossipml.peer.mesh`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import trio

from gossipml.errors import GossipmlError
from gossipml.ids import PeerId, short_peer_id
from gossipml.peer.gossip import Gossip
from gossipml.peer.gossip_events import Merge, MergeDone, MergeFailed, MergeTogether
from gossipml.peer.learner import Learner, MergeOutcome, NotReady
from gossipml.peer.wire import Update

log = logging.getLogger("gossipml.peer")


Merged: TypeAlias = tuple[MergeDone | MergeFailed, Update | None]
"""What came of an update, and its header where it was still held."""


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
            known = self.at_hand(encoding)
            if known is None:
                age, round_ = self._gossip.age, self._gossip.round  # before, not after: a claim must be covered
                try:
                    body = await learner.snapshot(encoding)
                except GossipmlError as error:  # whoever runs the learner deals with it; gossip has nothing to send
                    raise NotReady(f"the model cannot be encoded: {error}") from error
                if self._learner is not learner:
                    raise NotReady("the model was unloaded meanwhile")
                known = self._keep(Snapshot(version, encoding, body, age, round_))
            return known

    def at_hand(self, encoding: str) -> Snapshot | None:
        """The current model in this encoding, if that has been done."""
        known = self._snapshots.get(encoding)
        return known if known is not None and known.version == self._gossip.version else None

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

    def drop(self, sender: PeerId) -> None:
        """Let the sender's body go unmerged."""
        self._bodies.pop(sender, None)

    async def settle(self) -> None:
        """Nobody around trains any more; see `Learner.settle`."""
        if self._learner is not None:
            try:
                await self._learner.settle()
            except GossipmlError as error:  # whoever runs the learner deals with it
                log.debug("the model does not settle: %s", error)

    async def merge(self, action: Merge | MergeTogether) -> list[Merged]:
        """Merge what is held for its senders: what came of each, and the header it came with.

        Nothing when the learner was replaced meanwhile: gossip has already forgotten the updates.
        """
        senders = (action.sender,) if isinstance(action, Merge) else action.senders
        held = {sender: self._bodies.pop(sender) for sender in senders if sender in self._bodies}
        learner = self._learner
        outcomes: Sequence[MergeOutcome] = ()
        if held and learner is not None:
            try:
                if isinstance(action, Merge):
                    [(update, body)] = held.values()
                    outcomes = [await learner.merge(body, update.encoding, action.weight)]
                else:
                    outcomes = await learner.merge_together([(body, update.encoding) for update, body in held.values()])
            except GossipmlError as error:
                names = ", ".join(short_peer_id(sender) for sender in held)
                log.warning("what %s sent could not be merged: %s", names, error)
            if self._learner is not learner:
                return []
        came = dict(zip(held, outcomes, strict=False))  # nothing came of any when the learner failed
        return [
            (
                MergeDone(sender, outcome.applied, outcome.reason, outcome.distance, outcome.fault)
                if (outcome := came.get(sender)) is not None
                else MergeFailed(sender),
                held[sender][0] if sender in held else None,
            )
            for sender in senders
        ]
