"""Loss and gradient of N models of one specification at once: a peer trains with N = 1, the simulator with N peers.

The vectors are those of `models.flat`: the parameters, then the buffers, as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gossipml.models.spec import Spec

if TYPE_CHECKING:
    import torch

    from gossipml.models.flat import FlatModule


class Kernel(Protocol):
    """One way to compute it. Not thread-safe: a kernel keeps scratch buffers between calls."""

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        """gradients <- keep * gradients + d loss / d parameters; the losses (N,), mean over the batch, detached.

        `vectors` (N, size), of which training changes the buffers in place; `inputs` (N, batch, ...), `targets`
        (N, batch), `gradients` (N, parameter_count). `keep` is the momentum of SGD: the gradients are then the
        velocity (see `models.optimise`).
        """
        ...


class ModuleKernel:
    """Any module, by autograd; for N = 1, and the vector and gradient of `flat` only."""

    def __init__(self, spec: Spec, flat: FlatModule) -> None:
        self._spec = spec
        self._module = flat.module

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        """See `Kernel`; autograd adds to what it finds in the gradient."""
        loss = self._spec.loss(self._module(inputs[0]), targets[0])
        if keep:
            gradients.mul_(keep)
        else:
            gradients.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach().unsqueeze(0)


def kernel_for(spec: Spec, module: torch.nn.Module) -> Kernel | None:
    """What computes the module that `spec.build` gave, in training and at every N; None where no kernel is known to
    give what autograd gives."""
    from gossipml.models.kernels_dense import dense_kernel

    return dense_kernel(spec, module)
