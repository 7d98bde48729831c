"""The usual losses with their gradients by hand, for networks that are differentiated by hand.

A specification says that its `loss` is one of these with `spec.standard_loss`; any other one goes through
`by_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import torch

from gossipml.models.spec import Spec, StandardLoss

Find: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Of what was prepared of targets the losses (N,), means over the batch."""
Slope: TypeAlias = Callable[[torch.Tensor], object]
"""Of the same nothing; for the gradient alone."""


@dataclass(frozen=True)
class Loss:
    """`find` and `slope` are given the places of outputs (N, k, b) of N models, and of the gradient of the sum of their
    losses, once; what they return works on these at each step."""

    prepare: Callable[[torch.Tensor, int], torch.Tensor]
    """From targets (..., b), and the number k of outputs, what `Find` and `Slope` take for them (..., ...)."""
    find: Callable[[torch.Tensor, torch.Tensor], Find]
    slope: Callable[[torch.Tensor, torch.Tensor], Slope]
    sums: bool = False
    """Whether `slope` gives the gradient of the sum over the batch, which is `b` times that of the mean."""


def loss_of(spec: Spec) -> Loss:
    """The loss of the specification."""
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    match kind:
        case "cross-entropy":
            return Loss(ones_of, softmax_cross_entropy, softmax_minus_ones, sums=True)
        case "squared-error-of-classes":
            return Loss(ones_of, squared_error, squared_error)
        case "binary-cross-entropy":
            return Loss(_as_they_are, binary_cross_entropy, binary_cross_entropy)
    find = partial(by_autograd, spec)
    return Loss(_as_they_are, find, find)


def ones_of(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """(..., b) -> (..., k, b): 1 at the targets, else 0."""
    ones = torch.empty(*targets.shape[:-1], classes, targets.shape[-1], device=targets.device)
    # Comparing takes less time than scattering ones into zeros.
    return torch.eq(targets.unsqueeze(-2), _classes(classes, targets.device), out=ones)


def softmax_cross_entropy(outputs: torch.Tensor, gradient: torch.Tensor) -> Find:
    """`torch.nn.functional.cross_entropy`."""
    weight = 1 / outputs.shape[2]
    products = _Products(gradient, -weight)

    def find(ones: torch.Tensor) -> torch.Tensor:
        torch.log_softmax(outputs, 1, out=gradient)
        losses = products.with_(ones)
        gradient.exp_().sub_(ones).mul_(weight)
        return losses

    return find


def softmax_minus_ones(outputs: torch.Tensor, gradient: torch.Tensor) -> Slope:
    """The gradient of the sum of cross entropies."""

    def slope(ones: torch.Tensor) -> None:
        torch.softmax(outputs, 1, out=gradient)
        gradient.sub_(ones)

    return slope


def squared_error(outputs: torch.Tensor, gradient: torch.Tensor) -> Find:
    """`torch.nn.functional.mse_loss`; a mean over the outputs, too."""
    weight = 1 / (outputs.shape[1] * outputs.shape[2])
    products = _Products(gradient, weight)

    def find(ones: torch.Tensor) -> torch.Tensor:
        torch.sub(outputs, ones, out=gradient)
        losses = products.with_(gradient)
        gradient.mul_(2 * weight)
        return losses

    return find


def binary_cross_entropy(outputs: torch.Tensor, gradient: torch.Tensor) -> Find:
    """`torch.nn.functional.binary_cross_entropy` of the first output, a probability, from targets 0 and 1."""
    p = outputs[:, 0]

    def find(targets: torch.Tensor) -> torch.Tensor:
        t = targets.to(outputs.dtype)
        gradient.zero_()
        # The bounds are torch's: 1e-12 on the variance, -100 on the logarithms.
        torch.div(p - t, ((1 - p) * p).clamp_(min=1e-12).mul_(p.shape[1]), out=gradient[:, 0])
        return ((t - 1) * (-p).log1p_().clamp_(min=-100) - t * p.log().clamp_(min=-100)).mean(1)

    return find


def by_autograd(spec: Spec, outputs: torch.Tensor, gradient: torch.Tensor) -> Find:
    """Any function of one model's outputs and targets."""

    def find(targets: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = outputs.detach().transpose(1, 2).contiguous().requires_grad_()
            if len(leaf) == 1:
                losses = spec.loss(leaf[0], targets[0]).unsqueeze(0)
            else:
                losses = torch.func.vmap(spec.loss, randomness="different")(leaf, targets)
            (found,) = torch.autograd.grad(losses.sum(), leaf)
        gradient.copy_(found.transpose(1, 2))
        return losses.detach()

    return find


class _Products:
    """Of the elements of N matrices and of others, added up and weighted: as products of vectors they are faster."""

    def __init__(self, matrices: torch.Tensor, weight: float) -> None:
        self._rows = matrices.view(len(matrices), 1, -1)
        self._nothing = matrices.new_zeros(len(matrices), 1, 1)
        self._weight = weight

    def with_(self, others: torch.Tensor) -> torch.Tensor:
        columns = others.view(len(others), -1, 1)
        return torch.baddbmm(self._nothing, self._rows, columns, alpha=self._weight).view(-1)


def _as_they_are(targets: torch.Tensor, outputs: int) -> torch.Tensor:
    return targets


@lru_cache(maxsize=8)
def _classes(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device).unsqueeze(1)
