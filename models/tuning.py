"""How one peer trains and merges, whatever the model's own settings say: optimiser, its numbers, batch, outer step.

None of it is part of the specification's digest: peers that train one model may differ in all of it. No torch is
imported here; `optimise` makes the optimiser.

**The outer step** (`--outer nesterov:LR:MOMENTUM`) is Nesterov momentum over whole rounds: at the beginning of a round,
with y the parameters at the beginning of the round before and x those of now, after local steps and the merges between,

    d = y - x,  v <- MOMENTUM v + d,  x <- y - LR (d + MOMENTUM v)

(DiLoCo: Douillard et al. 2023, where all workers average exactly between two rounds; with gossip in place of that:
SlowMo, Wang, Tantia, Ballas, Rabbat 2020). Here the average is what gossip brought meanwhile, each peer has a v of its
own, and nothing waits. LR 1 and MOMENTUM 0 is no outer step. Buffers are left alone.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Final

from gossipml.errors import UserError
from gossipml.models.merge_rules import MergeRule

OPTIMISERS: Final = {
    name.lower(): name
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
}
"""Those of `torch.optim` that take dense gradients of any shape and one step at a time."""
_OUTER: Final = re.compile(r"nesterov(?::([0-9.]{1,8}))?(?::([0-9.]{1,8}))?", re.ASCII)


@dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    momentum: float = 0.5
    """DiLoCo's are 0.7 and 0.9, with hundreds of steps a round; rounds here have some ten (see docs/choosing.md)."""


@dataclass(frozen=True)
class LocalSteps:
    """Optimiser steps of every round: as many for each peer, or a share of one pass over its data."""

    steps: int = 0
    epochs: float = 0.0
    """Where `steps` is 0: each sample counts the same in the network, not each peer (see docs/choosing.md)."""

    def of(self, epoch: int) -> int:
        """Steps of a peer that takes `epoch` of them to see its data once."""
        return self.steps or max(1, round(self.epochs * epoch))


@dataclass(frozen=True)
class Tuning:
    merge: MergeRule = field(default_factory=lambda: MergeRule("clipping"))
    optimiser: str = ""
    """A key of OPTIMISERS; empty: the model's own."""
    learning_rate: float | None = None
    """This and the following: None for the model's own, or the optimiser's default."""
    momentum: float | None = None
    weight_decay: float | None = None
    batch: int | None = None
    outer: Outer | None = None

    def __post_init__(self) -> None:
        if self.optimiser and self.optimiser not in OPTIMISERS:
            near = difflib.get_close_matches(self.optimiser, OPTIMISERS, n=1, cutoff=0.5)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise UserError(f"there is no optimiser {self.optimiser[:40]!r};{hint} choose {', '.join(OPTIMISERS)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning rate {self.learning_rate:g} is not above 0; for example 0.05")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(f"momentum {self.momentum:g} is not from 0 to less than 1; for example 0.9")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight decay {self.weight_decay:g} is not at least 0; for example 0.0001")
        if self.batch is not None and not 1 <= self.batch <= 1 << 20:
            raise UserError(f"batch {self.batch} is not from 1 to {1 << 20} samples; for example 32")


def parse_outer(text: str) -> Outer | None:
    """`nesterov[:RATE[:MOMENTUM]]`, or nothing. UserError for anything else."""
    if not text:
        return None
    match = _OUTER.fullmatch(text)
    try:
        numbers = [float(number) for number in match.groups() if number] if match else [-1.0]
    except ValueError:
        numbers = [-1.0]
    outer = Outer(*numbers)
    if not (0 < outer.rate <= 10 and 0 <= outer.momentum < 1):
        raise UserError(
            f"there is no outer step {text[:40]!r}; choose nesterov, or with rate (up to 10) and momentum (below 1): "
            "nesterov:0.7:0.9"
        )
    return outer


def parse_local_steps(text: str) -> LocalSteps | None:
    """Of a round; None for `auto`. UserError for what is none of these."""
    if text == "auto":
        return None
    if re.fullmatch(r"[1-9][0-9]{0,6}", text, re.ASCII):
        return LocalSteps(int(text))
    if re.fullmatch(r"[0-9]{1,5}(?:\.[0-9]{1,3})?%", text, re.ASCII) and float(text[:-1]) > 0:
        return LocalSteps(epochs=float(text[:-1]) / 100)
    raise UserError(
        f"local steps {text[:40]!r} is neither auto nor a whole number from 1, for example 20, nor a share of an "
        "epoch, for example 30%"
    )
