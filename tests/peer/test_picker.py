"""Rarest first, against a picker that counts piece by piece."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gossipml.peer.picker import Picker, _nth


def test_the_rarest_piece_is_picked_first() -> None:
    picker = Picker(4, 0, random.Random(1))
    picker.add(0b1111)
    picker.add(0b0111)
    picker.add(0b0011)
    assert picker.pick(0b1111, 2) == [3, 2]
    assert sorted(picker.pick(0b1111, 9)) == [0, 1]
    assert picker.pick(0b1111, 9) == []


def test_equally_rare_pieces_are_picked_at_random() -> None:
    first: Counter[int] = Counter()
    for seed in range(2000):
        picker = Picker(10, 0, random.Random(seed))
        picker.add((1 << 10) - 1)
        first.update(picker.pick((1 << 10) - 1, 1))
    assert set(first) == set(range(10))
    assert max(first.values()) < 1.5 * min(first.values())


def test_only_missing_pieces_of_that_source_are_picked() -> None:
    picker = Picker(8, 0b0000_1111, random.Random(1))
    picker.add(0b0011_1100)
    assert sorted(picker.pick(0b0011_1100, 9)) == [4, 5]


def test_a_piece_that_is_released_can_be_picked_again_unless_it_came() -> None:
    picker = Picker(2, 0, random.Random(1))
    picker.add(0b11)
    assert sorted(picker.pick(0b11, 2)) == [0, 1]
    picker.done(0)
    picker.release(0)
    picker.release(1)
    assert picker.pick(0b11, 2) == [1]
    assert picker.missing == 0b10


@given(st.data())
def test_the_counts_are_those_of_a_naive_picker(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    bits = st.integers(0, (1 << count) - 1)
    picker = Picker(count, 0, random.Random(1))
    sources: list[int] = []
    for _ in range(data.draw(st.integers(0, 30))):
        leaves: bool = data.draw(st.booleans())
        if sources and leaves:
            picker.remove(sources.pop(data.draw(st.integers(0, len(sources) - 1))))
        else:
            sources.append(data.draw(bits))
            picker.add(sources[-1])
        counts = [sum(source >> index & 1 for source in sources) for index in range(count)]
        assert [picker.availability(index) for index in range(count)] == counts
        offered = data.draw(bits)
        picked = picker.pick(offered, 5)
        there = sorted(counts[i] for i in range(count) if offered >> i & 1 and counts[i])
        assert [counts[index] for index in picked] == there[:5]
        for index in picked:
            picker.release(index)


@given(st.integers(1, (1 << 200) - 1), st.data())
def test_the_nth_bit_is_found(bits: int, data: st.DataObject) -> None:
    positions = [i for i in range(200) if bits >> i & 1]
    n = data.draw(st.integers(0, len(positions) - 1))
    assert _nth(bits, n) == positions[n]
