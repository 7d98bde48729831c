"""Error feedback: what compression left out is not lost but sent later.

Two forms, for the two things that peers send:

**Updates** (gradients, changes, what push-sum moves): `with_feedback`. What was not sent stays in a residual and is
added to the next update, so that at any time the sum of what was sent plus the residual is the sum of the updates
(Seide et al. 2014; Stich, Cordonnier, Jaggi 2018; Karimireddy et al. 2019). It needs a compression that contracts,
|x - C(x)|^2 <= (1 - d) |x|^2, or the residual grows: top-k has d = k / P, rounding to int8 or int4 has d near 1.

**Models** in part (top-k): `pack_changes`. The sender keeps, as reference, the value that it last sent of each
parameter, and sends those that have moved furthest from it; what has not been sent, and what rounding lost, remains
as a difference (Koloskova, Stich, Jaggi 2019, CHOCO-SGD; Richtarik, Sokolov, Fatkhullin 2021, EF21; sending the
values themselves to receivers that keep nothing: Dhasade et al. 2023, JWINS).

A whole model in int8 needs neither, in int4 the residual gains half a point (docs/choosing.md).

Both states are vectors as long as the model. Receivers are drawn anew each time and one body goes to several of them,
so that there is one state for all (`Outgoing`), not one for each link; a lost message is lost: the state speaks of what
was sent, not of what arrived, and what a receiver missed comes to it from others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gossipml.models.arrays import A
from gossipml.models.compression import Form, pack, pack_into, unpack_into
from gossipml.models.encoding import Vector

MOST_STATES = 5  # forms with a state on the ladder of `auto`


def with_feedback(update: A, residual: A, compress: Callable[[A], A]) -> tuple[A, A]:
    """What is sent instead of `update` (..., P), and the residual after it: compress(update + residual) and the rest.

    `compress` gives what a receiver will decode. Start with a residual of zeros.
    """
    total = update + residual
    sent = compress(total)
    return sent, total - sent


def pack_update(form: Form, update: Vector, residual: Vector, *, exact: int = 0) -> bytes:
    """The body of an update with feedback; `residual` is changed in place. The receiver unpacks it over zeros.

    The same for a whole model in a form that leaves no parameter out: what rounding took then comes back.
    """
    total = residual + update
    body = pack(form, total, exact=exact)  # raises before anything is changed
    sent = np.zeros_like(total)
    unpack_into(form, body, sent, exact=exact)
    np.subtract(total, sent, out=residual)
    return body


def pack_changes(form: Form, model: Vector, reference: Vector, *, exact: int = 0) -> bytes:
    """The body of a model of which the parameters that moved most since they were last sent are sent.

    `reference` is changed in place; start with the parameters that every peer starts from, or with zeros. The receiver
    unpacks it over its own model.
    """
    body = pack(form, model, exact=exact, importance=model - reference)
    unpack_into(form, body, reference, exact=exact)
    return body


class Outgoing:
    """The bodies of one model, push after push, with the state that their forms need.

    Memory: one vector as long as the model for each of the last MOST_STATES forms that have a state.
    """

    def __init__(self, start: Vector, *, exact: int = 0) -> None:
        """`start` (n,): parameters that the receivers know already; of these `exact` buffers at the end."""
        self._exact = exact
        self.begin(start)

    def begin(self, start: Vector) -> None:
        """Our model is another one now, which the receivers know: what was left out of the former one is void."""
        self._start = start.copy()
        self._states: dict[Form, Vector] = {}

    def pack_into(self, form: Form, values: Vector, out: memoryview) -> int:
        """Writes the body of `values` (n,) to the beginning of `out`; how many bytes. LocalError as `pack_into`."""
        changes = form.percent < 100
        if not changes and not (form.values == "int4" and form.share == 1.0):
            return pack_into(form, values, out, exact=self._exact)
        state = self._states.pop(form, None)
        if state is None:
            state = self._start.copy() if changes else np.zeros_like(values)
        self._states[form] = state  # the latest last
        while len(self._states) > MOST_STATES:
            del self._states[next(iter(self._states))]
        body = (pack_changes if changes else pack_update)(form, values, state, exact=self._exact)
        out[: len(body)] = body
        return len(body)
