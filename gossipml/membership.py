"""Who is a member, as one peer knows it: the generations of the network's cookie that count now, and who is out.

One object for each peer, shared by its transport, DHT and sessions, which look at `accepted` and `is_revoked` each
time and notice changes by `version`. It takes orders of the network key (`gossipml.orders`) from the command line and
from other members, in any order and any number of times, and comes to the same end everywhere:

- Generations are ranked by (generation, key id), so that two rotations made at the same time on two machines are one
  after the other everywhere. The newest counts for ever; an older one until the earliest `old_until` of those
  above it. A newer rotation can therefore shorten an older window, and an older one can never lengthen it.
- An older generation that is not known is taken only while a known rotation above it says that it still counts:
  a replayed order of last year brings no old cookie back.
- Revocations only ever grow in number, at most 1,024.

What is taken is kept on disk (`state`), with the generations that came in a token and not by an order. Pure: wall
time is passed in. Leaves out: spreading (`gossipml.peer.mesh`), files (`gossipml.daemon.orders`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.ids import NodeId, PeerId, node_id_of
from gossipml.keys import NetworkKeys
from gossipml.orders import MAX_ORDER, Order, Revocation, Rotation, read_order
from gossipml.token import COOKIE_SIZE, MAX_GENERATION

MAX_ACCEPTED = 4  # a dial tries them one after the other, and so does a datagram; more rotations cut off the oldest
MAX_REVOKED = 1024  # 150 kB on disk and on the wire; beyond it, rotate
MAX_REFUSED = 64  # more than an honest network makes
MAX_STATE = 1 << 20
DIGEST_SIZE = 8
NO_ORDERS = bytes(DIGEST_SIZE)
"""The digest of a membership that never heard an order."""

Rank = tuple[int, str]


@dataclass
class _Generation:
    keys: NetworkKeys
    order: Rotation | None
    """None when it came in a token."""


class Membership:
    """The keys that count now and the peers that are out."""

    def __init__(self, keys: NetworkKeys) -> None:
        self.network_id = keys.network_id
        self.version = 0
        """Grows with every change."""
        self.accepted: tuple[NetworkKeys, ...] = (keys,)
        """All generations that count now, the newest first; never empty."""
        self._generations: dict[Rank, _Generation] = {keys.rank: _Generation(keys, None)}
        self._revoked: dict[PeerId, Revocation] = {}
        self._revoked_nodes: set[NodeId] = set()
        self._known: set[bytes] = set()  # orders that were taken, as they travel
        self._refused: dict[bytes, None] = {}  # genuine ones whose time is over: not to be verified again and again
        self._digest: tuple[int, bytes] = (0, NO_ORDERS)  # and of which version it is

    def __repr__(self) -> str:
        return f"Membership({self.newest!r}, accepted={len(self.accepted)}, revoked={len(self._revoked)})"

    @property
    def newest(self) -> NetworkKeys:
        return self.accepted[0]

    def accepts(self, key_id: str) -> bool:
        return any(keys.key_id == key_id for keys in self.accepted)

    def ends(self, keys: NetworkKeys) -> float:
        """Wall seconds from which a generation no longer counts; infinity for the newest."""
        above = [g.order.old_until for r, g in self._generations.items() if r > keys.rank and g.order is not None]
        return min(above, default=math.inf)

    def is_revoked(self, peer: PeerId) -> bool:
        return peer in self._revoked

    def is_revoked_node(self, node: NodeId) -> bool:
        return node in self._revoked_nodes

    @property
    def revoked(self) -> dict[PeerId, Revocation]:
        return dict(self._revoked)

    def orders(self) -> list[bytes]:
        """What another member should know. Revocations first: whoever has a rotation has those made before it, too,
        and so never passes it on to somebody who was put out before. Then the rotations, the newest first: it says
        which of the others still count."""
        revocations = [self._revoked[peer].raw for peer in sorted(self._revoked)]
        ranked = [self._generations[rank].order for rank in sorted(self._generations, reverse=True)]
        return revocations + [order.raw for order in ranked if order is not None]

    @property
    def digest(self) -> bytes:
        """Of the orders: two peers with the same one have nothing to tell each other."""
        if self._digest[0] != self.version:
            rotations = [list(rank) for rank, g in sorted(self._generations.items()) if g.order is not None]
            told = codec.pack([rotations, sorted(self._revoked)])
            digest = hashlib.sha256(b"gossipml/v1/orders" + told).digest()[:DIGEST_SIZE]
            self._digest = (self.version, digest if rotations or self._revoked else NO_ORDERS)
        return self._digest[1]

    # Changes.

    def take(self, data: bytes, wall: float) -> bool:
        """Do what an order says; whether it was news. RemoteError when it is no order of this network."""
        if data in self._known or data in self._refused:
            return False
        order = read_order(data, self.network_id)
        if self._do(order, wall):
            return True
        self._refused[data] = None
        if len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        return False

    def _do(self, order: Order, wall: float) -> bool:
        if isinstance(order, Revocation):
            if order.peer in self._revoked or len(self._revoked) >= MAX_REVOKED:
                return False
            self._revoked[order.peer] = order
            self._revoked_nodes.add(node_id_of(order.peer))
            self._known.add(order.raw)
            self.version += 1
            return True
        return self._add(NetworkKeys.derive(self.network_id, order.generation, order.cookie), order, wall)

    def hold(self, keys: NetworkKeys, wall: float) -> bool:
        """Take a generation out of a token, without the order that made it; whether it was news."""
        if keys.network_id != self.network_id:
            raise UserError("these keys are of another network")
        return self._add(keys, None, wall)

    def tick(self, wall: float) -> bool:
        """Drop the generations whose time is over; whether there was one. To be called every few seconds."""
        over = any(self.ends(keys) <= wall for keys in self.accepted)
        if over:
            self._changed(wall)
        return over

    def _add(self, keys: NetworkKeys, order: Rotation | None, wall: float) -> bool:
        known = self._generations.get(keys.rank)
        if known is not None:
            if known.order is not None or order is None:
                return False
            known.order = order
        elif keys.rank < self.newest.rank and not wall < self.ends(keys) < math.inf:
            return False  # its time is over, or nobody says that it is not
        else:
            self._generations[keys.rank] = _Generation(keys, order)
        self._changed(wall)
        return True

    def _changed(self, wall: float) -> None:
        ranked = sorted(self._generations.items(), reverse=True)
        kept = [(rank, g) for rank, g in ranked if self.ends(g.keys) > wall][:MAX_ACCEPTED]
        self._generations = dict(kept)
        self.accepted = tuple(g.keys for _, g in kept)
        self._refused.clear()  # what was too old may count now
        self._known = {order.raw for order in self._revoked.values()}
        self._known.update(g.order.raw for _, g in kept if g.order is not None)
        self.version += 1

    # On disk.

    def state(self) -> bytes:
        """What the next start needs to know; secret."""
        held = [[g.keys.generation, g.keys.cookie] for g in self._generations.values() if g.order is None]
        return codec.pack({"v": 1, "n": self.network_id, "held": held, "orders": self.orders()})

    def load(self, state: bytes, wall: float) -> None:
        """Take in what `state` gave in an earlier life. UserError when it is damaged."""
        try:
            fields = codec.as_map(codec.unpack(state, limit=MAX_STATE))
            if codec.get_int(fields, "v") != 1 or codec.get_bytes(fields, "n", limit=64) != self.network_id:
                raise RemoteError("it is of another version or another network")
            orders = codec.get_list(fields, "orders", limit=MAX_REVOKED + MAX_ACCEPTED)
            for order in orders:
                if not isinstance(order, bytes) or len(order) > MAX_ORDER:
                    raise RemoteError("an order is a few bytes")
                self.take(order, wall)
            for item in codec.get_list(fields, "held", limit=2 * MAX_ACCEPTED):
                match item:
                    case [int(generation), bytes(cookie)]:
                        if not 1 <= generation <= MAX_GENERATION or len(cookie) != COOKIE_SIZE:
                            raise RemoteError("a generation or a cookie is out of bounds")
                        self._hold_older(NetworkKeys.derive(self.network_id, generation, cookie), wall)
                    case _:
                        raise RemoteError("a generation is a number and a cookie")
        except RemoteError as error:
            raise UserError(
                f"HOME/keys is damaged ({error}); restore it from a copy, or delete it and join again with a token "
                "of today"
            ) from None

    def _hold_older(self, keys: NetworkKeys, wall: float) -> None:
        """A generation of our own earlier life: it counts although no rotation is known that ends it."""
        if keys.rank not in self._generations and self.ends(keys) > wall:
            self._generations[keys.rank] = _Generation(keys, None)
            self._changed(wall)
