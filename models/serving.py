"""Answering from a flat module: what a peer that trains and one that only serves have in common, and the latter.

A peer that only serves (`--no-train`) has no data: it builds the model, loads published versions one after the
other, and answers predictions from the last. It never steps, merges or measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gossipml.errors import UserError
from gossipml.models import predict, published
from gossipml.models.flat import FlatModule, build_flat
from gossipml.models.kernels_split import Split
from gossipml.models.spec import Array, Spec
from gossipml.models.trainer import Layout


class Answering:
    """Predictions of a flat module with any parameters (size,)."""

    def __init__(self, spec: Spec, flat: FlatModule, device: torch.device) -> None:
        self._spec = spec
        self._flat = flat
        self._device = device

    def forward(self, vector: torch.Tensor) -> predict.Forward:
        """The model with the parameters in `vector`; UserError where its outputs are not finite."""

        def forward(inputs: Array) -> Array:
            with self.holding(vector) as module:
                outputs = module(torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32)).to(self._device))
            given: Array = outputs.cpu().numpy()
            if not np.isfinite(given).all():
                raise UserError(
                    f"the model {self._spec.name!r} gives no finite answer for this input; send smaller values"
                )
            return given

        return forward

    def read(self, content: bytes) -> torch.Tensor:
        """The parameters (size,) in the file of a version. UserError when they are not this model's or not finite."""
        try:
            return self._flat.vector_of(published.unpack(content))
        except UserError as error:
            raise UserError(f"the version cannot be used with {self._spec.name!r}: {error}") from None

    @contextmanager
    def holding(self, vector: torch.Tensor) -> Iterator[torch.nn.Module]:
        """The module with the values of `vector`, in evaluation mode; afterwards in training mode with its own."""
        with torch.inference_mode(), self._flat.holding(vector) as module:
            module.eval()
            try:
                yield module
            finally:
                module.train()


class ServedModel:
    """A model that answers from what was loaded last. Not thread-safe."""

    def __init__(self, spec: Spec, *, network_id: bytes, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self.spec = spec
        flat, self.layout = build_flat(spec, network_id, device, trains=False)
        self._vector = flat.vector
        self._answering = Answering(spec, flat, device)
        self._loaded = False

    layout: Layout

    def use_cores(self, threads: int, workers: int = 0) -> tuple[Split, dict[Split, float]]:
        """Predictions use all threads in each operation; there is nothing to measure."""
        torch.set_num_threads(threads)
        return Split(1, threads), {}

    @property
    def batch(self) -> int:
        return self.spec.batch

    @property
    def sample_counts(self) -> dict[str, int]:
        return {"train": 0, "validation": 0, "test": 0}

    def load(self, content: bytes) -> None:
        """Answer from this version from now on. UserError, and nothing changed, when it does not fit."""
        self._vector.copy_(self._answering.read(content))
        self._loaded = True

    def forward(self) -> predict.Forward:
        """The version loaded last."""
        if not self._loaded:
            raise UserError(f"no version of {self.spec.name!r} has been loaded yet; ask again in a few seconds")
        return self._answering.forward(self._vector)
