"""The training process: commands in, answers out, training in between. `python -m gossipml.models.worker_main`.

One thread. While a round of training or an evaluation is under way, it looks for commands between two batches, so
that merges, snapshots and predictions happen there: a look costs a microsecond, and what neighbours send is worth less
with every step that it waits. It ends when its standard input does. See `worker_wire` for the messages.

Nothing of the user's code can reach the channel: descriptors 0 and 1 are replaced before it runs, so that what
it prints goes to the log.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from gossipml import codec
from gossipml.errors import GossipmlError, LocalError, UserError
from gossipml.models.allocator import keep_freed_memory
from gossipml.models.data import LocalData, load_source, prepare, take_part
from gossipml.models.merge_rules import parse_merge
from gossipml.models.partition import Part, Rule, parse_part, parse_rule
from gossipml.models.registry import load_spec
from gossipml.models.spec import Spec, TensorSpec, adapts, picture_shape
from gossipml.models.tuning import Tuning, parse_outer
from gossipml.models.worker_wire import FrameReader, SharedView, pack_frame

if TYPE_CHECKING:
    import torch

    from gossipml.models.hosting import Hosting, Request
    from gossipml.models.kernels_split import Split
    from gossipml.models.predict import Forward, Written
    from gossipml.models.serving import ServedModel
    from gossipml.models.trainer import Evaluation
    from gossipml.models.training import LocalTrainer

MAX_NICE = 19  # of POSIX
READ = 1 << 16
PIPE = 1 << 19  # bytes: the answer to a round, with its snapshot, is written without waiting for the daemon to read
MAX_THREADS = 1024
MAX_TOGETHER = 1 << 12  # models of one merge: more than twice the liars that a rule may be given

Fields = dict[str, codec.Value]
Reply = dict[str, object]
Job = Generator[None, None, tuple[Reply, bytes]]  # the answer and its body


def main() -> None:
    keep_freed_memory()
    commands, answers = _claim_channel()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon ends us in order
    _Worker(commands, answers).run()
    sys.stderr.flush()
    os._exit(0)  # the daemon waits: taking torch down in order takes up to a second and saves nothing


def _claim_channel() -> tuple[int, int]:
    """Private copies of standard input and output; in their place nothing to read, and the log."""
    commands, answers = os.dup(0), os.dup(1)
    try:
        for pipe in (commands, answers):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
    except (AttributeError, OSError):
        pass  # not Linux, or more than this user may have: answers then go in pieces
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return commands, answers


def _be_nice(nice: int) -> None:
    """Let other programs come first: HTTP keeps its latency while two threads train."""
    try:
        os.nice(nice)
    except OSError:
        pass  # a container may forbid it


@dataclass
class _Running:
    request: int
    job: Job


class _Worker:
    """The loop. `_rounds` and `_looks` are training and evaluations; the first of each is under way."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._frames = FrameReader()
        self._rounds: deque[_Running] = deque()
        self._looks: deque[_Running] = deque()
        self._model: LocalTrainer | ServedModel | None = None
        self._trains = True
        self._hosting: Hosting | None = None
        self._asked: list[Request] = []
        self._chosen: tuple[Evaluation, torch.Tensor] | None = None
        self._candidate: torch.Tensor | None = None

    def run(self) -> None:
        while self._poll(wait=not (self._rounds or self._looks)):
            for queue in (self._rounds, self._looks):
                if queue:
                    self._advance(queue)

    def _poll(self, *, wait: bool) -> bool:
        """Does what was commanded; False when the daemon is gone."""
        while select.select([self._commands], [], [], None if wait else 0)[0]:
            data = os.read(self._commands, READ)
            if not data:
                return False
            self._frames.feed(data)
            while (frame := self._frames.next_frame()) is not None:
                self._obey(*frame)
                wait = False
            if len(data) < READ:
                break
        self._predict()
        return True

    def _advance(self, queue: deque[_Running]) -> None:
        running = queue[0]
        try:
            next(running.job)
        except StopIteration as done:
            queue.popleft()
            self._answer(running.request, *done.value)
        except Exception as error:
            queue.popleft()
            self._refuse(running.request, error)

    def _obey(self, fields: Fields, body: bytes) -> None:
        request = codec.get_int(fields, "id")
        try:
            match codec.get_str(fields, "do"):
                case "configure":
                    self._answer(request, self._configure(fields))
                case "train":
                    steps = codec.get_int(fields, "steps", low=1)
                    encoding = codec.get_str(fields, "encoding")
                    self._rounds.append(_Running(request, _train(self.trainer, steps, encoding)))
                case "cancel":
                    self._cancel(codec.get_int(fields, "job"))
                    self._answer(request, {})
                case "snapshot":
                    self._answer(request, self._snapshot(codec.get_str(fields, "encoding")))
                case "merge":
                    self._answer(request, self._merge(fields))
                case "merge together":
                    self._answer(request, self._merge_together(fields))
                case "settle":
                    self.trainer.settle()
                    self._answer(request, {})
                case "evaluate" | "score" if not self._trains:
                    self._answer(request, {})
                case "evaluate":
                    self._looks.append(_Running(request, _evaluate(self.trainer)))
                case "choose":
                    self._looks.append(_Running(request, self._choose()))
                case "export":
                    self._answer(request, self._export())
                case "load":
                    self._predict()
                    self.model.load(self._delivered(fields))
                    self._answer(request, {})
                case "read":
                    self._candidate = self.trainer.read(self._delivered(fields)) if self._trains else None
                    self._answer(request, {})
                case "score":
                    self._looks.append(_Running(request, self._score()))
                case "serve":
                    self._answer(request, self._serve(fields))
                case "host":
                    self._predict()
                    self._answer(request, self._host(fields))
                case "drop":
                    self._predict()
                    self.hosting.drop(codec.get_str(fields, "key"))
                    self._answer(request, {})
                case "predict":
                    self._asked.append(_read_request(request, fields, body))
                case "served":
                    self._answer(request, self._give(self.trainer.pack_served()))
                case "save":
                    self._answer(request, self._give(self.trainer.save()))
                case "restore":
                    self.trainer.restore(self._delivered(fields))
                    self._answer(request, {})
                case other:
                    raise LocalError(f"the worker knows no command {other!r}")
        except Exception as error:
            self._refuse(request, error)

    @property
    def model(self) -> LocalTrainer | ServedModel:
        if self._model is None:
            raise LocalError("the worker has not been configured")
        return self._model

    @property
    def trainer(self) -> LocalTrainer:
        if not self._trains:
            raise LocalError("this peer only serves (--no-train): it has no data and no optimiser")
        return self.model  # type: ignore[return-value]  # as _configure made it

    def _configure(self, fields: Fields) -> Reply:
        if self._model is not None:
            raise LocalError("the worker is configured already")
        _be_nice(codec.get_int(fields, "nice", high=MAX_NICE))
        self._inbox = SharedView(codec.get_int(fields, "inbox"))
        self._outbox = SharedView(codec.get_int(fields, "outbox"))
        self._trains = codec.get_bool(fields, "train")
        rule, part = parse_rule(codec.get_str(fields, "split")), parse_part(codec.get_str(fields, "part"))
        seed = codec.get_int(fields, "seed")
        threads = codec.get_int(fields, "threads", low=1, high=MAX_THREADS)
        workers = codec.get_int(fields, "workers", high=threads)
        spec = load_spec(codec.get_str(fields, "model", limit=4096))
        source, local = "", None
        if self._trains or adapts(spec):  # who only serves needs the shape, where that comes from the data
            source = codec.get_str(fields, "source", limit=4096) or spec.data
            spec, local = _load_part(spec, source, rule, part, seed)
        network = codec.get_bytes(fields, "network")
        device = codec.get_str(fields, "device")
        local = local if self._trains else None
        tuning = _read_tuning(codec.as_map(fields["tuning"]))
        self._model, where = _make_model(spec, local, network, seed * 1_000_003 + part.index, device, tuning)
        self._hosting = _make_hosting(network, threads, device)
        used, measured = self._model.use_cores(threads, workers)
        layout = self._model.layout
        return {
            "layout": {
                "model": layout.model,
                "digest": layout.digest,
                "size": layout.size,
                "buffers": layout.buffers,
            },
            "samples": self._model.sample_counts,
            "batch": self._model.batch,
            "source": source,
            **_describe_spec(spec),
            "device": where,
            "workers": used.workers,
            "threads": used.threads,
            "cores": f"{used}, {_describe_times(measured) if measured else 'as asked for'}",
        }

    def _serve(self, fields: Fields) -> Reply:
        """No model of our own: to answer for those that are hosted."""
        if self._hosting is not None:
            raise LocalError("the worker is configured already")
        _be_nice(codec.get_int(fields, "nice", high=MAX_NICE))
        self._inbox = SharedView(codec.get_int(fields, "inbox"))
        threads = codec.get_int(fields, "threads", low=1, high=MAX_THREADS)
        self._hosting = _make_hosting(codec.get_bytes(fields, "network"), threads, codec.get_str(fields, "device"))
        return {}

    @property
    def hosting(self) -> Hosting:
        if self._hosting is None:
            raise LocalError("the worker has not been configured")
        return self._hosting

    def _host(self, fields: Fields) -> Reply:
        model, source = codec.get_str(fields, "model", limit=4096), codec.get_str(fields, "source", limit=4096)
        return _describe_spec(self.hosting.host(codec.get_str(fields, "key"), model, source, self._delivered(fields)))

    def _predict(self) -> None:
        """Answer what was asked since the last time, together what asks one version."""
        asked, self._asked = self._asked, []
        by_key: dict[str, list[Request]] = {}
        for request in asked:
            by_key.setdefault(request.key, []).append(request)
        for key, requests in by_key.items():
            from gossipml.models.hosting import answer_all

            try:
                spec, forward = self._answering(key)
                answers = answer_all(spec, forward, requests, time.monotonic())
            except Exception as error:
                answers = [(request.number, error) for request in requests]
            self._send(b"".join(self._written(number, given) for number, given in answers))

    def _answering(self, key: str) -> tuple[Spec, Forward]:
        """A hosted version, or our own model."""
        return self.hosting.model(key) if key else (self.model.spec, self.model.forward())

    def _written(self, request: int, given: Written | Exception) -> bytes:
        if isinstance(given, Exception):
            return self._refusal(request, given)
        return self._frame(request, {"json_size": given.json_size}, given.body)

    def _cancel(self, job: int) -> None:
        for running in [running for running in self._rounds if running.request == job]:
            self._rounds.remove(running)
            running.job.close()
            self._refuse(job, UserError("the round was cancelled"))

    def _snapshot(self, encoding: str) -> Reply:
        size = self.trainer.snapshot_size(encoding)
        return {"size": self.trainer.snapshot_into(encoding, self._outbox.for_writing(size))}

    def _merge(self, fields: Fields) -> Reply:
        update = self._inbox.for_reading(codec.get_int(fields, "size"))
        report = self.trainer.merge(update, codec.get_str(fields, "encoding"), codec.get_float(fields, "weight"))
        return asdict(report)

    def _merge_together(self, fields: Fields) -> Reply:
        encodings = codec.get_list(fields, "encodings", limit=MAX_TOGETHER)
        ends = list(accumulate(int(str(size)) for size in codec.get_list(fields, "sizes", limit=MAX_TOGETHER)))
        bodies = self._inbox.for_reading(codec.get_int(fields, "size"))
        updates = [
            (bodies[start:end], str(encoding))
            for start, end, encoding in zip([0, *ends], ends, encodings, strict=False)
        ]
        return {"reports": [asdict(report) for report in self.trainer.merge_together(updates)]}

    def _choose(self) -> Job:
        self._chosen = yield from self.trainer.choosing()
        return _describe_evaluation(self._chosen[0]), b""

    def _export(self) -> Reply:
        if self._chosen is None:
            raise LocalError("nothing has been chosen to be exported")
        (_, vector), self._chosen = self._chosen, None
        return self._give(self.trainer.pack(vector))

    def _give(self, content: bytes) -> Reply:
        self._outbox.for_writing(len(content))[:] = content
        return {"size": len(content)}

    def _score(self) -> Job:
        if self._candidate is None:
            raise LocalError("nothing has been read to be scored")
        candidate, self._candidate = self._candidate, None
        return {"validation": (yield from self.trainer.scoring(candidate))}, b""

    def _delivered(self, fields: Fields) -> bytes:
        return bytes(self._inbox.for_reading(codec.get_int(fields, "size")))

    def _answer(self, request: int, ok: Reply, body: bytes = b"") -> None:
        self._send(self._frame(request, ok, body))

    def _frame(self, request: int, ok: Reply, body: bytes) -> bytes:
        try:
            return pack_frame({"id": request, "ok": ok}, body)
        except LocalError as error:
            return pack_frame({"id": request, "error": f"the answer is too large: {error}", "fault": "user"})

    def _refuse(self, request: int, error: Exception) -> None:
        self._send(self._refusal(request, error))

    def _refusal(self, request: int, error: Exception) -> bytes:
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        known = isinstance(error, GossipmlError)
        text = str(error) if known else f"the model's code failed: {type(error).__name__}: {error}"
        fault = "local" if known and not isinstance(error, UserError) else "user"
        return pack_frame({"id": request, "error": text[:4000], "fault": fault})

    def _send(self, frame: bytes) -> None:
        view = memoryview(frame)
        try:
            while view:
                view = view[os.write(self._answers, view) :]
        except BrokenPipeError:
            os._exit(0)  # the daemon is gone


def _load_part(spec: Spec, source: str, rule: Rule, part: Part, seed: int) -> tuple[Spec, LocalData]:
    """The model as it is on the data, and this peer's part of them; the rest is let go before torch comes."""
    if not source:
        raise UserError(f"the model {spec.name!r} has no data of its own; name it, for example --data mnist:DIR")
    spec, data = prepare(spec, load_source(source))
    return spec, take_part(data, rule, part, seed)


def _read_tuning(fields: Fields) -> Tuning:
    """As `PeerConfig` has it; what is missing is the model's own."""

    def number(name: str) -> float | None:
        return codec.get_float(fields, name) if name in fields else None

    return Tuning(
        merge=parse_merge(codec.get_str(fields, "merge")),
        optimiser=codec.get_str(fields, "optimiser"),
        learning_rate=number("learning_rate"),
        momentum=number("momentum"),
        weight_decay=number("weight_decay"),
        batch=codec.get_int(fields, "batch") if "batch" in fields else None,
        outer=parse_outer(codec.get_str(fields, "outer")),
    )


def _make_model(
    spec: Spec,
    local: LocalData | None,
    network: bytes,
    seed: int,
    device: str,
    tuning: Tuning,
) -> tuple[LocalTrainer | ServedModel, str]:
    """In training on `local`; without data one that only serves."""
    import torch

    from gossipml.models.serving import ServedModel
    from gossipml.models.training import LocalTrainer

    torch.set_flush_denormal(True)  # as momentum fades, half of all steps would work on denormals: 1.27 ms, not 0.86
    where = _choose_device(device)
    if local is None:
        return ServedModel(spec, network_id=network, device=where), str(where)
    return LocalTrainer(spec, local, network_id=network, seed=seed, device=where, tuning=tuning), str(where)


def _make_hosting(network: bytes, threads: int, device: str) -> Hosting:
    import torch

    from gossipml.models.hosting import Hosting

    torch.set_num_threads(threads)
    return Hosting(network, _choose_device(device))


def _read_request(number: int, fields: Fields, body: bytes) -> Request:
    from gossipml.models.hosting import Request
    from gossipml.models.predict import FORMS, Names

    size, form = fields.get("json_size"), codec.get_str(fields, "form")
    names = Names(codec.get_str(fields, "model"), codec.get_str(fields, "version"), codec.get_str(fields, "peer"))
    return Request(
        number, codec.get_str(fields, "key"), FORMS[FORMS.index(form)], names,
        codec.get_float(fields, "until"), body, size if isinstance(size, int) else None,
    )  # fmt: skip


def _choose_device(device: str) -> torch.device:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is none of auto, cpu, cuda")
    found = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UserError("there is no CUDA device for this installation of torch; use --device cpu, or auto")
    return torch.device("cuda" if found else "cpu")


def _describe_spec(spec: Spec) -> Reply:
    return {
        "inputs": [_describe(tensor) for tensor in spec.inputs],
        "outputs": [_describe(tensor) for tensor in spec.outputs],
        "labels": list(spec.labels),
        "features": list(spec.features),
        "picture": list(picture_shape(spec) or ()),
    }


def _describe(tensor: TensorSpec) -> list[object]:
    return [tensor.name, tensor.datatype, list(tensor.shape)]


def _train(trainer: LocalTrainer, steps: int, encoding: str) -> Job:
    seconds = work = 0.0
    trainer.begin_round()
    try:
        for _ in range(steps):
            start, begun = time.perf_counter(), time.thread_time()
            trainer.step()
            seconds += time.perf_counter() - start
            work += time.thread_time() - begun
            yield
    except BaseException:  # GeneratorExit too: the round was cancelled
        trainer.drop_round()
        raise
    loss = trainer.end_round()
    reply: Reply = {
        "steps": steps,
        "samples": steps * trainer.batch,
        "seconds": seconds,
        "work": work if trainer.on_cpu else seconds,
        "loss": loss,
    }
    try:
        return reply, trainer.snapshot(encoding) if encoding else b""
    except LocalError:  # such parameters are never sent; whoever asks for them alone is told why
        return reply, b""


def _describe_times(measured: dict[Split, float]) -> str:
    times = (f"{1e3 * seconds:.2f} ms with {split}" for split, seconds in measured.items())
    return f"measured: a step takes {', '.join(times)}"


def _evaluate(trainer: LocalTrainer) -> Job:
    return _describe_evaluation((yield from trainer.evaluating())), b""


def _describe_evaluation(found: Evaluation) -> Reply:
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "validation": found.validation_accuracy,
        "served": found.served,
    }


if __name__ == "__main__":
    main()
