"""Any module for many models at once: the gradient that autograd gives to each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossipml.errors import UserError
from gossipml.models.flat import build_flat
from gossipml.models.kernels import ModuleKernel
from gossipml.models.kernels_functional import FunctionalKernel
from gossipml.models.spec import Classifier

CPU = torch.device("cpu")


class Own(Classifier):
    """A model of a user's: convolution-free, with batch norm, a frozen layer and a parameter of its own."""

    name = "own"
    input_shape: tuple[int, ...] = (6,)
    labels = ("a", "b", "c")

    def build(self) -> nn.Module:
        module = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)
        )
        for parameter in module[3].parameters():
            parameter.requires_grad_(False)
        return module


class Picture(Own):
    name = "picture"
    input_shape = (2, 4, 4)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.0)
        )


class Choosy(Own):
    name = "choosy"

    def build(self) -> nn.Module:
        class Looks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.layer(x)
                return y if float(y.sum()) > 0 else -y

        return Looks()


@pytest.mark.parametrize("spec", [Own(), Picture()])
@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_gradients_losses_and_running_statistics_are_those_of_each_model_alone(spec: Own, keep: float) -> None:
    generator = torch.Generator().manual_seed(1)
    flat, _ = build_flat(spec, b"", CPU)
    many = FunctionalKernel(spec, build_flat(spec, b"", CPU)[0].module)
    alone = ModuleKernel(spec, flat)
    vectors = flat.vector + 0.1 * torch.rand(4, flat.size, generator=generator)
    inputs = torch.randn(4, 7, *spec.input_shape, generator=generator)
    targets = torch.randint(0, 3, (4, 7), generator=generator)
    gradients = torch.randn(4, flat.parameter_count, generator=generator)
    expected, after = gradients.clone(), vectors.clone()
    losses = many.accumulate(after, inputs, targets, gradients, keep)
    trained = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in flat.module.parameters()])
    for number in range(4):
        flat.vector.copy_(vectors[number])
        flat.gradient.copy_(expected[number])
        one = slice(number, number + 1)
        loss = alone.accumulate(flat.vector[None], inputs[one], targets[one], flat.gradient, keep)
        assert torch.allclose(losses[one], loss, atol=1e-6)
        assert torch.allclose(gradients[number][trained], flat.gradient[trained], atol=1e-5)
        assert torch.allclose(after[number], flat.vector, atol=1e-6)
    assert not gradients[:, ~trained].any(), "frozen parameters have no gradient"
    assert not torch.equal(after, vectors), "running means have moved"


def test_a_module_that_cannot_be_transformed_is_refused_with_its_name() -> None:
    spec = Choosy()
    flat, _ = build_flat(spec, b"", CPU)
    kernel = FunctionalKernel(spec, flat.module)
    with pytest.raises(UserError, match="'choosy' cannot be trained for many peers at once"):
        kernel.accumulate(
            flat.vector[None], torch.ones(1, 2, 6), torch.zeros(1, 2, dtype=torch.int64), flat.gradient[None]
        )
