"""The usual losses with their gradients by hand, for networks that are differentiated by hand.

A specification says that its `loss` is one of these with `spec.standard_loss`; any other one goes through
`by_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch

from gossipml.models.spec import Spec, StandardLoss

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of outputs (N, b, k) and targets (N, b) of N models the losses (N,), means over the batch; and in the third, like
the outputs, the gradient of their sum."""
Slope: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""The same for who wants the gradient alone."""


def loss_of(spec: Spec) -> Loss:
    """The loss of the specification."""
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    return by_autograd(spec) if kind is None else _STANDARD[kind]


def slope_of(spec: Spec) -> Slope:
    """Of the loss of the specification."""
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    return softmax_minus_targets if kind == "cross-entropy" else loss_of(spec)


def softmax_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` from class numbers."""
    weight = 1 / outputs.shape[1]
    torch.log_softmax(outputs, 2, out=gradient)
    chosen = _one_hot(targets, outputs, -weight)
    losses = (gradient * chosen).sum((1, 2))
    torch.add(chosen, gradient.exp_(), alpha=weight, out=gradient)
    return losses


def softmax_minus_targets(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> None:
    """The gradient of `softmax_cross_entropy`, in half of its time."""
    weight = 1 / outputs.shape[1]
    torch.softmax(outputs, 2, out=gradient)
    torch.add(_one_hot(targets, outputs, -weight), gradient, alpha=weight, out=gradient)


def squared_error_of_classes(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`mse_loss` from one-hot class numbers; a mean over the outputs, too."""
    torch.add(outputs, _one_hot(targets, outputs, -1.0), out=gradient)
    losses = gradient.square().mean((1, 2))
    gradient.mul_(2 / (outputs.shape[1] * outputs.shape[2]))
    return losses


def binary_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.binary_cross_entropy` of the first output, a probability, from targets 0 and 1."""
    p, t = outputs[:, :, 0], targets.to(outputs.dtype)
    gradient.zero_()
    # The bounds are torch's: 1e-12 on the variance, -100 on the logarithms.
    torch.div(p - t, ((1 - p) * p).clamp_(min=1e-12).mul_(p.shape[1]), out=gradient[:, :, 0])
    return ((t - 1) * (-p).log1p_().clamp_(min=-100) - t * p.log().clamp_(min=-100)).mean(1)


def by_autograd(spec: Spec) -> Loss:
    """Any function of one model's outputs and targets."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            if len(leaf) == 1:
                losses = spec.loss(leaf[0], targets[0]).unsqueeze(0)
            else:
                losses = torch.func.vmap(spec.loss, randomness="different")(leaf, targets)
            (found,) = torch.autograd.grad(losses.sum(), leaf)
        gradient.copy_(found)
        return losses.detach()

    return loss


def _one_hot(targets: torch.Tensor, outputs: torch.Tensor, value: float) -> torch.Tensor:
    """Like the outputs: `value` at the targets, else 0. Rows of a matrix: a scatter takes five times as long."""
    return _diagonal(outputs.shape[2], value, outputs.device).index_select(0, targets.reshape(-1)).view_as(outputs)


@lru_cache(maxsize=8)
def _diagonal(classes: int, value: float, device: torch.device) -> torch.Tensor:
    return torch.eye(classes, device=device).mul_(value)


_STANDARD: dict[StandardLoss, Loss] = {
    "cross-entropy": softmax_cross_entropy,
    "squared-error-of-classes": squared_error_of_classes,
    "binary-cross-entropy": binary_cross_entropy,
}
