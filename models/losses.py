"""The usual losses with their gradients by hand, for networks that are differentiated by hand.

A specification says that its `loss` is one of these with `spec.standard_loss`; any other one goes through
`by_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from gossipml.models.spec import Spec, StandardLoss

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of outputs (N, k, b) and targets (N, b) of N models the losses (N,), means over the batch; and in the third, like
the outputs, the gradient of their sum."""


@dataclass(frozen=True)
class Slope:
    """The gradient alone, for who takes many steps at once."""

    prepare: Callable[[torch.Tensor, int], torch.Tensor]
    """From targets (..., N, b), and the number k of outputs, what `find` takes for the targets (..., N, ...)."""
    find: Loss | Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
    """Like a `Loss`, whatever it returns."""
    sums: bool
    """Whether it gives the gradient of the sum over the batch, which is `b` times that of the mean."""


def loss_of(spec: Spec) -> Loss:
    """The loss of the specification."""
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    return by_autograd(spec) if kind is None else _STANDARD[kind]


def slope_of(spec: Spec) -> Slope:
    """Of the loss of the specification."""
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    if kind == "cross-entropy":
        return Slope(_ones_of, softmax_minus_targets, sums=True)
    return Slope(lambda targets, _: targets, loss_of(spec), sums=False)


def softmax_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` from class numbers."""
    weight = 1 / outputs.shape[2]
    torch.log_softmax(outputs, 1, out=gradient)
    chosen = _one_hot(targets, outputs)
    # A product of two vectors is faster than their elements' products and a sum.
    losses = torch.bmm(gradient.flatten(1).unsqueeze(1), chosen.flatten(1).unsqueeze(2)).view(-1).mul_(-weight)
    gradient.exp_().sub_(chosen).mul_(weight)
    return losses


def softmax_minus_targets(outputs: torch.Tensor, ones: torch.Tensor, gradient: torch.Tensor) -> None:
    """The gradient of the sum of cross entropies; `ones` (N, k, b): 1 at the targets, else 0."""
    torch.softmax(outputs, 1, out=gradient)
    gradient.sub_(ones)


def squared_error_of_classes(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`mse_loss` from one-hot class numbers; a mean over the outputs, too."""
    torch.sub(outputs, _one_hot(targets, outputs), out=gradient)
    losses = gradient.square().mean((1, 2))
    gradient.mul_(2 / (outputs.shape[1] * outputs.shape[2]))
    return losses


def binary_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.binary_cross_entropy` of the first output, a probability, from targets 0 and 1."""
    p, t = outputs[:, 0], targets.to(outputs.dtype)
    gradient.zero_()
    # The bounds are torch's: 1e-12 on the variance, -100 on the logarithms.
    torch.div(p - t, ((1 - p) * p).clamp_(min=1e-12).mul_(p.shape[1]), out=gradient[:, 0])
    return ((t - 1) * (-p).log1p_().clamp_(min=-100) - t * p.log().clamp_(min=-100)).mean(1)


def by_autograd(spec: Spec) -> Loss:
    """Any function of one model's outputs and targets."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = outputs.detach().transpose(1, 2).contiguous().requires_grad_()
            if len(leaf) == 1:
                losses = spec.loss(leaf[0], targets[0]).unsqueeze(0)
            else:
                losses = torch.func.vmap(spec.loss, randomness="different")(leaf, targets)
            (found,) = torch.autograd.grad(losses.sum(), leaf)
        gradient.copy_(found.transpose(1, 2))
        return losses.detach()

    return loss


def _one_hot(targets: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Like the outputs: 1 at the targets, else 0. A scatter into them takes longer."""
    return torch.eq(targets.unsqueeze(1), _classes(outputs.shape[1], outputs.device), out=torch.empty_like(outputs))


def _ones_of(targets: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.eq(targets.unsqueeze(-2), _classes(classes, targets.device)).to(torch.float32)


@lru_cache(maxsize=8)
def _classes(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device).unsqueeze(1)


_STANDARD: dict[StandardLoss, Loss] = {
    "cross-entropy": softmax_cross_entropy,
    "squared-error-of-classes": squared_error_of_classes,
    "binary-cross-entropy": binary_cross_entropy,
}
