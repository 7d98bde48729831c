"""The daemon's side of its processes: a `Trainer` whose work happens elsewhere, and answers to predictions.

`open_worker` starts a process that trains (or serves one model), and waits until its model is built; `open_predictor`
one without a model of its own. Both answer for versions that they are given to host. See `gossipml.daemon.channel` for
the way there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from gossipml import codec
from gossipml.api.ports import TensorSpec
from gossipml.config import PeerConfig
from gossipml.daemon.channel import SMALL_COPY, Channel, Fields, open_process
from gossipml.daemon.channel import WorkerDied as WorkerDied
from gossipml.errors import UserError
from gossipml.models.compression import packed_size, parse_form
from gossipml.models.predict import Form
from gossipml.models.trainer import Evaluation, Export, Layout, MergeReport, RoundReport
from gossipml.models.worker_wire import MAX_BODY

FOR_EVER = 1e18  # monotonic seconds


log = logging.getLogger("gossipml.worker")


@dataclass(frozen=True)
class Described:
    """What a model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    features: tuple[str, ...]
    picture: tuple[int, ...]
    """Height, width and channels of the pictures that it takes; empty where it takes none."""


@dataclass(frozen=True)
class WorkerInfo:
    """What the worker said when it was ready."""

    layout: Layout
    source: str
    train_samples: int
    validation_samples: int
    test_samples: int
    batch: int
    described: Described
    device: str
    workers: int
    threads: int
    cores: str
    """How it uses them and why, in words."""


@dataclass(frozen=True)
class Asked:
    """A prediction that is asked of a process."""

    form: Form
    body: bytes
    json_size: int | None
    model: str
    """What the answer says of itself, and so the next two."""
    version: str
    peer: str
    until: float
    """Monotonic seconds: when nobody waits for it any more."""


@asynccontextmanager
async def open_worker(config: PeerConfig, network_id: bytes) -> AsyncIterator[WorkerTrainer]:
    """The trainer that `config` asks for, ready. UserError when model, data or split are wrong.

    Waits as long as the model and its data take to load; the timeout is the caller's.
    """
    async with open_process(config.threads) as channel:
        worker = WorkerTrainer(channel)
        await worker._configure(config, network_id)
        yield worker


@asynccontextmanager
async def open_predictor(config: PeerConfig, network_id: bytes) -> AsyncIterator[Predictor]:
    """A process that answers for what it hosts; not nice to others, so that predictions come before training."""
    async with open_process(config.threads, "predicting") as channel:
        asked: dict[str, object] = {
            "network": network_id, "threads": config.threads, "device": config.device, "nice": 0,
            "inbox": channel.inbox,
        }  # fmt: skip
        await channel.ask("serve", asked)
        yield Predictor(channel)


class Predictor:
    """Answers for versions of models, in a process of its own."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def host(self, key: str, model: str, source: str, content: bytes) -> Described:
        """Answer for `key` with these parameters from now on. `model` is a specification as `load_spec` takes it,
        `source` data for one that takes its shape from them. UserError when they do not fit."""
        ok = await self.channel.deliver("host", {"key": key, "model": model, "source": source}, content)
        return _read_described(ok)

    async def drop(self, key: str) -> None:
        """What was asked before is answered."""
        await self.channel.ask("drop", {"key": key})

    async def answer(self, key: str, asked: Asked) -> tuple[bytes, int | None]:
        """The body of the answer of what is hosted under `key` (empty: the process's own model), and how many bytes of
        it are JSON where binary tensors follow. UserError when the input is refused."""
        if len(asked.body) > MAX_BODY:
            raise UserError(f"the request has {len(asked.body)} bytes; at most {MAX_BODY} are answered")
        fields: dict[str, object] = {
            "key": key, "form": asked.form, "json_size": asked.json_size, "model": asked.model,
            "version": asked.version, "peer": asked.peer, "until": asked.until,
        }  # fmt: skip
        ok, body = await self.channel.ask("predict", fields, asked.body)
        size = ok.get("json_size")
        return body, size if isinstance(size, int) else None


class WorkerTrainer(Predictor):
    """`gossipml.models.trainer.Trainer` in a process of its own. Made by `open_worker`."""

    info: WorkerInfo

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._exporting, self._scoring = trio.Lock(), trio.Lock()

    @property
    def pid(self) -> int:
        return self.channel.pid

    @property
    def layout(self) -> Layout:
        return self.info.layout

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.info.train_samples // self.info.batch)

    async def train(self, steps: int, encoding: str = "") -> RoundReport:
        """A round that is cancelled here ends there, too, at the next batch."""
        if encoding and packed_size(parse_form(encoding), self.layout.size, self.layout.buffers) > SMALL_COPY:
            encoding = ""  # would hold up the channel; rounds of large models are long, so asking again costs little
        ok, body = await self.channel.ask("train", {"steps": steps, "encoding": encoding})
        return RoundReport(
            codec.get_int(ok, "steps"),
            codec.get_int(ok, "samples"),
            codec.get_float(ok, "seconds"),
            codec.get_float(ok, "work"),
            codec.get_float(ok, "loss"),
            body,
        )

    async def snapshot(self, encoding: str) -> bytes:
        return await self.channel.fetch("snapshot", {"encoding": encoding})

    async def merge(self, update: bytes | bytearray, encoding: str, weight: float) -> MergeReport:
        if not math.isfinite(weight):
            raise UserError(f"merge weight {weight} is not from 0 to 1")
        return _read_report(
            await self.channel.deliver("merge", {"encoding": encoding, "weight": float(weight)}, update)
        )

    async def merge_together(self, updates: Sequence[tuple[bytes | bytearray, str]]) -> list[MergeReport]:
        asked: dict[str, object] = {
            "encodings": [encoding for _, encoding in updates],
            "sizes": [len(update) for update, _ in updates],
        }
        ok = await self.channel.deliver("merge together", asked, b"".join(update for update, _ in updates))
        return [_read_report(codec.as_map(item)) for item in codec.get_list(ok, "reports", limit=len(updates))]

    async def settle(self) -> None:
        await self.channel.ask("settle", {})

    async def evaluate(self) -> Evaluation | None:
        ok, _ = await self.channel.ask("evaluate", {})
        return _read_evaluation(ok) if ok else None

    async def export(self) -> Export:
        async with self._exporting:  # the worker keeps one choice
            ok, _ = await self.channel.ask("choose", {})
            return Export(await self.channel.fetch("export", {}), _read_evaluation(ok))

    async def load(self, content: bytes) -> None:
        await self.channel.deliver("load", {}, content)

    async def score(self, content: bytes) -> float | None:
        async with self._scoring:  # the worker keeps one candidate
            await self.channel.deliver("read", {}, content)
            ok, _ = await self.channel.ask("score", {})
            return codec.get_float(ok, "validation") if ok else None

    async def predict(self, request: bytes) -> bytes:
        asked = Asked("json", request, None, self.layout.model, "", "", FOR_EVER)
        return (await self.answer("", asked))[0]

    async def served(self) -> bytes:
        """The file of a version with the parameters that answer now."""
        return await self.channel.fetch("served", {})

    async def save(self) -> bytes:
        return await self.channel.fetch("save", {})

    async def restore(self, state: bytes) -> None:
        await self.channel.deliver("restore", {}, state)

    async def _configure(self, config: PeerConfig, network_id: bytes) -> None:
        asked: dict[str, object] = {
            "model": config.model,
            "train": config.train,
            "source": config.data,
            "split": config.split,
            "part": f"{config.part[0]}/{config.part[1]}",
            "seed": config.seed,
            "network": network_id,
            "threads": max(config.threads, config.workers),
            "workers": config.workers,
            "device": config.device,
            "nice": config.nice,
            "tuning": _tuning(config),
            "inbox": self.channel.inbox,
            "outbox": self.channel.outbox,
        }
        ok, _ = await self.channel.ask("configure", asked)
        self.info = info = _read_info(ok)
        if info.workers > 1 or config.threads > 1:
            log.info("training of %s uses %s", config.model, info.cores)


def _tuning(config: PeerConfig) -> dict[str, object]:
    names = ("merge", "optimiser", "learning_rate", "momentum", "weight_decay", "batch", "outer")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def _read_report(ok: Fields) -> MergeReport:
    return MergeReport(
        codec.get_bool(ok, "applied"),
        codec.get_str(ok, "reason", limit=4096),
        codec.get_float(ok, "distance"),
        codec.get_bool(ok, "fault"),
    )


def _read_evaluation(ok: Fields) -> Evaluation:
    return Evaluation(
        codec.get_float(ok, "accuracy"),
        codec.get_float(ok, "loss"),
        codec.get_float(ok, "validation"),
        "local" if codec.get_str(ok, "served") == "local" else "average",
    )


def _read_info(ok: Fields) -> WorkerInfo:
    layout, samples = codec.as_map(ok["layout"]), codec.as_map(ok["samples"])
    return WorkerInfo(
        layout=Layout(
            codec.get_str(layout, "model"),
            codec.get_str(layout, "digest"),
            codec.get_int(layout, "size", low=1),
            codec.get_int(layout, "buffers"),
        ),
        source=codec.get_str(ok, "source", limit=4096),
        train_samples=codec.get_int(samples, "train"),
        validation_samples=codec.get_int(samples, "validation"),
        test_samples=codec.get_int(samples, "test"),
        batch=codec.get_int(ok, "batch", low=1),
        described=_read_described(ok),
        device=codec.get_str(ok, "device"),
        workers=codec.get_int(ok, "workers"),
        threads=codec.get_int(ok, "threads"),
        cores=codec.get_str(ok, "cores", limit=1024),
    )


def _read_described(ok: Fields) -> Described:
    return Described(
        _read_tensors(ok, "inputs"),
        _read_tensors(ok, "outputs"),
        _read_names(ok, "labels"),
        _read_names(ok, "features"),
        tuple(n for n in codec.get_list(ok, "picture", limit=3) if isinstance(n, int)),
    )


def _read_tensors(ok: Fields, name: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for item in codec.get_list(ok, name, limit=1000):
        assert isinstance(item, list)
        tensor, datatype, shape = item
        assert isinstance(tensor, str) and isinstance(datatype, str) and isinstance(shape, list)
        tensors.append(TensorSpec(tensor, datatype, tuple(n for n in shape if isinstance(n, int))))
    return tuple(tensors)


def _read_names(ok: Fields, name: str) -> tuple[str, ...]:
    return tuple(str(item) for item in codec.get_list(ok, name, limit=1 << 24))
