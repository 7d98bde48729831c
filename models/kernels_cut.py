"""Dense networks cut over workers: pairs of layers, the first by its outputs, the second by its inputs.

Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3): a worker keeps some of the units between
the two layers, `h_w = act(W1[w] x + b1[w])`, and its summand of the output is `W2[:, w] h_w`. So a worker's share of
a pair is a small dense network of its own, whose parameters, gradients and velocities nobody else needs. Per step only
the inputs, the summands, and the gradient of their sum cross from core to core; with samples shared out instead, all
weights would, since every step changes them.

Here: which pairs there are, and a worker's share of one. How workers meet is in `crew_work`.

Left out: pairs with dropout between their layers. Workers would draw other masks than one worker does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from gossipml.models.kernels_layers import Activation, Flow, Layer, Linear, Op

LINE = 16  # numbers in a line of the cache, and in a register of AVX-512
OF_CALLER = 0.85  # of an even share: it has the samples and the last layer, too; measured: docs/decisions/0011


@dataclass(frozen=True)
class Pair:
    """Two linear layers, and activations between them."""

    inputs: int
    units: int
    """Between the two layers."""
    outputs: int
    biases: tuple[bool, bool]
    activations: tuple[str, ...]
    offset: int
    """Of its parameters in the vector."""
    first: bool
    """Nobody asks for the gradient of its input."""
    factor: float
    """Of its input."""

    @property
    def layers(self) -> tuple[Linear, Linear]:
        """As they lie in the vector."""
        first = Linear(self.inputs, self.units, self.biases[0], self.offset)
        return first, Linear(self.units, self.outputs, self.biases[1], self.offset + first.size)

    @property
    def weights(self) -> int:
        return self.units * (self.inputs + self.outputs)

    @property
    def place(self) -> slice:
        """Of its parameters in the vector."""
        return slice(self.offset, self.offset + sum(layer.size for layer in self.layers))

    def shares(self, workers: int) -> list[slice]:
        """The units of each."""
        even = self.units / workers
        cuts = [even * OF_CALLER + (self.units - even * OF_CALLER) * index / (workers - 1) for index in range(workers)]
        grain = min(LINE, max(1, int(even) // 4))
        return [slice(*ends) for ends in pairwise([0, *(round(cut / grain) * grain for cut in cuts[:-1]), self.units])]


def find_pairs(layers: Sequence[Layer]) -> list[tuple[slice, Pair]]:
    """The pairs that hold the most weights together, and where they are among the layers, which `dense_layers` gave."""
    linear = [index for index, layer in enumerate(layers) if isinstance(layer, Linear)]
    # From each linear layer to the end: the weights in pairs, and the pairs.
    best: list[tuple[int, list[tuple[slice, Pair]]]] = [(0, []), (0, [])]
    for start, stop in reversed(list(pairwise(linear))):
        found = best[-1]
        pair = _pair(layers[start : stop + 1])
        if pair is not None:
            weights, others = best[-2]
            more = weights + pair.weights, [(slice(start, stop + 1), pair), *others]
            found = max(found, more, key=lambda one: one[0])
        best.append(found)
    return best[-1][1]


def _pair(layers: Sequence[Layer]) -> Pair | None:
    """None when something else than activations is between the two."""
    first, *middle, second = layers
    activations = [layer.kind for layer in middle if isinstance(layer, Activation)]
    if not isinstance(first, Linear) or not isinstance(second, Linear) or len(activations) < len(middle):
        return None
    return Pair(
        *(first.inputs, first.outputs, second.outputs),
        biases=(first.has_bias, second.has_bias),
        activations=tuple(activations),
        offset=first.offset,
        first=first.offset == 0,
        factor=first.factor,
    )


class Share:
    """What one worker has of a pair."""

    def __init__(self, pair: Pair, units: slice, *, bias: bool) -> None:
        """`bias`: with that of the second layer, which one worker adds."""
        self._pair, self._units, self._bias = pair, units, bias
        width = units.stop - units.start
        first = Linear(pair.inputs, width, pair.biases[0], 0)
        second = Linear(width, pair.outputs, pair.biases[1] and bias, first.size)
        first.first, first.factor = pair.first, pair.factor
        self._linear = first, second
        self._layers: list[Layer] = [first, *(Activation(kind) for kind in pair.activations), second]
        self.values = torch.zeros(first.size + second.size)
        self.velocity = torch.zeros_like(self.values)
        for layer in self._linear:
            layer.bind(self.values.unsqueeze(0), self.velocity.unsqueeze(0))

    def write_into(self, output: torch.Tensor, input_gradient: torch.Tensor) -> None:
        """What `forward` and `backward` give comes to lie at the beginning of these."""
        self._linear[1].room.keep("y", output)
        self._linear[0].room.keep("d", input_gradient)

    def forward(self, x: Flow, ops: list[Op]) -> Flow:
        """What computes its summand of the output."""
        for layer in self._layers:
            x = layer.forward(x, ops)
        return x

    def backward(self, d: Flow, ops: list[Op]) -> Flow:
        """What computes its summand of the gradient of the input."""
        for layer in reversed(self._layers):
            d = layer.backward(d, ops)
        return d

    def weigh(self, keep: float, ops: list[Op]) -> None:
        for layer in reversed(self._linear):
            layer.weigh(keep, ops)

    def load(self, vector: torch.Tensor, *, velocity: bool) -> None:
        """Takes its parameters, or velocities, out of all of them (size,)."""
        for own, there in zip(self._pieces(velocity), self._places(vector), strict=True):
            own.copy_(there)

    def store(self, vector: torch.Tensor, *, velocity: bool) -> None:
        """Undo of `load`."""
        for own, there in zip(self._pieces(velocity), self._places(vector), strict=True):
            there.copy_(own)

    def _pieces(self, velocity: bool) -> list[torch.Tensor]:
        own = (self.velocity if velocity else self.values).unsqueeze(0)
        return [piece for layer in self._linear for piece in layer.views(own)]

    def _places(self, vector: torch.Tensor) -> list[torch.Tensor]:
        (weights, biases), (columns, bias) = (layer.views(vector.unsqueeze(0)) for layer in self._pair.layers)
        own_bias = slice(0, self._pair.outputs * self._bias)
        return [weights[self._units], biases[self._units], columns[:, self._units], bias[own_bias]]
