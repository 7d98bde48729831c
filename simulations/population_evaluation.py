"""How good peers' models are on the common test data, and how far apart they are."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence

import torch

from gossipml.models.batches import Samples
from gossipml.models.dataset import Dataset
from gossipml.models.flat import FlatModule
from gossipml.models.spec import Spec
from gossipml.simulations.population_training import INGESTED_MOST, Threads

CHUNK = 2048  # test samples at once: outputs of wide layers fit the cache


class Judge:
    """Measures parameter vectors. Each thread has a module of its own."""

    def __init__(self, spec: Spec, data: Dataset, flat: FlatModule, device: torch.device, threads: Threads) -> None:
        self._spec = spec
        self._module = copy.deepcopy(flat.module)
        self._device = device
        self._threads = threads
        self._own = threading.local()
        self._test = Samples(spec, data.test, device, keep=INGESTED_MOST)

    def scores(self, x: torch.Tensor, rows: Sequence[int]) -> list[tuple[float, float]]:
        """Accuracy and mean loss of these rows of `x` (N, size), on all test samples."""
        found = [(0.0, 0.0)] * len(rows)

        def job(place: int) -> None:
            found[place] = self.score(x[rows[place]])

        self._threads.map(job, range(len(rows)))
        return found

    def score(self, vector: torch.Tensor) -> tuple[float, float]:
        """Of one vector (size,)."""
        flat: FlatModule | None = getattr(self._own, "flat", None)
        if flat is None:
            flat = self._own.flat = FlatModule(copy.deepcopy(self._module).eval(), self._device, trains=False)
        accuracy = loss = 0.0
        with torch.inference_mode(), flat.holding(vector) as module:
            for start in range(0, len(self._test), CHUNK):
                inputs, targets = self._test.between(start, start + CHUNK)
                outputs = module(inputs)
                accuracy += self._spec.metrics(outputs, targets)["accuracy"] * len(targets)
                loss += float(self._spec.loss(outputs, targets)) * len(targets)
        loss /= len(self._test)
        return accuracy / len(self._test), loss if math.isfinite(loss) else 1e30
