"""Samples are what `ingest` makes of them, however they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gossipml.models.batches import Rooms, Samples
from gossipml.models.dataset import Labelled
from gossipml.models.spec import Array, Classifier

CPU = torch.device("cpu")


class Scaled(Classifier):
    name = "scaled"
    input_shape = (12,)
    labels = ("a", "b")
    factor = 1 / 255

    def build(self) -> nn.Module:
        return nn.Linear(12, 2)

    def ingest(self, samples: Array) -> Array:
        return np.multiply(samples.reshape(len(samples), 12), np.float32(self.factor), dtype=np.float32)


class Shifted(Scaled):
    name = "shifted"

    def ingest(self, samples: Array) -> Array:
        return super().ingest(samples) - np.float32(0.5)


class Turned(Scaled):
    """The last value first: no multiple of the bytes as they lie."""

    name = "turned"

    def ingest(self, samples: Array) -> Array:
        return super().ingest(samples)[:, ::-1]


class LastOff(Scaled):
    """Alike in all samples but the last."""

    name = "last-off"

    def ingest(self, samples: Array) -> Array:
        made = super().ingest(samples)
        made[(samples.reshape(len(samples), 12) == 7).all(1)] = 0
        return made


def bytes_of(count: int) -> Array:
    made = np.random.default_rng(1).integers(0, 256, (count, 3, 4)).astype(np.uint8)
    made[-1] = 7
    return made


@pytest.mark.parametrize("spec", [Scaled(), Shifted(), Turned(), LastOff()], ids=lambda spec: spec.name)
@pytest.mark.parametrize("count", [40, 5000])
def test_samples_are_what_ingest_makes_of_them_bit_for_bit(spec: Classifier, count: int) -> None:
    raw = bytes_of(count)
    samples = Samples(spec, Labelled(raw, np.arange(count)), CPU)
    places = torch.randint(0, count, (17,), generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(np.ascontiguousarray(spec.ingest(raw)))
    inputs, targets = samples.at(places)
    assert torch.equal(inputs, expected[places]) and torch.equal(targets, places)
    assert torch.equal(samples.between(0, 9)[0], expected[:9])
    room = Rooms()
    for part in (places, places[:5], places, torch.cat([places, places])):  # in buffers that are used again
        assert torch.equal(samples.unscaled(part, room).mul(samples.scale), expected[part])
        out = torch.empty(len(part), 12)
        samples.unscaled_into(part, out)
        assert torch.equal(out.mul(samples.scale), expected[part].reshape(len(part), 12))
    assert (samples.scale != 1.0) == (spec.name == "scaled")


def test_targets_have_the_shape_of_their_places() -> None:
    samples = Samples(Scaled(), Labelled(bytes_of(6), np.arange(6)), CPU)
    places = torch.tensor([[5, 0, 2], [1, 1, 3]])
    assert torch.equal(samples.targets(places), places)


def test_black_pictures_alone_are_kept_as_ingest_makes_them() -> None:
    samples = Samples(Shifted(), Labelled(np.zeros((3, 3, 4), np.uint8), np.arange(3)), CPU)
    assert torch.equal(samples.at(torch.tensor([1]))[0], torch.full((1, 12), -0.5))
