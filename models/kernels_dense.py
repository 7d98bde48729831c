"""Dense networks by hand: `nn.Sequential` of `Linear`, `ReLU`, `Tanh`, `Sigmoid`, `Dropout`, and `Flatten` before them.

Two or three matrix products a layer, into buffers that are kept: small networks spend more time in autograd and in
allocations than in those. Of N > 1 models all layers run as batched products.

Between the layers a column is a sample, so that the long sides of the products, inputs and batch, lie along the rows:
forward `W x` and gradient `d x'` of 784-10 take 8 to 14 us a model, where `x W'` and `x' d` take 21; of 784-100 77 in
place of 91 (batch 32, N = 4 to 25). Softmax over the columns takes a twentieth of the time of one over short rows.

The gradient of the loss is written by hand, too, where `Spec.loss` says which one it is (see `losses`); otherwise it
comes from autograd over the outputs alone, which is exact for any function of them.

Not here: frozen, shared or hooked layers, and layers of other kinds; `kernels.kernel_for` gives None for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from gossipml.models.losses import Loss, Slope, loss_of, slope_of
from gossipml.models.spec import Spec

_aten = torch.ops.aten
_Forward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]
_Backward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]


class Layer(Protocol):
    """One model (k, batch), or N models (N, k, batch)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output, which stays as it is until the next `forward`; `x` must, too."""

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        """From the gradient of the output, which may be overwritten, that of the input."""


@runtime_checkable
class Weighing(Layer, Protocol):
    """A layer with parameters."""

    first: bool
    """Nobody asks for the gradient of its input."""

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Where its parameters, and their gradients if these are wanted, lie until the next `bind`."""

    def weigh(self, keep: float) -> None:
        """Adds the gradient of the parameters, of the last `forward` and `backward`, to `keep` times what is there."""


class DenseKernel:
    """See `kernels.Kernel`. Made by `dense_kernel`."""

    def __init__(self, layers: Sequence[Layer], loss: Loss, slope: Slope | None = None) -> None:
        self._layers = layers
        self._weighing = [layer for layer in layers if isinstance(layer, Weighing)]
        self._weighing[0].first = True
        self._linear = [layer for layer in layers if isinstance(layer, Linear)]
        self._loss = loss
        self._slope = slope or loss
        self._room = _Room()
        self._bound: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        count, batch = inputs.shape[:2]
        self._bind(vectors, gradients)
        x = self._outputs(inputs)
        d = self._room.of("d", x.shape, x)
        losses = self._loss(x.view(count, -1, batch), targets, d.view(count, -1, batch))
        for layer in reversed(self._layers):
            d = layer.backward(d)
        for weighing in reversed(self._weighing):
            weighing.weigh(keep)
        return losses

    def scale(self, factor: float) -> None:
        """From now on the samples are to be multiplied by it: in the products, where that costs nothing."""
        self._linear[0].factor = factor

    def descend(self, vectors: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor, rate: float) -> None:
        """vectors <- vectors - rate * d loss / d parameters: SGD without momentum, for which nobody needs the gradients
        by themselves, nor the losses. Shapes as in `kernels.Kernel`."""
        count, batch = inputs.shape[:2]
        self._bind(vectors, None)
        x = self._outputs(inputs)
        d = self._room.of("d", x.shape, x)
        self._slope(x.view(count, -1, batch), targets, d.view(count, -1, batch))
        for layer in reversed(self._layers):
            d = layer.backward(d)
        for linear in self._linear:
            linear.descend(rate)

    def _outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        count, batch = inputs.shape[:2]
        x = (inputs.reshape(batch, -1) if count == 1 else inputs.reshape(count, batch, -1)).transpose(-1, -2)
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def _bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Making views takes longer than a small product; a peer comes with the same vectors each time."""
        if self._bound is not None and _same(vectors, self._bound[0]) and _same(gradients, self._bound[1]):
            return
        for layer in self._weighing:
            layer.bind(vectors, gradients)
        self._bound = vectors, gradients  # held, so that nothing else comes to lie at their addresses


def dense_kernel(spec: Spec, module: nn.Module) -> DenseKernel | None:
    """The kernel for this module, or None."""
    layers = dense_layers(module)
    return DenseKernel(layers, loss_of(spec), slope_of(spec)) if layers else None


def dense_layers(module: nn.Module) -> list[Layer]:
    """The layers of this module; none of one that is not known to be plainly dense."""
    layers: list[Layer] = []
    offset = 0
    for layer in _flattened(module):
        if not _plain(layer):
            return []
        match layer:
            case nn.Linear():
                linear = Linear(layer.in_features, layer.out_features, layer.bias is not None, offset)
                layers.append(linear)
                offset += linear.size
            case nn.Flatten(start_dim=1, end_dim=-1):
                pass  # the rows are flat from the start; between dense layers it changes nothing
            case nn.ReLU() | nn.Tanh() | nn.Sigmoid() if layers:
                layers.append(Activation(type(layer).__name__))
            case nn.Dropout(p=p) if layers and p < 1:
                layers += [_Dropout(p)] * (p > 0)
            case _:
                return []
    # Shared layers count once in the vector and twice here.
    return layers if offset == sum(parameter.numel() for parameter in module.parameters()) else []


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
        self.room = _Room()
        self._ones = torch.empty(0, 1)

    def bind(self, vectors: torch.Tensor, gradients: torch.Tensor | None) -> None:
        self._weight, self._bias = self.views(vectors)
        if gradients is not None:
            self._weight_gradient, self._bias_gradient = self.views(gradients)

    def views(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of vectors (N, ...), weights (N, outputs, inputs) and biases (N, outputs, 1); for N = 1 without N."""
        count, middle = len(vectors), self.offset + self.inputs * self.outputs
        weights = vectors[:, self.offset : middle].view(count, self.outputs, self.inputs)
        biases = vectors[:, middle : middle + self.outputs * self.has_bias].unsqueeze(2)
        return (weights[0], biases[0]) if count == 1 else (weights, biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._x = x
        y = self.room.of("y", (*x.shape[:-2], self.outputs, x.shape[-1]), x)
        add = torch.addmm if x.dim() == 2 else torch.baddbmm
        if self.has_bias:
            return add(self._bias, self._weight, x, alpha=self.factor, out=y)
        return add(y, self._weight, x, beta=0, alpha=self.factor, out=y)

    def backward(self, d: torch.Tensor) -> torch.Tensor:
        self._d = d  # stays as it is: layers before this one write into `out`
        if self.first:
            return d  # nobody asks for the gradient of the samples
        out = self.room.of("d", self._x.shape, d)
        return (torch.mm if d.dim() == 2 else torch.bmm)(self._weight.transpose(-1, -2), d, out=out)

    def weigh(self, keep: float) -> None:
        self._add_gradient(self._weight_gradient, self._bias_gradient, keep, 1.0)

    def descend(self, rate: float) -> None:
        """A step of SGD."""
        self._add_gradient(self._weight, self._bias, 1.0, -rate)

    def _add_gradient(self, weight: torch.Tensor, bias: torch.Tensor, keep: float, times: float) -> None:
        """To `keep` times what is there."""
        x, d = self._x, self._d
        one = d.dim() == 2
        add = torch.addmm if one else torch.baddbmm
        add(weight, d, x.transpose(-1, -2), beta=keep, alpha=times * self.factor, out=weight)
        if not self.has_bias:
            return
        if one:  # one product with ones is faster than a sum and a sum of sums; of many models it is slower
            if len(self._ones) != d.shape[1] or self._ones.device != d.device:
                self._ones = d.new_ones(d.shape[1], 1)
            torch.addmm(bias, d, self._ones, beta=keep, alpha=times, out=bias)
            return
        total = torch.sum(d, -1, keepdim=True, out=self.room.of("b", (*d.shape[:-1], 1), d))
        if keep != 1.0:
            bias.mul_(keep)
        bias.add_(total, alpha=times)


class Activation:
    def __init__(self, kind: str) -> None:
        """`kind`: the name of torch's class."""
        self.kind = kind
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
        drawn = self._room.of("mask", (*x.shape[:-2], x.shape[-1], x.shape[-2]), x)
        self._mask = drawn.bernoulli_(1 - self._p).mul_(1 / (1 - self._p)).transpose(-1, -2)
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
_ACTIVATIONS: Final[dict[str, tuple[_Forward, _Backward]]] = {
    "ReLU": (_relu, _relu_backward),
    "Tanh": (_tanh, _tanh_backward),
    "Sigmoid": (_sigmoid, _sigmoid_backward),
}


class _Room:
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


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
