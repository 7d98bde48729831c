"""A node without its socket: who is answered, who is believed, what is dropped."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from gossipml import codec
from gossipml.dht import messages, records
from gossipml.dht.config import DhtConfig
from gossipml.dht.messages import (
    Challenge,
    Find,
    Found,
    Get,
    Got,
    NodeContact,
    Ping,
    Pong,
    Proof,
    Reply,
    Request,
    Store,
    Stored,
)
from gossipml.dht.node import Action, Answered, Check, DhtNode, Send, Warn
from gossipml.dht.records import Kind, Outcome, Record, sign_record
from gossipml.dht.seal import Receiver, Sealer, address_receiver, node_receiver, session_receiver
from gossipml.env import Credentials
from gossipml.ids import Address, NodeId

if TYPE_CHECKING:
    from tests.dht.conftest import Table

A, B, C = (Address(f"10.0.0.{i}", 8711) for i in (1, 2, 3))
KEY = records.topic_key(b"topic")


def record(member: Credentials, *, value: bytes = b"v", seq: int = 1, ttl: int = 600) -> Record:
    return sign_record(
        member.identity,
        member.keys.network_id,
        Kind.ANNOUNCEMENT,
        KEY,
        seq=seq,
        expires=1_700_000_000 + ttl,
        value=value,
    )


class Insider:
    """A member that seals whatever it likes."""

    def __init__(self, member: Credentials, sid: bytes = b"i" * 16) -> None:
        self.identity = member.identity
        self.sealer = Sealer(member.keys.datagram_key, sid)

    def seal(self, message: Request | Reply | bytes, receiver: Receiver, wall: float) -> bytes:
        body = message if isinstance(message, bytes) else messages.encode(message)
        return self.sealer.seal(body, receiver, wall)


def sends(actions: list[Action]) -> list[Send]:
    return [action for action in actions if isinstance(action, Send)]


def test_a_first_contact_by_address_alone_proves_the_node(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    answered = table.ask(a, B, Ping())
    assert answered is not None and answered.contact == NodeContact(b.id, B)
    assert [entry.contact for entry in a.table.contacts()] == [NodeContact(b.id, B)]
    assert len(b.table) == 0  # b has heard a claim only


def test_who_asks_is_challenged_before_it_enters_the_table(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    asked = a.ask(B, Ping(), 0.0, table.wall)
    assert asked is not None
    checks = [action for action in table.deliver(asked[1], A, B) if isinstance(action, Check)]
    assert checks == [Check(NodeContact(a.id, A))]
    assert table.ask(b, checks[0].contact, Ping()) is not None
    assert [entry.contact for entry in b.table.contacts()] == [NodeContact(a.id, A)]


def test_the_second_request_goes_to_the_session_and_needs_no_signature(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    assert table.ask(a, B, Ping()) is not None
    first, second = len(table.wire), NodeContact(b.id, B)
    answered = table.ask(a, second, Find(KEY))
    assert answered is not None and answered.answer == Found(())
    assert [wire[0][0] for wire in table.wire] == [3, 1, 1, 1]  # ADDRESS, then SESSION
    assert len(table.wire[first + 1][0]) < 100  # no proof in it


def test_a_process_that_has_proven_itself_is_not_verified_again_when_it_is_asked_twice(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = table.node("a", A), table.node("b", B)
    assert table.ask(a, B, Ping()) is not None
    monkeypatch.setattr(a, "_verify", lambda *signed: pytest.fail("verified"))
    asked = a.ask(NodeContact(b.id, B), Ping(), 0.0, table.wall)
    assert asked is not None  # and its answer is lost
    repeated = a.again(asked[0], table.wall)
    assert repeated is not None
    answered = table.exchange(a, repeated, B)
    assert answered is not None and answered.contact.node == b.id


def test_a_restarted_node_is_reached_again_with_the_same_call(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    assert table.ask(a, B, Ping()) is not None
    table.wall += 5
    again = table.node("b", B)
    asked = a.ask(NodeContact(b.id, B), Ping(), 0.0, table.wall)
    assert asked is not None
    call, data = asked
    assert table.exchange(a, data, B) is None  # sealed for a session that died
    repeated = a.again(call, table.wall)
    assert repeated is not None
    answered = table.exchange(a, repeated, B)
    assert answered is not None and answered.contact.node == b.id
    assert again.stats().dropped == {"unauthentic": 1}
    assert a.pending == 0


def test_a_node_on_a_new_port_must_prove_itself_there_and_then_has_moved(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    assert table.ask(a, B, Ping()) is not None
    del table.nodes[B]
    moved = Address(B.host, 9999)
    b = table.node("b", moved)
    asked = b.ask(A, Ping(), 0.0, table.wall)
    assert asked is not None
    actions = table.deliver(asked[1], moved, A)
    assert [entry.contact.address for entry in a.table.contacts()] == [B]  # a claim moves nobody
    assert Check(NodeContact(b.id, moved)) in actions
    assert table.ask(a, NodeContact(b.id, moved), Ping()) is not None
    assert [entry.contact.address for entry in a.table.contacts()] == [moved]


def test_a_stored_record_is_given_to_whoever_asks(table: Table, credentials: Callable[..., Credentials]) -> None:
    a, b = table.node("a", A), table.node("b", B)
    stored = record(credentials("a"))
    answered = table.ask(a, B, Store(stored))
    assert answered is not None and answered.answer == Stored(Outcome.STORED)
    answered = table.ask(a, NodeContact(b.id, B), Get(KEY))
    assert answered is not None and answered.answer == Got(KEY, (stored,), 1, ())


def test_forged_records_are_answered_with_a_refusal(table: Table, credentials: Callable[..., Credentials]) -> None:
    a, b = table.node("a", A), table.node("b", B)
    forged = dataclasses.replace(record(credentials("a")), value=b"other")
    answered = table.ask(a, B, Store(forged))
    assert answered is not None and answered.answer == Stored(Outcome.FORGED)
    assert b.stats().records == 0


def test_none_of_thousands_of_bad_records_of_a_member_is_stored(
    table: Table, credentials: Callable[..., Credentials]
) -> None:
    """Forged, stale, future-dated and rolled back, each properly sealed and asked for by a member."""
    rng = random.Random(1)
    config = DhtConfig(stores_per_second=1e6)
    a, b = table.node("a", A), table.node("b", B, config=config)
    owner = credentials("owner")
    assert table.ask(a, B, Ping()) is not None
    to = NodeContact(b.id, B)
    newest = record(owner, seq=500)
    answered = table.ask(a, to, Store(newest))
    assert answered is not None and answered.answer == Stored(Outcome.STORED)
    old = [record(owner, seq=seq) for seq in range(1, 500, 10)]
    others = [credentials(f"other-{number}") for number in range(20)]
    future = [record(other, seq=600, ttl=10**6) for other in others]
    expired = [record(other, seq=600, ttl=-1) for other in others]
    genuine = [record(other, seq=600) for other in others]
    outcomes = []
    for number in range(3000):
        match number % 4:
            case 0:
                bad = rng.choice(old)
            case 1:
                bad = rng.choice(future)
            case 2:
                bad = rng.choice(expired)
            case _:
                original = rng.choice([*genuine, newest])
                change = rng.choice(
                    [
                        {"value": rng.randbytes(9)},
                        {"seq": original.seq + rng.randrange(1, 10**6)},
                        {"expires": original.expires + 1},
                        {"public_key": rng.choice(others).identity.public_key, "signature": newest.signature},
                        {"signature": rng.randbytes(64)},
                    ]
                )
                bad = dataclasses.replace(original, **change)  # type: ignore[arg-type]
        answered = table.ask(a, to, Store(bad))
        assert answered is not None and isinstance(answered.answer, Stored)
        outcomes.append(answered.answer.outcome)
    assert set(outcomes) == {Outcome.STALE, Outcome.FUTURE, Outcome.EXPIRED, Outcome.FORGED}
    assert b.storage.get(KEY, table.wall) == [newest]
    assert b.stats().records == 1


# Strangers


def test_ten_thousand_garbage_datagrams_get_no_answer_and_change_nothing(table: Table) -> None:
    node, rng = table.node("a", A), random.Random(1)
    before = node.stats()
    for _ in range(10_000):
        garbage = bytearray(rng.randbytes(rng.randrange(1300)))
        if garbage and rng.random() < 0.8:
            garbage[0] = rng.choice((1, 2, 3))
        assert table.deliver(bytes(garbage), C, A) == []
    after = node.stats()
    assert (after.nodes, after.records, after.sent) == (before.nodes, before.records, 0)
    assert after.received == after.dropped.total() == 10_000


def test_a_node_with_another_cookie_gets_silence(table: Table) -> None:
    node = table.node("a", A)
    stranger = table.node("b", B, network="theirs")
    for to in (A, NodeContact(node.id, A)):
        assert table.ask(stranger, to, Ping()) is None
    assert node.stats().sent == 0
    assert node.stats().dropped == {"unauthentic": 4}


def conversation(table: Table, credentials: Callable[..., Credentials]) -> tuple[DhtNode, DhtNode]:
    """Two members that have said everything that can be said; all of it is on the wire."""
    a, b = table.node("a", A), table.node("b", B)
    for asker, to in ((a, B), (b, A), (a, NodeContact(b.id, B)), (b, NodeContact(a.id, A))):
        for question in (Ping(), Find(KEY), Store(record(credentials("a"))), Get(KEY)):
            assert table.ask(asker, to, question) is not None
    return a, b


@pytest.mark.parametrize("spoofed", [True, False])
def test_a_captured_conversation_played_again_has_no_effect_anywhere(
    table: Table, credentials: Callable[..., Credentials], spoofed: bool
) -> None:
    a, b = conversation(table, credentials)
    c = table.node("c", C)
    captured = list(table.wire)
    assert len(captured) == 32

    def replay(node: DhtNode, at: Address) -> None:
        before = node.stats()
        for data, source, _ in captured:
            assert table.deliver(data, source if spoofed else Address("10.6.6.6", 6666), at) == []
        after = node.stats()
        assert (after.sent, after.records, after.nodes, after.requests, after.replies) == (
            before.sent,
            before.records,
            before.nodes,
            before.requests,
            before.replies,
        )
        assert after.dropped.total() == before.dropped.total() + len(captured)

    table.wall += 1
    replay(a, A)
    replay(b, B)
    replay(c, C)
    restarted = table.node("b", B)
    replay(restarted, B)
    assert restarted.stats().records == 0
    # Also after the restarted node has met the sender again, whose session went on.
    table.wall += 1
    assert table.ask(a, B, Ping()) is not None
    replay(restarted, B)


def test_clock_skew_is_counted_and_said_once_a_minute(table: Table) -> None:
    a = table.node("a", A)
    table.wall += 3600
    b = table.node("b", B)
    table.wall -= 3600
    said = []
    for when in range(90):
        table.now = float(when)
        asked = b.ask(A, Ping(), table.now, table.wall + 3600)
        assert asked is not None
        b.forget(asked[0])
        said += table.deliver(asked[1], B, A)
    assert len(said) == 2 and all(isinstance(action, Warn) for action in said)
    assert isinstance(said[0], Warn) and "10.0.0.2:8711 is 3600 s ahead" in said[0].text and "NTP" in said[0].text
    assert a.stats().dropped == {"skewed": 90}
    assert a.stats().sent == 0


# Members that lie


def test_nobody_can_pose_as_another_node(table: Table, credentials: Callable[..., Credentials]) -> None:
    a, victim = table.node("a", A), table.node("victim", B)
    liar = Insider(credentials("liar"))
    asked = a.ask(NodeContact(victim.id, C), Ping(), 0.0, table.wall)
    assert asked is not None
    call, _ = asked
    nonce = a._pending[call].nonce
    own_key, victims_key = liar.identity.public_key, credentials("victim").identity.public_key
    signed = messages.proof_bytes(nonce, a.sid, liar.sealer.sid, C)
    tries = [
        None,  # without a word about it
        Proof(own_key, liar.identity.sign(signed)),  # as itself, though another was asked
        Proof(victims_key, liar.identity.sign(signed)),  # the victim's key, the liar's signature
        Proof(victims_key, bytes(64)),
    ]
    for proof in tries:
        reply = liar.seal(Reply(call, proof, Pong()), session_receiver(a.sid), table.wall)
        assert table.deliver(reply, C, A) == []
    assert len(a.table) == 0
    assert a.stats().dropped == {"unproven": 4}


@pytest.mark.parametrize("what", ["nonce", "requester", "responder", "address"])
def test_a_proof_holds_for_one_challenge_one_channel_and_one_address(
    table: Table, credentials: Callable[..., Credentials], what: str
) -> None:
    a = table.node("a", A)
    liar = Insider(credentials("liar"))
    asked = a.ask(C, Ping(), 0.0, table.wall)
    assert asked is not None
    nonce = a._pending[asked[0]].nonce
    signed = messages.proof_bytes(
        b"x" * 16 if what == "nonce" else nonce,
        b"x" * 16 if what == "requester" else a.sid,
        b"x" * 16 if what == "responder" else liar.sealer.sid,
        B if what == "address" else C,
    )
    proof = Proof(liar.identity.public_key, liar.identity.sign(signed))
    assert table.deliver(liar.seal(Reply(asked[0], proof, Pong()), session_receiver(a.sid), table.wall), C, A) == []
    assert len(a.table) == 0


def test_a_challenge_passed_on_is_not_signed(table: Table, credentials: Callable[..., Credentials]) -> None:
    """A member at C that is asked as the victim passes the challenge to the real one, which is at B."""
    a, victim = table.node("a", A), table.node("victim", B)
    asked = a.ask(NodeContact(victim.id, C), Ping(), 0.0, table.wall)
    assert asked is not None
    call, nonce = asked[0], a._pending[asked[0]].nonce
    relay = Insider(credentials("liar"), sid=a.sid)  # every member can derive every session key
    passed_on = Request(call, a.id, Challenge(nonce, C), Ping())
    assert table.deliver(relay.seal(passed_on, node_receiver(victim.id), table.wall), C, B) == []
    assert victim.stats().dropped == {"not-me": 1}
    # With the address changed to the victim's own the signature is of no use at C.
    passed_on = Request(call, a.id, Challenge(nonce, B), Ping())
    (send,) = sends(table.deliver(relay.seal(passed_on, node_receiver(victim.id), table.wall), C, B))
    assert table.deliver(send.data, C, A) == []
    assert len(a.table) == 0


def test_a_reply_from_elsewhere_or_to_no_question_is_dropped(
    table: Table, credentials: Callable[..., Credentials]
) -> None:
    a, b = table.node("a", A), table.node("b", B)
    asked = a.ask(B, Ping(), 0.0, table.wall)
    assert asked is not None
    (send,) = sends(table.deliver(asked[1], A, B))
    assert table.deliver(send.data, C, A) == []  # from another address
    assert a.stats().dropped == {"stranger": 1}
    insider = Insider(credentials("liar"))
    for answer in (Pong(), Found(()), Stored(Outcome.STORED)):
        reply = insider.seal(Reply(b"x" * 8, None, answer), session_receiver(a.sid), table.wall)
        assert table.deliver(reply, B, A) == []
    assert a.stats().dropped == {"stranger": 4}
    assert b.stats().replies == 0


def test_an_answer_to_another_question_is_dropped(table: Table, credentials: Callable[..., Credentials]) -> None:
    a = table.node("a", A)
    liar = Insider(credentials("liar"))
    for question, answer in (
        (Find(KEY), Pong()),
        (Ping(), Found(())),
        (Get(KEY), Got(b"z" * 20, (), 0, ())),
        (Store(record(credentials("a"))), Got(KEY, (), 0, ())),
    ):
        asked = a.ask(C, question, 0.0, table.wall)
        assert asked is not None
        signed = messages.proof_bytes(a._pending[asked[0]].nonce, a.sid, liar.sealer.sid, C)
        proof = Proof(liar.identity.public_key, liar.identity.sign(signed))
        reply = Reply(asked[0], proof, answer)
        assert table.deliver(liar.seal(reply, session_receiver(a.sid), table.wall), C, A) == []
    assert a.stats().dropped == {"malformed": 4}


def test_no_garbage_of_a_member_raises(table: Table, credentials: Callable[..., Credentials]) -> None:
    node, rng = table.node("a", A), random.Random(1)
    insider = Insider(credentials("liar"))
    asked = node.ask(C, Get(KEY), 0.0, table.wall)
    assert asked is not None
    templates: list[dict[str, codec.Value]] = [
        {"r": asked[0], "q": 3, "i": b"i" * 20, "k": KEY, "s": records.to_wire(record(credentials("liar")))},
        {"r": asked[0], "q": 2, "i": b"i" * 20, "k": KEY, "w": 20, "c": b"c" * 16, "t": messages.pack_address(A)},
        {"r": asked[0], "a": 2, "k": KEY, "m": 1, "v": [records.to_wire(record(credentials("liar")))], "n": bytes(26)},
        {"r": asked[0], "a": 1, "p": bytes(96), "n": bytes(range(52))},
        {"r": asked[0], "a": 3, "e": 0},
    ]
    values: list[codec.Value] = [
        None,
        True,
        -1,
        2**63 - 1,
        1.5,
        "x",
        b"",
        b"i" * 20,
        [],
        [[[[]]]],
        {},
        {"a": {"b": []}},
    ]
    for index in range(6000):
        template = dict(rng.choice(templates))
        for name in rng.sample(sorted(template), rng.randint(0, 2)):
            template[name] = rng.choice(values)
        body = codec.pack(template)
        if rng.random() < 0.2:
            body = rng.randbytes(rng.randrange(200))
        elif rng.random() < 0.2:
            body = body[: rng.randrange(len(body))]
        receiver = rng.choice((session_receiver(node.sid), node_receiver(node.id), address_receiver(A)))
        table.now = index / 1000
        table.deliver(insider.seal(body, receiver, table.wall), Address("10.0.0.9", rng.randint(1, 65535)), A)
    dropped = node.stats().dropped
    assert dropped["malformed"] > 1000
    assert len(node.table) == 0


def test_one_who_asks_often_is_challenged_once_in_half_a_minute(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    for when in (0.0, 1.0, 40.0):
        table.now = when
        asked = a.ask(B, Ping(), when, table.wall)
        assert asked is not None
        checks = [action for action in table.deliver(asked[1], A, B) if isinstance(action, Check)]
        assert len(checks) == (0 if when == 1.0 else 1)  # not twice within half a minute
    assert len(b.table) == 0


# Limits


def test_stores_and_finds_of_one_source_are_limited_apart(
    table: Table, credentials: Callable[..., Credentials]
) -> None:
    config = DhtConfig(finds_per_second=10, stores_per_second=5, burst=2)
    table.node("a", A, config=config)
    insider = Insider(credentials("liar"))

    def ask(question: object, source: Address, count: int) -> int:
        answered = 0
        for _ in range(count):
            request = Request(b"r" * 8, NodeId(b"i" * 20), None, question)  # type: ignore[arg-type]
            answered += len(sends(table.deliver(insider.seal(request, address_receiver(A), table.wall), source, A)))
        return answered

    store = Store(record(credentials("liar")))
    public = Address("203.0.113.5", 1)
    assert ask(store, public, 100) == 10
    assert ask(Find(KEY), public, 100) == 20
    assert ask(Find(KEY), Address("203.0.113.5", 2), 10) == 0  # the same host
    assert ask(Find(KEY), Address("203.0.113.6", 1), 10) == 10
    assert ask(Find(KEY), Address("10.0.0.8", 1), 30) == 20  # peers of one machine, each its own
    assert ask(Find(KEY), Address("10.0.0.8", 2), 30) == 20
    table.now = 1.0
    assert ask(store, public, 100) == 5


def test_ipv6_sources_share_their_site(table: Table, credentials: Callable[..., Credentials]) -> None:
    table.node("a", A, config=DhtConfig(finds_per_second=1, burst=5))
    insider = Insider(credentials("liar"))
    answered = 0
    for number in range(1, 50):
        request = Request(b"r" * 8, NodeId(b"i" * 20), None, Ping())
        source = Address(f"2001:db8:1:{number}::1", 1)
        answered += len(sends(table.deliver(insider.seal(request, address_receiver(A), table.wall), source, A)))
    assert answered == 5


def test_the_fullest_answers_fit_one_datagram(table: Table, credentials: Callable[..., Credentials]) -> None:
    a, b = table.node("a", A, config=DhtConfig(excepted_networks=("2001:db8::/32", "10.0.0.0/8"))), table.node("b", B)
    for number in range(40):
        node = NodeId(random.Random(number).randbytes(20))
        a.table.add(NodeContact(node, Address(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{number + 0xFF00:x}", 65535)), 0.0)
    for number in range(40):
        a.storage.offer(record(credentials(f"owner-{number}"), value=bytes(number * 20)), table.wall)
    for question in (Find(KEY), Get(KEY), Get(KEY, 0), Get(KEY, 5), Ping()):
        for _ in range(20):
            assert table.ask(b, A, question) is not None
    assert max(len(data) for data, _, _ in table.wire) <= 1232
    answered = table.ask(b, A, Get(KEY, 20))
    assert answered is not None and isinstance(answered.answer, Got)
    assert answered.answer.held == 40 and len(answered.answer.contacts) > 3 and answered.answer.records


def test_calls_are_bounded(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossipml.dht.node.MAX_PENDING", 3)
    a = table.node("a", A)
    calls = [a.ask(B, Ping(), 0.0, table.wall) for _ in range(5)]
    assert [call is not None for call in calls] == [True, True, True, False, False]
    assert calls[0] is not None
    a.forget(calls[0][0])
    assert a.ask(B, Ping(), 0.0, table.wall) is not None


def test_the_soft_wait_follows_the_round_trip_within_bounds(table: Table) -> None:
    a, b = table.node("a", A), table.node("b", B)
    assert a.soft_wait == 0.5
    for rtt, expected in ((0.001, 0.1), (10.0, 0.5)):
        for _ in range(60):
            asked = a.ask(NodeContact(b.id, B), Ping(), table.now, table.wall)
            assert asked is not None
            (send,) = sends(table.deliver(asked[1], A, B))
            table.now += rtt
            assert any(isinstance(action, Answered) for action in table.deliver(send.data, B, A))
        assert a.soft_wait == expected


def test_our_own_id_is_no_contact(table: Table) -> None:
    a = table.node("a", A)
    twin = table.node("a", B)  # the same identity started twice
    assert table.ask(a, B, Ping()) is None
    assert len(a.table) == len(twin.table) == 0
