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

A whole model in int8 needs neither, in int4 the residual gains half a point (docs/merging-and-compression.md).

Both states are vectors as long as the model; where several receivers get one body, there is one state for all of
them, and a lost message is lost: the residual speaks of what was sent, not of what arrived.
"""

from __future__ import annotations

from collections.abc import Callable

from gossipml.models.arrays import A
from gossipml.models.compression import Form, pack, unpack_into
from gossipml.models.encoding import Vector


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
    residual += update
    body = pack(form, residual, exact=exact)
    sent = residual * 0
    unpack_into(form, body, sent, exact=exact)
    residual -= sent
    return body


def pack_changes(form: Form, model: Vector, reference: Vector, *, exact: int = 0) -> bytes:
    """The body of a model of which the parameters that moved most since they were last sent are sent.

    `reference` is changed in place; start with the parameters that every peer starts from, or with zeros. The receiver
    unpacks it over its own model.
    """
    body = pack(form, model, exact=exact, importance=model - reference)
    unpack_into(form, body, reference, exact=exact)
    return body
