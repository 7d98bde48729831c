"""When a peer lets its machine alone: the hours of a schedule, and a policy that does not flap."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml.daemon.idle import IdleConfig, IdlePolicy, Observation
from gossipml.daemon.schedule import DAYS, MAX_TEXT, parse_schedule
from gossipml.errors import UserError

MONDAY = datetime(2026, 11, 16)  # a Monday at midnight
NOON = MONDAY + timedelta(hours=12)


def allowed(text: str, day: str, clock: str) -> bool:
    hour, minute = clock.split(":")
    return parse_schedule(text).allows(MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute)))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-06:00", ["mon 22:00", "mon 23:59", "sun 0:00", "wed 5:59"], ["mon 21:59", "mon 6:00", "sat 12:00"]),
        ("9:00-17:30", ["thu 9:00", "thu 17:29"], ["thu 8:59", "thu 17:30", "thu 0:00"]),
        ("mon-fri 18:00-07:00", ["mon 18:00", "sat 6:59", "tue 3:00"], ["mon 6:59", "sat 18:00", "sun 3:00"]),
        ("sat-mon 00:00-24:00", ["sat 0:00", "sun 12:00", "mon 23:59"], ["tue 0:00", "fri 23:59"]),
        ("Mon, wed 20:00 - 21:00, sun 1:00-2:00", ["mon 20:30", "wed 20:30", "sun 1:30"], ["tue 20:30", "mon 1:30"]),
        ("20:00-24:00", ["mon 23:59"], ["tue 0:00"]),
        ("00:00-24:00", ["mon 0:00", "sun 23:59"], []),
    ],
)
def test_a_schedule_means_the_hours_that_it_names(text: str, inside: list[str], outside: list[str]) -> None:
    assert [moment for moment in inside if not allowed(text, *moment.split())] == []
    assert [moment for moment in outside if allowed(text, *moment.split())] == []


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "night", "22-06", "22:00", "25:00-06:00", "22:60-06:00", "24:01-06:00", "24:00-06:00", "12:00-12:00",
        "mon-fri", "mon 8:00-9:00, tue", "mon-fri 8:00-9:00 tue 8:00-9:00", "foo 8:00-9:00", "mon-fry 8:00-9:00",
        "8:00-9:00,", "8:00-9:00,,9:00-10:00", "mon tue 8:00-9:00", "8:00-9:00 x", "-8:00-9:00",
        "8:00-9:00," * MAX_TEXT,
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"write for example|all day is"):
        parse_schedule(text)


@given(st.text(alphabet="monfrisat0123456789:-, ", max_size=40))
def test_any_text_is_a_schedule_or_a_user_error(text: str) -> None:
    try:
        schedule = parse_schedule(text)
    except UserError:
        return
    minutes = [MONDAY + timedelta(minutes=minute) for minute in range(0, 7 * 1440, 7)]
    assert schedule.windows
    assert any(schedule.allows(at) for at in minutes) or all(w.end - w.begin in range(1, 8) for w in schedule.windows)


class Play:
    """A policy that is shown a machine every five seconds."""

    def __init__(self, config: IdleConfig) -> None:
        self.policy = IdlePolicy(config)
        self.now = 100.0

    def see(self, seconds: float = 0.0, *, at: datetime = NOON, **seen: object) -> list[str]:
        """What was decided at each of the looks over that time, one at least."""
        decided = []
        end = self.now + seconds
        while True:
            decided.append(self.policy.decide(Observation(at, **seen), self.now))  # type: ignore[arg-type]
            self.now += 5.0
            if self.now > end:
                return decided


def test_nothing_is_a_reason_to_pause_by_default() -> None:
    assert not IdleConfig().watches
    play = Play(IdleConfig())
    assert set(play.see(60, on_battery=True, load=100.0)) == {""}


def test_on_battery_the_peer_pauses_at_once_and_resumes_when_the_plug_stays_in() -> None:
    play = Play(IdleConfig(pause_on_battery=True))
    assert play.see(on_battery=False) == [""]
    assert play.see(10, on_battery=True) == ["on battery"] * 3
    assert play.see(on_battery=False) == ["on battery"]
    assert play.see(on_battery=True) == ["on battery"], "a bad contact"
    assert play.see(15, on_battery=False) == ["on battery", "", "", ""]


def test_a_machine_that_tells_nothing_is_no_reason_to_pause() -> None:
    play = Play(IdleConfig(pause_on_battery=True, pause_on_load=30.0))
    assert set(play.see(60, on_battery=None, load=None)) == {""}
    assert play.see(5, load=90.0)[-1] != ""
    assert set(play.see(300, load=None)) == {"others use 30 % of the CPU or more"}, "nor to resume"


def test_a_moment_of_load_does_not_pause_and_lasting_load_does() -> None:
    play = Play(IdleConfig(pause_on_load=50.0))
    play.see(60, load=5.0)
    assert play.see(load=100.0) == [""]
    assert play.see(60, load=5.0)[-1] == ""
    decided = play.see(30, load=80.0)
    assert decided[0] == ""
    assert decided[-1] == "others use 50 % of the CPU or more"


def test_load_near_the_limit_does_not_flap() -> None:
    play = Play(IdleConfig(pause_on_load=50.0))
    decided = play.see(load=5.0)
    for step in range(200):
        decided += play.see(load=50.0 + (12.0 if step % 4 < 2 else -12.0))  # over and under, every ten seconds
    changes = sum(bool(a) != bool(b) for a, b in pairwise(decided))
    assert changes == 1, "paused once, and stayed so until there is calm"
    decided = play.see(120, load=10.0)
    assert decided[-1] == ""
    assert sum(bool(a) != bool(b) for a, b in pairwise(decided)) == 1


def test_a_pause_for_load_lasts_a_minute_at_least() -> None:
    play = Play(IdleConfig(pause_on_load=50.0))
    assert play.see(load=100.0) != [""], "the first figure counts as it is"
    decided = play.see(120, load=0.0)
    assert decided.index("") == 11, "60 s after the pause began"


def test_a_pause_for_load_ends_well_below_the_limit_alone() -> None:
    play = Play(IdleConfig(pause_on_load=50.0))
    play.see(load=100.0)
    assert all(play.see(600, load=40.0))
    assert play.see(600, load=30.0)[-1] == ""


def test_outside_its_hours_the_peer_pauses_and_says_which_they_are() -> None:
    play = Play(IdleConfig(schedule=parse_schedule("22:00-06:00")))
    assert play.see(at=NOON) == ["outside its hours (22:00-06:00)"]
    assert play.see(at=MONDAY.replace(hour=23)) == [""]


def test_all_reasons_are_named() -> None:
    play = Play(IdleConfig(pause_on_battery=True, pause_on_load=20.0, schedule=parse_schedule("22:00-06:00")))
    assert play.see(on_battery=True, load=60.0) == [
        "outside its hours (22:00-06:00) and on battery and others use 20 % of the CPU or more"
    ]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=60))
def test_whatever_was_before_calm_on_mains_in_its_hours_ends_in_training(seen: list[tuple[bool, float]]) -> None:
    play = Play(IdleConfig(pause_on_battery=True, pause_on_load=25.0, schedule=parse_schedule("00:00-24:00")))
    for on_battery, load in seen:
        play.see(on_battery=on_battery, load=load)
    assert play.see(180, on_battery=False, load=0.0)[-1] == ""
