"""A part of a model: drawn at random by seed, sent, merged by a real trainer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from gossipml.errors import RemoteError, UserError
from gossipml.models.builtin import DigitsMlp
from gossipml.models.compression import (
    Form,
    pack,
    packed_size,
    parse_choice,
    parse_form,
    received,
    sampled_places,
    unpack_into,
)
from gossipml.models.data import load_source, take_part
from gossipml.models.encoding import ENCODINGS, encode
from gossipml.models.partition import Part, Rule
from gossipml.models.training import LocalTrainer


@given(st.sampled_from(ENCODINGS), st.integers(2, 64), st.integers(0, 2**32 - 1))
def test_the_name_says_it_all(values: str, one_in: int, seed: int) -> None:
    form = Form(values, one_in=one_in, seed=seed)
    assert parse_form(form.name) == form
    assert len(form.name) <= 32


@pytest.mark.parametrize(
    "name", ["int8-1in1-00000000", "int8-1in65-00000000", "int8-1in8", "int8-1in8-0", "int8-1in8-0BADC0DE"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RemoteError):
        parse_form(name)


def test_a_person_does_not_choose_a_seed() -> None:
    with pytest.raises(UserError):
        parse_choice("int8-1in8-00000000")


@settings(deadline=None)
@given(st.integers(0, 700), st.integers(2, 64), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_a_sample_arrives_and_the_rest_stays(n: int, one_in: int, seed: int, exact: int) -> None:
    form = Form("float32", one_in=one_in, seed=seed)
    values = np.arange(1, n + exact + 1, dtype=np.float32)
    body = pack(form, values, exact=exact)
    assert len(body) == packed_size(form, n + exact, exact)
    out = np.zeros(n + exact, dtype=np.float32)
    places = unpack_into(form, body, out, exact=exact)
    assert np.array_equal(out[places], values[places])
    assert np.array_equal(out[n:], values[n:]), "buffers are always sent"
    assert np.count_nonzero(out) == len(sampled_places(form, n)) + exact
    assert np.array_equal(out, received(form, values, np.zeros_like(values), exact=exact))
    with pytest.raises(RemoteError):
        unpack_into(form, body + b"\0", out, exact=exact)


@pytest.mark.parametrize("n", [64, 61, 5])
def test_every_parameter_is_sent_equally_often_and_by_itself(n: int) -> None:
    draws = 4000
    counts, pairs = np.zeros(n), 0
    for seed in range(draws):
        places = sampled_places(Form(one_in=8, seed=seed), n)
        counts[places] += 1
        pairs += {0, n - 1} <= set(places.tolist())
    assert np.abs(counts / draws - 1 / 8).max() < 5 * (1 / 8 * 7 / 8 / draws) ** 0.5, "unbiased, also at the end"
    if n > 8:
        assert abs(pairs / draws - 1 / 64) < 0.01


def test_what_a_peer_draws_every_peer_draws_for_ever() -> None:
    assert sampled_places(Form(one_in=8, seed=0x0BADC0DE), 60).tolist() == [0, 13, 16, 26, 32, 43, 49]


def test_a_sample_of_int8_is_encoded_as_a_vector_of_its_own() -> None:
    values = np.random.RandomState(1).normal(size=5000).astype(np.float32)
    form = Form("int8", one_in=10, seed=7)
    assert pack(form, values) == encode("int8", values[sampled_places(form, 5000)])


# In the trainer.


class WithNorm(DigitsMlp):
    name = "with-norm"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))


def make() -> LocalTrainer:
    local = take_part(load_source("digits"), Rule("iid"), Part(1, 4), 0)
    return LocalTrainer(WithNorm(), local, network_id=b"network", seed=1)


def values(trainer: LocalTrainer) -> NDArray[np.float32]:
    return np.frombuffer(trainer.snapshot("float32"), dtype=np.float32).copy()


@pytest.mark.parametrize("part", ["-2of4", "-1in4-00000007"])
def test_a_part_moves_its_own_parameters_and_the_buffers_alone(part: str) -> None:
    trainer = make()
    buffers = trainer.layout.buffers
    assert buffers == 40
    form = parse_form("float32" + part)
    whole = values(trainer)  # buffers first, in the body
    before = np.concatenate([whole[buffers:], whole[:buffers]])
    other = before + np.float32(1.0)
    report = trainer.merge(pack(form, other, exact=buffers), form.name, 0.5)
    assert report.applied
    after = values(trainer)
    moved = np.concatenate([after[buffers:], after[:buffers]]) - before
    expected = np.zeros(len(before), dtype=bool)
    n = len(before) - buffers
    expected[sampled_places(form, n) if form.one_in > 1 else slice(*form.stretch(n))] = True
    expected[n:] = True
    assert np.array_equal(moved != 0, expected)
    assert np.ptp(moved[:n][expected[:n]]) < 1e-6 and np.ptp(moved[n:]) < 1e-6, "each clipped by its own bound"
    assert report.distance == pytest.approx(len(before) ** 0.5, rel=0.1), "as if all were as far away"


def test_the_parts_of_a_model_are_together_what_the_model_is() -> None:
    trainer, target = make(), make()
    for _ in range(5):
        target.step()
    for number in range(1, 9):
        body = target.snapshot(f"float32-{number}of8")
        assert len(body) == target.snapshot_size(f"float32-{number}of8")
        assert trainer.merge(body, f"float32-{number}of8", 1.0).applied
    assert np.abs(values(trainer) - values(target)).max() < 0.02


def test_a_part_of_a_wrong_length_is_refused_with_a_reason() -> None:
    trainer = make()
    report = trainer.merge(b"12345", "int8-1of8", 0.5)
    assert not report.applied
    assert "5 bytes" in report.reason
