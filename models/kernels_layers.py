"""Layers of dense networks as lists of operations on buffers that stay where they are.

Making views, and finding out what to do next, takes longer than the operations of a small network. So a layer is asked
once for what it does (`forward`, `backward`, `weigh` append to a list), and the list is run at every step.

Between the layers a column is a sample, so that the long sides of the products, inputs and batch, lie along the rows:
forward `W x` and gradient `d x'` of 784-10 take 8 to 14 us a model, where `x W'` and `x' d` take 21; of 784-100 77 in
place of 91 (batch 32, N = 4 to 25). Softmax over the columns takes a twentieth of the time of one over short rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeAlias, runtime_checkable

import torch

from gossipml.models.spec import Sgd

_aten = torch.ops.aten

Op: TypeAlias = Callable[[], object]
_Forward: TypeAlias = Callable[[torch.Tensor], object]
_Backward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]


@dataclass
class Flow:
    """What goes from layer to layer: (k, batch) of one model, or (N, k, batch) of N."""

    now: torch.Tensor
    across: torch.Tensor
    """The same, transposed."""
    moves: bool = False
    """Whether it lies elsewhere at each step, as samples do."""
    spare: bool = False
    """Whether the next layer, or on the way back the one before, may overwrite it."""
    factor: float = 1.0
    """What a gradient is still to be multiplied by."""

    @property
    def one(self) -> bool:
        """Of one model."""
        return self.now.dim() == 2


def still(buffer: torch.Tensor) -> Flow:
    """What is always written there."""
    return Flow(buffer, buffer.transpose(-1, -2))


class Layer(Protocol):
    """Asked in this order; what it is asked first, the operations of one step do first."""

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        """What computes the output, which stays as it is until the next step."""

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        """What computes, from the gradient of the output, that of the input."""


@runtime_checkable
class Weighing(Layer, Protocol):
    """A layer with parameters."""

    first: bool
    """Nobody asks for the gradient of its input."""

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Where its parameters, and their gradients if these are wanted, lie for what it is asked next."""

    def weigh(self, keep: float, ops: list[Op]) -> None:
        """What adds the gradient of the parameters to `keep` times what is there."""


class Linear:
    """`y = W x + b`, W (outputs, inputs) as torch has it, from `offset` on in the vector."""

    def __init__(self, inputs: int, outputs: int, has_bias: bool, offset: int) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.has_bias = has_bias
        self.offset = offset
        self.size = (inputs + has_bias) * outputs
        self.first = False
        self.factor = 1.0
        """Of the input."""
        self.room = Room()
        self._held: list[torch.Tensor] = []

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        self._weight, self._bias = self.views(vectors)
        if gradients is not None:
            self._weight_gradient, self._bias_gradient = self.views(gradients)

    def hold(self, vectors: torch.Tensor, velocities: torch.Tensor | None, rows: torch.Tensor) -> bool:
        """Copies the parameters in these rows, and their velocities; whether they come to lie where those that it held
        before did."""
        given = self._all(vectors, velocities)
        fits = len(self._held) == len(given) and all(
            len(own) >= len(rows) and own.device == view.device for own, view in zip(self._held, given, strict=True)
        )
        if not fits:
            self._held = [view.new_empty(len(rows), *view.shape[1:]) for view in given]
        for own, view in zip(self._held, given, strict=True):
            torch.index_select(view, 0, rows, out=own[: len(rows)])
        return fits

    def bind_held(self, count: int) -> None:
        """`bind` to those of the first so many models."""
        views = [held[0] if count == 1 else held[:count] for held in self._held]
        self._weight, self._bias = views[:2]
        self._weight_gradient, self._bias_gradient = views[-2:]

    def held_sums(self, count: int) -> torch.Tensor:
        """Of the parameters of the first so many models, each: (count,)."""
        weight, bias = self._held[:2]
        return weight[:count].sum((1, 2)) + bias[:count].sum((1, 2))

    def release(
        self, vectors: torch.Tensor, velocities: torch.Tensor | None, rows: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Undo of `hold`: those at `kept` (n,) of the models that are held go to these rows (n,)."""
        for view, held in zip(self._all(vectors, velocities), self._held, strict=True):
            if view.device.type == "cpu":  # row by row, as memory is copied: half of the time of `index_copy_`
                to, own = view.numpy(), held.numpy()
                for row, place in zip(rows.tolist(), kept.tolist(), strict=True):
                    to[row] = own[place]
            else:
                view.index_copy_(0, rows, held[kept])

    def views(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors (N, ...), weights (N, outputs, inputs) and biases (N, outputs, 1); for N = 1 without N."""
        weights, biases = self._each(vectors)
        return (weights[0], biases[0]) if len(vectors) == 1 else (weights, biases)

    def _all(self, vectors: torch.Tensor, velocities: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return self._each(vectors) + (() if velocities is None else self._each(velocities))

    def _each(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middle = self.offset + self.inputs * self.outputs
        weights = vectors[:, self.offset : middle].view(len(vectors), self.outputs, self.inputs)
        return weights, vectors[:, middle : middle + self.outputs * self.has_bias].unsqueeze(2)

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        self._x = x
        weight, alpha = self._weight, self.factor
        y = still(self.room.of("y", (*x.now.shape[:-2], self.outputs, x.now.shape[-1]), x.now))
        add = torch.addmm if x.one else torch.baddbmm
        start, beta = (self._bias, 1) if self.has_bias else (y.now, 0)
        if x.moves:
            ops.append(lambda: add(start, weight, x.now, beta=beta, alpha=alpha, out=y.now))
        else:
            ops.append(partial(add, start, weight, x.now, beta=beta, alpha=alpha, out=y.now))
        y.spare = True
        return y

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        self._d = d  # stays as it is: layers before this one write into the other
        if self.first:
            return d  # nobody asks for the gradient of the samples
        out = still(self.room.of("d", self._x.now.shape, d.now))
        out.spare = True
        add = torch.addmm if d.one else torch.baddbmm
        ops.append(partial(add, out.now, self._weight.transpose(-1, -2), d.now, beta=0, alpha=d.factor, out=out.now))
        return out

    def weigh(self, keep: float, ops: list[Op]) -> None:
        self._add_gradient(self._weight_gradient, self._bias_gradient, keep, 1.0, ops)

    def descend(self, sgd: Sgd, ops: list[Op]) -> None:
        """What takes a step along the gradient, which is needed by itself only with momentum or decay."""
        if not sgd.has_velocity:
            self._add_gradient(self._weight, self._bias, 1.0, -sgd.learning_rate, ops)
            return
        self._add_gradient(self._weight_gradient, self._bias_gradient, sgd.momentum, 1.0, ops)
        for values, velocity in ((self._weight, self._weight_gradient), (self._bias, self._bias_gradient)):
            if sgd.weight_decay:
                ops.append(partial(velocity.add_, values, alpha=sgd.weight_decay))
            ops.append(partial(values.add_, velocity, alpha=-sgd.learning_rate))

    def _add_gradient(self, weight: torch.Tensor, bias: torch.Tensor, keep: float, times: float, ops: list[Op]) -> None:
        """So many times the gradient to `keep` times what is there."""
        x, d = self._x, self._d.now
        times *= self._d.factor
        alpha = times * self.factor
        add = torch.addmm if x.one else torch.baddbmm
        if x.moves:
            ops.append(lambda: add(weight, d, x.across, beta=keep, alpha=alpha, out=weight))
        else:
            ops.append(partial(add, weight, d, x.across, beta=keep, alpha=alpha, out=weight))
        if not self.has_bias:
            return
        if x.one:  # one product with ones is faster than a sum and a sum of sums; of many models it is slower
            ops.append(partial(add, bias, d, d.new_ones(d.shape[1], 1), beta=keep, alpha=times, out=bias))
            return
        total = self.room.of("b", (*d.shape[:-1], 1), d)
        ops.append(partial(torch.sum, d, -1, keepdim=True, out=total))
        if keep != 1.0:
            ops.append(partial(bias.mul_, keep) if keep else bias.zero_)
        ops.append(partial(bias.add_, total, alpha=times))


class Activation:
    def __init__(self, kind: str) -> None:
        """`kind`: the name of torch's class."""
        self.kind = kind
        self._forward, self._backward = _ACTIVATIONS[kind]
        self._room = Room()

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        self._y = y = replace(_spared(x, "y", self._room, ops), spare=False)  # it is needed on the way back
        ops.append(partial(self._forward, y.now))
        return y

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        out = _spared(d, "d", self._room, ops)
        ops.append(partial(self._backward, out.now, self._y.now))
        return out


class Dropout:
    """Draws as `nn.Dropout` does: the same generator gives the same masks."""

    def __init__(self, p: float) -> None:
        self._p = p
        self._room = Room()

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        drawn = self._room.of("mask", x.across.shape, x.now)  # a sample after the other
        self._mask = drawn.transpose(-1, -2)
        y = still(self._room.of("y", x.now.shape, x.now))
        ops += [
            partial(drawn.bernoulli_, 1 - self._p),
            partial(drawn.mul_, 1 / (1 - self._p)),
            partial(torch.mul, x.now, self._mask, out=y.now),
        ]
        return y

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        out = _spared(d, "d", self._room, ops)
        ops.append(partial(out.now.mul_, self._mask))
        return out


def _relu_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.threshold_backward.grad_input(d, y, 0, grad_input=d)


def _tanh_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.tanh_backward.grad_input(d, y, grad_input=d)


def _sigmoid_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.sigmoid_backward.grad_input(d, y, grad_input=d)


# Both in place: forward, and backward from the gradient of the output and the output.
_ACTIVATIONS: Final[dict[str, tuple[_Forward, _Backward]]] = {
    "ReLU": (torch.relu_, _relu_backward),
    "Tanh": (torch.tanh_, _tanh_backward),
    "Sigmoid": (torch.sigmoid_, _sigmoid_backward),
}


def _spared(flow: Flow, name: str, room: Room, ops: list[Op]) -> Flow:
    """It, or what copies it where it may be changed."""
    if flow.spare:
        return flow
    copy = still(room.of(name, tuple(flow.now.shape), flow.now))
    ops.append(partial(copy.now.copy_, flow.now))
    return replace(copy, spare=True, factor=flow.factor)


class Room:
    """Buffers that are kept from one call to the next; a smaller one lies at the beginning of the largest yet."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}

    def keep(self, name: str, buffer: torch.Tensor) -> None:
        """Use this one from now on, as far as it goes."""
        self._buffers[name] = buffer.view(-1)
        self._views.pop(name, None)

    def of(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        view = self._views.get(name)
        if view is None or view.shape != shape or view.device != like.device:
            size = torch.Size(shape).numel()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < size or buffer.device != like.device:
                buffer = self._buffers[name] = like.new_empty(size)
            view = self._views[name] = buffer[:size].view(shape)
        return view
