"""Manifests: their size at worst, what is refused, and which version is the latest."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.identity import Identity
from gossipml.models import manifest as module
from gossipml.models.manifest import (
    EPOCH,
    MAX_MANIFEST,
    Manifest,
    latest,
    parse_manifest,
    read_manifest,
    sign_manifest,
    succession,
    version_id,
)
from gossipml.models.merkle import MAX_SIZE

NETWORK = b"n" * 16
WALL = 1_790_000_000.0
ALICE = Identity(hashlib.sha256(b"alice").digest())
BOB = Identity(hashlib.sha256(b"bob").digest())


def signed(identity: Identity = ALICE, **changes: Any) -> bytes:
    """A manifest; `Any`: a test may set a field to anything."""
    fields: dict[str, Any] = {
        "network_id": NETWORK,
        "name": "digits-mlp",
        "spec": b"s" * 32,
        "height": 1,
        "parents": (),
        "age": 1500.0,
        "metrics": {"accuracy": 0.97, "loss": 0.11},
        "size": 123_456,
        "root": b"r" * 32,
        "created": WALL,
    }
    return sign_manifest(identity, **(fields | changes))


def made(identity: Identity = ALICE, **changes: Any) -> Manifest:
    return read_manifest(signed(identity, **changes), NETWORK, WALL)


def forged(**changes: Any) -> bytes:
    """A signed manifest with other values than `sign_manifest` would take."""
    values = codec.unpack(signed(), limit=MAX_MANIFEST)
    assert isinstance(values, list)
    for key, value in changes.items():
        values[module._NAMES.index(key.replace("_", " "))] = value
    data = codec.pack([*values[:-1], bytes(64)])[:-64]
    return data + ALICE.sign(b"gossipml/v1/manifest" + data[:-2])


def test_a_manifest_says_what_was_signed() -> None:
    data = signed(note="imported")
    manifest = read_manifest(data, NETWORK, WALL)
    assert (manifest.name, manifest.height, manifest.parents, manifest.age) == ("digits-mlp", 1, (), 1500.0)
    assert manifest.metrics == {"accuracy": 0.97, "loss": 0.11}
    assert (manifest.size, manifest.piece_length, manifest.root) == (123_456, 16384, b"r" * 32)
    assert (manifest.created, manifest.note, manifest.peer) == (int(WALL), "imported", ALICE.peer_id)
    assert manifest.version == version_id(data) == hashlib.sha256(data).digest()
    assert manifest == parse_manifest(data)


def test_the_greatest_manifest_fits_into_a_record_of_the_dht() -> None:
    metrics = {f"{n}".ljust(16, "x"): -1 / 3 for n in range(8)}
    data = signed(
        name="n" * 64,
        height=int(WALL) - EPOCH,
        parents=[bytes([n]) * 32 for n in range(4)],
        age=1e18,
        metrics=metrics,
        size=MAX_SIZE,
        note="ü" * 40,
    )
    assert 700 < len(data) <= MAX_MANIFEST
    assert read_manifest(data, NETWORK, WALL).metrics == metrics
    spare = module.MAX_METRICS_BYTES - len(codec.pack(metrics))
    assert len(data) + spare <= MAX_MANIFEST, "with metrics of the greatest length allowed"
    with pytest.raises(UserError, match="fewer or shorter names"):
        signed(metrics={f"{n}".ljust(17, "x"): 0.5 for n in range(8)})
    assert len(signed(metrics={f"{n}".ljust(24, "x"): 0.5 for n in range(6)})) < MAX_MANIFEST


def test_a_flipped_bit_anywhere_is_refused() -> None:
    data = signed(parents=[b"p" * 32], height=2)
    for index, bit in itertools.product(range(len(data)), range(8)):
        wrong = bytearray(data)
        wrong[index] ^= 1 << bit
        with pytest.raises(RemoteError):
            read_manifest(bytes(wrong), NETWORK, WALL)


def test_cut_and_lengthened_manifests_are_refused() -> None:
    data = signed()
    for wrong in [*(data[:end] for end in range(len(data))), data + b"\0", data + data, bytes(MAX_MANIFEST + 1)]:
        with pytest.raises(RemoteError):
            read_manifest(wrong, NETWORK, WALL)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=800))
def test_garbage_is_refused_without_another_error(data: bytes) -> None:
    with pytest.raises(RemoteError):
        read_manifest(data, NETWORK, WALL)


def test_another_networks_manifest_is_refused() -> None:
    with pytest.raises(RemoteError, match="another network"):
        read_manifest(signed(), b"m" * 16, WALL)


def test_a_manifest_from_the_future_is_refused_and_slack_is_given() -> None:
    assert read_manifest(signed(created=WALL + 120), NETWORK, WALL).created == int(WALL) + 120
    with pytest.raises(RemoteError, match="121 s in the future"):
        read_manifest(signed(created=WALL + 121), NETWORK, WALL)


def test_no_height_can_be_unsurpassable() -> None:
    top = int(WALL) - EPOCH
    assert made(height=top, parents=[b"p" * 32]).height == top
    for height in (top + 1, 2**40, 2**63 - 1):
        with pytest.raises(RemoteError, match="'height'"):
            read_manifest(forged(height=height, parents=[b"p" * 32]), NETWORK, WALL)


def test_a_signature_by_somebody_else_is_refused() -> None:
    data = signed()
    with pytest.raises(RemoteError, match="not signed by its publisher"):
        read_manifest(data[:-64] + BOB.sign(b"gossipml/v1/manifest" + data[:-66]), NETWORK, WALL)
    with pytest.raises(RemoteError, match="not signed by its publisher"):
        read_manifest(data[:-64] + ALICE.sign(b"gossipml/v1/record" + data[:-66]), NETWORK, WALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"format": True}, "format True"),
        ({"name": "Digits"}, "not a name"),
        ({"name": "../x"}, "not a name"),
        ({"name": ""}, "not a name"),
        ({"name": "x" * 65}, "at most 64"),
        ({"spec": b"s" * 31}, "31 bytes"),
        ({"spec": "s" * 32}, "'spec'"),
        ({"height": 0}, "'height'"),
        ({"height": 2}, "cannot have 0 parents"),
        ({"parents": [b"p" * 32]}, "cannot have 1 parents"),
        ({"parents": [b"p" * 31], "height": 2}, "'parent'"),
        ({"parents": [b"p" * 32] * 2, "height": 2}, "has one twice"),
        ({"parents": [bytes([n]) * 32 for n in range(5)], "height": 2}, "at most 4"),
        ({"age": 1500}, "'age'"),
        ({"age": -1.0}, "'age'"),
        ({"age": 1e19}, "'age'"),
        ({"metrics": []}, "not a map"),
        ({"metrics": {"a b": 1.0}}, "not a name"),
        ({"metrics": {"accuracy": 1}}, "'accuracy'"),
        ({"metrics": {str(n): 1.0 for n in range(9)}}, "9 metrics"),
        ({"size": 9, "piece_length": 16384}, "'size'"),
        ({"size": MAX_SIZE + 1}, "'size'"),
        ({"piece_length": 32768}, "not 32768"),
        ({"piece_length": 0}, "not 0"),
        ({"root": b"r" * 20}, "'root'"),
        ({"created": EPOCH - 1}, "'created'"),
        ({"created": WALL}, "'created'"),
        ({"publisher": b"k" * 31}, "'publisher'"),
        ({"note": "n" * 81}, "at most 80"),
        ({"note": "ü" * 41}, "80 bytes"),
        ({"note": "line\nline"}, "printable"),
        ({"network": b"n" * 15}, "'network'"),
    ],
)
def test_each_field_out_of_its_form_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        read_manifest(forged(**changes), NETWORK, WALL)


@pytest.mark.parametrize("name", ["", "Digits", "a/b", "..", "-x", "ä", "x" * 65, "a b", "a\n"])
def test_a_name_that_is_not_a_name_is_the_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match="is not a name; use at most 64 of a-z"):
        signed(name=name)


@pytest.mark.parametrize(
    "changes", [{"metrics": {"x": float("nan")}}, {"age": float("inf")}, {"note": "n" * 81}, {"created": 0}]
)
def test_what_cannot_be_published_is_said_before_it_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="'digits-mlp' cannot be published"):
        signed(**changes)


def test_the_latest_is_the_same_in_every_order_of_finding() -> None:
    manifests = [
        made(identity, height=height, parents=[b"p" * 32] if height > 1 else [], age=age)
        for identity, height, age in itertools.product((ALICE, BOB), (1, 2), (10.0, 20.0))
    ]
    best = latest(manifests)
    assert best is not None and (best.height, best.age) == (2, 20.0)
    assert best.version == max(m.version for m in manifests if (m.height, m.age) == (2, 20.0))
    for seed in range(20):
        shuffled = random.Random(seed).sample(manifests, len(manifests))
        assert latest(shuffled) is best
    assert latest([]) is None


def test_a_version_that_follows_others_wins_over_all_of_them() -> None:
    one, two = made(age=10), made(BOB, age=20)
    height, parents = succession([one, two, two])
    assert (height, parents) == (2, (two.version, one.version))
    after = made(height=height, parents=parents, age=1)
    assert latest([one, two, after]) is after
    assert succession([]) == (1, ())


def test_only_the_four_latest_heads_become_parents() -> None:
    heads = [made(age=float(age)) for age in range(6)]
    height, parents = succession(heads)
    assert height == 2
    assert parents == tuple(head.version for head in (heads[5], heads[4], heads[3], heads[2]))
