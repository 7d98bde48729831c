"""One optimiser step on the flat vector, after a kernel (see `kernels`) has put the gradient where it belongs.

Plain SGD (with momentum and weight decay) is two operations on the whole vector instead of one set per
parameter, which matters for small models. Every other optimiser is torch's own, on the module's parameters.
"""

from __future__ import annotations

import copy
import json

import torch

from gossipml.errors import UserError
from gossipml.models.flat import FlatModule
from gossipml.models.spec import Sgd, Spec


class FlatSgd:
    """`Sgd` on the vector; the same arithmetic as `torch.optim.SGD`.

    The gradient vector is the velocity: `keep` of it stays when a kernel adds the next gradient, which saves two
    passes over the vector.
    """

    def __init__(self, flat: FlatModule, sgd: Sgd) -> None:
        self._values = flat.vector[: flat.parameter_count]
        self._velocity = flat.gradient
        self._sgd = sgd
        self.keep = sgd.momentum

    def step(self) -> None:
        if self._sgd.weight_decay:
            self._velocity.add_(self._values, alpha=self._sgd.weight_decay)
        self._values.add_(self._velocity, alpha=-self._sgd.learning_rate)

    def reset(self) -> None:
        self._velocity.zero_()

    def save(self) -> tuple[dict[str, torch.Tensor], str]:
        return {"optimiser.velocity": self._velocity}, "{}"

    def restore(self, tensors: dict[str, torch.Tensor], text: str) -> None:
        velocity = tensors["optimiser.velocity"]
        if velocity.shape != self._velocity.shape or not bool(velocity.isfinite().all()):
            raise ValueError("the velocity does not fit")
        self._velocity.copy_(velocity)


class TorchOptimiser:
    """Any `torch.optim.Optimizer`. Its state is tensors and numbers by parameter; its settings come from the
    specification and are not saved."""

    keep = 0.0

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self._optimiser = optimiser
        self._first = copy.deepcopy(optimiser.state_dict())

    def step(self) -> None:
        self._optimiser.step()

    def reset(self) -> None:
        self._optimiser.load_state_dict(copy.deepcopy(self._first))

    def save(self) -> tuple[dict[str, torch.Tensor], str]:
        tensors: dict[str, torch.Tensor] = {}
        numbers: list[list[object]] = []
        for index, entries in self._optimiser.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimiser.{index}.{name}"] = value
                elif value is None or isinstance(value, bool | int | float):
                    numbers.append([index, name, value])
        return tensors, json.dumps(numbers)

    def restore(self, tensors: dict[str, torch.Tensor], text: str) -> None:
        state: dict[int, dict[str, object]] = {}
        for index, name, value in json.loads(text):
            state.setdefault(int(index), {})[str(name)] = value
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            if kind == "optimiser":
                state.setdefault(int(index), {})[name] = tensor.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})


def make_optimiser(flat: FlatModule, spec: Spec) -> FlatSgd | TorchOptimiser:
    """What the specification's `optimiser` asks for, on the flat vector where that is the same."""
    trained = [parameter for parameter in flat.module.parameters() if parameter.requires_grad]
    asked = spec.optimiser(trained)
    if isinstance(asked, torch.optim.Optimizer):
        return TorchOptimiser(asked)
    if not isinstance(asked, Sgd):
        raise UserError(
            f"optimiser() of the model {spec.name!r} gave a {type(asked).__name__}; return a torch.optim.Optimizer "
            "or a gossipml.models.spec.Sgd"
        )
    if len(trained) < len(list(flat.module.parameters())):  # frozen parameters must not decay or drift
        return TorchOptimiser(
            torch.optim.SGD(
                trained,
                lr=asked.learning_rate,
                momentum=asked.momentum,
                weight_decay=asked.weight_decay,
            ),
        )
    return FlatSgd(flat, asked)
