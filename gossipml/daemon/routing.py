"""Any peer answers for any model: a prediction for a model that is not here, or that cannot be answered here now, is
asked of a peer that has it (docs/decisions/0009).

    predict -> here -> answer
            -> not here, not ready, overloaded -> peers that have it -> one of them, another when it is slow or fails
    a stream of another peer -> here, never further

Who has a model: whoever holds the version that is asked for (the newest one, without any), as the DHT says, and whoever
trains it. Whom of them to ask is decided in `gossipml.peer.asking`. A model that is asked for often is fetched, and
answered from here from then on.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

import trio

from gossipml.api.ports import (
    Form,
    ModelCard,
    NotReady,
    Overloaded,
    PredictAnswer,
    Prediction,
    PredictRequest,
    UnknownModel,
)
from gossipml.daemon.cards import read_card, write_card
from gossipml.daemon.node import Node
from gossipml.env import ASK
from gossipml.errors import RemoteError, UserError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Contact, PeerId, format_peer_id, short_peer_id
from gossipml.models.registry import nearest
from gossipml.models.store_rules import MIN_PREFIX
from gossipml.peer import asking as a
from gossipml.peer import asking_wire as w
from gossipml.peer.asking_stream import Answerer, Asker, AskingConfig, Busy

log = logging.getLogger("gossipml.routing")

FORMS: dict[str, Form] = {"json": "json", "picture": "picture", "csv": "csv", "infer": "infer"}
STATUS: dict[w.Code, int] = {"input": 400, "unknown": 404, "busy": 503}  # of HTTP, in the audit log

MAX_FORWARDED = 1024  # predictions that we wait for at others
FRESH_SECONDS = 10.0  # who has a model is looked up anew, without waiting for it, when it is older
LEAST_LOOK_SECONDS = 0.5  # between two looks for one model
LOOK_SECONDS = 5.0  # for one look into the DHT
LOOKS = 8  # at once
MAX_SOURCES = 256  # models and versions whose holders are remembered
SHARE_OF_TIME = 0.95  # of the client's: the rest is for saying that nobody answered
OVERLOADED_SECONDS = 2.0  # for others to answer what we have no room for; then the client hears of it
PULL_SECONDS = 60.0
MAX_PULLED = 8  # models fetched because they were asked for
TIDY_SECONDS = 10.0
NAMES_SECONDS = 1.0  # for what there is where somebody asks for what there is not
CARD_SECONDS = 3.0  # for others to say what a model takes and gives

T = TypeVar("T")


class Local(Protocol):
    """The predictions that are computed on this peer: `gossipml.daemon.serving.Serving`."""

    @property
    def waiting(self) -> int: ...

    def has(self, model: str) -> bool: ...

    def could_have(self, model: str) -> bool: ...

    async def warm(self, model: str) -> None: ...

    async def card(self, model: str, version: str = "") -> ModelCard: ...

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer: ...


@dataclass(frozen=True)
class RoutingConfig:
    pull_after: int = 100
    """Predictions of a model that is not here, within a minute, after which it is fetched; 0 for never."""
    asking: AskingConfig = field(default_factory=AskingConfig)


@dataclass
class RoutingStats:
    """Counters since the start."""

    forwarded: int = 0
    """Predictions that others were asked for."""
    extra: int = 0
    """Asked of one more peer, because the first was slow."""
    again: int = 0
    """Asked of one more peer, because the first failed."""
    unanswered: int = 0
    """That nobody answered."""
    served: int = 0
    """Answered for others."""


@dataclass
class _Sources:
    """Who has a model, or a version of it."""

    contacts: dict[PeerId, Contact] = field(default_factory=dict)
    looked: float = -math.inf
    looking: trio.Event | None = None


@dataclass(frozen=True)
class _Question(Generic[T]):
    """Something that any peer which has a model can answer."""

    model: str
    version: str
    seconds: float
    here: Callable[[], Awaitable[T]]
    """Answers it on this peer."""
    ask: w.Ask
    """For others, but for the time."""
    body: bytes
    there: Callable[[PredictAnswer], T]
    """Reads the answer of another peer; RemoteError when it is none."""
    answerers: a.Answerers
    hedging: a.Hedging
    stats: RoutingStats


@dataclass(frozen=True)
class _Got(Generic[T]):
    content: T


class Routing:
    """`predict` and `card` for the endpoint, `run` for the supervisor."""

    def __init__(
        self, node: Node, local: Local, config: RoutingConfig | None = None,
        record: Callable[[Prediction], None] = lambda prediction: None,
    ) -> None:  # fmt: skip
        """`record` is told of what is answered for others."""
        self.stats = RoutingStats()
        self._node = node
        self._local = local
        self._config = config or RoutingConfig()
        self._record = record
        self._own = node.credentials.identity.peer_id
        self._now = node.env.clock.now
        self._asker = Asker(node.env, node.credentials, self._config.asking)
        self._answerers = a.Answerers(node.env.rng)
        self._hedging = a.Hedging()
        self._cards = a.Answerers(node.env.rng), a.Hedging()  # apart: how fast these are says nothing of predictions
        self._sources: OrderedDict[tuple[str, str], _Sources] = OrderedDict()
        self._looks = trio.CapacityLimiter(LOOKS)
        self._waiting = 0
        self._asked: Counter[str] = Counter()  # of models that are not here, since `_counted_from`
        self._counted_from = -math.inf
        self._pulled: set[str] = set()
        self._pulling: set[str] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer for others until cancelled; inside of `Node.running`."""
        answerer = Answerer(self._node.env, self._answer_for, self._node.mesh.blame, self._config.asking)
        self._node.mesh.accept(ASK, answerer.serve)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(TIDY_SECONDS)
                    await self._asker.tidy()
        finally:
            self._nursery = None
            await self._asker.close()

    # Answering for others

    async def _answer_for(self, peer: PeerId, ask: w.Ask, body: bytes) -> tuple[w.FromAnswerer, bytes]:
        if ask.form == w.CARD:
            return await self._answered(ask, partial(self._describe, ask))
        begun = self._now()
        answer, data = await self._answered(ask, partial(self._compute, ask, body))
        match answer:
            case w.Answer(_, json_size):
                self.stats.served += 1
                status, told, head = 200, data, len(data) if json_size is None else json_size
            case w.No(code, reason):
                status, told, head = STATUS[code], reason.encode(), 0
        seconds = self._now() - begun
        self._record(Prediction(f"asked by {short_peer_id(peer)}", ask.model, status, seconds, body, told, head))
        return answer, data

    async def _answered(
        self, ask: w.Ask, compute: Callable[[], Awaitable[PredictAnswer]]
    ) -> tuple[w.FromAnswerer, bytes]:
        try:
            found = await compute()
            return w.Answer(found.version, found.json_size, self._local.waiting, len(found.body)), found.body
        except UserError as error:
            return w.No("input", str(error)), b""
        except UnknownModel as error:
            return w.No("unknown", str(error)), b""
        except NotReady as error:
            return w.No("busy", str(error), error.retry_after), b""
        except Exception:
            log.exception("what another peer asked of %s failed", ask.model)
            return w.No("busy", "gossipml failed inside; the log of that peer says more", 1), b""

    async def _compute(self, ask: w.Ask, body: bytes) -> PredictAnswer:
        request = PredictRequest(FORMS[ask.form], body, ask.json_size, ask.version, ask.wait)
        return await self._local.predict(ask.model, request)

    async def _describe(self, ask: w.Ask) -> PredictAnswer:
        card, peer = await self._card_here(ask.model, ask.version), format_peer_id(self._own)
        return PredictAnswer(card.version, peer, write_card(card, peer))

    # Asking others

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        """See `gossipml.api.ports.Node.predict`."""
        if not self._is_here(model):
            self._count(model)
        ask = w.Ask(model, request.version, request.form, request.json_size, 1.0, len(request.body))
        return await self._anywhere(
            _Question(
                model, request.version, request.seconds, partial(self._local.predict, model, request), ask,
                request.body, lambda answer: answer, self._answerers, self._hedging, self.stats,
            )
        )  # fmt: skip

    async def card(self, model: str, version: str = "") -> ModelCard:
        """What a model takes and gives, wherever it is; not ready only when no peer answers for it. Raises as `predict`
        does for what is not here."""
        here = partial(self._card_here, model, version)
        ask = w.Ask(model, version, w.CARD, None, 1.0, 0)
        try:
            return await self._anywhere(
                _Question(model, version, CARD_SECONDS, here, ask, b"", read_card, *self._cards, RoutingStats())
            )
        except (UnknownModel, NotReady):
            if not self._local.has(model):
                raise
            return await self._local.card(model, version)

    async def _card_here(self, model: str, version: str = "") -> ModelCard:
        card = await self._local.card(model, version)
        if not card.ready:
            raise UnknownModel(card.reason) if card.versions else NotReady(card.reason)
        return card

    def _is_here(self, model: str) -> bool:
        return self._local.has(model) and model not in self._pulling

    async def _anywhere(self, question: _Question[T]) -> T:
        """The answer from here, or else from another peer. Raises as `predict` does."""
        here: UnknownModel | NotReady | None = None
        if self._is_here(question.model):
            try:
                return await question.here()
            except (UnknownModel, NotReady) as error:
                here = error
        answer = await self._forward(question, here)
        if not isinstance(answer, a.GiveUp):
            return answer
        if here is None and answer.unknown:
            try:
                return await question.here()  # which says whether there will be one here
            except NotReady as error:
                here = error
            except UnknownModel:
                raise await self._nowhere(question.model, question.version) from None
        if isinstance(here, UnknownModel) and answer.unknown:
            raise UnknownModel(f"{here}; no other peer of the network has it either") from None
        if here is not None and (answer.unknown or isinstance(here, Overloaded)):
            raise here
        raise NotReady(f"the peers that have the model {question.model} do not answer; ask again in a moment", 2)

    async def _nowhere(self, model: str, version: str) -> UnknownModel:
        if version and len(version) < MIN_PREFIX:
            return UnknownModel(f"version {version!r} is too short; give at least {MIN_PREFIX} characters of the id")
        if version:
            return UnknownModel(
                f"no peer of the network has a version {version[:64]!r} of a model {model!r}; see "
                "`gossipml models list`"
            )
        names: list[str] = []
        with trio.move_on_after(NAMES_SECONDS):
            async with self._looks:
                names = await self._node.library.names()
        if model in names:
            return UnknownModel(f"no peer that can be reached has the code of {model!r}; only its file is kept")
        return UnknownModel(f"there is no model {model!r} in the network; {nearest(model, names)}")

    async def _forward(self, question: _Question[T], here: Exception | None) -> T | a.GiveUp:
        """The answer of another peer. UserError when the input is refused."""
        if self._nursery is None or self._waiting >= MAX_FORWARDED:
            raise Overloaded(f"{self._waiting} predictions wait for other peers; ask again in a second")
        begun, stats = self._now(), question.stats
        seconds = SHARE_OF_TIME * question.seconds
        if isinstance(here, Overloaded):
            seconds = min(seconds, OVERLOADED_SECONDS)
        asking = a.Asking(question.model, question.answerers, question.hedging, begun, begun + seconds)
        self._waiting += 1
        try:
            outcome = await self._drive(asking, question)
        finally:
            self._waiting -= 1
            asking.end(self._now())
            stats.extra += asking.extra
            stats.again += asking.again
        if isinstance(outcome, UserError):
            raise outcome
        if not isinstance(outcome, a.GiveUp):
            stats.forwarded += 1
            return outcome.content
        if not outcome.unknown:
            stats.unanswered += 1
        return outcome

    async def _drive(self, asking: a.Asking, question: _Question[T]) -> _Got[T] | UserError | a.GiveUp:
        model, version = question.model, question.version
        sources = self._sources_of(model, version)
        contacts = dict(sources.contacts)
        tell, told = trio.open_memory_channel[tuple[a.Event, _Got[T] | UserError | None]](math.inf)

        async def attempt(contact: Contact) -> None:
            tell.send_nowait(await self._attempt(contact, question, asking.until - self._now()))

        async def look() -> None:
            await self._look(sources, model, version)
            contacts.update(sources.contacts)
            tell.send_nowait((a.Found(tuple(sources.contacts)), None))

        async with trio.open_nursery() as nursery:
            actions = asking.begin(contacts)
            while True:
                for action in actions:
                    match action:
                        case a.AskPeer(peer):
                            nursery.start_soon(attempt, contacts[peer])
                        case a.Look():
                            nursery.start_soon(look)
                        case a.GiveUp():
                            nursery.cancel_scope.cancel()
                            return action
                event: a.Event = a.Tick()
                outcome = None
                with trio.move_on_after(max(0.0, asking.next_deadline() - self._now())):
                    event, outcome = await told.receive()
                actions = asking.handle(event, self._now())
                if outcome is not None:
                    nursery.cancel_scope.cancel()
                    return outcome

    async def _attempt(
        self, contact: Contact, question: _Question[T], wait: float
    ) -> tuple[a.Event, _Got[T] | UserError | None]:
        peer, model = contact.peer, question.model
        try:
            answer, data = await self._asker.ask(contact, replace(question.ask, wait=wait), question.body)
            if isinstance(answer, w.Answer):
                content = question.there(PredictAnswer(answer.version, format_peer_id(peer), data, answer.json_size))
                return a.Answered(peer, answer.load), _Got(content)
        except Busy as error:
            log.debug("%s does not answer for %s: %s", short_peer_id(peer), model, error)
            return a.Failed(peer, "broken"), None
        except RemoteError as error:
            log.warning("%s answered for %s against the rules: %s", short_peer_id(peer), model, error)
            self._node.mesh.blame(peer, str(error))
            return a.Failed(peer, "broken"), None
        match answer.code:
            case "input":
                return a.Answered(peer, 0), UserError(answer.reason)
            case "unknown":
                return a.Failed(peer, "unknown"), None
            case _:
                return a.Failed(peer, "busy"), None

    # Who has a model

    def _sources_of(self, model: str, version: str) -> _Sources:
        """As far as it is known; looked up anew, without waiting for it, when that is old."""
        sources = self._sources.setdefault((model, version), _Sources())
        self._sources.move_to_end((model, version))
        if len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        if sources.contacts and self._now() - sources.looked > FRESH_SECONDS and self._nursery is not None:
            self._begin_look(sources, model, version)
        return sources

    def _begin_look(self, sources: _Sources, model: str, version: str) -> trio.Event:
        if sources.looking is None:
            sources.looking = trio.Event()
            assert self._nursery is not None
            self._nursery.start_soon(self._look_up, sources, model, version)
        return sources.looking

    async def _look(self, sources: _Sources, model: str, version: str) -> None:
        """Look up who has the model, unless that was done just now."""
        if self._nursery is not None and self._now() - sources.looked >= LEAST_LOOK_SECONDS:
            await self._begin_look(sources, model, version).wait()

    async def _look_up(self, sources: _Sources, model: str, version: str) -> None:
        found: dict[PeerId, Contact] = {}

        def add(contacts: list[Contact]) -> None:
            for contact in contacts:
                if contact.peer != self._own:
                    found[contact.peer] = self._where(contact)

        try:
            async with self._looks:
                with trio.move_on_after(LOOK_SECONDS) as late:
                    entries = self._node.view.entries()
                    add([e.contact for e in entries if e.connected and e.contact.model == model])
                    add(await self._node.directory.providers(model))
                    add(await self._holders(model, version))
            sources.contacts = {**sources.contacts, **found} if late.cancelled_caught else found
        finally:
            sources.looked = self._now()
            if sources.looking is not None:
                sources.looking.set()
            sources.looking = None

    async def _holders(self, model: str, version: str) -> list[Contact]:
        library = self._node.library
        try:
            manifest = await library.find(model, version)
        except (UnknownModel, UserError, RemoteError):
            return []
        replicas = await library.catalogue.replicas(manifest.version)
        return [replica.contact for replica in replicas if replica.complete]

    def _where(self, contact: Contact) -> Contact:
        """With the addresses that we know of ourselves: first where there is a session, else last."""
        entry = self._node.view.get(contact.peer)
        if entry is None:
            return contact
        both = (entry.contact.addresses, contact.addresses)
        first, last = both if entry.connected else both[::-1]
        return contact._replace(addresses=tuple(dict.fromkeys((*first, *last)))[:MAX_CONTACT_ADDRESSES])

    # Models that are asked for often

    def _count(self, model: str) -> None:
        if self._now() - self._counted_from > PULL_SECONDS:
            self._counted_from = self._now()
            self._asked.clear()
        if len(self._asked) >= MAX_SOURCES and model not in self._asked:
            return
        self._asked[model] += 1
        if (
            self._asked[model] == self._config.pull_after
            and len(self._pulled | self._pulling) < MAX_PULLED
            and self._nursery is not None
            and self._local.could_have(model)
        ):
            self._pulling.add(model)
            self._nursery.start_soon(self._pull, model)

    async def _pull(self, model: str) -> None:
        log.info("%s is asked for often: fetching it, to answer from here", model)
        try:
            await self.load(model)
            self._pulled.add(model)
        except (UserError, RemoteError, UnknownModel, NotReady, OSError) as error:
            log.warning("%s is asked for often, and cannot be fetched: %s", model, error)
        finally:
            self._pulling.discard(model)

    async def load(self, model: str) -> None:
        """Fetch the newest version and those that come after it; others are asked until it is in memory. UnknownModel
        when there is none, or when it could not be answered for here."""
        library = self._node.library
        if not self._local.has(model) and not self._local.could_have(model):
            raise UnknownModel(f"the model {model} cannot be built on this peer; it is asked of the peers that can")
        version = await library.latest(model)
        if version is None:
            await self._card_here(model)  # nothing is published: what is in training answers, or nothing does
            return
        await library.fetch(version)
        await self._local.warm(model)
        library.follow(model)
