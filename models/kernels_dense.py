"""Dense networks by hand: `nn.Sequential` of `Linear`, `ReLU`, `Tanh`, `Sigmoid`, `Dropout`, and `Flatten` before them.

Two or three matrix products a layer, into buffers that are kept, from lists of operations that are made once (see
`kernels_layers`): small networks spend more time in autograd and in allocations than in those. Of N > 1 models all
layers run as batched products. Inference mode takes a layer of torch away, autograd's, which would do nothing at each
operation.

The gradient of the loss is written by hand, too, where `Spec.loss` says which one it is (see `losses`); otherwise it
comes from autograd over the outputs alone, which is exact for any function of them.

Not here: frozen, shared or hooked layers, and layers of other kinds; `kernels.kernel_for` gives None for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

from gossipml.models.kernels_layers import Activation, Dropout, Flow, Layer, Linear, Op, Room, Weighing
from gossipml.models.losses import Loss, Losses, Slope, loss_of
from gossipml.models.spec import Sgd, Spec

K = TypeVar("K")
T = TypeVar("T")

STEPS_KEPT = 16  # lists of operations, for other numbers of models and samples


class _Step(Generic[T]):
    """The operations of one step on so many samples of so many models."""

    def __init__(self, x: Flow, forward: list[Op], loss: T, back: list[Op]) -> None:
        """`loss`: what it does where the outputs and their gradient lie."""
        self.loss = loss
        self._x = x
        self._forward, self._back = forward, back

    def take(self, x: Flow, prepared: torch.Tensor, slope: Slope) -> None:
        self._x.now, self._x.across = x.now, x.across
        for op in self._forward:
            op()
        slope(prepared)
        for op in self._back:
            op()


class DenseKernel:
    """See `kernels.Kernel`. Made by `dense_kernel`."""

    def __init__(self, layers: Sequence[Layer], loss: Loss, outputs: int) -> None:
        """`outputs`: of the last layer."""
        self._layers = layers
        self._weighing = [layer for layer in layers if isinstance(layer, Weighing)]
        self._weighing[0].first = True
        self._linear = [layer for layer in layers if isinstance(layer, Linear)]
        self._loss = loss
        self._outputs = outputs
        self._room = Room()
        self._last: tuple[torch.Tensor, Flow] | None = None
        """Inputs, and what was made of them; see `batches.Feed`."""
        self._bound: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps: dict[tuple[torch.Size, float], _Step[tuple[Slope, Losses]]] = {}  # on what is bound
        self._descents: dict[tuple[torch.Size, Sgd], _Step[Slope]] = {}  # on what is held

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        """See `Kernel`."""
        return self.accumulate_prepared(vectors, self._flow(inputs), self.prepare(targets), gradients, keep)

    def prepare(self, targets: torch.Tensor) -> torch.Tensor:
        """Of targets (..., N, batch) what steps take of them, (..., N, ...)."""
        return self._loss.prepare(targets, self._outputs)

    def accumulate_prepared(
        self,
        vectors: torch.Tensor,
        x: Flow,
        prepared: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        """`accumulate`, with what `flow_of` made of the inputs, and `prepare` of the targets."""
        bound = self._bound
        if bound is None or not (_same(vectors, bound[0]) and _same(gradients, bound[1])):
            self._steps.clear()
            self._bound = vectors, gradients  # held, so that nothing else comes to lie at their addresses
        step = self._steps.get((x.now.shape, keep))
        with torch.inference_mode():
            if step is None:
                for layer in self._weighing:
                    layer.bind(vectors, gradients)
                step, back = self._record(x, self._loss.find)
                for layer in reversed(self._weighing):
                    layer.weigh(keep, back)
                _keep(self._steps, (x.now.shape, keep), step)
            slope, losses = step.loss
            step.take(x, prepared, slope)
            return losses(prepared)

    def scale(self, factor: float) -> None:
        """From now on the samples are to be multiplied by it: in the products, where that costs nothing."""
        self._linear[0].factor = factor
        self._steps.clear()
        self._descents.clear()

    def hold(self, vectors: torch.Tensor, velocities: torch.Tensor | None, rows: torch.Tensor) -> None:
        """Copies of the parameters in these rows of `vectors` (N, size), and of their velocities (N, parameter_count)
        where there are some (`Sgd.has_velocity`), layer by layer, for `descend`: batched products into matrices of
        which each begins at another vector are done one by one."""
        fitted = [linear.hold(vectors, velocities, rows) for linear in self._linear]
        if not all(fitted):
            self._descents.clear()

    def descend(self, inputs: torch.Tensor, prepared: torch.Tensor, sgd: Sgd) -> None:
        """One step of the first models that are held, without their losses. Inputs as in `kernels.Kernel`; for the
        targets see `prepare`."""
        x = self._flow(inputs)
        step = self._descents.get((x.now.shape, sgd))
        with torch.inference_mode():
            if step is None:
                for linear in self._linear:
                    linear.bind_held(len(inputs))
                step, back = self._record(x, self._loss.slope)
                for linear in self._linear:
                    linear.descend(sgd, back)
                _keep(self._descents, (x.now.shape, sgd), step)
            step.take(x, prepared, step.loss)

    def release(self, vectors: torch.Tensor, velocities: torch.Tensor | None, rows: torch.Tensor) -> list[bool]:
        """Undo of `hold`: the parameters and velocities as they are now go to these rows, but for those of models that
        are not finite. Which of them are."""
        finite = torch.stack([linear.held_sums(len(rows)) for linear in self._linear]).sum(0).isfinite()
        good: list[bool] = finite.tolist()
        kept = finite.nonzero()[:, 0]
        for linear in self._linear:
            linear.release(vectors, velocities, rows[kept], kept)
        return good

    def _flow(self, inputs: torch.Tensor) -> Flow:
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, flow_of(inputs)
        return self._last[1]

    def _record(self, samples: Flow, loss: Callable[[torch.Tensor, torch.Tensor], T]) -> tuple[_Step[T], list[Op]]:
        """A step on samples like these, without the last part of its way back, which is to be added to the list."""
        x = output = Flow(samples.now, samples.across, moves=True)
        count = 1 if x.one else len(x.now)
        forward: list[Op] = []
        back: list[Op] = []
        for layer in self._layers:
            output = layer.forward(output, forward)
        slope = self._room.of("d", output.now.shape, output.now)
        d = Flow(slope, slope.transpose(-1, -2), factor=self._loss.weight(*slope.shape[-2:]))
        for layer in reversed(self._layers):
            d = layer.backward(d, back)
        outputs, slopes = (each.view(count, *each.shape[-2:]) for each in (output.now, slope))
        return _Step(x, forward, loss(outputs, slopes), back), back


def _keep(steps: dict[K, _Step[T]], key: K, step: _Step[T]) -> None:
    if len(steps) >= STEPS_KEPT:
        steps.clear()
    steps[key] = step


def flow_of(inputs: torch.Tensor) -> Flow:
    """Of samples (N, batch, ...)."""
    count, batch = inputs.shape[:2]
    across = inputs.reshape(batch, -1) if count == 1 else inputs.reshape(count, batch, -1)
    return Flow(across.transpose(-1, -2), across)


def dense_kernel(spec: Spec, module: nn.Module) -> DenseKernel | None:
    """The kernel for this module, or None."""
    layers = dense_layers(module)
    return DenseKernel(layers, loss_of(spec), outputs_of(layers)) if layers else None


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
                layers += [Dropout(p)] * (p > 0)
            case _:
                return []
    # Shared layers count once in the vector and twice here.
    return layers if offset == sum(parameter.numel() for parameter in module.parameters()) else []


def outputs_of(layers: Sequence[Layer]) -> int:
    """How many outputs the last of them has."""
    return [layer.outputs for layer in layers if isinstance(layer, Linear)][-1]


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


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
