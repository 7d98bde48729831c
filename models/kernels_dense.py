"""Dense networks by hand: `nn.Sequential` of `Linear`, `ReLU`, `Tanh`, `Sigmoid`, `Dropout`, and `Flatten` before them.

Two or three matrix products a layer, into buffers that are kept: small networks spend more time in autograd and in
allocations than in those. Of N > 1 models all layers run as batched products.

The gradient of the loss is written by hand, too, where `Spec.loss` says which one it is (see `losses`); otherwise it
comes from autograd over the outputs alone, which is exact for any function of them.

Not here: frozen, shared or hooked layers, and layers of other kinds; `kernels.kernel_for` gives None for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import torch
from torch import nn

from gossipml.models.losses import Loss, loss_of
from gossipml.models.spec import Spec

_aten = torch.ops.aten
_Forward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]
_Backward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]


class _Layer(Protocol):
    """One model (batch, k), or N models (N, batch, k)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output, which stays as it is until the next `forward`; `x` must, too."""

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        """From the gradient of the output, which may be overwritten, that of the input."""


class DenseKernel:
    """See `kernels.Kernel`. Made by `dense_kernel`."""

    def __init__(self, layers: list[_Layer], loss: Loss) -> None:
        self._layers = layers
        self.linear: Final = [layer for layer in layers if isinstance(layer, _Linear)]
        self.linear[0].first = True
        self._loss = loss
        self._room = _Room()
        self._bound: tuple[torch.Tensor, torch.Tensor] | None = None

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        losses = self.propagate(vectors, inputs, targets, gradients)
        for layer in reversed(self.linear):
            layer.weigh(layer, keep)
        return losses

    def propagate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        share: float = 1.0,
    ) -> torch.Tensor:
        """The losses, and in each layer what `_Linear.weigh` makes the gradients of weights from; both times `share`,
        of a batch that these samples are."""
        count, batch = inputs.shape[:2]
        self.bind(vectors, gradients)
        x = inputs.reshape(batch, -1) if count == 1 else inputs.reshape(count, batch, -1)
        for layer in self._layers:
            x = layer.forward(x)
        d = self._room.of("d", x.shape, x)
        losses = self._loss(x.view(count, batch, -1), targets, d.view(count, batch, -1))
        if share != 1.0:
            d.mul_(share)
            losses = losses * share
        for layer in reversed(self._layers):
            d = layer.backward(d)
        return losses

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor) -> None:
        """Making views takes longer than a small product; a peer comes with the same vectors each time."""
        if self._bound is not None and _same(vectors, self._bound[0]) and _same(gradients, self._bound[1]):
            return
        for layer in self.linear:
            layer.bind(vectors, gradients)
        self._bound = vectors, gradients  # held, so that nothing else comes to lie at their addresses


def dense_kernel(spec: Spec, module: nn.Module) -> DenseKernel | None:
    """The kernel for this module, or None."""
    layers: list[_Layer] = []
    offset = 0
    for layer in _flattened(module):
        if not _plain(layer):
            return None
        match layer:
            case nn.Linear():
                layers.append(_Linear(layer, offset))
                offset += sum(parameter.numel() for parameter in layer.parameters())
            case nn.Flatten(start_dim=1, end_dim=-1):
                pass  # the rows are flat from the start; between dense layers it changes nothing
            case nn.ReLU() | nn.Tanh() | nn.Sigmoid() if layers:
                layers.append(_Activation(type(layer)))
            case nn.Dropout(p=p) if layers and p < 1:
                layers += [_Dropout(p)] * (p > 0)
            case _:
                return None
    # Shared layers count once in the vector and twice here.
    if not layers or offset != sum(parameter.numel() for parameter in module.parameters()):
        return None
    return DenseKernel(layers, loss_of(spec))


def _flattened(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential or not _plain(module):
        return [module]
    return [layer for child in module for layer in _flattened(child)]


def _plain(layer: nn.Module) -> bool:
    """Whether the layer does what its class does, and nothing beside."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) in (nn.Sequential, nn.Linear, nn.Flatten, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Dropout)
        and "forward" not in vars(layer)
        and not any(hooks)
        and all(parameter.requires_grad for parameter in layer.parameters())
    )


@dataclass(frozen=True)
class Part:
    """Of a layer's parameters: some rows of W (None: all, of all models), and the bias or not."""

    rows: slice | None
    bias: bool


WHOLE: Final = Part(None, bias=True)


class _Linear:
    """`y = x W + b`, where W (inputs, outputs) is the transpose that `flat` keeps."""

    def __init__(self, layer: nn.Linear, offset: int) -> None:
        self._inputs, self._outputs = layer.in_features, layer.out_features
        self._has_bias = layer.bias is not None
        self._offset = offset
        self._room = _Room()
        self._ones = torch.empty(1, 0)
        self.first = False

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor) -> None:
        self._weight, self._bias = self._views(vectors)
        self._weight_gradient, self._bias_gradient = self._views(gradients)

    def _views(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors (N, ...), weights (N, inputs, outputs) and biases (N, 1, outputs); for N = 1 without N."""
        count, middle = len(vectors), self._offset + self._inputs * self._outputs
        weights = vectors[:, self._offset : middle].view(count, self._inputs, self._outputs)
        biases = vectors[:, middle : middle + self._outputs * self._has_bias].unsqueeze(1)
        return (weights[0], biases[0]) if count == 1 else (weights, biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._x = x
        if self._ones.shape[1] != x.shape[-2] or self._ones.device != x.device:
            self._ones = x.new_ones(1, x.shape[-2])
        y = self._room.of("y", (*x.shape[:-1], self._outputs), x)
        one = x.dim() == 2
        if self._has_bias:
            return (torch.addmm if one else torch.baddbmm)(self._bias, x, self._weight, out=y)
        return (torch.mm if one else torch.bmm)(x, self._weight, out=y)

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        self._d = d  # stays as it is: layers before this one write into `out`
        if self.first:
            return d  # nobody asks for the gradient of the samples
        out = self._room.of("d", self._x.shape, d)
        return (torch.mm if d.dim() == 2 else torch.bmm)(d, self._weight.transpose(-1, -2), out=out)

    def weigh(self, source: _Linear, keep: float, part: Part = WHOLE) -> None:
        """Adds what `source`, this layer or its twin of another worker, found for its samples to `keep` times the
        gradient of part of the parameters."""
        x, d = source._x, source._d
        add = torch.addmm if d.dim() == 2 else torch.baddbmm
        gradient = self._weight_gradient
        if part.rows is not None:
            x, gradient = x[:, part.rows], gradient[part.rows]
        add(gradient, x.transpose(-1, -2), d, beta=keep, out=gradient)
        if self._has_bias and part.bias:
            # As a product with ones: adding up the rows takes three times as long.
            ones = source._ones.expand(*d.shape[:-2], 1, -1)
            add(self._bias_gradient, ones, d, beta=keep, out=self._bias_gradient)

    def part(self, index: int, count: int, *, bias: bool) -> Part:
        """One of `count` parts, of one model; with or without all of the bias."""
        return Part(slice(self._inputs * index // count, self._inputs * (index + 1) // count), bias)

    def ranges(self, part: Part) -> list[slice]:
        """Where the part lies in the vector."""
        rows = part.rows or slice(0, self._inputs)
        middle = self._offset + self._inputs * self._outputs
        weights = slice(self._offset + rows.start * self._outputs, self._offset + rows.stop * self._outputs)
        return [weights, *[slice(middle, middle + self._outputs)] * (self._has_bias and part.bias)]


class _Activation:
    def __init__(self, kind: type[nn.Module]) -> None:
        self._forward, self._backward = _ACTIVATIONS[kind]
        self._room = _Room()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._y = self._room.of("y", x.shape, x)
        self._forward(x, self._y)
        return self._y

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        self._backward(d, self._y)
        return d


class _Dropout:
    """Draws as `nn.Dropout` does: the same generator gives the same masks."""

    def __init__(self, p: float) -> None:
        self._p = p
        self._room = _Room()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._mask = self._room.of("mask", x.shape, x).bernoulli_(1 - self._p).mul_(1 / (1 - self._p))
        return torch.mul(x, self._mask, out=self._room.of("y", x.shape, x))

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        return d.mul_(self._mask)


def _relu(x: torch.Tensor, out: torch.Tensor) -> object:
    return torch.clamp(x, min=0, out=out)


def _relu_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.threshold_backward.grad_input(d, y, 0, grad_input=d)


def _tanh(x: torch.Tensor, out: torch.Tensor) -> object:
    return torch.tanh(x, out=out)


def _tanh_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.tanh_backward.grad_input(d, y, grad_input=d)


def _sigmoid(x: torch.Tensor, out: torch.Tensor) -> object:
    return torch.sigmoid(x, out=out)


def _sigmoid_backward(d: torch.Tensor, y: torch.Tensor) -> object:
    return _aten.sigmoid_backward.grad_input(d, y, grad_input=d)


# Forward into `out`; backward in place, from the gradient of the output and the output.
_ACTIVATIONS: Final[dict[type[nn.Module], tuple[_Forward, _Backward]]] = {
    nn.ReLU: (_relu, _relu_backward),
    nn.Tanh: (_tanh, _tanh_backward),
    nn.Sigmoid: (_sigmoid, _sigmoid_backward),
}


class _Room:
    """Buffers that are kept from one call to the next; a smaller one lies at the beginning of the largest yet."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}

    def of(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        view = self._views.get(name)
        if view is None or view.shape != shape or view.device != like.device:
            size = torch.Size(shape).numel()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < size or buffer.device != like.device:
                buffer = self._buffers[name] = like.new_empty(size)
            view = self._views[name] = buffer[:size].view(shape)
        return view


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
