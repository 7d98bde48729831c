"""`auto`: for each link the finest form that it carries in the time that a send may take.

A peer that trains for T seconds a round and pushes to s receivers one after the other can spend T / s on each; then
training takes about as long as sending. A fast link gets int8 (finer forms gain nothing: see
docs/choosing.md), a slower one int4, then the parameters that moved most.

A link goes down the ladder at once, and up only when the finer form would take half of the time, so that a bandwidth
that wavers around a limit does not change the form with every send. A peer that reads slowly on purpose makes us
send less to itself, and to nobody else.
"""

from __future__ import annotations

from typing import Final

from gossipml.models.compression import Form, packed_size

LADDER: Final = (
    Form("int8"),
    Form("int4"),
    *(Form("int8", percent) for percent in (25, 10, 5, 1)),
)
"""From fine to coarse: 1.02, 0.53, 0.36, 0.17, 0.09, 0.02 bytes a parameter. int4 with residual, top-k with reference
(`feedback`). Measured with 16 peers, digits and MNIST, dirichlet:0.1; at equal bytes top-k beats fragments."""

RESERVE: Final = 0.5  # of the time, before a finer form is tried


def choose(bandwidth: float | None, seconds: float, n: int, *, exact: int = 0, now: Form | None = None) -> Form:
    """The form for the next send of n values over a link, in at most `seconds` if any does it.

    bandwidth: bytes a second, None when not known: then what it is now, or the finest. now: the form of the last send.
    """
    current = LADDER.index(now) if now in LADDER else 0
    if bandwidth is None:
        return LADDER[current]
    for rung, form in enumerate(LADDER):
        allowed = seconds * RESERVE if now is not None and rung < current else seconds
        if packed_size(form, n, exact) <= bandwidth * allowed:
            return form
    return LADDER[-1]
