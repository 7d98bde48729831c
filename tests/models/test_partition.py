from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models.data import Dataset, take_part
from gossipml.models.partition import (
    MIN_PART,
    Part,
    Rule,
    hold_out,
    parse_part,
    parse_rule,
    part_indices,
    split_indices,
)

rules = st.one_of(
    st.just(Rule("iid")),
    st.builds(Rule, st.just("shards"), st.integers(1, 3)),
    st.builds(Rule, st.just("dirichlet"), st.floats(0.01, 1000)),
)


@settings(deadline=None, max_examples=60)
@example(Rule("shards", 3), 12, 0, 120, 1)  # 36 shards of three or four samples
@given(rules, st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(120, 400), st.integers(1, 11))
def test_every_sample_is_in_exactly_one_part(rule: Rule, count: int, seed: int, samples: int, classes: int) -> None:
    targets = np.arange(samples, dtype=np.int64) % classes
    parts = split_indices(targets, classes, rule, count, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(samples))
    assert min(map(len, parts)) >= MIN_PART
    again = split_indices(targets, classes, rule, count, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10), st.integers(1, 12), st.integers(0, 2**63 - 1))
def test_labels_gives_at_most_k_classes_and_covers_all(per_part: int, count: int, seed: int) -> None:
    targets = np.arange(400, dtype=np.int64) % 10
    parts = split_indices(targets, 10, Rule("labels", per_part), count, seed)
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    assert all(1 <= len(np.unique(targets[part])) <= per_part for part in parts)
    if count * per_part >= 10:
        assert np.array_equal(np.sort(everything), np.arange(400))
    else:
        assert len(np.unique(targets[everything])) == count * per_part


def test_parts_are_the_same_on_every_machine_and_release() -> None:
    targets = np.arange(1000, dtype=np.int64) % 10
    digest = hashlib.sha256()
    for rule in ("iid", "dirichlet:0.5", "labels:4"):
        for part in split_indices(targets, 10, parse_rule(rule), 4, 7):
            digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "24f4ef33aa338784"


def test_shards_are_the_same_on_every_machine_too() -> None:
    targets = np.arange(1000, dtype=np.int64) % 10
    digest = hashlib.sha256()
    for part in split_indices(targets, 10, parse_rule("shards:2"), 4, 7):
        digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "5cd5351203acc064"


def test_shards_give_equal_parts_of_few_classes() -> None:
    targets = np.random.RandomState(0).permutation(np.arange(2000, dtype=np.int64) % 10)
    parts = split_indices(targets, 10, Rule("shards", 2), 10, 1)  # McMahan's MNIST: as many shards as fit two a class
    assert {len(part) for part in parts} == {200}
    assert max(len(np.unique(targets[part])) for part in parts) <= 2
    values = np.random.RandomState(0).rand(100).astype(np.float32)
    low, high = split_indices(values, 0, Rule("shards", 1), 2, 0)
    ordered = sorted((values[low], values[high]), key=lambda part: float(part.mean()))
    assert ordered[0].max() < ordered[1].min()


def test_values_cannot_be_split_by_class() -> None:
    values = np.random.RandomState(0).rand(100).astype(np.float32)
    assert sum(map(len, split_indices(values, 0, Rule("iid"), 3, 0))) == 100
    for rule in (Rule("labels", 2), Rule("dirichlet", 0.5)):
        with pytest.raises(UserError, match=f"{rule.kind} divides by class, and these targets are values; use iid"):
            split_indices(values, 0, rule, 3, 0)


def test_labels_deals_only_classes_that_are_there() -> None:
    targets = np.array([2, 5, 9] * 40, dtype=np.int64)
    parts = split_indices(targets, 10, Rule("labels", 1), 3, 0)
    assert sorted(int(targets[part[0]]) for part in parts) == [2, 5, 9]
    with pytest.raises(UserError, match="there are 3 classes; use labels:1 to labels:3"):
        split_indices(targets, 10, Rule("labels", 4), 3, 0)


def test_a_small_alpha_is_more_uneven() -> None:
    targets = np.arange(5000, dtype=np.int64) % 10

    def spread(rule: str) -> float:
        parts = split_indices(targets, 10, parse_rule(rule), 5, 0)
        return float(np.mean([np.bincount(targets[part], minlength=10).std() for part in parts]))

    assert spread("iid") < spread("dirichlet:10") < spread("dirichlet:0.1")


def test_another_seed_gives_other_parts() -> None:
    targets = np.arange(1000, dtype=np.int64) % 10
    first, second = (part_indices(targets, 10, Rule("iid"), Part(1, 4), seed) for seed in (0, 2**40))
    assert not np.array_equal(first, second)


def test_a_tenth_is_held_out_and_in_no_other_set(digits: Dataset) -> None:
    indices = part_indices(digits.train.targets, 10, Rule("iid"), Part(2, 4), 0)
    train, validation = hold_out(indices, Part(2, 4), 0)
    assert len(validation) == len(indices) // 10
    assert np.array_equal(np.sort(np.concatenate([train, validation])), indices)
    local = take_part(digits, Rule("iid"), Part(2, 4), 0)
    assert np.array_equal(local.train.inputs[:], digits.train.inputs[train])
    assert len(local.test) == len(digits.test)


@pytest.mark.parametrize(
    "text, says",
    [
        ("iid:3", "no split rule 'iid:3'"),
        ("dirichelt:0.5", "did you mean 'dirichlet:ALPHA'"),
        ("dirichlet", "from 0.01 to 1e+06, not ''"),
        ("dirichlet:0", "from 0.01 to 1e+06, not '0'"),
        ("dirichlet:nan", "not 'nan'"),
        ("dirichlet:1e9", "not '1e9'"),
        ("labels:0", "number of classes from 1, not '0'"),
        ("labels:2.5", "not '2.5'"),
        ("labels:", "not ''"),
        ("labels:99999999999999999999", "not '999"),
        ("shards:0", "number of shards a peer from 1 to 9999, not '0'"),
        ("shards:x", "not 'x'"),
        ("shard:2", "did you mean 'shards:K'"),
        ("", "no split rule ''"),
    ],
)
def test_impossible_rules_name_value_and_bound(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("0/4", "from 1 to 4, not 0"),
        ("5/4", "from 1 to 4, not 5"),
        ("1/0", "1 to 100000 parts, not 0"),
        ("1", "is not I/N"),
        ("a/b", "is not I/N"),
        ("1/-4", "is not I/N"),
        ("1/4/2", "is not I/N"),
        ("1/9999999", "not 9999999"),
    ],
)
def test_impossible_parts_name_value_and_bound(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_part(text)
    assert says in str(caught.value)


def test_too_many_parts_and_classes_are_refused() -> None:
    targets = np.arange(100, dtype=np.int64) % 10
    with pytest.raises(UserError, match="100 samples cannot be divided into 11 parts of at least 10; at most 10"):
        split_indices(targets, 10, Rule("iid"), 11, 0)
    with pytest.raises(UserError, match="there are 10 classes; use labels:1 to labels:10"):
        split_indices(targets, 10, Rule("labels", 11), 2, 0)
    with pytest.raises(UserError, match="100 samples cannot be cut into 180 shards; use shards:1 to shards:11"):
        split_indices(targets, 10, Rule("shards", 20), 9, 0)
    rare = np.array([0] * 99 + [1], dtype=np.int64)
    with pytest.raises(UserError, match="too few samples"):
        split_indices(rare, 2, Rule("labels", 1), 4, 0)
