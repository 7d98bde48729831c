"""Token buckets in debt, and meters."""

from __future__ import annotations

import pytest

from gossipml.peer.rates import Bandwidth, Meter, TokenBucket


def test_no_rate_is_no_limit() -> None:
    bucket = TokenBucket(0)
    assert [bucket.take(1 << 40, 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.slice(1000) == 1000


def test_a_take_waits_until_its_debt_is_paid() -> None:
    bucket = TokenBucket(1000)  # and 250 saved up at the start
    assert bucket.take(250, 0.0) == 0.0
    assert bucket.take(500, 0.0) == pytest.approx(0.5)
    assert bucket.take(500, 0.0) == pytest.approx(1.0)  # whoever takes second waits behind the first
    assert bucket.take(0, 1.0) == 0.0


def test_the_rate_holds_over_time() -> None:
    bucket, now, taken = TokenBucket(1000), 0.0, 0
    while now < 100:
        now += bucket.take(77, now) + 0.001
        taken += 77
    assert 100_000 <= taken <= 100_500


def test_little_is_saved_up() -> None:
    bucket = TokenBucket(1000)
    bucket.take(0, 0.0)
    assert bucket.take(1000, 3600.0) == pytest.approx(0.75)


def test_a_slice_at_a_low_rate_is_small() -> None:
    assert TokenBucket(100_000).slice(1 << 18) == 25_000
    assert TokenBucket(1).slice(1 << 18) == 4096
    assert TokenBucket(1e12).slice(1 << 18) == 1 << 18


def test_a_meter_shows_the_rate_and_forgets_it() -> None:
    meter = Meter()
    assert meter.rate(0.0) == 0.0
    for step in range(200):
        meter.add(1000, step * 0.1)
    assert meter.rate(20.0) == pytest.approx(10_000, rel=0.05)
    assert meter.rate(80.0) < 1


def test_bandwidth_follows_a_change_and_is_not_led_by_small_messages() -> None:
    link = Bandwidth()
    assert link.estimate is None
    link.learn(1000, 0.0)
    assert link.estimate is None, "a clock that stood still says nothing"
    link.learn(1_000_000, 1.0)
    link.learn(100, 0.001)
    assert link.estimate == pytest.approx(1e6, rel=0.02)
    for _ in range(10):
        link.learn(1_000_000, 10.0)
    assert link.estimate == pytest.approx(1e5, rel=0.15)
