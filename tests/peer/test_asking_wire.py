"""The wire of forwarded predictions: what goes out comes back, and nothing else comes in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.errors import RemoteError
from gossipml.peer import asking_wire as w
from gossipml.peer.swarm_wire import MAX_HEADER

ASK = w.Ask("mnist-mlp", "ab12", "infer", 100, 2.5, 3236)
ANSWER = w.Answer("ab12cd34", None, 3, 200)


def header(message: w.Message) -> bytes:
    return w.encode(message)[4:]


@pytest.mark.parametrize("ask", [ASK, w.Ask("xor", "", "card", None, 3.0, 0), replace(ASK, length=w.MAX_ASKED)])
def test_a_question_comes_back(ask: w.Ask) -> None:
    assert w.from_dialler(header(ask)) == ask


@pytest.mark.parametrize("answer", [ANSWER, w.Answer("v", 20, 0, 20), w.No("busy", "later", 5), w.No("input", "no")])
def test_an_answer_comes_back(answer: w.FromAnswerer) -> None:
    assert w.from_answerer(header(answer)) == answer


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "../x"}, {"model": ""}, {"version": "a/b"}, {"form": "pickle"}, {"json": 4000}, {"json": -2},
        {"wait": 0}, {"wait": 10**9}, {"bytes": w.MAX_ASKED + 1}, {"bytes": -1}, {"t": "answer"}, {"model": 7},
        {"form": "card"},
    ],
)  # fmt: skip
def test_a_question_that_breaks_the_rules_is_refused(wrong: dict[str, object]) -> None:
    fields = codec.as_map(codec.unpack(header(ASK), limit=MAX_HEADER))
    with pytest.raises(RemoteError):
        w.from_dialler(codec.pack({**fields, **wrong}))


@pytest.mark.parametrize(
    "wrong", [{"version": ""}, {"bytes": 0}, {"bytes": w.MAX_ANSWERED + 1}, {"json": 201}, {"load": -1}, {"t": "ask"}]
)
def test_an_answer_that_breaks_the_rules_is_refused(wrong: dict[str, object]) -> None:
    fields = codec.as_map(codec.unpack(header(ANSWER), limit=MAX_HEADER))
    with pytest.raises(RemoteError):
        w.from_answerer(codec.pack({**fields, **wrong}))


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_are_a_remote_error_or_a_message(data: bytes) -> None:
    for read in (w.from_dialler, w.from_answerer):
        try:
            read(data)
        except RemoteError:
            pass


def test_a_body_must_name_the_model_the_version_and_the_peer_that_sent_it() -> None:
    easy = {"label": "3", "model": "xor", "version": "ab12cd34", "peer": "p"}
    ask = w.Ask("xor", "ab", "json", None, 1.0, 0)
    w.check_answer(json.dumps(easy).encode(), ANSWER, ask, "p")
    w.check_answer(json.dumps(easy).encode(), ANSWER, replace(ask, version="AB12cd34ee"), "p")
    for change in ({"model": "other"}, {"version": "ff"}, {"peer": "q"}, {"peer": None}):
        with pytest.raises(RemoteError, match="names another"):
            w.check_answer(json.dumps({**easy, **change}).encode(), ANSWER, ask, "p")
    with pytest.raises(RemoteError, match="another version"):
        w.check_answer(json.dumps(easy).encode(), ANSWER, replace(ask, version="cd"), "p")
    for body in (b"", b"no", b"[1]", b"\xff", b"[" * 100_000):
        with pytest.raises(RemoteError, match="no JSON"):
            w.check_answer(body, ANSWER, ask, "p")


def test_of_an_infer_answer_the_json_before_the_tensors_is_read() -> None:
    head = json.dumps({"model_name": "xor", "model_version": "ab12cd34", "parameters": {"peer": "p"}}).encode()
    ask, answer = w.Ask("xor", "", "infer", None, 1.0, 0), replace(ANSWER, json_size=len(head))
    w.check_answer(head + b"\x00\xff", answer, ask, "p")
    with pytest.raises(RemoteError, match="names another"):
        w.check_answer(head + b"\x00\xff", answer, ask, "q")
