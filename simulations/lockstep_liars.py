"""What a liar in a lockstep network sends in place of its model: in the form that was asked for, with an honest head.

| kind | what is sent |
|---|---|
| `nan` | values that are not finite: refused by who receives them, who then strikes the sender |
| `sign flip`, `x100` | -1 and 100 times the parameters |
| `stale` | the first model it ever had, with the age of a new one |
| `noise` | the parameters and normal noise of NOISE of their standard deviations |
"""

from __future__ import annotations

from typing import Final

import numpy as np

from gossipml.models.compression import pack, parse_form, unpack_into
from gossipml.models.encoding import MAX_MAGNITUDE
from gossipml.models.training import LocalTrainer

KINDS: Final = ("nan", "sign flip", "x100", "stale", "noise")
FACTORS: Final = {"sign flip": -1.0, "x100": 100.0, "noise": 1.0}
NOISE: Final = 3.0


class Liar:
    """A `Lie` of `Network`, for one peer: it remembers what it sent."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._first = b""

    def __call__(self, trainer: LocalTrainer, body: bytes, encoding: str) -> bytes:
        if self._kind == "nan":
            return b"\xff" * len(body)  # the scales, read as numbers, are none
        if self._kind == "stale":
            self._first = self._first or body
            return self._first
        form, model = parse_form(encoding), np.empty(trainer.layout.size, np.float32)
        unpack_into(form, body, model)
        model *= FACTORS[self._kind]
        if self._kind == "noise":
            model += self._rng.normal(scale=NOISE * float(model.std()), size=len(model)).astype(np.float32)
        return pack(form, model.clip(-MAX_MAGNITUDE, MAX_MAGNITUDE))  # beyond, nobody would read it
