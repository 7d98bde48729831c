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

Slope: TypeAlias = Callable[[torch.Tensor], object]
"""From what was prepared of targets the gradient, where it belongs."""
Losses: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Of the same the losses (N,), means over the batch; after the slope, with its gradient still there. They can wait for
whatever somebody else waits for."""
Find: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[Slope, Losses]]


@dataclass(frozen=True)
class Loss:
    """`find` and `slope` are given the places of outputs (N, k, b) of N models, and of the gradient of the sum of their
    losses, once; what they return works on these at each step. The gradient is still to be multiplied by `weight`."""

    prepare: Callable[[torch.Tensor, int], torch.Tensor]
    """From targets (..., b), and the number k of outputs, what `Slope` and `Losses` take for them (..., ...)."""
    find: Find
    slope: Callable[[torch.Tensor, torch.Tensor], Slope]
    """For the gradient alone."""
    weight: Callable[[int, int], float] = lambda outputs, batch: 1.0
    """By k and b; for the products on the way back, where a factor costs nothing."""


def loss_of(spec: Spec) -> Loss:
    """The loss of the specification."""
    find: Find
    kind: StandardLoss | None = getattr(spec.loss, "standard_loss", None)
    match kind:
        case "cross-entropy":
            return Loss(ones_of, softmax_cross_entropy, softmax_minus_ones, lambda outputs, batch: 1 / batch)
        case "squared-error-of-classes":
            return Loss(ones_of, squared_error, error, lambda outputs, batch: 2 / (outputs * batch))
        case "binary-cross-entropy":
            find = binary_cross_entropy
        case None:
            find = partial(by_autograd, spec)
    return Loss(_as_they_are, find, lambda outputs, gradient: find(outputs, gradient)[0])


def ones_of(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """(..., b) -> (..., k, b): 1 at the targets, else 0."""
    ones = torch.empty(*targets.shape[:-1], classes, targets.shape[-1], device=targets.device)
    # Comparing takes less time than scattering ones into zeros.
    return torch.eq(targets.unsqueeze(-2), _classes(classes, targets.device), out=ones)


def softmax_cross_entropy(outputs: torch.Tensor, gradient: torch.Tensor) -> tuple[Slope, Losses]:
    """`torch.nn.functional.cross_entropy`."""
    logarithms = torch.empty_like(outputs)
    products = _Products(logarithms, -1 / outputs.shape[2])

    def slope(ones: torch.Tensor) -> None:
        torch.log_softmax(outputs, 1, out=logarithms)
        torch.exp(logarithms, out=gradient).sub_(ones)

    return slope, products.with_


def softmax_minus_ones(outputs: torch.Tensor, gradient: torch.Tensor) -> Slope:
    """The slope of the same."""

    def slope(ones: torch.Tensor) -> None:
        torch.softmax(outputs, 1, out=gradient)
        gradient.sub_(ones)

    return slope


def squared_error(outputs: torch.Tensor, gradient: torch.Tensor) -> tuple[Slope, Losses]:
    """`torch.nn.functional.mse_loss`; a mean over the outputs, too."""
    products = _Products(gradient, 1 / (outputs.shape[1] * outputs.shape[2]))
    return error(outputs, gradient), lambda ones: products.with_(gradient)


def error(outputs: torch.Tensor, gradient: torch.Tensor) -> Slope:
    """The slope of the same."""
    return partial(torch.sub, outputs, out=gradient)


def binary_cross_entropy(outputs: torch.Tensor, gradient: torch.Tensor) -> tuple[Slope, Losses]:
    """`torch.nn.functional.binary_cross_entropy` of the first output, a probability, from targets 0 and 1."""
    p = outputs[:, 0]

    def slope(targets: torch.Tensor) -> None:
        gradient.zero_()
        # The bounds are torch's: 1e-12 on the variance, -100 on the logarithms.
        variance = ((1 - p) * p).clamp_(min=1e-12)
        torch.div(p - targets.to(p.dtype), variance.mul_(p.shape[1]), out=gradient[:, 0])

    def losses(targets: torch.Tensor) -> torch.Tensor:
        t = targets.to(p.dtype)
        return ((t - 1) * (-p).log1p_().clamp_(min=-100) - t * p.log().clamp_(min=-100)).mean(1)

    return slope, losses


def by_autograd(spec: Spec, outputs: torch.Tensor, gradient: torch.Tensor) -> tuple[Slope, Losses]:
    """Any function of one model's outputs and targets."""
    found = torch.empty(len(outputs))

    def slope(targets: torch.Tensor) -> None:
        nonlocal found
        with torch.inference_mode(False), torch.enable_grad():
            # Clones: autograd takes nothing that was made in inference mode.
            leaf = outputs.transpose(1, 2).clone(memory_format=torch.contiguous_format).requires_grad_()
            if len(leaf) == 1:
                losses = spec.loss(leaf[0], targets[0].clone()).unsqueeze(0)
            else:
                losses = torch.func.vmap(spec.loss, randomness="different")(leaf, targets.clone())
            (back,) = torch.autograd.grad(losses.sum(), leaf)
        gradient.copy_(back.transpose(1, 2))
        found = losses.detach()

    return slope, lambda targets: found


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
