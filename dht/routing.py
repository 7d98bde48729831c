"""The routing table: `kademlia`'s buckets with proven contacts, exact walks and virtual time.

Kademlia (Maymounkov, Mazieres 2002) section 2.2 to 2.4 and 4.1. From the package: `Node`, `KBucket` (contacts and
the replacement cache), `RoutingTable` (splitting). Done differently here:

- `nearest` is exact: in a sorted list of the ids those with a prefix in common lie side by side (the package's
  traverser stops early and is not in XOR order).
- No clock of its own and no event loop: time is an argument, and `add` says whom to probe instead of probing.
- Ranges are powers of two, a contact is evicted after two misses, and one network (a /24 or /48) holds at most
  two places of a bucket, so that one who owns a network cannot fill it.

Callers add only contacts that have proven their id at their address.
"""

from __future__ import annotations

import functools
import ipaddress
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from gossipml.dht.messages import NodeContact, pack_contact
from gossipml.ids import NODE_ID_SIZE, Address, NodeId

K = 20  # with 8, records were lost when half of the nodes stopped
SPLIT_EVERY = 5  # section 4.2: buckets outside our own range split to this many bits, for shorter lookups
MAX_MISSES = 2  # one lost datagram must not evict
MAX_PER_NETWORK = 2
SOUGHT_REPLACEMENTS = 5  # a full bucket seeks no more; its cache fills up from those who answer us anyway
MAX_STRAY_ADDRESSES = 256  # of nodes that left the table; then they are forgotten
MAX_FOUND = 256  # keys whose nearest contacts are remembered: 100 kB
ID_BITS = 8 * NODE_ID_SIZE

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Networks:
    """Which addresses belong together, so that one owner of many gets few places."""

    def __init__(self, excepted: Iterable[str]) -> None:
        self._excepted: tuple[IpNetwork, ...] = tuple(ipaddress.ip_network(text) for text in excepted)
        # An address is looked at with every datagram; parsing it costs more than the rest of the decision.
        self.group = functools.lru_cache(4096)(self._group)

    def _group(self, host: str) -> str | None:
        """The /24 or /48 of an address; None when it is in an excepted network."""
        ip = ipaddress.ip_address(host)
        if any(ip.version == network.version and ip in network for network in self._excepted):
            return None
        bits = 24 if ip.version == 4 else 48
        return str(ipaddress.ip_network((ip, bits), strict=False))


class Contact(Node):  # type: ignore[misc]  # the package has no types
    """A proven node in the table."""

    id: bytes
    long_id: int

    def __init__(self, contact: NodeContact, now: float) -> None:
        super().__init__(contact.node, contact.address.host, contact.address.port)
        self.contact = contact
        self.packed = pack_contact(contact)
        self.heard = now
        self.misses = 0


class Bucket(KBucket):  # type: ignore[misc]
    """A range of ids whose size is a power of two."""

    range: tuple[int, int]
    nodes: dict[bytes, Contact]
    replacement_nodes: dict[bytes, Contact]

    def __init__(self, lower: int, upper: int, size: int) -> None:
        super().__init__(lower, upper, size, replacementNodeFactor=1)
        self.looked_up = -math.inf  # never

    def touch_last_updated(self) -> None:
        """Nothing: the package would read the real clock; see `looked_up`."""

    @property
    def bits(self) -> int:
        """How many bits vary within the bucket."""
        return (self.range[1] - self.range[0] + 1).bit_length() - 1

    def split(self) -> tuple[Bucket, Bucket]:
        middle = (self.range[0] + self.range[1]) // 2
        one = Bucket(self.range[0], middle, self.ksize)
        two = Bucket(middle + 1, self.range[1], self.ksize)
        one.looked_up = two.looked_up = self.looked_up
        for node in [*self.nodes.values(), *self.replacement_nodes.values()]:
            (one if node.long_id <= middle else two).add_node(node)
        return one, two


class Table(RoutingTable):  # type: ignore[misc]
    """The proven contacts of one node."""

    buckets: list[Bucket]
    node: Node

    def __init__(self, own: NodeId, networks: Networks, k: int = K) -> None:
        self.networks = networks
        self._lows = [0]  # where the buckets begin
        self._by_id: tuple[list[int], dict[int, Contact]] | None = None  # the ids in order; None: to be made
        self._reach: int | None = None
        # The nearest to popular keys, while nobody comes or goes.
        self._found: dict[tuple[bytes, int], list[Contact]] = {}
        self._node_at: dict[Address, bytes] = {}  # the node that proved itself there last
        self.additions = 0
        """How often a contact entered or moved."""
        super().__init__(None, k, Node(own))

    def flush(self) -> None:
        self.buckets = [Bucket(0, (1 << ID_BITS) - 1, self.ksize)]

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def bucket_of(self, node: bytes) -> Bucket:
        return self.buckets[self._index(int.from_bytes(node, "big"))]

    def get(self, node: bytes) -> Contact | None:
        return self._sorted()[1].get(int.from_bytes(node, "big"))

    def contacts(self) -> list[Contact]:
        return [contact for bucket in self.buckets for contact in bucket.nodes.values()]

    def wants(self, contact: NodeContact) -> bool:
        """Whether it would be useful to have this contact proven."""
        if contact.node == self.node.id:
            return False
        held = self.get(contact.node)
        if held is not None:
            return held.contact != contact
        bucket = self.bucket_of(contact.node)
        if contact.node in bucket.replacement_nodes:
            return False
        if self._crowded(bucket, contact):
            return False
        room = len(bucket) < self.ksize or len(bucket.replacement_nodes) < SOUGHT_REPLACEMENTS
        return room or self._splits(bucket)

    def add(self, contact: NodeContact, now: float) -> Contact | None:
        """Enter a contact that has proven itself; returns one to probe when the bucket is full.

        A known node moves to its newly proven address; another node at the same address is replaced.
        """
        if contact.node == self.node.id:
            return None
        bucket = self.bucket_of(contact.node)
        bucket.replacement_nodes.pop(contact.node, None)
        if self._crowded(bucket, contact):
            return None
        entry = Contact(contact, now)
        self._take_address(contact)
        while not bucket.add_node(entry):
            if not self._splits(bucket):
                return min(bucket.nodes.values(), key=lambda held: held.heard)
            bucket.replacement_nodes.pop(contact.node, None)
            self.split_bucket(self.buckets.index(bucket))
            bucket = self.bucket_of(contact.node)
        self.additions += 1
        if self._by_id is not None:
            ids, contacts = self._by_id
            if entry.long_id not in contacts:
                insort(ids, entry.long_id)
            contacts[entry.long_id] = entry
            self._reach = None
            self._found.clear()
        return None

    def heard(self, node: bytes, now: float) -> None:
        """A contact answered us."""
        contact = self.get(node)
        if contact is not None:
            contact.heard, contact.misses = now, 0

    def missed(self, contact: NodeContact) -> bool:
        """A contact did not answer; True when it was evicted for that."""
        held = self.get(contact.node)
        if held is None:
            self.bucket_of(contact.node).replacement_nodes.pop(contact.node, None)
            return False
        if held.contact != contact:  # it has moved since it was asked
            return False
        held.misses += 1
        if held.misses < MAX_MISSES:
            return False
        self.remove_contact(held)
        return True

    def remove_all(self, banned: Callable[[bytes], bool]) -> None:
        """Forget every contact whose id is banned."""
        self._by_id = None
        for bucket in self.buckets:
            for node in [node for node in bucket.replacement_nodes if banned(node)]:  # first: they would move up
                del bucket.replacement_nodes[node]
            for held in [held for held in bucket.nodes.values() if banned(held.id)]:
                bucket.remove_node(held)

    def remove_contact(self, node: Node) -> None:
        self._by_id = None
        self.bucket_of(node.id).remove_node(node)

    def nearest(self, target: bytes, count: int) -> list[NodeContact]:
        """The `count` contacts nearest to `target`, exactly, nearest first."""
        return [held.contact for held in self._nearest(target, count)]

    def nearest_packed(self, target: bytes, count: int, exclude: NodeId) -> tuple[bytes, ...]:
        """The same as they travel, without `exclude`."""
        if not count:
            return ()
        near = self._nearest(target, count + 1)
        packed = [held.packed for held in near]
        for index, held in enumerate(near):
            if held.id == exclude:
                del packed[index]
                break
        return tuple(packed[:count])

    def _nearest(self, target: bytes, wanted: int) -> list[Contact]:
        ids, contacts = self._sorted()
        near = self._found.get((target, wanted))
        if near is None:
            if len(self._found) >= MAX_FOUND:
                self._found.clear()
            near = self._found[target, wanted] = self._find_nearest(ids, contacts, target, wanted)
        return near

    @staticmethod
    def _find_nearest(ids: list[int], contacts: dict[int, Contact], target: bytes, wanted: int) -> list[Contact]:
        goal = int.from_bytes(target, "big")

        def sharing(bits: int) -> tuple[int, int]:
            """Where those lie that differ from the goal in the last `bits` bits alone."""
            low = goal >> bits << bits
            return bisect_left(ids, low), bisect_left(ids, low + (1 << bits))

        # All that share a prefix with the goal lie side by side, and are nearer than any other. Begin with the range
        # that would hold enough if ids were spread evenly.
        bits = ID_BITS - (len(ids) // max(1, wanted)).bit_length()
        low, high = sharing(bits)
        while high - low < wanted and bits < ID_BITS:
            bits += 1
            low, high = sharing(bits)
        while high - low > 4 * wanted and bits:  # near our own id they are dense; sorting them all would cost more
            inner = sharing(bits - 1)
            if inner[1] - inner[0] < wanted:
                break
            bits -= 1
            low, high = inner
        near = sorted(ids[low:high], key=goal.__xor__)[:wanted]
        return [contacts[long_id] for long_id in near]

    def reach(self) -> int:
        """How far from a key its `k` nearest nodes are, about: half as far as our 2 k nearest are from us.

        Everything, when there are no more than that. Twice as many as needed are looked at, so that `k` ids ground
        to be near us make the reach half as long at worst.
        """
        if self._reach is None or self._by_id is None:
            near = self._nearest(self.node.id, 2 * self.ksize)
            everything = (1 << ID_BITS) - 1
            self._reach = (near[-1].long_id ^ self.node.long_id) // 2 if len(near) == 2 * self.ksize else everything
        return self._reach

    def looked_up(self, target: bytes, now: float) -> None:
        """A lookup went through the bucket of `target`, which is therefore not lonely."""
        self.bucket_of(target).looked_up = now

    def lonely(self, now: float, after: float) -> list[Bucket]:
        """Buckets through which no lookup went for `after` seconds."""
        return [bucket for bucket in self.buckets if now - bucket.looked_up >= after]

    def split_bucket(self, index: int) -> None:
        self._by_id = None  # some may have moved up from the replacements
        self.buckets[index : index + 1] = self.buckets[index].split()
        self._lows = [bucket.range[0] for bucket in self.buckets]

    def _index(self, long_id: int) -> int:
        return bisect_right(self._lows, long_id) - 1

    def _sorted(self) -> tuple[list[int], dict[int, Contact]]:
        if self._by_id is None:
            self._found.clear()
            contacts = {held.long_id: held for bucket in self.buckets for held in bucket.nodes.values()}
            self._by_id = (sorted(contacts), contacts)
        return self._by_id

    def _splits(self, bucket: Bucket) -> bool:
        if bucket.bits == 0:
            return False
        return bool(bucket.has_in_range(self.node)) or (ID_BITS - bucket.bits) % SPLIT_EVERY != 0

    def _crowded(self, bucket: Bucket, contact: NodeContact) -> bool:
        if self.networks.group(contact.address.host) is None:
            return False
        nodes = [*bucket.nodes.values(), *bucket.replacement_nodes.values()]
        return not has_place(self.networks, contact, [node.contact for node in nodes if node.id != contact.node])

    def _take_address(self, contact: NodeContact) -> None:
        """Another node that was at this address is there no more."""
        before = self._node_at.get(contact.address)
        if before is not None and before != contact.node:
            held = self.get(before)
            if held is not None and held.contact.address == contact.address:
                self.remove_contact(held)
        self._node_at[contact.address] = contact.node
        if len(self._node_at) > 2 * len(self) + MAX_STRAY_ADDRESSES:
            self._node_at = {held.contact.address: held.id for held in self.contacts()} | {
                contact.address: contact.node
            }


def has_place(networks: Networks, contact: NodeContact, others: Sequence[NodeContact]) -> bool:
    """Whether the network of `contact` has fewer than two of `others`."""
    group = networks.group(contact.address.host)
    if group is None:
        return True
    return sum(networks.group(other.address.host) == group for other in others) < MAX_PER_NETWORK
