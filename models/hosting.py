"""Versions of models in memory, side by side, and the answers to requests that came together.

What the training process and the one that only predicts have in common. A model is built once for all its versions,
each of which is a vector of parameters. Not thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gossipml.errors import UserError
from gossipml.models.data import load_source, prepare
from gossipml.models.flat import build_flat
from gossipml.models.predict import Answers, Form, Forward, Names, Question, Written, answer_together, read
from gossipml.models.registry import load_spec
from gossipml.models.serving import Answering
from gossipml.models.spec import Spec, adapts

MAX_TOGETHER = 64  # samples of one pass through a model (TRANSPORT.md): from there on only latency grows


@dataclass(frozen=True)
class Request:
    """A prediction that is asked for."""

    number: int
    key: str
    form: Form
    names: Names
    until: float
    """When nobody waits for it any more, on the monotonic clock, which all processes share."""
    body: bytes = field(repr=False)
    json_size: int | None = None


@dataclass(frozen=True)
class _Version:
    model: str
    vector: torch.Tensor


class Hosting:
    def __init__(self, network_id: bytes, device: torch.device) -> None:
        self._network_id = network_id
        self._device = device
        self._models: dict[str, tuple[Spec, Answering]] = {}  # by what the daemon calls the specification
        self._versions: dict[str, _Version] = {}

    def host(self, key: str, model: str, source: str, content: bytes) -> Spec:
        """Answer for `key` with these parameters from now on. `source` is data for a model that takes its shape from
        them. UserError when the version does not fit the model."""
        if model not in self._models:
            spec = load_spec(model)
            if adapts(spec):
                if not source:
                    raise UserError(
                        f"the model {spec.name!r} takes its shape from data that are not on this peer; ask a peer that "
                        "trains it"
                    )
                spec, _ = prepare(spec, load_source(source))
            flat, _ = build_flat(spec, self._network_id, self._device, trains=False)
            self._models[model] = spec, Answering(spec, flat, self._device)
        spec, answering = self._models[model]
        self._versions[key] = _Version(model, answering.read(content))
        return spec

    def drop(self, key: str) -> None:
        """Forget a version, and the model with its last one."""
        version = self._versions.pop(key, None)
        if version is not None and all(other.model != version.model for other in self._versions.values()):
            del self._models[version.model]

    def model(self, key: str) -> tuple[Spec, Forward]:
        version = self._versions.get(key)
        if version is None:
            raise UserError("the version is no longer in memory; ask again")
        spec, answering = self._models[version.model]
        return spec, answering.forward(version.vector)


def answer_all(
    spec: Spec, forward: Forward, requests: list[Request], now: float
) -> list[tuple[int, Written | Exception]]:
    """The answers, by number, of requests to one version: as many samples at once as MAX_TOGETHER says."""
    answers: list[tuple[int, Written | Exception]] = []
    waiting: list[tuple[Request, Question]] = []
    samples = 0

    def answer_waiting() -> None:
        nonlocal samples
        found = answer_together(spec, [question for _, question in waiting], forward) if waiting else []
        for (request, question), given in zip(waiting, found, strict=True):
            answers.append(
                (request.number, given if isinstance(given, Exception) else _written(request, question, given))
            )
        waiting.clear()
        samples = 0

    for request in requests:
        if now > request.until:
            answers.append((request.number, UserError("the time given for the answer is over")))
            continue
        try:
            question = read(spec, request.form, request.body, request.json_size)
        except Exception as error:
            answers.append((request.number, error))
            continue
        if samples and samples + len(question.samples) > MAX_TOGETHER:
            answer_waiting()
        waiting.append((request, question))
        samples += len(question.samples)
    answer_waiting()
    return answers


def _written(request: Request, question: Question, answers: Answers) -> Written | Exception:
    if isinstance(answers, Exception):
        return answers
    try:
        return question.write(answers, request.names)
    except Exception as error:  # of the model's own egest
        return error
