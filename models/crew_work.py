"""One step of a network by a crew: who does what, and how it lies in the memory that they share.

The caller has the samples, the loss, and the layers that no pair holds (see `kernels_cut`); a pair is one layer of its
`DenseKernel`. Helpers only do what they are told, one thing after the other: take their parts of the parameters, give
their summand of a pair's output, learn from the gradient of that output, put their parts back. The caller does not wait
for the end of a step. It fetches the next batch, and tells helpers to begin with it, before its own share of the way
back: what it alone has to do costs time only where helpers wait for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import partial

import torch

from gossipml.models.crew import Crew, Link, as_floats
from gossipml.models.kernels_cut import LINE, Pair, Share, find_pairs
from gossipml.models.kernels_layers import Flow, Layer, Linear, Op, still
from gossipml.models.optimise import moves
from gossipml.models.spec import Sgd
from gossipml.models.worker_wire import SharedView


@dataclass(frozen=True)
class Plan:
    """What all workers must know."""

    pairs: tuple[Pair, ...]
    workers: int
    batch: int
    """At most so many samples a step."""
    size: int
    """Of the vector of all parameters."""
    sgd: Sgd | None
    """How workers move their parameters after each step; None: they leave the gradient where the velocity would be."""

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def share(self, pair: Pair, worker: int) -> Share:
        """Worker 0 is the caller."""
        return Share(pair, pair.shares(self.workers)[worker], bias=worker == 0)


def _unpack(data: bytes) -> Plan:
    fields = json.loads(data)
    pairs = tuple(
        Pair(**{**pair, "biases": tuple(pair["biases"]), "activations": tuple(pair["activations"])})
        for pair in fields.pop("pairs")
    )
    sgd = fields.pop("sgd")
    return Plan(pairs=pairs, sgd=None if sgd is None else Sgd(**sgd), **fields)


FLOWS_KEPT = 16  # of a pair: two for each size of a batch


@dataclass(frozen=True)
class Exchange:
    """Of one pair, in shared memory: rooms for matrices with a column for each sample, as `kernels_layers` has them."""

    pair: Pair
    inputs: tuple[torch.Tensor, ...]
    """Two of them, in turn: a helper may still need the one before, when it has not finished the last step."""
    outputs: tuple[torch.Tensor, ...]
    """The summands of the helpers."""
    output_gradient: torch.Tensor
    input_gradients: tuple[torch.Tensor, ...]
    """The summands of the helpers; nothing is there for the first pair."""
    flows: dict[tuple[int, int], Flow] = field(default_factory=dict)
    """Of `input`, by what it was asked: views that have been made once."""

    def input(self, turn: int, batch: int) -> Flow:
        """(inputs, batch); those of the first pair are samples, which lie one after the other."""
        flow = self.flows.get((turn, batch))
        if flow is None:
            if len(self.flows) >= FLOWS_KEPT:
                self.flows.clear()
            room = self.inputs[turn][: batch * self.pair.inputs]
            flow = self.flows[turn, batch] = still(
                room.view(batch, -1).t() if self.pair.first else room.view(-1, batch)
            )
        return flow


class Shared:
    """How the shared memory is used."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        helpers = plan.workers - 1
        self._widths = [
            width
            for pair in plan.pairs
            for width in (*[pair.inputs] * 2, *[pair.outputs] * (helpers + 1), *[pair.inputs] * helpers)
        ]
        self.size = _whole_lines(plan.size) + sum(_whole_lines(plan.batch * width) for width in self._widths)

    def cut(self, memory: torch.Tensor) -> tuple[torch.Tensor, list[Exchange]]:
        """Of memory (size,): room for the vector, and for each pair."""
        helpers = self._plan.workers - 1
        rooms = self._rooms(memory)

        def take(count: int) -> tuple[torch.Tensor, ...]:
            return tuple(next(rooms) for _ in range(count))

        exchanges = [Exchange(pair, take(2), take(helpers), next(rooms), take(helpers)) for pair in self._plan.pairs]
        return memory[: self._plan.size], exchanges

    def _rooms(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        start = _whole_lines(self._plan.size)
        for width in self._widths:
            count = self._plan.batch * width
            yield memory[start : start + count]
            start += _whole_lines(count)


def _whole_lines(count: int) -> int:
    return -(-count // LINE) * LINE


def _like(room: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The beginning of a room, in the shape of the matrix."""
    return room[: matrix.numel()].view(matrix.shape)


_MESSAGE = struct.Struct("<BBBI")  # what to do; pair, or 1 for velocities; which of two inputs; samples, or bytes
_DONE = b"."
TAPES_KEPT = 64  # of a helper: two for each pair and size of a batch


class _Do(IntEnum):
    BEGIN = 0
    FORWARD = 1
    BACKWARD = 2
    LOAD = 3
    STORE = 4


def _nothing() -> None:
    pass


class CutPair:
    """A pair as a layer (see `kernels_dense.Weighing`) of the caller, who has a share of it, too."""

    def __init__(self, pair: Pair, number: int, share: Share, crew: Crew, exchange: Exchange) -> None:
        self.first = pair.first
        self._number = number
        self._share = share
        self._crew = crew
        self._exchange = exchange
        self._turn = 0
        self._begun = False
        self._meanwhile = _nothing

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Its parameters lie with the workers; see `CutNetwork.load`."""

    @contextmanager
    def doing(self, meanwhile: Callable[[], None]) -> Iterator[None]:
        """What the caller does before its own share of the way back, while the helpers are on it. It must not raise."""
        self._meanwhile = meanwhile
        try:
            yield
        finally:
            self._meanwhile = _nothing  # nothing in a circle: a crew must end when it is forgotten

    def room(self, batch: int) -> Flow:
        """Where helpers look for the next input, (inputs, batch)."""
        return self._exchange.input(1 - self._turn, batch)

    def begin(self, batch: int) -> None:
        """The helpers' part of `forward` on what is in the room; they come to it when they have done what they were
        told before."""
        self._begun = True
        self._turn = 1 - self._turn
        self._crew.tell(_MESSAGE.pack(_Do.FORWARD, self._number, self._turn, batch))

    def forget(self) -> None:
        """What has been begun: the parameters will be others, or the samples."""
        if self._begun:
            self._crew.wait()
            self._begun = False
            self._turn = 1 - self._turn  # what is there may still be wanted

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        def begin() -> None:
            if not self._begun:
                there = self.room(x.now.shape[1]).now
                if x.now.data_ptr() != there.data_ptr():
                    there.copy_(x.now)
                self.begin(x.now.shape[1])

        def end() -> None:
            self._crew.wait()
            self._begun = False

        ops.append(begin)
        y = self._share.forward(x, ops)
        ops.append(end)
        ops += [partial(y.now.add_, _like(summand, y.now)) for summand in self._exchange.outputs]
        return y

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        message = _MESSAGE.pack(_Do.BACKWARD, self._number, 0, d.now.shape[1])
        given = still(_like(self._exchange.output_gradient, d.now))
        if d.now.data_ptr() != given.now.data_ptr():
            ops.append(partial(torch.mul, d.now, d.factor, out=given.now))
        ops += [partial(self._crew.tell, message), self._do_meanwhile]
        out = self._share.backward(given, ops)
        if not self.first:
            ops.append(self._crew.wait)
            ops += [partial(out.now.add_, _like(summand, out.now)) for summand in self._exchange.input_gradients]
        return out

    def weigh(self, keep: float, ops: list[Op]) -> None:
        self._share.weigh(keep, ops)

    def _do_meanwhile(self) -> None:
        self._meanwhile()


class CutNetwork:
    """The layers of a network that a crew trains, and where its parameters are."""

    def __init__(self, layers: Sequence[Layer], crew: Crew, batch: int, size: int, sgd: Sgd | None) -> None:
        """`layers` as `dense_layers` gives them, with parameters in a vector (size,)."""
        places, pairs = zip(*find_pairs(layers), strict=True)
        self._plan = plan = Plan(pairs, crew.size, batch, size, sgd)
        self._crew = crew
        shared = Shared(plan)
        self._vector, exchanges = shared.cut(crew.room(shared.size))
        message = plan.pack()
        crew.tell(_MESSAGE.pack(_Do.BEGIN, 0, 0, len(message)) + message)
        self.shares = [plan.share(pair, 0) for pair in pairs]
        self.layers: list[Layer] = list(layers)
        for number in reversed(range(len(pairs))):
            self.first = CutPair(pairs[number], number, self.shares[number], crew, exchanges[number])
            self.layers[places[number]] = [self.first]
            after = self.layers[places[number].start + 1 :]
            following = next((layer for layer in after if isinstance(layer, Linear | CutPair)), None)
            if isinstance(following, Linear):  # the layers between work in place: what they leave, helpers read
                following.room.keep("d", exchanges[number].output_gradient)
        alone = [layer for layer in self.layers if isinstance(layer, Linear)]
        self.alone = [slice(layer.offset, layer.offset + layer.size) for layer in alone]
        """Where in the vector the layers are that no pair holds."""

    def load(self, vector: torch.Tensor, *, velocity: bool = False) -> None:
        """Gives each worker its part of the parameters, or velocities, in `vector` (size,)."""
        for pair in self._plan.pairs:
            self._vector[pair.place].copy_(vector[pair.place])
        self._crew.tell(_MESSAGE.pack(_Do.LOAD, velocity, 0, 0))
        for share in self.shares:
            share.load(vector, velocity=velocity)
        self._crew.wait()

    def store(self, vector: torch.Tensor, *, velocity: bool = False) -> None:
        """Undo of `load`; the layers that no pair holds are left as they are."""
        self._crew.tell(_MESSAGE.pack(_Do.STORE, velocity, 0, 0))
        for share in self.shares:
            share.store(self._vector, velocity=velocity)
        self._crew.wait()
        for pair in self._plan.pairs:
            vector[pair.place].copy_(self._vector[pair.place])


@torch.inference_mode()  # see `kernels_dense`
def help_with(link: Link, descriptor: int, number: int) -> None:
    """What a helper, counted from 1, does until the caller ends."""
    view = SharedView(descriptor)
    helper: _Helper | None = None
    while len(message := link.receive(_MESSAGE.size)) == _MESSAGE.size:
        what, which, turn, count = _MESSAGE.unpack(message)
        if what == _Do.BEGIN:
            plan = _unpack(link.receive(count))
            helper = _Helper(plan, as_floats(view.for_reading(4 * Shared(plan).size)), number, link)
        assert helper is not None, "a plan comes first"
        match what:
            case _Do.FORWARD:
                helper.forward(which, turn, count)
            case _Do.BACKWARD:
                helper.backward(which, count)
            case _Do.LOAD:
                helper.load(velocity=bool(which))
            case _Do.STORE:
                helper.store(velocity=bool(which))


@dataclass(frozen=True)
class _Tape:
    """The operations of a helper's share of a pair."""

    forward: list[Op]
    backward: list[Op]
    weigh: list[Op]


class _Helper:
    """Answers, by one byte, where the caller waits."""

    def __init__(self, plan: Plan, memory: torch.Tensor, number: int, link: Link) -> None:
        self._vector, self._exchanges = Shared(plan).cut(memory)
        self._link = link
        self._pairs = plan.pairs
        self._shares = [plan.share(pair, number) for pair in plan.pairs]
        for share, exchange in zip(self._shares, self._exchanges, strict=True):
            share.write_into(exchange.outputs[number - 1], exchange.input_gradients[number - 1])
        self._keep = plan.sgd.momentum if plan.sgd else 0.0
        self._moves = [moves(plan.sgd, [(share.values, share.velocity)]) for share in self._shares if plan.sgd]
        self._tapes: dict[tuple[int, int, int], _Tape] = {}
        self._turns = [0] * len(plan.pairs)

    def forward(self, number: int, turn: int, batch: int) -> None:
        self._turns[number] = turn
        for op in self._tape(number, batch).forward:
            op()
        self._link.send(_DONE)

    def backward(self, number: int, batch: int) -> None:
        tape = self._tape(number, batch)
        for op in tape.backward:
            op()
        if not self._pairs[number].first:
            self._link.send(_DONE)
        for op in tape.weigh:
            op()
        if self._moves:
            self._moves[number]()

    def _tape(self, number: int, batch: int) -> _Tape:
        turn = self._turns[number]
        tape = self._tapes.get((number, turn, batch))
        if tape is None:
            if len(self._tapes) >= TAPES_KEPT:
                self._tapes.clear()
            share, exchange = self._shares[number], self._exchanges[number]
            tape = self._tapes[number, turn, batch] = _Tape([], [], [])
            share.forward(exchange.input(turn, batch), tape.forward)
            gradient = exchange.output_gradient[: batch * exchange.pair.outputs].view(-1, batch)
            share.backward(still(gradient), tape.backward)
            share.weigh(self._keep, tape.weigh)
        return tape

    def load(self, *, velocity: bool) -> None:
        for share in self._shares:
            share.load(self._vector, velocity=velocity)
        self._link.send(_DONE)

    def store(self, *, velocity: bool) -> None:
        for share in self._shares:
            share.store(self._vector, velocity=velocity)
        self._link.send(_DONE)
