"""One optimiser step on the flat vector, after a kernel (see `kernels`) has put the gradient where it belongs.

Plain SGD (with momentum and weight decay) is two operations on the whole vector instead of one set per
parameter, which matters for small models. Every other optimiser is torch's own, on the module's parameters.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from gossipml.errors import UserError
from gossipml.models.flat import FlatModule
from gossipml.models.spec import Sgd, Spec
from gossipml.models.tuning import OPTIMISERS, Outer, Tuning

SGD_RATE = 0.05  # as `Classifier.learning_rate`, for a model that asks for another optimiser


class FlatSgd:
    """`Sgd` on the vector; the same arithmetic as `torch.optim.SGD`.

    The gradient vector is the velocity: `keep` of it stays when a kernel adds the next gradient, which saves two
    passes over the vector.
    """

    kind = "sgd on the vector"

    def __init__(self, flat: FlatModule, sgd: Sgd) -> None:
        self._values = flat.vector[: flat.parameter_count]
        self._velocity = flat.gradient
        self.sgd = sgd
        self.keep = sgd.momentum
        self.step = self.step_of([slice(None)])

    def step_of(self, ranges: Iterable[slice]) -> Callable[[], None]:
        """What takes the step for some ranges of the parameters alone."""
        return moves(self.sgd, [(self._values[place], self._velocity[place]) for place in ranges])

    def reset(self) -> None:
        self._velocity.zero_()

    def save(self) -> tuple[dict[str, torch.Tensor], str]:
        return {"optimiser.velocity": self._velocity}, "{}"

    def restore(self, tensors: dict[str, torch.Tensor], text: str) -> None:
        velocity = tensors["optimiser.velocity"]
        if velocity.shape != self._velocity.shape or not bool(velocity.isfinite().all()):
            raise ValueError("the velocity does not fit")
        self._velocity.copy_(velocity)


def moves(sgd: Sgd, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """What takes the step for some values with their velocities, to which the gradient has been added."""
    decay, rate = sgd.weight_decay, sgd.learning_rate

    def step() -> None:
        for values, velocity in parts:
            if decay:
                velocity.add_(values, alpha=decay)
            values.add_(velocity, alpha=-rate)

    return step


class TorchOptimiser:
    """Any `torch.optim.Optimizer`. Its state is tensors and numbers by parameter; its settings come from the
    specification and are not saved."""

    keep = 0.0

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self._optimiser = optimiser
        self.kind = type(optimiser).__name__
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


class OuterStep:
    """Nesterov momentum over rounds: see `tuning`."""

    def __init__(self, outer: Outer, parameters: torch.Tensor) -> None:
        """`parameters` (P,): a view, changed in place."""
        self._outer = outer
        self._x = parameters
        self._before = parameters.clone()
        self._velocity = torch.zeros_like(parameters)

    def step(self) -> None:
        """At the beginning of a round."""
        change = self._before - self._x
        self._velocity.mul_(self._outer.momentum).add_(change)
        change.add_(self._velocity, alpha=self._outer.momentum)
        self._before.sub_(change, alpha=self._outer.rate)
        self._x.copy_(self._before)

    def reset(self) -> None:
        """The parameters are others now: no way led here."""
        self._before.copy_(self._x)
        self._velocity.zero_()

    def save(self) -> dict[str, torch.Tensor]:
        return {"outer.before": self._before, "outer.velocity": self._velocity}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """After the parameters; from the beginning where there was no outer step then."""
        self.reset()
        for name, own in self.save().items():
            saved = tensors.get(name)
            if saved is not None and saved.shape == own.shape and bool(saved.isfinite().all()):
                own.copy_(saved)


def make_optimiser(flat: FlatModule, spec: Spec, tuning: Tuning | None = None) -> FlatSgd | TorchOptimiser:
    """What the specification's `optimiser` asks for, or the user instead, on the flat vector where that is the same."""
    trained = [parameter for parameter in flat.module.parameters() if parameter.requires_grad]
    asked = _asked(trained, spec, tuning or Tuning())
    if isinstance(asked, torch.optim.Optimizer):
        return TorchOptimiser(asked)
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


def _asked(trained: list[torch.nn.Parameter], spec: Spec, tuning: Tuning) -> torch.optim.Optimizer | Sgd:
    own = None if tuning.optimiser and tuning.learning_rate is not None else spec.optimiser(trained)
    if not isinstance(own, torch.optim.Optimizer | Sgd | None):
        raise UserError(
            f"optimiser() of the model {spec.name!r} gave a {type(own).__name__}; return a torch.optim.Optimizer "
            "or a gossipml.models.spec.Sgd"
        )
    numbers = {"momentum": tuning.momentum, "weight_decay": tuning.weight_decay, "lr": tuning.learning_rate}
    given = {name: number for name, number in numbers.items() if number is not None}
    if tuning.optimiser == "sgd" or (isinstance(own, Sgd) and not tuning.optimiser):
        basis = own if isinstance(own, Sgd) else Sgd(tuning.learning_rate or SGD_RATE)
        return Sgd(
            given.get("lr", basis.learning_rate),
            given.get("momentum", basis.momentum),
            given.get("weight_decay", basis.weight_decay),
        )
    if tuning.optimiser:
        make = getattr(torch.optim, OPTIMISERS[tuning.optimiser])
        _check_taken(tuning.optimiser, given, inspect.signature(make).parameters)
        made: torch.optim.Optimizer = make(trained, **given)
        return made
    assert isinstance(own, torch.optim.Optimizer)
    _check_taken(f"the optimiser of {spec.name!r}", given, own.defaults)
    for group in own.param_groups:
        group.update(given)
    return own


def _check_taken(what: str, given: dict[str, float], taken: Collection[str]) -> None:
    for name in given:
        if name not in taken:
            raise UserError(
                f"{what} takes no {name.replace('_', ' ')}; leave --{name.replace('_', '-')} out, or use sgd"
            )
