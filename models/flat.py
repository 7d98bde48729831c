"""A torch module whose parameters and floating-point buffers are views into one flat float32 vector.

Averaging, encoding and saving work on the vector; the module sees every change at once, and in-place
optimisers write into it. Order: parameters first, in the module's own order, then buffers (batch norm's running mean
and variance, which are averaged like parameters). Integer buffers (batch norm's batch counter) stay in the
module: they are neither sent nor saved, and no output depends on them under the default momentum.

`named` and `vector_of` translate between the vector and the names of the module's `state_dict`, which is the form
of published versions.

Not here: parameters of another dtype than float32, and buffers that a module replaces instead of changing in
place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from gossipml import codec
from gossipml.errors import UserError
from gossipml.models.encoding import MAX_MAGNITUDE
from gossipml.models.spec import Spec, agreement
from gossipml.models.trainer import Layout

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of an imported file; all become float32
_OTHER_MODEL = "the file is of another model, or of another form of it"
MAX_PARAMETERS = 1 << 27  # 512 MiB of float32; bounds what a slip in a specification allocates in every peer


class FlatModule:
    """A module over a flat vector, and the gradient vector of its parameters (empty for a module that only serves)."""

    def __init__(self, module: torch.nn.Module, device: torch.device, *, trains: bool = True) -> None:
        self.module = module.to(device)
        self._parameters = list(self.module.parameters())
        self._buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]
        self._tensors: list[torch.Tensor] = [*self._parameters, *self._buffers]
        self.parameter_count = sum(tensor.numel() for tensor in self._parameters)
        self.size = sum(tensor.numel() for tensor in self._tensors)
        self.vector = torch.cat([tensor.detach().reshape(-1) for tensor in self._tensors])  # (size,)
        self.gradient = torch.zeros(self.parameter_count if trains else 0, device=device)
        offset = 0
        for parameter in self._parameters:
            count = parameter.numel()
            if trains and parameter.requires_grad:
                parameter.grad = self.gradient[offset : offset + count].view_as(parameter)
            offset += count
        self._point_at(self.vector)

    @contextmanager
    def holding(self, vector: torch.Tensor) -> Iterator[torch.nn.Module]:
        """The module with the values of another vector (size,), for evaluation; afterwards with its own."""
        self._point_at(vector)
        try:
            yield self.module
        finally:
            self._point_at(self.vector)

    def check_parameters(self) -> None:
        """UserError when the model's code has replaced, added or removed a parameter: what it trains is then not
        what neighbours get."""
        now = dict(self.module.named_parameters())
        if [id(parameter) for parameter in now.values()] != [id(parameter) for parameter in self._parameters]:
            known = {id(parameter) for parameter in self._parameters}
            new = [f"{name} {list(tensor.shape)}" for name, tensor in now.items() if id(tensor) not in known]
            raise UserError(
                f"the model has changed its parameters while training ({', '.join(new)[:200] or 'some are gone'}); "
                "make all of them in build(), and change values only in place"
            )

    def named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies of the module's named tensors with the values of `vector`, in their ordinary orientation, on the CPU:
        what `load_state_dict` of the plain module takes."""
        with self.holding(vector):
            return {
                name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, tensor in self._state().items()
            }

    def vector_of(self, named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The vector (size,) with which the module has these tensors; undoes `named`. UserError unless names and
        shapes are the module's and all values finite. What no name stands for (buffers that are not persistent)
        keeps its value; integer buffers are left alone."""
        vector = self.vector.clone()
        with self.holding(vector):
            own = self._state()
            for names, what in ((own.keys() - named.keys(), "lacks"), (named.keys() - own.keys(), "has an unknown")):
                if names:
                    raise UserError(f"it {what} tensor {min(names)!r:.200}, and {len(names) - 1} more; {_OTHER_MODEL}")
            filled: dict[int, str] = {}
            for name, tensor in own.items():
                given = named[name]
                if given.shape != tensor.shape:
                    raise UserError(
                        f"its tensor {name!r:.200} has the shape {list(given.shape)}, not {list(tensor.shape)}; "
                        f"{_OTHER_MODEL}"
                    )
                if (given.dtype in FLOATS) != tensor.is_floating_point():
                    raise UserError(f"its tensor {name!r:.200} is {given.dtype}, not {tensor.dtype}; {_OTHER_MODEL}")
                if not tensor.is_floating_point():
                    continue
                first = filled.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
                if first == name:
                    tensor.copy_(given)
                elif not torch.equal(tensor, given.to(tensor.device, tensor.dtype)):
                    raise UserError(f"its tensors {first!r:.200} and {name!r:.200} differ; the model shares them")
        largest = max(float(vector.max()), -float(vector.min()))
        if not largest <= MAX_MAGNITUDE:  # NaN compares false
            raise UserError(f"it holds the value {largest:g}; finite values up to {MAX_MAGNITUDE:g} are parameters")
        return vector

    def _state(self) -> dict[str, torch.Tensor]:
        """The tensors of the module's `state_dict`: views of the vector that is held."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if isinstance(tensor, torch.Tensor)}

    def _point_at(self, vector: torch.Tensor) -> None:
        offset = 0
        for tensor in self._tensors:
            count = tensor.numel()
            tensor.data = vector[offset : offset + count].view(tensor.shape)
            offset += count


def build_flat(
    spec: Spec, network_id: bytes, device: torch.device, *, trains: bool = True
) -> tuple[FlatModule, Layout]:
    """The model with the initial parameters that every peer of the network derives, and its layout.

    UserError when `build` fails, has no float32 parameters, or gives other parameters on a second call with the
    same seed (then peers would start apart, and averaging would fail).
    """
    layout = layout_of(spec, _build(spec, 0))
    words = hashlib.sha256(network_id + b"|" + spec.name.encode() + b"|" + layout.digest.encode()).digest()
    seed = int.from_bytes(words[:8], "big") >> 1  # torch takes 63 bits
    module, again = _build(spec, seed), _build(spec, seed)
    if not all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values()):
        raise UserError(f"build() of the model {spec.name!r} gives parameters that are not finite")
    if layout_of(spec, module) != layout or not _same(module, again):
        raise UserError(
            f"build() of the model {spec.name!r} gives other parameters each time; draw them from torch's global "
            "generator alone, without seeding it"
        )
    return FlatModule(module, device, trains=trains), layout


def layout_of(spec: Spec, module: torch.nn.Module) -> Layout:
    """Size and digest of the flat vector. UserError when the module has no such vector."""
    fields: list[object] = [spec.name, agreement(spec)]
    size = buffers = 0
    for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if kind == "parameter" and tensor.dtype != torch.float32:
                raise UserError(f"the parameter {name!r} of {spec.name!r} is {tensor.dtype}; use torch.float32")
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise UserError(f"the buffer {name!r} of {spec.name!r} is {tensor.dtype}; use torch.float32")
            if tensor.dtype == torch.float32:
                fields.append([kind, name, list(tensor.shape), "float32"])
                size += tensor.numel()
                buffers += tensor.numel() if kind == "buffer" else 0
    if not 0 < size <= MAX_PARAMETERS:
        raise UserError(f"the model {spec.name!r} has {size} parameters; there must be 1 to {MAX_PARAMETERS}")
    return Layout(spec.name, hashlib.sha256(codec.pack(fields)).hexdigest(), size, buffers)


def _same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _build(spec: Spec, seed: int) -> torch.nn.Module:
    legacy = np.random.get_state()  # some modules initialise themselves from numpy's global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            module = spec.build()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"build() of the model {spec.name!r} failed: {type(error).__name__}: {error}") from error
        finally:
            np.random.set_state(legacy)
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"build() of the model {spec.name!r} gave a {type(module).__name__}, not a torch.nn.Module")
    return module
