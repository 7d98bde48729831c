"""What lying peers send in place of their model: only values, since a lie in a header is caught by the header checks.

| kind | what is sent |
|---|---|
| `nan` | values that are not finite: refused by who receives them, who then strikes the sender |
| `sign-flip` | -x |
| `scale` | FACTOR x (100) |
| `noise` | normal noise of the norm of x |
| `zero` | zeros |
| `stale` | the first model it ever had, with the age of an honest one |
| `inliers` | the mean of the honest models plus FACTOR of their standard deviations (1.5; Baruch et al. 2019) |
| `label-flip` | an honest model, trained on labels C - 1 - y |
| `silent` | nothing |

Blanchard et al. 2017; Karimireddy, He, Jaggi 2021. Liars train and merge as everybody else does, so that their lies
are about a model that they have.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch

from gossipml.models.merging import norm

FACTORS: Final = {"scale": 100.0, "inliers": 1.5}


class Liars:
    """What the liars among the peers say; see `PopulationEngine`. `x` (N, P) are all models, as they are now."""

    def __init__(self, kind: str, liars: Collection[int], x: torch.Tensor, *, factor: float = 0.0, seed: int) -> None:
        self._kind, self._liars, self._x = kind, frozenset(liars), x
        self._factor = factor or FACTORS.get(kind, 0.0)
        self._first = x[min(liars)].clone()
        self._honest = torch.tensor([peer for peer in range(len(x)) if peer not in self._liars], device=x.device)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, peer: int, own: torch.Tensor) -> torch.Tensor | None:
        """What goes out for the model `own` (P,) of a peer; None: the truth; empty: nothing."""
        if peer not in self._liars:
            return None
        match self._kind:
            case "nan":
                return torch.full_like(own, float("nan"))
            case "sign-flip":
                return -own
            case "scale":
                return self._factor * own
            case "noise":
                noise = torch.randn(own.shape, generator=self._generator)  # on the CPU: the same on each device
                return (noise * (float(norm(own)) / float(norm(noise)))).to(own.device)
            case "zero":
                return torch.zeros_like(own)
            case "stale":
                return self._first
            case "inliers":
                honest = self._x[self._honest]
                return honest.mean(0) + self._factor * honest.std(0, correction=0)
            case "silent":
                return own.new_empty(0)
        return None  # label-flip lies while it trains
