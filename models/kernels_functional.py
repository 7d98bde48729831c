"""Any module for N models at once, by `torch.func`: one `vmap` over the gradient of `functional_call`.

Buffers that the forward pass changes (running means and variances of batch norm) are taken out of it and written back
into the vectors; each model has its own. Integer buffers (batch norm's counter of batches) are not in the vector and
stay as they were built. Dropout draws another mask for each model, from torch's global generator.

Convolutions on a CPU are done for one model after the other: `vmap` makes grouped convolutions of them, which take
2.7 times as long (`cifar-cnn`, batch 64). Slower than a kernel by hand; right for everything that `torch.func` can
transform. Leaves out: modules that look at values in Python (`if x.sum() > 0`), for which torch says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gossipml.errors import UserError
from gossipml.models.spec import Spec

Named = dict[str, torch.Tensor]


class FunctionalKernel:
    """See `kernels.Kernel`. `module` is what `spec.build` gave; it is used for its structure alone."""

    def __init__(self, spec: Spec, module: nn.Module) -> None:
        self._spec = spec
        self._module = module.train()
        self._fixed: Named = {}
        self._buffers: list[str] = []
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._frozen: list[str] = []
        offset = 0
        for name, parameter in module.named_parameters():
            self._places[name] = offset, parameter.shape
            offset += parameter.numel()
            if not parameter.requires_grad:
                self._frozen.append(name)
        self._parameters = list(self._places)
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                self._places[name] = offset, buffer.shape
                self._buffers.append(name)
                offset += buffer.numel()
            else:
                self._fixed[name] = buffer.detach().clone()
        gradient = torch.func.grad_and_value(self._loss, has_aux=True)
        self._all = torch.func.vmap(gradient, randomness="different")
        self._convolves = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())

    def accumulate(
        self,
        vectors: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float = 0.0,
    ) -> torch.Tensor:
        """See `Kernel`. UserError where torch cannot transform the module."""
        parameters = {name: self._view(vectors, name) for name in self._parameters}
        buffers = {name: self._view(vectors, name) for name in self._buffers}
        if self._convolves and vectors.device.type == "cpu":
            return self._one_by_one(parameters, buffers, inputs, targets, gradients, keep)
        try:
            found, (losses, changed) = self._all(parameters, buffers, inputs, targets)
        except RuntimeError as error:
            raise UserError(
                f"the model {self._spec.name!r} cannot be trained for many peers at once: {str(error)[:300]}"
            ) from error
        for name, value in changed.items():
            buffers[name].copy_(value)
        self._add(found, gradients, keep)
        result: torch.Tensor = losses
        return result.detach()

    def _one_by_one(
        self,
        parameters: Named,
        buffers: Named,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        keep: float,
    ) -> torch.Tensor:
        losses = torch.empty(len(inputs))
        trained = [name for name in self._parameters if name not in self._frozen]
        for number in range(len(inputs)):
            own = {name: value[number].detach() for name, value in (parameters | buffers).items()}
            leaves = [own[name].requires_grad_() for name in trained]
            outputs = torch.func.functional_call(self._module, own, (inputs[number],))
            loss = self._spec.loss(outputs, targets[number])
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            one = slice(number, number + 1)
            self._add({name: value[None] for name, value in zip(trained, found, strict=True)}, gradients[one], keep)
            losses[number] = loss.detach()
        return losses

    def _add(self, found: Named, gradients: torch.Tensor, keep: float) -> None:
        for name in self._parameters:
            own = self._view(gradients, name)
            if name in self._frozen:
                own.zero_()
            elif keep:
                own.mul_(keep).add_(found[name])
            else:
                own.copy_(found[name])

    def _loss(
        self, parameters: Named, buffers: Named, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, Named]:
        own = {name: value.clone() for name, value in buffers.items()}  # batch norm writes into them
        fixed = {name: value.clone() for name, value in self._fixed.items()}
        state: Mapping[str, torch.Tensor] = {**parameters, **own, **fixed}
        outputs = torch.func.functional_call(self._module, dict(state), (inputs,))
        return self._spec.loss(outputs, targets), {name: value.detach() for name, value in own.items()}

    def _view(self, vectors: torch.Tensor, name: str) -> torch.Tensor:
        """(N, size) -> (N, *shape), of one parameter or buffer."""
        offset, shape = self._places[name]
        return vectors[:, offset : offset + shape.numel()].view(-1, *shape)
