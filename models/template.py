"""The text of a model file to begin with: `gossipml models new`.

It is written for one data source: the shape of a sample, the classes, the columns and the normalisation stand in it
as constants. So it trains as it is, and given to every peer it is what all agree on: their digests are the same, their
columns have one order, and a value means the same everywhere ("agreed" normalisation; without a file the built-in
models of tables learn it locally).
"""

from __future__ import annotations

import math
import re

from gossipml.models.data_fit import describe
from gossipml.models.dataset import Dataset
from gossipml.models.spec import NAME, Facts

DIGITS = 6  # of the numbers that are written
WIDTH = 90

HEAD = '''"""A model for gossipml, written by `gossipml models new`. Train it:

    gossipml peer start --model {file}:Spec

Give this file to every peer that shall train together: what stands here is what they agree on. Change what you like;
Classifier has defaults for everything but name, input_shape, labels and build (gossipml.models.spec
describes the rest).
"""

from __future__ import annotations

{imports}

class Spec(Classifier):
    name = "{name}"  # what it is called in the network, and in /predict/{name}
    data = {source}  # what it trains on where --data is not given
    input_shape = {shape}  # of a sample, as the data source has it
    batch = {batch}
    learning_rate = {rate}
    momentum = 0.9
'''

CLASSES = """
    # The classes, in the order of the outputs. A peer may have data of some of them only.
    labels = {labels}
"""

COLUMNS = """
    # The columns, in their order; also the parameters of a prediction: /predict/{name}?COLUMN=VALUE&...
    features = {features}
"""

NORMALISATION = """
    # Subtracted from and divided into every sample, measured on the data.
    mean = {mean}
    scale = {scale}
"""

FLAT = '''
    def build(self) -> torch.nn.Module:
        """The module. It draws its first parameters from torch's generator, which is seeded alike for all peers."""
        from torch import nn

        return nn.Sequential(nn.Flatten(), nn.Linear({inputs}, 64), nn.ReLU(), nn.Linear(64, {outputs}))
'''

PICTURE = '''
    def build(self) -> torch.nn.Module:
        """The module. It draws its first parameters from torch's generator, which is seeded alike for all peers."""
        from torch import nn

        return nn.Sequential(
            nn.Conv2d({channels}, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(16),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, {outputs}),
        )

    def ingest(self, samples: Array) -> Array:
        """Raw samples (n, height, width, channels) as float32 (n, channels, height, width)."""
        return np.ascontiguousarray(super().ingest(samples).transpose(0, 3, 1, 2))
'''

VALUES = '''
    # The mean and deviation of the values to predict: the module gives (value - MIDDLE) / SPREAD.
    MIDDLE, SPREAD = {middle}, {spread}

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("value", "FP32", (-1, 1)),)

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        """One answer for each row of the module's outputs."""
        return [{{"value": float(row[0]) * self.SPREAD + self.MIDDLE}} for row in outputs]

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - (targets - self.MIDDLE) / self.SPREAD).square().mean()

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """`accuracy`, 0 to 1, decides what is served: here R2."""
        return {{"accuracy": max(0.0, 1.0 - float(self.loss(outputs, targets)))}}
'''


def write_template(data: Dataset, name: str, file: str = "") -> str:
    """The file's text."""
    facts = describe(data)
    picture = len(facts.sample_shape) == 3
    mean, scale = _normalisation(data, facts)
    outputs = len(facts.labels) or 1
    text = HEAD.format(
        file=file if re.fullmatch(r"[\w./-]+", file) else "my_model.py",
        source=_pretty(data.source),
        imports=_imports(picture=picture, values=not facts.labels),
        name=name,
        shape=facts.sample_shape,
        batch=32 if len(data.train) >= 1000 else 16,
        rate=0.05 if facts.labels else 0.01,
    )
    if facts.labels:
        text += CLASSES.format(labels=_pretty(facts.labels))
    if facts.features:
        text += COLUMNS.format(name=name, features=_pretty(facts.features))
    text += NORMALISATION.format(mean=_pretty(mean), scale=_pretty(scale))
    if not facts.labels:
        text += VALUES.format(middle=_short(facts.target_mean), spread=_short(facts.target_scale))
    if picture:
        return text + PICTURE.format(channels=facts.sample_shape[2], outputs=outputs)
    return text + FLAT.format(inputs=math.prod(facts.sample_shape), outputs=outputs)


def model_name(stem: str) -> str:
    """A name for the network out of a file's name."""
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:64]
    return name if NAME.fullmatch(name) else "my-model"


def _imports(*, picture: bool, values: bool) -> str:
    names = ["Array", "Classifier"] if picture or values else ["Classifier"]
    if values:
        names += ["Json", "TensorSpec"]
    lines = ["from typing import TYPE_CHECKING", ""]
    if picture:
        lines += ["import numpy as np", ""]
    lines += [f"from gossipml.models.spec import {', '.join(names)}", "", "if TYPE_CHECKING:", "    import torch", ""]
    return "\n".join(lines)


def _normalisation(data: Dataset, facts: Facts) -> tuple[tuple[float, ...] | float, tuple[float, ...] | float]:
    """A mean and deviation for each column of a table; for pixels (bytes) one for all."""
    if len(facts.mean) == 1 or data.train.inputs.dtype.kind == "f":
        mean, scale = tuple(map(_short, facts.mean)), tuple(map(_short, facts.scale))
        return (mean[0], scale[0]) if len(mean) == 1 else (mean, scale)
    middle = sum(facts.mean) / len(facts.mean)
    spread = sum(s * s + (m - middle) ** 2 for m, s in zip(facts.mean, facts.scale, strict=True)) / len(facts.mean)
    return _short(middle), _short(math.sqrt(spread))


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _pretty(value: object) -> str:
    """As Python writes it, in lines that fit. What came from a file can end neither the text nor the line."""
    if isinstance(value, str):
        text = repr(value)
        return text if '"' in text else f'"{text[1:-1]}"'
    if not isinstance(value, tuple):
        return repr(value)
    items = [f"{_pretty(item)}," for item in value]
    if sum(map(len, items)) < WIDTH:
        return f"({' '.join(items).removesuffix(',') if len(items) > 1 else ''.join(items)})"
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) > WIDTH:
            lines.append("")
        lines[-1] += f" {item}" if lines[-1] else item
    return "(\n" + "".join(f"        {line}\n" for line in lines) + "    )"
