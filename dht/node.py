"""One DHT node without its socket: opens datagrams, answers requests, matches replies, knows who is proven.

`receive(datagram, source, now, wall)` returns what to do: `Send`, `Answered` (a call of ours), `Check` (somebody
who should be challenged), `Warn`. It never raises, whatever a member sends. `ask` and `again` make requests.

Who is proven: a request to somebody we have no session with carries a challenge, and its reply counts only with
a signature over the challenge, both sids and the dialled address. Then `(address -> node id, sid)` is a session
and later requests are sealed for that sid alone. A node that restarts has another sid, so the session dies with
it; `again` therefore goes back to the first-contact form. A challenged node signs only for an address that it
knows to be its own, so a member cannot pass the challenge on and pose as another at his address.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gossipml.dht.config import DhtConfig
from gossipml.dht.limits import TokenBuckets
from gossipml.dht.messages import (
    ANSWER_TO,
    CALL_SIZE,
    GET_ROOM,
    NONCE_SIZE,
    RECORD_BUDGET,
    Answer,
    Challenge,
    Find,
    Found,
    Get,
    Got,
    NodeContact,
    Ping,
    Pong,
    Proof,
    Question,
    Reply,
    Request,
    Store,
    Stored,
    decode,
    encode,
    fit,
    proof_bytes,
)
from gossipml.dht.routing import Contact, Networks, Table
from gossipml.dht.seal import (
    SID_SIZE,
    Drop,
    Dropped,
    Opened,
    Opener,
    Sealer,
    address_receiver,
    node_receiver,
    session_receiver,
)
from gossipml.dht.storage import Storage, Verifier
from gossipml.errors import RemoteError
from gossipml.identity import Identity, Verify, verify
from gossipml.ids import Address, NodeId, node_id_of, peer_id_of
from gossipml.keys import NetworkKeys
from gossipml.membership import Membership

if TYPE_CHECKING:
    import random

MAX_SESSIONS = 4096  # as many as senders are remembered
MAX_PENDING = 1024  # 16 lookups and puts at once; a bound, not a target
MAX_CHECKS = 64  # challenges to those who wrote to us, at once
FAR_CHECKS = 0.1  # a second, of nodes that are not near us: our own lookups find enough of them
FAR_CHECKS_AT_FIRST = 32  # so that a small network knows itself at once
CHECK_AGAIN_AFTER = 30.0  # seconds between two challenges to one address
MAX_CHECKED = 1024
WARN_EVERY = 60.0
RTT_GAIN = 0.125  # RFC 6298


@dataclass(frozen=True)
class Send:
    data: bytes
    to: Address


@dataclass(frozen=True)
class Answered:
    """The reply to a call of ours; `contact` is proven."""

    call: bytes
    contact: NodeContact
    answer: Answer


@dataclass(frozen=True)
class Check:
    """Somebody who would be a good contact, if it is who it says."""

    contact: NodeContact


@dataclass(frozen=True)
class Warn:
    text: str


Action = Send | Answered | Check | Warn


@dataclass
class DhtStats:
    """Counters since the start."""

    sent: int = 0
    received: int = 0
    requests: int = 0
    replies: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason: those of `seal.Drop`, and malformed, stranger, unproven, busy, not-me, revoked."""
    nodes: int = 0
    records: int = 0
    keys: int = 0
    checks: int = 0
    """Record signatures verified."""


@dataclass(frozen=True, slots=True)
class _Session:
    node: NodeId
    sid: bytes
    root: bytes
    """The datagram key that it uses."""


@dataclass(slots=True)
class _Pending:
    address: Address
    node: NodeId | None
    question: Question
    nonce: bytes
    sent: float
    repeated: bool = False


class DhtNode:
    def __init__(
        self,
        identity: Identity,
        keys: NetworkKeys,
        config: DhtConfig,
        secrets: Callable[[int], bytes],
        rng: random.Random,
        wall: float,
        membership: Membership | None = None,
        verify: Verify = verify,
    ) -> None:
        self.id = identity.node_id
        self._membership = membership or Membership(keys)
        self._version = 0
        self.networks = Networks(config.excepted_networks)
        self.table = Table(self.id, self.networks, config.k)
        self.verifier = Verifier(keys.network_id, verify)
        self.storage = Storage(self.id, self.verifier, secrets(16))
        self._identity = identity
        self._config = config
        self._secrets = secrets
        self._verify = verify
        self._rng = rng
        sid = secrets(SID_SIZE)
        self._sealer = Sealer(keys.datagram_key, sid)
        self._opener = Opener(keys.datagram_key, sid, self.id, wall)
        self._own: tuple[Address, ...] = ()
        self._pending: dict[bytes, _Pending] = {}
        self._sessions: dict[Address, _Session] = {}
        self._checked: OrderedDict[Address, float] = OrderedDict()
        self._memo: dict[bytes, NodeContact] = {}
        self._finds = TokenBuckets(config.finds_per_second, config.burst)
        self._stores = TokenBuckets(config.stores_per_second, config.burst)
        self._stats = DhtStats()
        self._far_checks = TokenBuckets(FAR_CHECKS, FAR_CHECKS_AT_FIRST / FAR_CHECKS)
        self._rtt: float | None = None
        self._next_warning = float("-inf")
        self._handlers: dict[type[Question], Callable[..., Answer | None]] = {
            Ping: self._on_ping,
            Find: self._on_find,
            Get: self._on_get,
            Store: self._on_store,
        }

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def received(self) -> int:
        """Datagrams since the start."""
        return self._stats.received

    @property
    def sid(self) -> bytes:
        return self._sealer.sid

    @property
    def soft_wait(self) -> float:
        """Seconds after which a query is slow."""
        low, high = self._config.soft_wait
        return high if self._rtt is None else min(high, max(low, 4 * self._rtt))

    def stats(self) -> DhtStats:
        return dataclasses.replace(
            self._stats,
            dropped=Counter(self._stats.dropped),
            nodes=len(self.table),
            records=self.storage.count,
            keys=self.storage.keys,
            checks=self.verifier.checks,
        )

    def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """Where we can be reached; first contacts for any other address are not for us."""
        self._own = addresses
        self._opener.set_addresses(addresses)

    def _heed(self) -> None:
        """Take up what has changed about the keys and the members."""
        membership = self._membership
        self._version = membership.version
        roots = [keys.datagram_key for keys in membership.accepted]
        self._sealer.set_roots(roots)
        self._opener.set_roots(roots)
        if membership.revoked:
            self.verifier.is_revoked = membership.is_revoked
            self.table.remove_all(lambda node: membership.is_revoked_node(NodeId(node)))
            self.storage.remove_all(lambda record: membership.is_revoked(record.peer))
        for address, session in list(self._sessions.items()):
            if session.root not in roots or membership.is_revoked_node(session.node):
                del self._sessions[address]

    # Asking

    def ask(self, to: NodeContact | Address, question: Question, now: float, wall: float) -> tuple[bytes, bytes] | None:
        """The number of a new call and its datagram; None when too many are under way, or to a revoked node."""
        if self._version != self._membership.version:
            self._heed()
        if len(self._pending) >= MAX_PENDING:
            return None
        address, node = (to.address, to.node) if isinstance(to, NodeContact) else (to, None)
        if node is not None and self._membership.is_revoked_node(node):
            return None
        session = self._sessions.get(address)
        if session is not None and node is not None and session.node != node:
            session = None
        drawn = self._secrets(CALL_SIZE + NONCE_SIZE)
        call = drawn[:CALL_SIZE]
        pending = _Pending(address, node, question, drawn[CALL_SIZE:], now)
        self._pending[call] = pending
        return call, self._request(call, pending, wall, session)

    def again(self, call: bytes, wall: float) -> bytes | None:
        """The datagram of a call once more, as a first contact: the other side may have restarted."""
        pending = self._pending.get(call)
        if pending is None:
            return None
        pending.repeated = True
        return self._request(call, pending, wall, None)

    def older(self, call: bytes, wall: float) -> list[bytes]:
        """The same under the older keys that still count: the other side may not have heard of the newest."""
        pending = self._pending.get(call)
        if pending is None:
            return []
        return [self._request(call, pending, wall, None, keys.datagram_key) for keys in self._membership.accepted[1:]]

    def forget(self, call: bytes) -> None:
        """The caller no longer waits for this call."""
        self._pending.pop(call, None)

    def missed(self, contact: NodeContact) -> bool:
        """A contact was silent for the hard wait; True when it left the table for that."""
        self._sessions.pop(contact.address, None)
        return self.table.missed(contact)

    def _request(
        self, call: bytes, pending: _Pending, wall: float, session: _Session | None, root: bytes = b""
    ) -> bytes:
        challenge = None
        if session is not None:
            receiver, root = session_receiver(session.sid), session.root
        else:
            challenge = Challenge(pending.nonce, pending.address)
            known = pending.node is not None
            receiver = node_receiver(pending.node) if known and pending.node else address_receiver(pending.address)
        self._stats.sent += 1
        return self._sealer.seal(encode(Request(call, self.id, challenge, pending.question)), receiver, wall, root)

    # Receiving

    def receive(self, datagram: bytes, source: Address, now: float, wall: float) -> list[Action]:
        self._stats.received += 1
        if self._version != self._membership.version:
            self._heed()
        opened = self._opener.open(datagram, wall)
        if isinstance(opened, Dropped):
            self._drop(opened.reason)
            return self._warn_of_skew(opened, source, now) if opened.reason is Drop.SKEWED else []
        try:
            message = decode(opened.body, self._memo)
        except RemoteError:
            self._drop("malformed")
            return []
        if isinstance(message, Request):
            return self._on_request(message, opened, source, now, wall)
        return self._on_reply(message, opened, source, now)

    def _drop(self, reason: str) -> None:
        self._stats.dropped[str(reason)] += 1

    def _warn_of_skew(self, dropped: Dropped, source: Address, now: float) -> list[Action]:
        if now < self._next_warning:
            return []
        self._next_warning = now + WARN_EVERY
        direction = "ahead of" if dropped.skew > 0 else "behind"
        return [
            Warn(
                f"the clock of {source} is {abs(dropped.skew):.0f} s {direction} ours, more than 120 s; its "
                "datagrams are dropped. Set both clocks (for example with NTP)"
            )
        ]

    def _on_request(self, request: Request, opened: Opened, source: Address, now: float, wall: float) -> list[Action]:
        self._stats.requests += 1
        if self._membership.is_revoked_node(request.sender):
            self._drop("revoked")
            return []
        buckets = self._stores if isinstance(request.question, Store) else self._finds
        if not buckets.take(self._source(source), now):
            self._drop("busy")
            return []
        proof = None
        if request.challenge is not None:
            dialled = request.challenge.dialled
            if dialled not in self._own:
                self._drop("not-me")
                return []
            to_sign = proof_bytes(request.challenge.nonce, opened.sid, self.sid, dialled)
            proof = Proof(self._identity.public_key, self._identity.sign(to_sign))
        answer = self._handlers[type(request.question)](request.question, request.sender, wall)
        if answer is None:
            return []
        body = encode(Reply(request.call, proof, answer))
        self._stats.sent += 1
        actions: list[Action] = [Send(self._sealer.seal(body, session_receiver(opened.sid), wall, opened.root), source)]
        sender = NodeContact(request.sender, source)
        if self.table.wants(sender) and self._may_check(source, now) and self._matters(sender, now):
            actions.append(Check(sender))
        return actions

    def _source(self, address: Address) -> str | Address:
        """Who shares a token bucket: a host; a /48 of IPv6, where hosts are free; a socket in excepted networks."""
        group = self.networks.group(address.host)
        if group is None:
            return address
        return group if ":" in address.host else address.host

    def _matters(self, sender: NodeContact, now: float) -> bool:
        """Neighbours always, and known nodes that have moved; of the many far away only some: a busy node must not
        answer every stranger's request with a question of its own."""
        bucket = self.table.bucket_of(sender.node)
        own = bucket.range[0] <= self.table.node.long_id <= bucket.range[1]
        return own or sender.node in bucket.nodes or self._far_checks.take("", now)

    def _may_check(self, address: Address, now: float) -> bool:
        then = self._checked.get(address)
        if then is not None and now - then < CHECK_AGAIN_AFTER:
            return False
        self._checked[address] = now
        self._checked.move_to_end(address)
        if len(self._checked) > MAX_CHECKED:
            self._checked.popitem(last=False)
        return True

    def _on_reply(self, reply: Reply, opened: Opened, source: Address, now: float) -> list[Action]:
        pending = self._pending.get(reply.call)
        if pending is None or pending.address != source:
            self._drop("stranger")  # late, or not the one we asked
            return []
        if not _answers(reply.answer, pending.question):
            self._drop("malformed")
            return []
        node = self._proven(pending, reply.proof, opened.sid)
        if node is None:
            self._drop("unproven")
            return []
        if self._membership.is_revoked_node(node):
            self._drop("revoked")
            return []
        self._stats.replies += 1
        del self._pending[reply.call]
        if not pending.repeated:
            sample = now - pending.sent
            self._rtt = sample if self._rtt is None else self._rtt + RTT_GAIN * (sample - self._rtt)
        contact = NodeContact(node, source)
        actions: list[Action] = [Answered(reply.call, contact, reply.answer)]
        if reply.proof is not None:
            self._sessions.pop(source, None)
            self._sessions[source] = _Session(node, opened.sid, opened.root)  # at the end, as the latest
            if len(self._sessions) > MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
        held = self.table.get(node)
        if held is not None and held.contact == contact:
            self.table.heard(node, now)
            return actions
        to_probe = self.table.add(contact, now)
        if to_probe is not None and self._is_quiet(to_probe, now) and self._may_check(to_probe.contact.address, now):
            actions.append(Check(to_probe.contact))
        return actions

    def _is_quiet(self, contact: Contact, now: float) -> bool:
        return now - contact.heard >= self._config.quiet_after

    def _proven(self, pending: _Pending, proof: Proof | None, sid: bytes) -> NodeId | None:
        """The node id of whoever replied; None when it is not proven or not the one we asked."""
        session = self._sessions.get(pending.address)
        if session is not None and session.sid == sid:
            node = session.node  # the process that has proven itself there; it is as well when it does so again
        elif proof is None:
            return None
        else:
            node = node_id_of(peer_id_of(proof.public_key))
            if pending.node in (None, node):
                signed = proof_bytes(pending.nonce, self.sid, sid, pending.address)
                if not self._verify(proof.public_key, proof.signature, signed):
                    return None
        if pending.node not in (None, node) or node == self.id:
            return None
        return node

    # Answering: each handler decides at once, from what is known here

    def _on_ping(self, question: Ping, sender: NodeId, wall: float) -> Answer:
        return Pong()

    def _on_find(self, question: Find, sender: NodeId, wall: float) -> Answer:
        return Found(packed=self.table.nearest_packed(question.target, self._config.k, exclude=sender))

    def _on_get(self, question: Get, sender: NodeId, wall: float) -> Answer:
        room = GET_ROOM
        budget = min(room, RECORD_BUDGET) if question.wanted else room
        found, held = self.storage.sample(question.key, wall, self._rng, budget, question.part)
        packed = self.table.nearest_packed(question.key, question.wanted, exclude=sender)
        room -= sum(record.size for record in found)
        return Got(question.key, tuple(found), held, packed=fit(packed, room))

    def _on_store(self, question: Store, sender: NodeId, wall: float) -> Answer:
        outcome = self.storage.offer(question.record, wall)
        return Stored(outcome, packed=self.table.nearest_packed(question.record.key, question.wanted, exclude=sender))


def _answers(answer: Answer, question: Question) -> bool:
    if isinstance(answer, Got) and isinstance(question, Get) and answer.key != question.key:
        return False
    return isinstance(answer, ANSWER_TO[type(question)])
