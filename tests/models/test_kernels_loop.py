"""All steps of many small dense networks in one compiled loop give what the batched products of `DenseKernel` give."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossipml.models import kernels_loop
from gossipml.models.arrays import can_compile
from gossipml.models.batches import Samples
from gossipml.models.dataset import Labelled
from gossipml.models.flat import FlatModule
from gossipml.models.kernels_dense import dense_kernel
from gossipml.models.kernels_loop import DenseLoop, dense_loop
from gossipml.models.spec import Array, Classifier, Sgd, Spec, standard_loss

pytest.importorskip("numba", reason="the extra `simulate` is not installed")

CPU = torch.device("cpu")
MODELS, SAMPLES, BATCH = 5, 40, 7
RATES = [Sgd(0.1), Sgd(0.1, momentum=0.9), Sgd(0.1, weight_decay=0.1), Sgd(0.1, momentum=0.5, weight_decay=0.01)]


class Softmax(Classifier):
    name = "softmax"
    input_shape = (3, 6)
    labels: tuple[str, ...] = ("a", "b", "c")
    bias = True

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, len(self.labels), bias=self.bias))


class Bytes(Softmax):
    name = "bytes"

    def ingest(self, samples: Array) -> Array:
        return samples.astype(np.float32) * np.float32(1 / 255)


class NoBias(Bytes):
    name = "no-bias"
    bias = False


class Many(Softmax):
    name = "many"
    labels = tuple(map(str, range(11)))


class Errors(Softmax):
    name = "errors"

    @standard_loss("squared-error-of-classes")
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, len(self.labels)).to(outputs.dtype))


class Smoothed(Softmax):
    name = "smoothed"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2)


class Deep(Softmax):
    name = "deep"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 3))


class Deeper(Bytes):
    """More outputs than a tile has rows, more inputs than it has columns, and a layer without biases."""

    name = "deeper"

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(18, 61), nn.ReLU(), nn.Linear(61, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)
        )


class DeepErrors(Errors):
    name = "deep-errors"

    def build(self) -> nn.Module:
        return Deep().build()


class Smooth(Softmax):
    name = "smooth"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 3))


class Twice(Softmax):
    name = "twice"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Linear(4, 3))


def samples_of(spec: Classifier) -> Samples:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, len(spec.labels), SAMPLES)
    if isinstance(spec, Bytes):
        return Samples(spec, Labelled(rng.integers(0, 256, (SAMPLES, 3, 6), dtype=np.uint8), targets), CPU)
    return Samples(spec, Labelled(rng.standard_normal((SAMPLES, 3, 6)).astype(np.float32), targets), CPU)


def loop_of(spec: Spec, samples: Samples) -> DenseLoop:
    loop = dense_loop(spec, spec.build(), samples)
    assert loop is not None
    return loop


def models_of(spec: Spec, sgd: Sgd) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    size = FlatModule(spec.build(), CPU).size
    return 0.3 * torch.randn(MODELS, size), 0.3 * torch.randn(MODELS, size) if sgd.has_velocity else None


def one_by_one(
    spec: Spec,
    samples: Samples,
    models: tuple[torch.Tensor, torch.Tensor | None],
    rows: Sequence[int],
    steps: Sequence[int],
    places: torch.Tensor,
    sgd: Sgd,
) -> None:
    """The same by the other kernel."""
    kernel = dense_kernel(spec, spec.build())
    assert kernel is not None
    for place, (row, count) in enumerate(zip(rows, steps, strict=True)):
        own = torch.tensor([row])
        kernel.hold(*models, own)
        for step in range(count):
            where = places[step, place]
            inputs, targets = samples.at(where)
            kernel.descend(inputs[None], kernel.prepare(targets[None]), sgd)
        assert kernel.release(*models, own) == [True]


@pytest.mark.parametrize("sgd", RATES, ids=str)
@pytest.mark.parametrize(
    "kind", [Softmax, Bytes, NoBias, Many, Errors, Deep, Deeper, DeepErrors], ids=lambda kind: kind.name
)
def test_it_takes_the_steps_of_the_other_kernel(kind: type[Softmax], sgd: Sgd) -> None:
    spec = kind()
    samples = samples_of(spec)
    rows, steps = [3, 0, 4], [6, 6, 2]
    found, right = models_of(spec, sgd), models_of(spec, sgd)
    loop = loop_of(spec, samples)
    for batch in (BATCH, 2 * BATCH, 1):  # what lay in a larger batch does not count in the next
        places = torch.randint(0, SAMPLES, (6, 3, batch), generator=torch.Generator().manual_seed(batch))
        assert loop.descend(*found, rows, steps, places, sgd) == [True] * 3
        one_by_one(spec, samples, right, rows, steps, places, sgd)
    for ours, theirs in zip(found, right, strict=True):
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0], models_of(spec, sgd)[0])
    assert torch.equal(found[0][[1, 2]], models_of(spec, sgd)[0][[1, 2]])  # nobody's, untouched


def test_large_outputs_do_not_overflow() -> None:
    spec, sgd = Softmax(), Sgd(0.1)
    samples, places = samples_of(spec), torch.arange(BATCH)[None, None]
    found, right = (models_of(spec, sgd) for _ in range(2))
    for vectors, _ in (found, right):
        vectors *= 3000
    assert loop_of(spec, samples).descend(*found, [0], [1], places, sgd) == [True]
    one_by_one(spec, samples, right, [0], [1], places, sgd)
    np.testing.assert_allclose(found[0], right[0], rtol=1e-5)


@pytest.mark.parametrize("kind", [Softmax, Deep, Deeper], ids=lambda kind: kind.name)
def test_a_model_that_is_not_finite_stays_as_it_was_and_so_does_the_next(kind: type[Softmax]) -> None:
    spec, sgd = kind(), Sgd(0.1, momentum=0.9)
    samples, places = samples_of(spec), torch.arange(2 * BATCH).view(1, 2, BATCH)
    (vectors, velocities), right = (models_of(spec, sgd) for _ in range(2))
    assert velocities is not None
    velocities[1] = torch.inf
    before = vectors.clone()
    assert loop_of(spec, samples).descend(vectors, velocities, [1, 2], [1, 1], places, sgd) == [False, True]
    assert torch.equal(vectors[1], before[1])
    one_by_one(spec, samples, right, [2], [1], places[:, 1:], sgd)
    np.testing.assert_allclose(vectors[2], right[0][2], rtol=1e-4, atol=1e-6)


def test_without_momentum_velocities_are_only_room() -> None:
    spec, sgd = Softmax(), Sgd(0.1, weight_decay=0.1)
    samples, places = samples_of(spec), torch.arange(BATCH)[None, None]
    found, right = (models_of(spec, sgd) for _ in range(2))
    assert found[1] is not None
    found[1].fill_(torch.nan)
    assert loop_of(spec, samples).descend(*found, [0], [1], places, sgd) == [True]
    one_by_one(spec, samples, right, [0], [1], places, sgd)
    np.testing.assert_allclose(found[0], right[0], rtol=1e-4, atol=1e-6)


def test_a_numba_that_cannot_be_imported_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs NumPy 1.0 or less")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    can_compile.cache_clear()
    try:
        assert not can_compile()
        assert "Numba needs NumPy" in caplog.text
    finally:
        can_compile.cache_clear()


def test_where_nothing_can_be_kept_loops_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossipml.models import loops

    def nowhere(self: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    def next_one(number: int) -> int:
        return number + 1

    monkeypatch.setattr(type(loops.compare), "enable_caching", nowhere)
    assert loops.compiled(next_one)(2) == 3


def test_on_a_full_disk_loops_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    from gossipml.models import loops

    tried: list[object] = []

    def full(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError(28, "No space left on device")

    def twice(number: int) -> int:
        return 2 * number

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert loops.compiled(twice)(3) == 6
    assert tried


def test_other_models_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (Smoothed(), Smooth(), Twice()):
        assert dense_loop(other, other.build(), samples_of(other)) is None
    spec = Softmax()
    assert dense_loop(spec, nn.Linear(1024, 512), samples_of(spec)) is None  # too large for the cache
    assert dense_loop(spec, spec.build(), samples_of(spec)) is not None
    monkeypatch.setattr(kernels_loop, "can_compile", lambda: False)
    assert dense_loop(spec, spec.build(), samples_of(spec)) is None


@pytest.mark.slow  # compiles all anew: ten seconds
def test_registers_of_half_the_width_do_the_same(tmp_path: Path) -> None:
    """As on a machine without AVX-512."""
    script = """
import os
import subprocess
import sys
from llvmlite import binding

features = binding.get_host_cpu_features()
features.update((name, False) for name in features if name.startswith(("avx512", "amx", "avx10")))
binding.get_host_cpu_features = lambda: features
from gossipml.models import loops_tiles

assert loops_tiles.LANES == 8
sys.exit(__import__("pytest").main([*sys.argv[1:], "-q", "-p", "no:cacheprovider", "-k", "takes_the_steps"]))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, __file__], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
