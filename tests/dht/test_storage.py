"""What a node keeps for others: only what is genuine, alive and newest, within its bounds."""

from __future__ import annotations

import dataclasses
import random

import pytest

from gossipml.dht import records, storage
from gossipml.dht.records import Kind, Outcome, Record, sign_record
from gossipml.dht.storage import Storage, Verifier
from gossipml.identity import Identity
from gossipml.ids import NodeId

NETWORK = b"n" * 16
WALL = 1_700_000_000
OWN = NodeId(b"\0" * 20)
KEY = records.topic_key(b"topic")


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def announcement(
    owner: int = 1, *, key: bytes = KEY, seq: int = 1, expires: int = WALL + 600, value: bytes = b"v"
) -> Record:
    return sign_record(identity(owner), NETWORK, Kind.ANNOUNCEMENT, key, seq=seq, expires=expires, value=value)


@pytest.fixture
def verifier() -> Verifier:
    return Verifier(NETWORK)


@pytest.fixture
def store(verifier: Verifier) -> Storage:
    return Storage(OWN, verifier, b"s" * 16)


def test_the_parts_of_a_list_are_all_of_it_and_have_nothing_in_common(store: Storage) -> None:
    held = [announcement(owner) for owner in range(1, 51)]
    for record in held:
        store.offer(record, WALL)
    found = []
    for index in range(9):
        part, total = store.sample(KEY, WALL, random.Random(index), 10_000, (index, 9))
        assert total == 50 and len(part) in (5, 6)
        found += part
    assert sorted(found, key=lambda record: record.public_key) == sorted(held, key=lambda record: record.public_key)


def test_of_ten_thousand_bad_records_none_is_accepted(store: Storage) -> None:
    rng = random.Random(1)
    newest = announcement(seq=100)
    assert store.offer(newest, WALL) is Outcome.STORED
    stale = [announcement(seq=seq) for seq in range(100)]
    future = [announcement(owner, seq=200, expires=WALL + 10**7) for owner in range(1, 50)]
    expired = [announcement(owner, seq=200, expires=WALL - 1) for owner in range(1, 50)]
    genuine = [announcement(owner, seq=200 + owner) for owner in range(1, 50)]
    outcomes = set()
    for _ in range(10_000):
        match rng.randrange(4):
            case 0:
                bad = rng.choice(stale)
            case 1:
                bad = rng.choice(future)
            case 2:
                bad = rng.choice(expired)
            case _:
                original = rng.choice(genuine)
                bad = rng.choice(
                    [
                        dataclasses.replace(original, value=rng.randbytes(5)),
                        dataclasses.replace(original, seq=original.seq + 1),
                        dataclasses.replace(original, expires=original.expires + 1),
                        dataclasses.replace(original, public_key=identity(99).public_key),
                        dataclasses.replace(original, signature=rng.randbytes(64)),
                    ]
                )
        outcome = store.offer(bad, WALL)
        outcomes.add(outcome)
        assert not outcome.held
    assert outcomes == {Outcome.STALE, Outcome.FUTURE, Outcome.EXPIRED, Outcome.FORGED}
    assert store.get(KEY, WALL) == [newest]


def test_a_newer_record_replaces_and_an_older_never_comes_back(store: Storage) -> None:
    first, second = announcement(seq=1), announcement(seq=2)
    assert store.offer(first, WALL) is Outcome.STORED
    assert store.offer(second, WALL) is Outcome.STORED
    assert store.offer(first, WALL) is Outcome.STALE
    assert store.get(KEY, WALL) == [second]
    assert (store.count, store.keys) == (1, 1)


def test_an_equal_record_is_not_verified_again(store: Storage, verifier: Verifier) -> None:
    record = announcement()
    assert store.offer(record, WALL) is Outcome.STORED
    assert store.offer(record, WALL) is Outcome.HELD
    assert verifier.checks == 1


def test_stale_and_expired_records_cost_no_verification(store: Storage, verifier: Verifier) -> None:
    store.offer(announcement(seq=2), WALL)
    store.offer(announcement(seq=1), WALL)
    store.offer(announcement(seq=3, expires=WALL), WALL)
    assert verifier.checks == 1


def test_a_genuine_record_is_verified_once_wherever_it_is_seen(verifier: Verifier) -> None:
    record = announcement()
    assert verifier.is_genuine(record) and verifier.is_genuine(record)
    assert verifier.checks == 1


def test_a_forged_record_is_never_remembered_as_verified(verifier: Verifier) -> None:
    forged = dataclasses.replace(announcement(), value=b"other")
    assert not verifier.is_genuine(forged) and not verifier.is_genuine(forged)
    assert verifier.checks == 2


def test_records_die_at_their_signed_time(store: Storage) -> None:
    store.offer(announcement(1, expires=WALL + 10), WALL)
    store.offer(announcement(2, expires=WALL + 20), WALL)
    assert len(store.get(KEY, WALL + 9)) == 2
    assert len(store.get(KEY, WALL + 10)) == 1
    store.sweep(WALL + 20)
    assert (store.count, store.keys, store.bytes) == (0, 0, 0)


def test_sweeping_visits_every_key_a_few_at_a_time(store: Storage) -> None:
    for i in range(10):
        store.offer(announcement(key=records.topic_key(bytes((i,)))), WALL)
    for expected in (7, 4, 1, 0):
        store.sweep(WALL + 600, limit=3)
        assert store.keys == expected


def test_a_full_key_keeps_a_sample_that_nobody_outside_can_choose(verifier: Verifier) -> None:
    offered = [announcement(owner) for owner in range(1, 201)]
    kept = []
    for secret in (b"1" * 16, b"2" * 16):
        holder = Storage(OWN, verifier, secret)
        outcomes = [holder.offer(record, WALL) for record in offered]
        assert Outcome.FULL in outcomes
        kept.append({record.public_key for record in holder.get(KEY, WALL)})
        assert len(kept[-1]) == holder.count == storage.MAX_RECORDS_PER_KEY
        for record in random.Random(1).sample(offered, 200):  # in whatever order they come again
            holder.offer(record, WALL)
        assert {record.public_key for record in holder.get(KEY, WALL)} == kept[-1]
    assert len(kept[0] & kept[1]) < 40  # 20 expected by chance


def test_an_expired_record_makes_room_in_a_full_key(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_RECORDS_PER_KEY", 2)
    store.offer(announcement(1, expires=WALL + 5), WALL)
    store.offer(announcement(2, expires=WALL + 5), WALL)
    assert store.offer(announcement(3), WALL + 6) is Outcome.STORED
    assert store.count == 1


def test_too_many_keys_drop_the_farthest(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_KEYS", 3)
    far = [bytes((i,)) + bytes(19) for i in (0x40, 0x30, 0x20)]
    for key in far:
        assert store.offer(announcement(key=key), WALL) is Outcome.STORED
    assert store.offer(announcement(key=b"\x50" + bytes(19)), WALL) is Outcome.FULL
    assert store.offer(announcement(key=b"\x10" + bytes(19)), WALL) is Outcome.STORED
    assert [len(store.get(key, WALL)) for key in far] == [0, 1, 1]
    assert store.keys == 3


def test_one_publisher_fills_no_node(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OF_ONE", 10)
    keys = [records.topic_key(b"%d" % number) for number in range(15)]
    outcomes = [store.offer(announcement(1, key=key, expires=WALL + 60), WALL) for key in keys]
    assert outcomes == [Outcome.STORED] * 10 + [Outcome.FULL] * 5
    assert store.offer(announcement(1, key=keys[0], seq=2, expires=WALL + 600), WALL) is Outcome.STORED  # the same slot
    assert store.offer(announcement(2, key=keys[14]), WALL) is Outcome.STORED
    store.sweep(WALL + 60)  # nine of them are gone
    assert store.offer(announcement(1, key=keys[14]), WALL + 60) is Outcome.STORED
    store.remove_all(lambda record: record.public_key == identity(1).public_key)
    assert (store.count, store.keys, dict(store._of)) == (1, 1, {identity(2).public_key: 1})


def test_bytes_are_bounded(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES", 200_000)
    for owner in range(1, 250):
        store.offer(announcement(owner, key=records.topic_key(bytes((owner % 5,))), value=bytes(800)), WALL)
        assert store.bytes <= 200_000
    assert store.count > 100


def test_a_sample_fits_the_budget_and_says_how_many_there_are(store: Storage) -> None:
    for owner in range(1, 31):
        store.offer(announcement(owner, value=bytes(60)), WALL)
    seen: set[bytes] = set()
    for seed in range(40):
        sample, total = store.sample(KEY, WALL, random.Random(seed), 760)
        assert total == 30 and len(sample) == 4
        assert sum(record.size for record in sample) <= 760
        seen.update(record.public_key for record in sample)
    assert len(seen) == 30  # over many asks everybody comes up
