"""What models take and give: told by one peer to another, and of all models of the network at once.

A card travels as the JSON `{"model", "version", "peer", "card": {...}}`: see the form `card` of
`gossipml.peer.asking_wire`. What comes in is a stranger's: lengths and forms are checked before anybody shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict

import trio

from gossipml import strict_json
from gossipml.api.ports import JSON, ModelCard, NotReady, PredictAnswer, TensorSpec, UnknownModel
from gossipml.errors import RemoteError, UserError
from gossipml.models.spec import DATATYPES, MAX_SAMPLE_VALUES

MAX_CARD = 1 << 18  # bytes: the names of 4,096 columns have 100 kB
MAX_TENSORS = 16
MAX_DIMENSIONS = 8
MAX_TEXT = 256  # characters of a name
MAX_VERSIONS = 1024
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOLD = ("platform", "inputs", "outputs", "labels", "features", "picture", "versions")
_TENSOR = ("name", "datatype", "shape")

FRESH_SECONDS = 20.0  # before others are asked again, for a list of all models
WAIT_SECONDS = 2.0  # for their answers: a list is better soon than whole
AT_ONCE = 8


def write_card(card: ModelCard, peer: str) -> bytes:
    """For another peer. UnknownModel when the card is beyond what `read_card` takes."""
    told: dict[str, JSON] = {name: value for name, value in asdict(card).items() if name in _TOLD}
    data = strict_json.dump({"model": card.name, "version": card.version, "peer": peer, "card": told})
    try:
        read_card(PredictAnswer(card.version, peer, data))
    except RemoteError as error:
        raise UnknownModel(f"what the model {card.name} takes and gives cannot be told: {error}") from None
    return data


def read_card(answer: PredictAnswer) -> ModelCard:
    """The card in another peer's answer, whose model and version were checked before. RemoteError when it is none."""
    if len(answer.body) > MAX_CARD:
        raise RemoteError(f"a card of {len(answer.body)} bytes is over the limit of {MAX_CARD}")
    try:
        value = strict_json.parse(answer.body)
    except UserError as error:
        raise RemoteError(f"a card that is no JSON: {error}") from None
    model, given = (value.get("model"), value.get("card")) if isinstance(value, dict) else (None, None)
    if not isinstance(given, dict) or given.keys() != set(_TOLD):
        raise RemoteError(f"a card is an object of {', '.join(_TOLD)}")
    versions, picture = _texts(given["versions"], MAX_VERSIONS), _numbers(given["picture"], 3, low=1)
    if answer.version not in versions or not all(map(_VERSION.fullmatch, versions)):
        raise RemoteError("a card has an impossible version, or lacks its own")
    if len(picture) not in (0, 3) or math.prod(picture) > MAX_SAMPLE_VALUES:
        raise RemoteError(f"a card has a picture of {picture}")
    return ModelCard(
        name=_text(model),
        version=answer.version,
        platform=_text(given["platform"]),
        inputs=_tensors(given["inputs"]),
        outputs=_tensors(given["outputs"]),
        ready=True,
        labels=_texts(given["labels"]),
        features=_texts(given["features"]),
        picture=picture,
        versions=versions,
    )


def _tensors(value: JSON) -> tuple[TensorSpec, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TENSORS:
        raise RemoteError(f"a card lists 1 to {MAX_TENSORS} tensors")
    return tuple(_tensor(tensor) for tensor in value)


def _tensor(value: JSON) -> TensorSpec:
    if not isinstance(value, dict) or value.keys() != set(_TENSOR) or _text(value["datatype"]) not in DATATYPES:
        raise RemoteError(f"a tensor is an object of {', '.join(_TENSOR)}, of a known datatype")
    return TensorSpec(_text(value["name"]), _text(value["datatype"]), _numbers(value["shape"], MAX_DIMENSIONS, low=-1))


def _texts(value: JSON, most: int = MAX_CARD) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise RemoteError(f"a card has no list of at most {most} names")
    return tuple(_text(item) for item in value)


def _text(value: JSON) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise RemoteError(f"a card has a name that is no text of at most {MAX_TEXT} characters")
    return value


def _numbers(value: JSON, most: int, *, low: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise RemoteError(f"a card has no list of at most {most} lengths")
    return tuple(_number(item, low) for item in value)


def _number(value: JSON, low: int) -> int:
    if type(value) is not int or not low <= value <= MAX_SAMPLE_VALUES:
        raise RemoteError(f"a card has a length that is not from {low} to {MAX_SAMPLE_VALUES}")
    return value


class Cards:
    """Of all models of the network. What others say is remembered for a while: a page asks every few seconds."""

    def __init__(self, here: Callable[[], Iterable[ModelCard]], there: Callable[[str], Awaitable[ModelCard]]) -> None:
        """`here`: the cards of this peer; `there`: the card of a model from whoever has it, raising as
        `gossipml.api.ports.Node.card` does."""
        self._here = here
        self._there = there
        self._asked: dict[str, tuple[float, ModelCard]] = {}

    async def of(self, names: Iterable[str]) -> list[ModelCard]:
        """Those of this peer, and of the models of these names."""
        cards = {card.name: card for card in self._here()}
        elsewhere = [name for name in dict.fromkeys((*cards, *names)) if name not in cards or not cards[name].ready]
        self._asked = {name: self._asked[name] for name in elsewhere if name in self._asked}
        limiter, now = trio.CapacityLimiter(AT_ONCE), trio.current_time()

        async def ask(name: str) -> None:
            async with limiter:
                try:
                    self._asked[name] = now, await self._there(name)
                except (UnknownModel, NotReady) as error:
                    self._asked[name] = now, _unready(name, str(error))

        with trio.move_on_after(WAIT_SECONDS):
            async with trio.open_nursery() as nursery:
                for name in elsewhere:
                    if name not in self._asked or now - self._asked[name][0] > FRESH_SECONDS:
                        nursery.start_soon(ask, name)
        for name in elsewhere:
            if name not in self._asked:
                self._asked[name] = now, _unready(name, f"nobody has said yet what the model {name} takes; ask again")
            card = self._asked[name][1]
            if card.ready or name not in cards:
                cards[name] = card
        return list(cards.values())


def _unready(name: str, reason: str) -> ModelCard:
    return ModelCard(name, "", "", (), (), ready=False, reason=reason)
