"""Passes the orders of the network key from session to session: who is out, and which cookie is new.

Two peers that open a session compare digests of what they know; when those differ, each tells all it has: at most
1,024 revocations and four rotations. What is news to a peer it tells to all its other sessions, so an order runs
through the network in as many steps as an update does, and who was away hears it with the first session. Nobody
passes a rotation on to whom he knows to be revoked, and whoever has a rotation has the revocations made before it.

Pure: decides what is to be said; the mesh says it, and ends the sessions that an order ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from gossipml.errors import RemoteError
from gossipml.membership import Membership
from gossipml.peer.wire import MAX_ORDERS, Orders


class Herald:
    """What to tell others about the orders that we know."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def greeting(self, their_digest: bytes) -> list[Orders]:
        """For a session that has just opened."""
        return [] if their_digest == self._membership.digest else self.tell(self._membership.orders())

    def tell(self, orders: Sequence[bytes]) -> list[Orders]:
        """Messages that carry these orders, in their order."""
        digest = self._membership.digest
        starts = range(0, len(orders), MAX_ORDERS)
        return [Orders(tuple(orders[start : start + MAX_ORDERS]), digest) for start in starts]

    def acknowledge(self) -> Orders:
        """That we know as much as our digest says, and nothing new."""
        return Orders((), self._membership.digest)

    def hear(self, message: Orders, wall: float) -> list[bytes]:
        """Do what the orders say; those that were news. RemoteError for one that is no order of this network."""
        news: list[bytes] = []
        for order in message.orders:
            try:
                if self._membership.take(order, wall):
                    news.append(order)
            except RemoteError:
                if not news:
                    raise
                break  # what came before it is to be told and kept first
        return news
