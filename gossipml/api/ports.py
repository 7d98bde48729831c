"""What the HTTP endpoint needs of the daemon: the `Node` interface and the values that cross it.

Everything here is JSON-able. Numbers handed to the endpoint should be finite: JSON has no word for the others,
and they leave as null.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from gossipml.errors import GossipmlError
from gossipml.strict_json import JSON as JSON


@dataclass(frozen=True)
class Health:
    """An answer to a probe."""

    ok: bool
    sentence: str
    """What is wrong and what helps, or that all is well; for people."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model, in the words of the Open Inference Protocol."""

    name: str
    datatype: str
    """BOOL, UINT8 to UINT64, INT8 to INT64, FP16, FP32, FP64 or BYTES."""
    shape: tuple[int, ...]
    """-1 where any length goes; the first axis is the batch."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked about, here or elsewhere."""

    name: str
    version: str
    """The version that answers now; empty when none does yet."""
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ready: bool
    reason: str = ""
    """Why it is not ready, a sentence; empty when it is."""
    labels: tuple[str, ...] = ()
    """What the classes of a classifier are called."""
    features: tuple[str, ...] = ()
    """What the values of a sample are called; empty where they have no names."""
    picture: tuple[int, ...] = ()
    """Height, width and channels of the pictures that it takes; empty where it takes none."""
    versions: tuple[str, ...] = ()
    """All that can be asked for where it is, the one that answers first."""


Form: TypeAlias = Literal["json", "picture", "csv", "infer"]
"""How the body of a prediction is to be read; see `gossipml.models.predict`."""


@dataclass(frozen=True)
class PredictRequest:
    """What a client asks, unread: whoever has the model reads it, so that it can be handed on as it is."""

    form: Form
    body: bytes = field(repr=False)
    json_size: int | None = None
    """For `infer`: how many bytes of the body are JSON; binary tensors follow (Inference-Header-Content-Length)."""
    version: str = ""
    """The version that must answer, a beginning of its id; empty for whichever is served."""
    seconds: float = 30.0
    """The time that the client gives for the answer."""


@dataclass(frozen=True)
class PredictAnswer:
    version: str
    """What computed it."""
    peer: str
    """Who computed it."""
    body: bytes = field(repr=False)
    """What the client gets; it names model, version and peer."""
    json_size: int | None = None
    """How many bytes of the body are JSON, where binary tensors follow."""


@dataclass(frozen=True)
class Prediction:
    """A prediction that was asked for over HTTP, for the audit log."""

    route: str
    """The path, or who asked where another peer did."""
    model: str
    status: int
    seconds: float
    given: bytes
    """The query or the body."""
    answer: bytes
    """The body of the answer, or the sentence of a refusal."""
    head: int
    """Bytes of the answer that are JSON."""


@dataclass(frozen=True)
class Metric:
    """One sample for Prometheus. All samples of one name carry the same kind and help."""

    name: str
    """By the conventions of Prometheus: `gossipml_bytes_sent_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    suffix: str = ""
    """Of a histogram's sample: `_bucket`, `_sum`, `_count`."""


@dataclass(frozen=True)
class Event:
    """Something that happened, for whoever watches."""

    kind: str
    """A short lower-case word: `round`, `merge`, `peer`, `health`."""
    data: dict[str, JSON]


class UnknownModel(GossipmlError):
    """No model, or no version of it, has that name here. The endpoint answers 404."""


class NotReady(GossipmlError):
    """Nothing to answer with yet; the message says what is missing. The endpoint answers 503."""

    def __init__(self, sentence: str, retry_after: int = 5) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class Overloaded(NotReady):
    """More was asked than can be answered; the endpoint answers 503."""

    def __init__(self, sentence: str, retry_after: int = 1) -> None:
        super().__init__(sentence, retry_after)


class Library(Protocol):
    """The published models of the network. Names and versions are the client's text, unread; a version is any
    unambiguous beginning of its id, empty for the latest.

    Raises UserError for a wrong request, UnknownModel when there is no such model or version, RemoteError when nobody
    gives it.
    """

    async def names(self) -> list[str]:
        """Of all models that are published, as far as they can be seen from here."""

    async def table(self) -> list[dict[str, JSON]]:
        """One line a model: its latest version, size, live replicas."""

    async def show(self, name: str) -> dict[str, JSON]:
        """The versions of a model, newest first, and who holds them."""

    async def publish(self, name: str, file: str, note: str) -> dict[str, JSON]:
        """Make a new version: of the model in training, or of a file that lies in HOME/models/incoming."""

    async def pull(self, name: str, version: str) -> dict[str, JSON]:
        """Begin to fetch a version, or say that it is here; `transfers` tells how it goes on."""

    async def rollback(self, name: str, version: str) -> dict[str, JSON]: ...

    async def pin(self, name: str, version: str, pinned: bool) -> dict[str, JSON]:
        """Keep a version here whatever comes after it, or no longer."""

    async def remove(self, name: str, version: str) -> dict[str, JSON]:
        """Remove a version from this peer, or all of a model when `version` is empty."""

    def transfers(self) -> list[dict[str, JSON]]:
        """Downloads under way, and those that ended a moment ago."""


class Node(Protocol):
    """The daemon as its HTTP endpoint sees it. Only models, predictions and the library may take their time."""

    @property
    def library(self) -> Library: ...

    def status(self) -> dict[str, JSON]:
        """What the peer is and does: the body of `/v1/status`."""

    def peers(self) -> list[dict[str, JSON]]:
        """Who else is in the network, as far as this peer knows: the body of `/v1/peers`."""

    def health(self) -> Health:
        """Alive; not ok when a part keeps crashing."""

    def readiness(self) -> Health:
        """Has trained or fetched a model and can answer for it."""

    def history(self) -> list[dict[str, JSON]]:
        """How the learning went since the start, oldest first: `uptime` in seconds, `round`, `loss`, `accuracy`."""

    async def pause(self) -> str:
        """Train no more until `resume`, over restarts too; the state afterwards in a sentence. UserError for a peer
        that trains nothing."""

    async def resume(self) -> str:
        """Train again; the state afterwards in a sentence, which says what else keeps it from training."""

    async def models(self, names: Iterable[str]) -> Sequence[ModelCard]:
        """Those that are on this peer, and of these names, within seconds; without inputs and outputs where these are
        not known yet."""

    async def card(self, model: str, version: str = "") -> ModelCard:
        """A model or a version of it, wherever it is, with inputs and outputs. Raises as `predict` does."""

    async def load(self, model: str) -> None:
        """Have the newest version of a model here and in memory, from now on. Raises as `predict` does."""

    async def unload(self, model: str) -> None:
        """Out of memory, until it is asked for again, and newer versions are not fetched any more. UserError for the
        model that this peer trains."""

    def metrics(self) -> Sequence[Metric]: ...

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        """Answer for a model.

        Raises UserError when the input is refused, UnknownModel when there is no such model or version, NotReady,
        Overloaded, RemoteError when another peer was asked and failed. The caller cancels it when the time is over.
        """

    def record(self, prediction: Prediction) -> None:
        """Be told of a prediction, answered or refused; returns at once."""

    def subscribe(self) -> AbstractContextManager[AsyncIterator[Event]]:
        """Events from now on, until the block is left; see `gossipml.api.broadcast`. Raises Overloaded when too
        many watch."""
