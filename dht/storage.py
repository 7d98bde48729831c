"""The records that this node keeps for others: verified, bounded, sampled.

Bounds: 64 records a key, 10,000 keys, 32 MB; of one publisher 1,000 records, so that none fills a node alone. When
a key is full it keeps the publishers with the smallest keyed hash, under a secret of this node: each holder keeps
another fair sample of a long list, and nobody can choose an identity that displaces others everywhere. When there
are too many keys or bytes, the key farthest from our own id goes, as those nearer to it should hold it; a key that
would itself be the farthest is refused.

Records are never handed on by a holder: only the owner republishes, so none outlives its signed expiry.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from gossipml.dht.records import LEAST_SIZE, Outcome, Record, is_signed, refused_by_time
from gossipml.identity import Verify, verify
from gossipml.ids import NodeId, PeerId

if TYPE_CHECKING:
    import random

MAX_RECORDS_PER_KEY = 64
MAX_KEYS = 10_000
MAX_OF_ONE = 1000  # records of a publisher: as many model versions; ten identities are needed to fill a node
MAX_BYTES = 32 << 20  # 10,000 full keys would be 600 MB
RECORD_COST = 400  # Python objects around the bytes of a record, about
MAX_VERIFIED = 4096  # records remembered as verified: a full get of a long list, many times over


class Verifier:
    """Checks signatures, each record only once while it is remembered."""

    def __init__(self, network_id: bytes, verify: Verify = verify) -> None:
        self._network_id = network_id
        self._verify = verify
        self._verified: OrderedDict[Record, None] = OrderedDict()
        self.checks = 0
        self.is_revoked: Callable[[PeerId], bool] | None = None
        """Whose records do not count; None while nobody is out."""

    def is_genuine(self, record: Record) -> bool:
        if self.is_revoked is not None and self.is_revoked(record.peer):
            return False
        if record in self._verified:
            self._verified.move_to_end(record)
            return True
        self.checks += 1
        if not is_signed(record, self._network_id, self._verify):
            return False
        self._verified[record] = None
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return True


class Storage:
    def __init__(self, own: NodeId, verifier: Verifier, secret: bytes) -> None:
        self._own = int.from_bytes(own, "big")
        self._verifier = verifier
        self._secret = secret
        self._records: dict[bytes, dict[tuple[int, bytes], Record]] = {}
        self._first_expiry: dict[bytes, float] = {}  # by key: when the first of its records may expire
        self._of: Counter[bytes] = Counter()  # records by public key
        self._by_distance: list[tuple[int, bytes]] = []  # sorted: the farthest key is last
        self._unswept: list[bytes] = []
        self.bytes = 0
        self.count = 0

    @property
    def keys(self) -> int:
        return len(self._records)

    def offer(self, record: Record, wall: float) -> Outcome:
        """Store a record if it is newer, alive, within the bounds and genuine; the signature is checked last."""
        refused = refused_by_time(record, wall)
        if refused is not None:
            return refused
        slots = self._records.get(record.key, {})
        held = slots.get(record.slot)
        if held is not None:
            if held == record:
                return Outcome.HELD
            if record.order <= held.order:  # BEP 44: a lower or equal seq never replaces
                return Outcome.STALE
        if not self._has_room(record, slots, wall):
            return Outcome.FULL
        if not self._verifier.is_genuine(record):
            return Outcome.FORGED
        self._put(record)
        return Outcome.STORED if record.key in self._records else Outcome.FULL

    def get(self, key: bytes, wall: float) -> list[Record]:
        """The live records of a key."""
        self._expire(key, wall)
        return list(self._records.get(key, {}).values())

    def sample(
        self, key: bytes, wall: float, rng: random.Random, budget: int, part: tuple[int, int] | None = None
    ) -> tuple[list[Record], int]:
        """Records of a key in random order, as many as fit in `budget` bytes on the wire; and how many there are.

        `part`: only which of how many parts. Two holders of nearly the same records cut them at nearly the same places.
        """
        records = self.get(key, wall)
        total = len(records)
        if part is not None:
            index, parts = part
            records.sort(key=lambda record: record.public_key)
            records = records[index * total // parts : (index + 1) * total // parts]
        chosen = []
        while records and budget >= LEAST_SIZE:
            index = int(rng.random() * len(records))
            record, records[index] = records[index], records[-1]
            records.pop()
            if record.size <= budget:
                budget -= record.size
                chosen.append(record)
        return chosen, total

    def remove_all(self, unwanted: Callable[[Record], bool]) -> None:
        """Forget every record that is unwanted."""
        for key, slots in list(self._records.items()):
            for slot in [slot for slot, record in slots.items() if unwanted(record)]:
                self._forget(slots, slot)
            if not slots:
                self._drop_key(key)

    def sweep(self, wall: float, limit: int = 500) -> None:
        """Drop what expired under the next `limit` keys; a few calls visit all, none takes long."""
        if not self._unswept:
            self._unswept = list(self._records)
        for key in self._unswept[-limit:]:
            self._expire(key, wall)
        del self._unswept[-limit:]

    def _rank(self, slot: tuple[int, bytes]) -> bytes:
        kind, public_key = slot
        return hashlib.blake2b(public_key + bytes((kind,)), key=self._secret, digest_size=8).digest()

    def _has_room(self, record: Record, slots: dict[tuple[int, bytes], Record], wall: float) -> bool:
        if record.slot in slots:
            return True
        if self._of[record.public_key] >= MAX_OF_ONE:
            return False
        if slots:
            if len(slots) >= MAX_RECORDS_PER_KEY:
                self._expire(record.key, wall)
            if len(slots) >= MAX_RECORDS_PER_KEY and self._rank(record.slot) > max(map(self._rank, slots)):
                return False
        elif self._is_full(record) and self._by_distance:
            return self._distance(record.key) < self._by_distance[-1][0]
        return True

    def _is_full(self, record: Record) -> bool:
        return len(self._records) >= MAX_KEYS or self.bytes + record.size + RECORD_COST > MAX_BYTES

    def _put(self, record: Record) -> None:
        slots = self._records.get(record.key)
        if slots is None:
            while self._is_full(record) and self._by_distance:
                self._drop_key(self._by_distance[-1][1])
            slots = self._records[record.key] = {}
            bisect.insort(self._by_distance, (self._distance(record.key), record.key))
        elif record.slot in slots:
            self._forget(slots, record.slot)
        elif len(slots) >= MAX_RECORDS_PER_KEY:
            self._forget(slots, max(slots, key=self._rank))
        slots[record.slot] = record
        self._first_expiry[record.key] = min(record.expires, self._first_expiry.get(record.key, record.expires))
        self._of[record.public_key] += 1
        self.count += 1
        self.bytes += record.size + RECORD_COST
        while self.bytes > MAX_BYTES and len(self._by_distance) > 1:
            self._drop_key(self._by_distance[-1][1])

    def _distance(self, key: bytes) -> int:
        return int.from_bytes(key, "big") ^ self._own

    def _forget(self, slots: dict[tuple[int, bytes], Record], slot: tuple[int, bytes]) -> None:
        gone = slots.pop(slot)
        self.bytes -= gone.size + RECORD_COST
        self.count -= 1
        self._of[gone.public_key] -= 1
        if not self._of[gone.public_key]:
            del self._of[gone.public_key]

    def _expire(self, key: bytes, wall: float) -> None:
        if self._first_expiry.get(key, math.inf) > wall:
            return
        slots = self._records[key]
        for slot in [slot for slot, record in slots.items() if record.expires <= wall]:
            self._forget(slots, slot)
        if slots:
            self._first_expiry[key] = min(record.expires for record in slots.values())
        else:
            self._drop_key(key)

    def _drop_key(self, key: bytes) -> None:
        slots = self._records.pop(key)
        del self._first_expiry[key]
        for slot in list(slots):
            self._forget(slots, slot)
        index = bisect.bisect_left(self._by_distance, (self._distance(key), key))
        del self._by_distance[index]
