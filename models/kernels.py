"""Loss and gradient of N models of one specification at once: a peer trains with N = 1, the simulator with N peers.

The vectors are those of `models.flat`: the parameters, then the buffers, as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


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
