from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipml.errors import LocalError, RemoteError, UserError
from gossipml.models.compression import (
    SPAN,
    Form,
    _marks,
    pack,
    pack_into,
    packed_size,
    parse_choice,
    parse_form,
    received,
    rounded,
    unpack_into,
)
from gossipml.models.compression_auto import LADDER, RESERVE, choose
from gossipml.models.encoding import ENCODINGS, MAX_MAGNITUDE, Vector, decode, encode, encoded_size
from gossipml.models.feedback import pack_changes, pack_update, with_feedback

FORMS = [
    Form("float32"),
    Form("int8"),
    Form("int4"),
    Form("float16", fragment=2, fragments=5),
    Form("int4", fragment=7, fragments=8),
    Form("int8", 1),
    Form("bfloat16", 6),
    Form("float32", 7),
    Form("int4", 50),
]


def normal(n: int, seed: int = 0) -> Vector:
    return np.random.RandomState(seed).normal(size=n).astype(np.float32)


def names(form: Form) -> str:
    return form.name


# Names.


@settings(deadline=None)
@given(
    st.sampled_from(ENCODINGS),
    st.one_of(
        st.tuples(st.integers(1, 50), st.just(0), st.just(1)),
        st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(100), st.integers(0, n - 1), st.just(n))),
    ),
)
def test_a_name_says_the_form_and_fits_the_wire(values: str, rest: tuple[int, int, int]) -> None:
    form = Form(values, *rest)
    assert parse_form(form.name) == form
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,15}", form.name)


@pytest.mark.parametrize(
    "name",
    (
        *("", "int3", "int8-", "int8-top0", "int8-top51", "int8-top05", "int8-of8", "int8-0of8", "int8-9of8"),
        *("int8-1of1", "int8-1of65", "int8-top10-1of2", "INT8", "int8 ", "int8\n", "int8-top١", "x" * 1000),
    ),
)
def test_names_that_a_peer_must_not_send_are_refused(name: str) -> None:
    with pytest.raises(RemoteError, match="encoding") as caught:
        parse_form(name)
    assert len(str(caught.value)) < 200


def test_a_person_chooses_auto_an_encoding_a_share_or_fragments() -> None:
    assert parse_choice("auto") is None
    assert parse_choice("bf16") == Form("bfloat16")
    assert parse_choice("fp16-top5") == Form("float16", 5)
    assert parse_choice("int4-of8") == Form("int4", fragments=8)
    for wrong, says in (
        ("zip", "choose auto, float32"),
        ("int8-top90", "top takes 1 to 50 %"),
        ("int8-of99", "2 to 64 fragments"),
        ("int8-2of8", "no compression"),
    ):
        with pytest.raises(UserError, match=says):
            parse_choice(wrong)


# Bytes.


@pytest.mark.parametrize("form", FORMS, ids=names)
@pytest.mark.parametrize("n, exact", [(1, 0), (2, 1), (1000, 0), (1003, 17), (SPAN, 0), (2 * SPAN + 77, 5)])
def test_what_arrives_is_what_was_sent_and_the_rest_stays(form: Form, n: int, exact: int) -> None:
    values, own = normal(n), np.full(n, 7, dtype=np.float32)
    data = pack(form, values, exact=exact)
    assert len(data) == packed_size(form, n, exact)
    out = own.copy()
    where = unpack_into(form, data, out, exact=exact)
    there = np.zeros(n, dtype=bool)
    there[where] = True
    assert (out[n - exact :] == values[n - exact :]).all(), "buffers arrive bit by bit"
    parameters = n - exact
    assert (out[:parameters][~there[:parameters]] == 7).all()
    sent = values[:parameters][there[:parameters]]
    expected = decode(form.values, encode(form.values, sent), len(sent)) if len(sent) else sent
    assert (out[:parameters][there[:parameters]] == expected).all()
    assert abs(there[:parameters].sum() - form.share * parameters) <= 1 + parameters / SPAN


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_a_simulator_gets_what_the_bytes_would_bring(form: Form) -> None:
    n, exact = SPAN + 301, 9
    values, own, importance = (np.stack([normal(n, seed + 10 * kind) for seed in range(2)]) for kind in range(3))
    together = received(form, values, own, exact=exact, importance=importance)
    tensors = received(
        form, *(torch.from_numpy(v) for v in (values, own)), exact=exact, importance=torch.from_numpy(importance)
    )
    assert together.dtype == np.float32
    for peer in range(2):
        out = own[peer].copy()
        unpack_into(form, pack(form, values[peer], exact=exact, importance=importance[peer]), out, exact=exact)
        np.testing.assert_allclose(together[peer], out, rtol=1e-6, atol=1e-9)  # approx takes seconds for these
        np.testing.assert_allclose(tensors[peer].numpy(), out, rtol=1e-6, atol=1e-9)


@settings(deadline=None)
@given(st.sampled_from(ENCODINGS), st.integers(1, 400), st.integers(-30, 12))
def test_rounding_is_decoding_what_was_encoded(encoding: str, n: int, exponent: int) -> None:
    values = normal(n, n) * np.float32(10.0**exponent)
    if encoding == "float16":
        values = values.clip(-6e4, 6e4)
    values = values.clip(-9e8, 9e8)
    expected = decode(encoding, encode(encoding, values), n)
    for found in (rounded(encoding, values), rounded(encoding, torch.from_numpy(values)).numpy()):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-32)


def test_top_sends_the_largest_of_each_block_or_those_that_matter_most() -> None:
    values = normal(SPAN + 1000)
    for importance in (None, normal(SPAN + 1000, 1)):
        out = np.zeros_like(values)
        where = unpack_into(form := Form("float32", 10), pack(form, values, importance=importance), out)
        weights = np.abs(values if importance is None else importance)
        there = np.zeros(len(values), dtype=bool)
        there[where] = True
        for block in (slice(0, SPAN), slice(SPAN, None)):
            assert weights[block][there[block]].min() >= weights[block][~there[block]].max()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 10))
def test_top_k_contracts(n: int, percent: int, seed: int) -> None:
    """Stich, Cordonnier, Jaggi 2018: |x - top(x)|^2 <= (1 - k / n) |x|^2, here also in blocks."""
    values = normal(n, seed)
    rest = values - received(Form("float32", percent), values, np.zeros_like(values))
    assert (rest**2).sum() <= (1 - percent / 100) * (values**2).sum() * (1 + 1e-5)


@pytest.mark.parametrize("encoding, worst", [("int8", 0.004), ("int4", 0.25)])
@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 10), st.integers(1, 4))
def test_rounding_contracts(encoding: str, worst: float, n: int, seed: int, power: int) -> None:
    """255 values half a step of 1 / 127 of the peak from a level; 63 half a step of 1 / 8."""
    values = normal(n, seed) ** power
    rest = values - rounded(encoding, values)
    assert (rest**2).sum() <= worst * (values**2).sum()


@settings(deadline=None)
@given(st.integers(2, 64), st.integers(0, 500), st.integers(0, 1000))
def test_fragments_cover_every_parameter_once_in_a_cycle(fragments: int, n: int, first: int) -> None:
    form = Form("int8", fragments=fragments)
    times = np.zeros(n, dtype=int)
    for step in range(first, first + fragments):
        start, stop = form.at(step).stretch(n)
        times[start:stop] += 1
    assert (times == 1).all()


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_wrong_lengths_are_refused(form: Form) -> None:
    data = pack(form, normal(1000), exact=3)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(RemoteError, match="1000 parameters take"):
            unpack_into(form, wrong, np.zeros(1000, dtype=np.float32), exact=3)
    with pytest.raises(LocalError, match="do not fit"):
        pack_into(form, normal(1000), memoryview(bytearray(len(data) - 1)), exact=3)


@given(st.integers(1, 50), st.integers(1, 700), st.sampled_from(("first", "last", "any")), st.integers(0, 99))
def test_places_come_back_wherever_they_are(percent: int, n: int, where: str, seed: int) -> None:
    form = Form("float32", percent)
    count = -(-n * percent // 100)
    importance = np.random.RandomState(seed).permutation(n).astype(np.float32)
    if where != "any":
        importance.sort()
    if where == "first":
        importance = importance[::-1].copy()
    values = normal(n) + 9
    out = np.zeros(n, dtype=np.float32)
    places = unpack_into(form, pack(form, values, importance=importance), out)
    assert set(np.asarray(places).tolist()) == set(np.argsort(-importance)[:count].tolist())
    assert np.array_equal(out, np.where(importance >= n - count, values, 0))


def test_places_are_gaps_of_zeros_and_a_one_and_their_last_bits() -> None:
    form, n = Form("float32", 10), 40  # 4 of them; k = 3, so 4 + 36 >> 3 = 8 marks, and thrice 4 bits
    importance = np.zeros(n, dtype=np.float32)
    importance[[2, 3, 21, 39]] = 1  # gaps 2, 0, 17, 17
    body = pack(form, normal(n), importance=importance)
    assert body[16:] == bytes([0b10010011, 0b1100, 0b0001, 0b0000])


def test_places_take_few_bits() -> None:
    bits = {k: 8 * (packed_size(Form("int8", k), SPAN) - encoded_size("int8", -(-SPAN * k // 100))) for k in (1, 5, 10)}
    assert {k: round(bits[k] / (SPAN * k / 100), 1) for k in bits} == {1: 8.6, 5: 6.2, 10: 5.1}


@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_any_bytes_are_places_of_the_model_or_refused(percent: int, n: int, seed: int, right_count: bool) -> None:
    form, rng = Form("float32", percent), np.random.default_rng(seed)
    count = -(-n * percent // 100)
    body = bytes(4 * count) + rng.bytes(packed_size(form, n) - 4 * count)
    if right_count:
        marks = np.zeros(8 * -(-_marks(form, n) // 8), dtype=np.uint8)
        marks[rng.choice(len(marks), count, replace=False)] = 1
        packed = np.packbits(marks, bitorder="little").tobytes()
        body = body[: 4 * count] + packed + body[4 * count + len(packed) :]
    try:
        places = np.asarray(unpack_into(form, body, np.zeros(n, dtype=np.float32)))
    except RemoteError as error:
        assert "beyond" in str(error) or not right_count
        return
    assert len(places) == count and places[0] >= 0 and places[-1] < n and (np.diff(places) > 0).all()


def test_marks_of_other_counts_and_places_beyond_the_model_are_refused() -> None:
    form, n = Form("float32", 10), 45  # 5 of them: 10 marks in 2 bytes, and thrice 5 bits
    importance = np.zeros(n, dtype=np.float32)
    importance[:5] = 1
    body = pack(form, normal(n), importance=importance)
    assert body[-5:] == bytes([0b11111, 0, 0, 0, 0])
    for marks, says in (
        ([0b111111, 0], "marks 6 places, not 5"),
        ([0b1111, 0], "marks 4 places"),
        ([0b1111, 0b10], "beyond"),  # the padding begins with the third bit
        ([0b1111, 0b10000000], "beyond"),
    ):
        with pytest.raises(RemoteError, match=says):
            unpack_into(form, body[:-5] + bytes([*marks, 255, 255, 255]), np.zeros(n, dtype=np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS, ids=names)
def test_what_is_not_finite_is_neither_sent_nor_taken(form: Form, bad: float) -> None:
    values = np.full(4000, bad, dtype=np.float32)
    with pytest.raises(LocalError):
        pack(form, values)
    values = normal(4000)
    values[-1] = bad
    with pytest.raises(LocalError):
        pack(form, values, exact=1)
    data = bytearray(pack(form, normal(4000), exact=1))
    data[:4] = np.float32(bad).tobytes()
    with pytest.raises(RemoteError, match="update holds the value"):
        unpack_into(form, data, np.zeros(4000, dtype=np.float32), exact=1)
    if form.percent < 100:
        with pytest.raises(LocalError, match="not finite"):
            pack(form, normal(4000), importance=values)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FORMS), st.integers(1, 300), st.data())
def test_any_bytes_give_finite_values_or_remote_error(form: Form, n: int, data: st.DataObject) -> None:
    exact = data.draw(st.integers(0, min(n, 3)))
    size = packed_size(form, n, exact)
    body = data.draw(st.binary(min_size=size, max_size=size))
    out = np.zeros(n, dtype=np.float32)
    try:
        where = unpack_into(form, body, out, exact=exact)
    except RemoteError:
        return
    assert np.isfinite(out).all() and np.abs(out).max() <= MAX_MAGNITUDE
    untouched = np.ones(n, dtype=bool)
    untouched[where] = untouched[n - exact :] = False
    assert not out[untouched].any()


# Error feedback.


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_sent_and_residual_add_up_to_the_updates(form: Form) -> None:
    n, exact = 3000, 5
    residual, arrived, updates = np.zeros(n, np.float32), np.zeros(n), np.zeros(n)
    for step in range(20):
        update = normal(n, step)
        updates += update
        received_update = np.zeros(n, np.float32)
        unpack_into(
            form.at(step), pack_update(form.at(step), update, residual, exact=exact), received_update, exact=exact
        )
        arrived += received_update
    np.testing.assert_allclose(arrived + residual, updates, atol=1e-4)
    assert not residual[-exact:].any(), "buffers are sent exactly"


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_the_residual_of_a_contraction_stays_bounded(n: int, percent: int, tensors: bool) -> None:
    """Karimireddy et al. 2019, lemma 3: |e|^2 <= 4 (1 - d) / d^2 max |u|^2."""
    share = -(-n * percent // 100) / n
    residual = torch.zeros(n) if tensors else np.zeros(n, np.float32)
    for step in range(30):
        update = normal(n, step)
        update /= np.linalg.norm(update)
        one = torch.from_numpy(update) if tensors else update
        _sent, residual = with_feedback(one, residual, lambda v: received(Form("float32", percent), v, v * 0))
        assert float((residual**2).sum()) <= 4 * (1 - share) / share**2 + 1e-5


def test_feedback_works_for_all_peers_of_a_simulation_at_once() -> None:
    updates = np.stack([normal(100, seed) for seed in range(6)]).reshape(2, 3, 100)
    sent, residual = with_feedback(updates, np.zeros_like(updates), lambda v: received(Form("int4", 10), v, v * 0))
    for peer in np.ndindex(2, 3):
        alone, _ = with_feedback(updates[peer], 0, lambda v: received(Form("int4", 10), v, v * 0))
        assert (sent[peer] == alone).all()
    assert sent + residual == pytest.approx(updates)


def test_rounding_with_feedback_is_right_on_average() -> None:
    model = normal(640)
    plain = rounded("int4", model)
    residual, total = np.zeros_like(model), np.zeros(640)
    for _ in range(200):
        out = np.zeros_like(model)
        unpack_into(Form("int4"), pack_update(Form("int4"), model, residual), out)
        total += out
    assert np.abs(total / 200 - model).max() < 0.01 < np.abs(plain - model).max()


def test_a_model_sent_by_its_changes_arrives_whole() -> None:
    model, reference = normal(5000), np.zeros(5000, np.float32)
    receiver = np.zeros_like(model)
    form = Form("int8", 10)
    for sends in range(1, 31):
        body = pack_changes(form, model, reference)
        unpack_into(form, body, receiver)
        assert (receiver == reference).all(), "the sender knows what the receiver has"
        if sends == 10:
            assert (receiver != 0).mean() > 0.98, "the sender says everything once before it says anything again"
    assert np.abs(receiver - model).max() < 0.02


# Auto.


def test_a_link_gets_the_finest_form_that_it_carries_in_time() -> None:
    n = 1_000_000
    forms = [choose(bandwidth, 1.0, n) for bandwidth in (1e9, 1.1e6, 1e6, 4e5, 3e5, 1e5, 4e4, 1.0)]
    assert forms == [LADDER[rung] for rung in (0, 0, 1, 2, 3, 4, 5, 5)]
    assert choose(None, 1.0, n) == LADDER[0] and choose(None, 1.0, n, now=LADDER[2]) == LADDER[2]
    sizes = [packed_size(form, n) for form in LADDER]
    assert sizes == sorted(sizes, reverse=True)


def test_auto_does_not_waver_around_a_limit() -> None:
    n = 1_000_000
    limit = packed_size(LADDER[0], n)
    form, changes = LADDER[0], 0
    for step in range(100):
        new = choose(limit * (1.2 if step % 2 else 0.9), 1.0, n, now=form)
        changes, form = changes + (new != form), new
    assert (form, changes) == (LADDER[1], 1)
    assert choose(limit / RESERVE, 1.0, n, now=form) == LADDER[0]


def test_a_form_that_is_not_on_the_ladder_gives_way_to_the_ladder() -> None:
    assert choose(1e9, 1.0, 1000, now=Form("float32")) == LADDER[0]
    assert choose(None, 1.0, 1000, now=Form("float32")) == LADDER[0]
