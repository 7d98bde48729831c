"""The component interface of a model: what a user writes to bring one.

    from gossipml.models.spec import Classifier

    class Spec(Classifier):
        name = "my-digits"
        data = "digits"
        input_shape = (64,)
        labels = tuple("0123456789")

        def build(self):
            import torch
            return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

        def ingest(self, samples):
            return samples.astype("float32") / 16

`gossipml peer start --model my_model.py:Spec` trains it; `gossipml models new my_model.py` writes a longer one to
begin with. `build` draws its initial parameters from torch's
global generator alone: it is seeded so that every peer of a network starts from the same ones.

This file imports torch inside functions only, so that names and shapes are known without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

if TYPE_CHECKING:
    import torch

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Array: TypeAlias = NDArray[Any]  # the element type is the data source's: uint8 images, float32 features

StandardLoss: TypeAlias = Literal["cross-entropy", "squared-error-of-classes", "binary-cross-entropy"]
F = TypeVar("F", bound=Callable[..., object])

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # also the name in URLs and of files

DATATYPES: Final = {  # Open Inference Protocol, "Tensor Data Types"; BYTES is text in JSON
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}

MAX_SAMPLE_VALUES: Final = 1 << 24  # an image of 2364 x 2364 x 3; bounds what one request may claim


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as the Open Inference Protocol names it; the first dimension of `shape` is -1, the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sgd:
    """Plain stochastic gradient descent, as `torch.optim.SGD` without dampening and Nesterov.

    Asked for by this name because making any `torch.optim` optimiser imports 800 modules: 75 MB and 1.7 s.
    """

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    @property
    def has_velocity(self) -> bool:
        """Whether a step is along anything else than the gradient."""
        return bool(self.momentum or self.weight_decay)


@dataclass(frozen=True)
class Facts:
    """What a data source shows before training."""

    source: str
    sample_shape: tuple[int, ...]
    labels: tuple[str, ...]
    """Names of the classes; empty where the targets are values."""
    features: tuple[str, ...]
    """Names of the values of a sample; empty where they have none."""
    mean: tuple[float, ...]
    """Of each value of a row of a table, over the train part; of pictures and the like one number for all values."""
    scale: tuple[float, ...]
    """Their standard deviations, 1 for a constant."""
    target_mean: float
    target_scale: float


class Spec(Protocol):
    """A model. `Classifier` gives all but `name`, `input_shape`, `labels` and `build`."""

    @property
    def name(self) -> str:
        """What it is called in the network: `[a-z0-9][a-z0-9_-]{0,63}`."""

    @property
    def data(self) -> str:
        """The source that it trains on when the user names none; empty when there is no such source."""

    @property
    def batch(self) -> int:
        """Samples per optimiser step."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """One tensor: a sample as requests bring it, before `ingest`."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The fields of an answer of `egest` that the Open Inference Protocol shows as tensors."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the input values for query parameters, in order; empty when they have none."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty when the model does not classify."""

    def build(self) -> torch.nn.Module: ...

    def ingest(self, samples: Array) -> Array:
        """Raw samples (n, ...) of the data source or of a request as float32 (n, ...) for the module."""

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        """One answer per row of the module's outputs."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The scalar to minimise, a mean over the batch."""

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """Means over the batch; `accuracy`, 0 to 1, decides what is served."""

    def optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | Sgd: ...


class Adaptive(Spec, Protocol):
    """A model whose numbers of inputs and outputs depend on the data."""

    def adapt(self, facts: Facts) -> Spec:
        """The model for this source; UserError when there is none."""


def adapts(spec: Spec) -> TypeGuard[Adaptive]:
    """Whether the model takes its shape from the data."""
    return callable(getattr(spec, "adapt", None))


def agreement(spec: Spec) -> list[str | float]:
    """What two peers must have alike beside the shapes, or their averages mean nothing: the classes and values in
    their order, and the normalisation where the specification fixes one. Part of the layout's digest; a model that
    is no `Classifier` may say more as `agreed`."""
    given = getattr(spec, "agreed", ())
    return [float(value) if isinstance(value, float | int) else str(value) for value in given]


def standard_loss(kind: StandardLoss) -> Callable[[F], F]:
    """Says of a method `loss` that it is one of the usual ones (see `losses`), whose gradient need not be derived.
    The mark is the function's: a `loss` that overrides it has none, and is derived as it stands."""

    def mark(function: F) -> F:
        function.standard_loss = kind  # type: ignore[attr-defined]  # read by `losses.loss_of`
        return function

    return mark


class Classifier:
    """A model that gives one score per class: cross-entropy, accuracy, SGD with momentum.

    `ingest` brings samples into `input_shape`, and subtracts `mean` and divides by `scale` where they are given (a
    number for all values, or one for each).
    """

    name: str = ""
    data: str = ""
    batch: int = 32
    input_shape: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    picture: tuple[int, int, int] | None = None
    """Height, width and channels of the pictures that a model of flat samples takes."""
    white: float = 255.0
    """The value of a white pixel in a sample; black is 0."""
    mean: tuple[float, ...] | float = 0.0
    scale: tuple[float, ...] | float = 1.0
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0

    @property
    def agreed(self) -> tuple[str | float, ...]:
        """See `agreement`."""
        mean, scale = (np.ravel(values).tolist() for values in (self.mean, self.scale))
        return (*self.labels, "|", *self.features, "|", *mean, "|", *scale)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("input", "FP32", (-1, *self.input_shape)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("probabilities", "FP32", (-1, len(self.labels))),
            TensorSpec("label", "BYTES", (-1, 1)),
        )

    def build(self) -> torch.nn.Module:
        raise UserError(f"the model {self.name!r} has no build(); return the torch module from it")

    def ingest(self, samples: Array) -> Array:
        shaped = np.asarray(samples, dtype=np.float32).reshape(len(samples), *self.input_shape)
        if not np.any(self.mean) and np.all(np.equal(self.scale, 1.0)):
            return shaped
        return standardise(shaped, self.mean, self.scale)

    def egest(self, outputs: Array) -> list[dict[str, Json]]:
        shifted = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)  # (n, classes)
        return [
            {"label": self.labels[int(row.argmax())], "probabilities": [round(float(p), 6) for p in row]}
            for row in probabilities
        ]

    @standard_loss("cross-entropy")
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    def optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | Sgd:
        return Sgd(self.learning_rate, self.momentum, self.weight_decay)


def standardise(samples: Array, mean: tuple[float, ...] | float, scale: tuple[float, ...] | float) -> Array:
    """(samples - mean) / scale along the last axis, as float32 (n, ...). In float64 between: years differ by less
    than float32 keeps of their squares."""
    exact = np.asarray(samples, dtype=np.float64)
    standard: Array = ((exact - np.asarray(mean)) / np.asarray(scale)).astype(np.float32)
    return standard


_METHODS: Final = ("build", "ingest", "egest", "loss", "metrics", "optimiser")
_VALUES: Final = ("name", "data", "batch", "inputs", "outputs", "features", "labels")


def check_interface(candidate: object, where: str) -> Spec:
    """`candidate` as a `Spec`, or UserError naming everything that is missing or wrong. A class is called."""
    if isinstance(candidate, type):
        try:
            candidate = candidate()
        except Exception as error:
            raise UserError(f"{where} cannot be made without arguments: {type(error).__name__}: {error}") from error
    missing = [f"{name}()" for name in _METHODS if not callable(getattr(candidate, name, None))]
    missing += [name for name in _VALUES if not hasattr(candidate, name)]
    if missing:
        raise UserError(
            f"{where} is not a model: it lacks {', '.join(missing)}; derive it from gossipml.models.spec.Classifier "
            "or write what is missing"
        )
    spec: Spec = candidate  # type: ignore[assignment]  # checked by hand just above
    if type(candidate).build is Classifier.build if isinstance(candidate, Classifier) else False:
        raise UserError(f"{where} is not a model: it lacks build(); return the torch module from it")
    if not isinstance(spec.name, str) or not NAME.fullmatch(spec.name):
        raise UserError(
            f"{where} is named {spec.name!r}; a name is 1 to 64 of a-z, 0-9, - and _, and begins with a letter or digit"
        )
    if not isinstance(spec.batch, int) or isinstance(spec.batch, bool) or not 1 <= spec.batch <= 1 << 20:
        raise UserError(f"{where}: batch is {spec.batch!r}; it is a whole number from 1 to {1 << 20}")
    _check_tensors(spec, where)
    if isinstance(candidate, Classifier):
        _check_normalisation(candidate, where)
    return spec


def sample_shape(spec: Spec) -> tuple[int, ...]:
    """Shape of one raw sample of a request."""
    return spec.inputs[0].shape[1:]


def picture_shape(spec: Spec) -> tuple[int, int, int] | None:
    """Height, width and channels (1, 3 or 4: grey, RGB, RGBA) in which the model takes a picture; None when its
    samples are no pictures."""
    given, shape = getattr(spec, "picture", None), sample_shape(spec)
    if given is not None:
        height, width, channels = given
        return height, width, channels
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        return shape[0], shape[1], shape[2]
    return (shape[0], shape[1], 1) if len(shape) == 2 else None


def _check_normalisation(spec: Classifier, where: str) -> None:
    last = spec.input_shape[-1] if spec.input_shape else 1
    for name, values in (("mean", spec.mean), ("scale", spec.scale)):
        try:
            numbers = np.ravel(np.asarray(values, dtype=np.float64))
        except (ValueError, TypeError):
            numbers = np.empty(0)
        if len(numbers) not in (1, last) or not np.isfinite(numbers).all() or (name == "scale" and not numbers.all()):
            raise UserError(
                f"{where}: {name} is one finite number, or {last} of them{', none of them 0' * (name == 'scale')}"
            )


def _check_tensors(spec: Spec, where: str) -> None:
    if len(spec.inputs) != 1 or not spec.outputs:
        raise UserError(
            f"{where} has {len(spec.inputs)} inputs and {len(spec.outputs)} outputs; it needs one input and at least "
            "one output (for a Classifier: set input_shape and labels)"
        )
    for tensor in (*spec.inputs, *spec.outputs):
        if tensor.datatype not in DATATYPES:
            raise UserError(
                f"{where}: tensor {tensor.name!r} has datatype {tensor.datatype!r}; use one of {', '.join(DATATYPES)}"
            )
        if tensor.shape[:1] != (-1,) or any(not isinstance(n, int) or n < 1 for n in tensor.shape[1:]):
            raise UserError(
                f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}; it is -1 and then positive numbers "
                "(for a Classifier: set input_shape and labels)"
            )
        if math.prod(tensor.shape[1:]) > MAX_SAMPLE_VALUES:
            raise UserError(f"{where}: tensor {tensor.name!r} has over {MAX_SAMPLE_VALUES} values a sample")
    picture = getattr(spec, "picture", None)
    if picture is not None and (len(picture) != 3 or math.prod(picture) != math.prod(sample_shape(spec))):
        raise UserError(
            f"{where}: picture is {picture!r}; it is height, width and channels, in all "
            f"{math.prod(sample_shape(spec))} values"
        )
    if spec.features and len(spec.features) != math.prod(sample_shape(spec)):
        raise UserError(
            f"{where}: {len(spec.features)} feature names for {math.prod(sample_shape(spec))} input values; give one "
            "name a value, or none"
        )
