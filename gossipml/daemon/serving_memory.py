"""The versions that one predicting process has in memory: loaded when asked for, a bounded number, the least recently
used out first."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from gossipml.api.ports import UnknownModel
from gossipml.daemon.worker import Described, Predictor
from gossipml.errors import UserError

log = logging.getLogger("gossipml.serving")

MAX_LOADED = 16  # versions (guess); bounds a client that asks for one old version after the other
MAX_BYTES = 1 << 30  # of parameters: as many as fit beside torch itself on a small machine (guess)


@dataclass(frozen=True)
class Wanted:
    """A version that can be loaded."""

    key: str
    model: str
    """Its name in the network."""
    version: str
    """What answers call it."""
    size: int
    """Bytes of its file."""
    spec: str
    """As `load_spec` takes it."""
    source: str
    """Data for a model that takes its shape from them."""
    content: Callable[[], Awaitable[bytes | None]]
    """The file, None when it is gone or damaged."""


@dataclass(eq=False)
class _Loaded:
    wanted: Wanted
    over: trio.Event = field(default_factory=trio.Event)
    """Loaded, or failed."""
    described: Described | None = None
    problem: str = ""


class Memory:
    """Loads go on in `nursery`, so that whoever asked first may go without taking it from the others."""

    def __init__(self, predictor: Predictor, nursery: trio.Nursery) -> None:
        self.predictor = predictor
        self._nursery = nursery
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the least recently used first
        self._loading = trio.CapacityLimiter(1)  # one after the other: they share the file that they come through

    def __contains__(self, wanted: Wanted) -> bool:
        """Whether it answers at once."""
        found = self._loaded.get(wanted.key)
        return found is not None and found.described is not None

    def problem(self, wanted: Wanted) -> str:
        """Why it cannot be loaded; empty when it can, as far as is known."""
        found = self._loaded.get(wanted.key)
        return found.problem if found is not None else ""

    def begin(self, wanted: Wanted) -> None:
        """Have it loaded soon."""
        if wanted.key not in self._loaded:
            self._loaded[wanted.key] = loaded = _Loaded(wanted)
            self._nursery.start_soon(self._load, loaded)

    async def load(self, wanted: Wanted) -> Described:
        """Returns when it is in memory. UnknownModel when it cannot be answered for here."""
        self.begin(wanted)
        loaded = self._loaded[wanted.key]
        self._loaded.move_to_end(wanted.key)
        if not loaded.over.is_set():
            await loaded.over.wait()
        if loaded.described is None:
            raise UnknownModel(loaded.problem)
        return loaded.described

    async def drop(self, key: str) -> None:
        """Forget one; what was asked of it before is answered."""
        if self._loaded.pop(key, None) is not None:
            await self.predictor.drop(key)

    async def drop_model(self, model: str) -> None:
        """Forget the versions of a model that are in memory."""
        for key, loaded in list(self._loaded.items()):
            if loaded.wanted.model == model and loaded.over.is_set():
                await self.drop(key)

    async def _load(self, loaded: _Loaded) -> None:
        wanted = loaded.wanted
        name = f"version {wanted.version} of {wanted.model}"
        try:
            async with self._loading:
                content = await wanted.content()
                if content is None:
                    loaded.problem = f"{name} is damaged on this disk and is fetched anew; ask again later"
                    self._loaded.pop(wanted.key, None)
                    return
                loaded.described = await self.predictor.host(wanted.key, wanted.spec, wanted.source, content)
            log.info("loaded %s", name)
            await self._make_room()
        except UserError as error:
            loaded.problem = f"{name} cannot be answered for here: {error}"
        finally:
            loaded.over.set()

    async def _make_room(self) -> None:
        whole = [loaded for loaded in self._loaded.values() if loaded.over.is_set() or loaded.described is not None]
        size = sum(loaded.wanted.size for loaded in whole)
        for loaded in whole[:-1]:
            if len(whole) <= MAX_LOADED and size <= MAX_BYTES:
                break
            whole.remove(loaded)
            size -= loaded.wanted.size
            log.info("version %s of %s makes room", loaded.wanted.version, loaded.wanted.model)
            await self.drop(loaded.wanted.key)
