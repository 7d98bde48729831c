"""The session, step by step, between two machines without a stream."""

from __future__ import annotations

import pytest

from gossipml.errors import LocalError, RemoteError
from gossipml.peer.session import (
    HELLO_SECONDS,
    TRANSITIONS,
    Action,
    Admit,
    Closed,
    Deadline,
    Decline,
    Deliver,
    End,
    Introduced,
    Opened,
    PeerProfile,
    ProfileChanged,
    Received,
    Send,
    Session,
    Started,
    State,
    incompatible,
)
from gossipml.peer.wire import (
    Goodbye,
    Hello,
    HelloReply,
    Message,
    NewProfile,
    News,
    Ping,
    Pong,
    Profile,
    Refusal,
    UpdateAck,
)

from .peers import DIGEST, OTHER_DIGEST, make_profile, make_update, peer_id

ANN, BOB = peer_id(1), peer_id(2)
A, B = make_profile("ann"), make_profile("bob")


def pair(a: Profile = A, b: Profile = B) -> tuple[Session, Session]:
    return (
        Session(ANN, BOB, a, b"aaaaaaaa", dialled=True, now=0.0),
        Session(BOB, ANN, b, b"bbbbbbbb", dialled=False, now=0.0),
    )


def sent(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def opened() -> tuple[Session, Session]:
    ann, bob = pair()
    [hello] = sent(ann.handle(Started(), 0.0))
    bob.handle(Received(hello), 0.0)
    [reply] = sent(bob.handle(Admit(), 0.0))
    ann.handle(Received(reply), 0.0)
    return ann, bob


def test_hello_and_its_answer_open_a_session() -> None:
    ann, bob = pair()
    assert bob.handle(Started(), 0.0) == []
    hello = Hello(1, 1, b"aaaaaaaa", A)
    assert ann.handle(Started(), 0.0) == [Send(hello)]
    assert bob.handle(Received(hello), 0.1) == [Introduced(hello)]
    assert bob.next_deadline() == HELLO_SECONDS
    reply = HelloReply(1, 1, b"bbbbbbbb", B)
    assert bob.handle(Admit(), 0.2) == [Send(reply), Opened(A)]
    assert ann.handle(Received(reply), 0.3) == [Opened(B)]
    assert [ann.state, bob.state] == [State.OPEN, State.OPEN]
    assert ann.next_deadline() is None
    assert bob.next_deadline() is None
    assert (ann.theirs, ann.their_boot, ann.version) == (B, b"bbbbbbbb", 1)


def test_a_declined_peer_hears_why() -> None:
    ann, bob = pair()
    [hello] = sent(ann.handle(Started(), 0.0))
    bob.handle(Received(hello), 0.0)
    refusal = Refusal("full", "no room")
    assert bob.handle(Decline("full", "no room"), 0.0) == [Send(refusal), Closed("full", "no room")]
    assert ann.handle(Received(refusal), 0.0) == [Closed("full", "no room")]
    assert [ann.state, bob.state] == [State.CLOSED, State.CLOSED]


ALL: list[Message] = [
    Hello(1, 1, b"12345678", B),
    HelloReply(1, 1, b"12345678", B),
    Refusal("full", ""),
    NewProfile(B),
    make_update(),
    UpdateAck(1, True, ""),
    News("training", 1, None, None, ()),
    Ping(1),
    Pong(1),
    Goodbye(""),
]


def at(state: State) -> Session:
    ann, bob = pair()
    match state:
        case State.DIALLING:
            return ann
        case State.ACCEPTING:
            return bob
        case State.JUDGING:
            bob.handle(Received(Hello(1, 1, b"aaaaaaaa", A)), 0.0)
            return bob
        case State.OPEN:
            return opened()[0]
        case State.CLOSED:
            ann.handle(Received(Refusal("full", "")), 0.0)
            return ann


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_is_legal_exactly_where_the_table_says(state: State, message: Message) -> None:
    session = at(state)
    assert session.state is state
    after = TRANSITIONS.get((state, type(message)))
    if after is None:
        with pytest.raises(RemoteError, match=state.value):
            session.handle(Received(message), 0.0)
    else:
        session.handle(Received(message), 0.0)
        assert session.state is after


def test_messages_of_an_open_session_are_delivered() -> None:
    ann, _ = opened()
    assert ann.handle(Received(Ping(7)), 1.0) == [Deliver(Ping(7))]
    assert ann.handle(Received(make_update()), 1.0) == [Deliver(make_update())]


def test_two_specifications_under_one_name_are_refused_with_both_digests() -> None:
    ann, bob = pair(b=make_profile("bob", digest=OTHER_DIGEST))
    [hello] = sent(ann.handle(Started(), 0.0))
    [refusal, closed] = bob.handle(Received(hello), 0.0)
    assert isinstance(refusal, Send)
    assert isinstance(refusal.message, Refusal)
    assert isinstance(closed, Closed)
    assert refusal.message.code == closed.code == "digest"
    for digest in (DIGEST, OTHER_DIGEST):
        assert digest in refusal.message.reason


def test_the_dialler_too_notices_two_specifications() -> None:
    ann, _ = pair()
    ann.handle(Started(), 0.0)
    actions = ann.handle(Received(HelloReply(1, 1, b"bbbbbbbb", make_profile("bob", digest=OTHER_DIGEST))), 0.0)
    assert isinstance(sent(actions)[0], Goodbye)
    assert actions[-1] == Closed("digest", incompatible(A, make_profile("bob", digest=OTHER_DIGEST)))


@pytest.mark.parametrize(
    "other",
    [
        make_profile("bob", model="other", digest=OTHER_DIGEST),
        make_profile("bob", model="", digest=""),
        make_profile("bob", digest=""),
        make_profile("bob"),
    ],
)
def test_another_model_none_or_one_not_yet_loaded_is_welcome(other: Profile) -> None:
    assert incompatible(A, other) == incompatible(other, A) == ""


def test_a_profile_that_changes_is_told_and_judged() -> None:
    ann, bob = opened()
    news = make_profile("ann", model="other", digest=OTHER_DIGEST)
    assert ann.handle(ProfileChanged(news), 1.0) == [Send(NewProfile(news))]
    assert bob.handle(Received(NewProfile(news)), 1.0) == [PeerProfile(news)]
    conflict = make_profile("ann", digest=OTHER_DIGEST)
    actions = bob.handle(Received(NewProfile(conflict)), 1.0)
    assert isinstance(actions[-1], Closed)
    assert actions[-1].code == "digest"


def test_a_profile_that_changes_during_the_hello_is_told_after_it() -> None:
    ann, _ = pair(a=make_profile("ann", model="", digest=""))
    ann.handle(Started(), 0.0)
    assert ann.handle(ProfileChanged(A), 0.0) == []
    actions = ann.handle(Received(HelloReply(1, 1, b"bbbbbbbb", B)), 0.0)
    assert actions == [Opened(B), Send(NewProfile(A))]


def test_the_acceptor_answers_with_its_profile_of_that_moment() -> None:
    _, bob = pair(b=make_profile("bob", model="", digest=""))
    assert bob.handle(ProfileChanged(B), 0.0) == []
    bob.handle(Received(Hello(1, 1, b"aaaaaaaa", A)), 0.0)
    assert sent(bob.handle(Admit(), 0.0)) == [HelloReply(1, 1, b"bbbbbbbb", B)]


def test_a_common_version_is_spoken_and_none_is_refused() -> None:
    _, bob = pair()
    bob.handle(Received(Hello(7, 1, b"aaaaaaaa", A)), 0.0)
    assert bob.version == 1
    _, bob = pair()
    actions = bob.handle(Received(Hello(7, 2, b"aaaaaaaa", A)), 0.0)
    [refusal] = sent(actions)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "version"
    assert "2 to 7" in refusal.reason


def test_a_peer_does_not_talk_to_itself() -> None:
    session = Session(ANN, ANN, A, b"aaaaaaaa", dialled=False, now=0.0)
    actions = session.handle(Received(Hello(1, 1, b"aaaaaaaa", A)), 0.0)
    assert isinstance(actions[-1], Closed)
    assert actions[-1].code == "self"


def test_a_hello_that_does_not_come_ends_the_session() -> None:
    for session in pair():
        assert session.next_deadline() == HELLO_SECONDS
        assert session.handle(Deadline(), HELLO_SECONDS - 0.1) == []
        [closed] = session.handle(Deadline(), HELLO_SECONDS)
        assert isinstance(closed, Closed)
        assert closed.code == "timeout"
        assert session.next_deadline() is None


def test_goodbye_ends_it_once() -> None:
    ann, bob = opened()
    actions = ann.handle(End("stopping"), 1.0)
    assert actions == [Send(Goodbye("stopping")), Closed("local", "stopping")]
    assert ann.handle(End("stopping"), 1.0) == []
    assert bob.handle(Received(Goodbye("stopping")), 1.0) == [Closed("goodbye", "stopping")]


def test_judging_nobody_is_our_own_error() -> None:
    ann, _ = pair()
    with pytest.raises(LocalError):
        ann.handle(Admit(), 0.0)
    with pytest.raises(LocalError):
        ann.handle(Decline("full", ""), 0.0)
