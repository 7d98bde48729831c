"""The failure detector, tick by tick."""

from __future__ import annotations

from gossipml.peer.failure import (
    DialFailed,
    FailureConfig,
    FailureDetector,
    Health,
    Heard,
    Lost,
    Probe,
    Recovered,
    SessionBroke,
    SessionClosed,
    SessionOpened,
    Suspect,
    Tick,
)

from .peers import peer_id

ANN, BOB = peer_id(1), peer_id(2)
CONFIG = FailureConfig(silence=5.0, answer=3.0, suspicion=7.0, failures=3)


def test_silence_leads_over_a_probe_and_suspicion_to_loss() -> None:
    detector = FailureDetector(CONFIG)
    assert detector.next_deadline() is None
    detector.handle(SessionOpened(ANN), 0.0)
    assert detector.next_deadline() == 5.0
    assert detector.handle(Tick(), 4.9) == []
    assert detector.handle(Tick(), 5.0) == [Probe(ANN)]
    assert detector.health(ANN) is Health.ALIVE
    assert detector.next_deadline() == 8.0
    assert detector.handle(Tick(), 8.0) == [Suspect(ANN, "silent for 8 s"), Probe(ANN)]
    assert detector.health(ANN) is Health.SUSPECT
    assert detector.next_deadline() == 15.0
    assert detector.handle(Tick(), 15.0) == [Lost(ANN, "silent for 15 s")]
    assert detector.health(ANN) is Health.LOST
    assert detector.next_deadline() is None


def test_any_sign_of_life_clears_suspicion() -> None:
    detector = FailureDetector(CONFIG)
    detector.handle(SessionOpened(ANN), 0.0)
    detector.handle(Tick(), 5.0)
    detector.handle(Tick(), 8.0)
    assert detector.handle(Heard(ANN), 9.0) == [Recovered(ANN)]
    assert detector.health(ANN) is Health.ALIVE
    assert detector.next_deadline() == 14.0
    assert detector.handle(Heard(ANN), 10.0) == []
    assert detector.handle(Tick(), 14.0) == []
    assert detector.handle(Tick(), 15.0) == [Probe(ANN)]


def test_an_answered_probe_is_not_held_against_a_peer() -> None:
    detector = FailureDetector(CONFIG)
    detector.handle(SessionOpened(ANN), 0.0)
    for step in range(1, 50):
        assert detector.handle(Tick(), 5.0 * step) == [Probe(ANN)]
        detector.handle(Heard(ANN), 5.0 * step)
    assert detector.health(ANN) is Health.ALIVE


def test_a_closed_session_may_be_silent() -> None:
    detector = FailureDetector(CONFIG)
    detector.handle(SessionOpened(ANN), 0.0)
    detector.handle(SessionClosed(ANN), 1.0)
    assert detector.handle(Tick(), 100.0) == []
    assert detector.health(ANN) is Health.ALIVE


def test_failed_dials_lead_to_loss_and_a_session_brings_it_back() -> None:
    detector = FailureDetector(CONFIG)
    detector.handle(SessionOpened(ANN), 0.0)
    assert detector.handle(SessionBroke(ANN), 1.0) == [Suspect(ANN, "a dial or a session failed")]
    assert detector.handle(DialFailed(ANN), 2.0) == []
    assert detector.handle(DialFailed(ANN), 4.0) == [Lost(ANN, "failed 3 times in a row")]
    assert detector.handle(DialFailed(ANN), 8.0) == []
    assert detector.handle(SessionOpened(ANN), 9.0) == [Recovered(ANN)]
    assert detector.health(ANN) is Health.ALIVE


def test_peers_are_judged_apart() -> None:
    detector = FailureDetector(CONFIG)
    detector.handle(SessionOpened(ANN), 0.0)
    detector.handle(SessionOpened(BOB), 2.0)
    assert detector.handle(Tick(), 6.0) == [Probe(ANN)]
    assert detector.next_deadline() == 7.0
    assert detector.handle(Tick(), 9.0) == [Suspect(ANN, "silent for 9 s"), Probe(ANN), Probe(BOB)]


def test_what_is_remembered_is_bounded_and_sessions_are_kept() -> None:
    detector = FailureDetector(FailureConfig(remembered=10))
    detector.handle(SessionOpened(ANN), 0.0)
    for number in range(100, 200):
        for _ in range(3):
            detector.handle(DialFailed(peer_id(number)), 0.0)
    assert sum(detector.health(peer_id(n)) is Health.LOST for n in range(100, 200)) == 9
    assert detector.next_deadline() == 5.0


def test_news_of_an_unknown_peer_means_nothing() -> None:
    detector = FailureDetector(CONFIG)
    assert detector.handle(Heard(ANN), 0.0) == []
    assert detector.handle(SessionClosed(ANN), 0.0) == []
