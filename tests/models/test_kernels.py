"""Training by hand gives what autograd gives, for one model and for many at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gossipml.models.builtin import BUILTIN
from gossipml.models.flat import FlatModule
from gossipml.models.kernels import kernel_for
from gossipml.models.kernels_dense import DenseKernel
from gossipml.models.registry import load_spec
from gossipml.models.spec import Adaptive, Classifier, Facts, Sgd, Spec, adapts, sample_shape, standard_loss

CPU = torch.device("cpu")
BATCH = 6
DENSE = ["xor", "digits-mlp", "mnist-mlp", "mnist-dense", "mnist-wide", "mnist-wide-mse", "logistic", "linear"]


class Deep(Classifier):
    """Everything that a dense network may have."""

    name = "deep"
    input_shape = (2, 3)
    labels = ("a", "b", "c")

    def build(self) -> nn.Module:
        inner = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Flatten(), nn.Sigmoid())
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), inner, nn.Linear(4, 3))


class OwnLoss(Deep):
    """A loss of the user's, over an inherited one that is known."""

    name = "own-loss"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2) + outputs.square().mean()


class Squashed(Deep):
    """Its last layer would work in place of the gradient of the loss."""

    name = "squashed"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Sigmoid())

    @standard_loss("squared-error-of-classes")
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 3).to(outputs.dtype))


OWN = {"deep": Deep, "own-loss": OwnLoss, "squashed": Squashed}


def specification(name: str) -> Spec:
    spec: Spec = OWN[name]() if name in OWN else load_spec(name)
    if adapts(spec):
        labels = ("1990", "1995", "2001")
        facts = Facts("table", (4,), labels, (), (0.0,) * 4, (1.0,) * 4, 1.0, 1.0)
        adaptive: Adaptive = spec
        spec = adaptive.adapt(facts)
    return spec


def batch_of(spec: Spec, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    classes = max(2, len(spec.labels)) if spec.labels else 3
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, BATCH, *sample_shape(spec), generator=generator)
    return inputs, torch.randint(0, classes, (count, BATCH), generator=generator)


def flat_of(spec: Spec) -> FlatModule:
    torch.manual_seed(1)
    flat = FlatModule(spec.build(), CPU)
    flat.vector.add_(torch.randn(flat.size), alpha=0.1)
    return flat


def by_hand(
    spec: Spec, flat: FlatModule, vectors: torch.Tensor, start: torch.Tensor, keep: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = kernel_for(spec, flat.module)
    assert kernel is not None
    inputs, targets = batch_of(spec, len(vectors))
    gradients = start.clone()
    return kernel.accumulate(vectors, inputs, targets, gradients, keep), gradients


@pytest.mark.parametrize("name", [*DENSE, *OWN])
@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_loss_and_gradient_are_those_of_autograd(name: str, keep: float) -> None:
    spec = specification(name)
    flat = flat_of(spec)
    start = torch.randn(1, flat.parameter_count)
    torch.manual_seed(2)
    losses, gradients = by_hand(spec, flat, flat.vector.unsqueeze(0), start, keep)
    inputs, targets = batch_of(spec, 1)
    flat.gradient.copy_(start[0]).mul_(keep)
    torch.manual_seed(2)  # dropout draws the same mask
    flat.module.train()
    loss = spec.loss(flat.module(inputs[0]), targets[0])
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(losses, loss.detach().unsqueeze(0))
    torch.testing.assert_close(gradients[0], flat.gradient, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("name", [*(name for name in DENSE if name != "mnist-dense"), *OWN])
def test_five_models_at_once_are_five_models(name: str) -> None:
    spec = specification(name)
    flat = flat_of(spec)
    generator = torch.Generator().manual_seed(3)
    # Rows of a wider matrix, as a simulation keeps them.
    table = torch.randn(5, flat.size + 7, generator=generator) * 0.3
    vectors, start = table[:, 3 : 3 + flat.size], torch.randn(5, flat.parameter_count, generator=generator)
    inputs, targets = batch_of(spec, 5)
    losses, gradients = by_hand(spec, flat, vectors, start, 0.5)
    kernel = kernel_for(spec, flat.module)
    assert kernel is not None
    for row in range(5):
        own = start[row : row + 1].clone()
        loss = kernel.accumulate(vectors[row : row + 1], inputs[row : row + 1], targets[row : row + 1], own, 0.5)
        torch.testing.assert_close(loss, losses[row : row + 1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own[0], gradients[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*(name for name in DENSE if name != "mnist-dense"), *OWN])
@pytest.mark.parametrize("count", [1, 3])
def test_a_descent_is_a_step_along_the_gradient_of_scaled_samples(name: str, count: int) -> None:
    spec = specification(name)
    flat = flat_of(spec)
    vectors = flat.vector + 0.1 * torch.randn(count, flat.size, generator=torch.Generator().manual_seed(3))
    start = torch.zeros(count, flat.parameter_count)
    inputs, targets = batch_of(spec, count)
    kernel = kernel_for(spec, flat.module)
    assert isinstance(kernel, DenseKernel)
    kernel.accumulate(vectors, inputs, targets, start)
    gradients = torch.zeros_like(start)
    kernel.scale(0.25)
    kernel.accumulate(vectors, 4 * inputs, targets, gradients)
    torch.testing.assert_close(gradients, start, rtol=1e-4, atol=1e-6)
    moved = vectors.clone()
    kernel.hold(moved, None, torch.arange(len(moved)))
    kernel.descend(4 * inputs, kernel.prepare(targets), Sgd(0.5))
    kernel.release(moved, None, torch.arange(len(moved)))
    torch.testing.assert_close(moved, vectors - 0.5 * start, rtol=1e-4, atol=1e-6)


def test_of_the_models_that_are_held_the_first_ones_may_take_more_steps() -> None:
    spec = specification("deep")
    flat = flat_of(spec)
    vectors = flat.vector + 0.1 * torch.randn(4, flat.size, generator=torch.Generator().manual_seed(3))
    inputs, targets = batch_of(spec, 4)
    kernel = kernel_for(spec, flat.module)
    assert isinstance(kernel, DenseKernel)
    for held in (4, 2, 4):  # a chunk of another size lies where the last one did
        moved = vectors[:held].clone()
        kernel.hold(moved, None, torch.arange(len(moved)))
        for count in (held, 2, 1):  # steps: three of the first, two of the second, one of the others
            kernel.descend(inputs[:count], kernel.prepare(targets)[:count], Sgd(0.5))
        kernel.release(moved, None, torch.arange(len(moved)))
        for row, steps in zip(range(held), (3, 2, 1, 1), strict=False):
            expected = vectors[row : row + 1].clone()
            for _ in range(steps):
                gradients = torch.zeros(1, flat.parameter_count)
                kernel.accumulate(expected, inputs[row : row + 1], targets[row : row + 1], gradients)
                expected[:, : flat.parameter_count] -= 0.5 * gradients
            torch.testing.assert_close(moved[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sgd", [Sgd(0.1, 0.9), Sgd(0.1, 0.0, 0.01), Sgd(0.1, 0.5, 0.01)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_descent_with_momentum_and_decay_is_that_of_torch(sgd: Sgd, count: int) -> None:
    spec = specification("deep")
    flat = flat_of(spec)
    vectors = flat.vector + 0.1 * torch.randn(count, flat.size, generator=torch.Generator().manual_seed(3))
    inputs, targets = batch_of(spec, count)
    kernel = kernel_for(spec, flat.module)
    assert isinstance(kernel, DenseKernel)
    moved, velocities = vectors.clone(), torch.zeros(count, flat.parameter_count)
    if not sgd.momentum:
        velocities.fill_(float("nan"))  # nobody's: only room
    for _ in range(2):  # what is held in between is nobody's business
        kernel.hold(moved, velocities, torch.arange(count))
        for _ in range(2):
            kernel.descend(inputs, kernel.prepare(targets), sgd)
        kernel.release(moved, velocities, torch.arange(count))
    for row in range(count):
        own = vectors[row].clone().requires_grad_()
        optimiser = torch.optim.SGD([own], lr=sgd.learning_rate, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
        for _ in range(4):
            gradient = torch.zeros(1, flat.parameter_count)
            place = slice(row, row + 1)
            kernel.accumulate(own.detach()[None], inputs[place], targets[place], gradient)
            own.grad = gradient[0]
            optimiser.step()
        torch.testing.assert_close(moved[row], own.detach(), rtol=1e-4, atol=1e-5)


def test_what_lay_in_the_gradients_is_forgotten_when_nothing_is_kept() -> None:
    spec = specification("deep")
    flat = flat_of(spec)
    start = torch.full((1, flat.parameter_count), float("nan"))
    _, gradients = by_hand(spec, flat, flat.vector.unsqueeze(0), start, 0.0)
    assert bool(gradients.isfinite().all())


def test_a_saturated_probability_has_the_gradient_of_autograd() -> None:
    spec = specification("xor")
    flat = flat_of(spec)
    flat.vector.mul_(1000)
    losses, gradients = by_hand(spec, flat, flat.vector.unsqueeze(0), torch.zeros(1, flat.parameter_count), 0.0)
    inputs, targets = batch_of(spec, 1)
    loss = spec.loss(flat.module(inputs[0]), targets[0])
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(losses, loss.detach().unsqueeze(0))
    torch.testing.assert_close(gradients[0], flat.gradient)


def test_a_smaller_batch_after_a_larger_one() -> None:
    spec = specification("deep")
    flat = flat_of(spec)
    kernel = kernel_for(spec, flat.module)
    assert kernel is not None
    inputs, targets = batch_of(spec, 1)
    found = []
    for rows in (BATCH, 2, BATCH, 2):
        gradients = torch.empty(1, flat.parameter_count)
        kernel.accumulate(flat.vector.unsqueeze(0), inputs[:, :rows], targets[:, :rows], gradients)
        found.append(gradients.numpy())
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])


@pytest.mark.parametrize("name", sorted(BUILTIN.keys() - set(DENSE)))
def test_convolutions_have_no_dense_kernel(name: str) -> None:
    spec = load_spec(name)
    assert kernel_for(spec, spec.build()) is None


def _hooked() -> nn.Module:
    module = Deep().build()
    next(module.children()).register_forward_hook(lambda *_: None)
    return module


def _frozen() -> nn.Module:
    module = Deep().build()
    next(iter(module.parameters())).requires_grad_(False)
    return module


def _shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


class _Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    "module",
    [_hooked(), _frozen(), _shared(), _Residual(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))],
    ids=["hooked", "frozen", "shared", "residual", "softmax"],
)
def test_what_is_not_plainly_dense_is_left_to_autograd(module: nn.Module) -> None:
    assert kernel_for(Deep(), module) is None


def test_a_loss_of_the_users_is_not_taken_for_the_inherited_one() -> None:
    assert hasattr(Deep().loss, "standard_loss")
    assert not hasattr(OwnLoss().loss, "standard_loss")
    assert isinstance(kernel_for(OwnLoss(), OwnLoss().build()), DenseKernel)
