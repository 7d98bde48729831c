"""Which version answers: real processes, as a user runs them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from .processes import Peer, gossipml, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

ZEROS = [0] * 784


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def publish(peer: Peer, folder: Path, label: int) -> str:
    """A version of mnist-mlp that says `label` whatever it is asked; how answers call it."""
    tensors = {
        "0.weight": np.zeros((100, 784), np.float32),
        "0.bias": np.zeros(100, np.float32),
        "2.weight": np.zeros((10, 100), np.float32),
        "2.bias": np.eye(10, dtype=np.float32)[label] * 9,
    }
    file = folder / f"{label}.safetensors"
    save_file(tensors, file)
    done = gossipml("--home", str(peer.home.path), "models", "publish", "mnist-mlp", "--file", str(file), "--json")
    return str(json.loads(done.stdout)["version"])[:12]


def ask(peer: Peer, path: str, body: object = ZEROS, **headers: str) -> tuple[int, Any]:  # Any: JSON
    request = urllib.request.Request(
        f"http://{peer.home.require_run_info().api}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_any_version_answers_and_a_new_one_drops_no_request(tmp_path: Path, make_peer: Callable[[str], Peer]) -> None:
    """On a peer that trains another model, so that all of it is another process's than the trainer's."""
    peer = make_peer("peer")
    peer.start("--model", "xor", "--max-rounds", "3", "--no-lan")
    until(lambda: peer.status()["age"] > 0, 60, "its own model is loaded")
    status, answer = ask(peer, "/predict/mnist-mlp")
    assert (status, "there is no model 'mnist-mlp' in the network" in answer["error"]) == (404, True)
    first = publish(peer, tmp_path, 3)
    status, answer = ask(peer, "/predict/mnist-mlp")
    assert (status, answer["label"], answer["version"], answer["model"]) == (200, "3", first, "mnist-mlp")

    seen: list[tuple[int, str, str]] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            status, answer = ask(peer, "/predict/mnist-mlp")
            seen.append((status, answer.get("label", ""), answer.get("version", "")))

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    second = publish(peer, tmp_path, 5)
    until(lambda: seen[-1][2] == second, 30, "the new version answers")
    time.sleep(0.2)
    over.set()
    for asker in askers:
        asker.join()
    assert set(seen) == {(200, "3", first), (200, "5", second)}, "one version an answer, and none failed"

    for version, label in ((first, "3"), (second, "5"), (first[:6], "3")):
        assert ask(peer, f"/predict/mnist-mlp?version={version}")[1]["label"] == label
        tensor = {"name": "input", "datatype": "FP32", "shape": [1, 784], "data": ZEROS}
        status, answer = ask(peer, f"/v2/models/mnist-mlp/versions/{version}/infer", {"inputs": [tensor]})
        assert (status, answer["outputs"][1]["data"]) == (200, [label])
        assert answer["model_version"].startswith(version)
    status, answer = ask(peer, "/predict/mnist-mlp?version=ffffff")
    assert (status, "has no version 'ffffff' here" in answer["error"]) == (404, True)
    metadata = peer.ask("/v2/models/mnist-mlp")
    assert metadata["versions"] == [second, first] and metadata["inputs"][0]["shape"] == [-1, 784]

    broken = tmp_path / "broken.safetensors"
    save_file({"other": np.zeros(3, np.float32)}, broken)
    gossipml("--home", str(peer.home.path), "models", "publish", "mnist-mlp", "--file", str(broken))
    for _ in range(5):
        status, answer = ask(peer, "/predict/mnist-mlp")
        assert (status, answer["version"]) == (200, second), "a version that does not fit never answers"


def test_the_model_in_training_is_copied_when_it_is_asked_often(make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("peer")
    peer.start("--model", "xor", "--no-lan")
    until(lambda: peer.status()["age"] > 0, 60, "it trains")
    answers = []
    until(lambda: answers.append(ask(peer, "/predict/xor", [0, 1])) or b"predicting process runs" in _log(peer), 60, "")  # type: ignore[func-returns-value]
    end = time.monotonic() + 5
    while time.monotonic() < end:
        answers.append(ask(peer, "/predict/xor", [0, 1]))
    assert {status for status, _ in answers} == {200}
    versions = [str(answer["version"]) for _, answer in answers]
    assert len(set(versions)) > 1, "the copy is renewed"
    rounds = [int(version.rpartition("-")[2]) for version in versions]
    assert rounds[-1] > rounds[0]


def _log(peer: Peer) -> bytes:
    return peer.output.read_bytes()


@pytest.mark.slow
def test_a_peer_that_does_not_train_answers_for_all_it_holds_in_one_process(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    trainer, server = make_peer("trainer"), make_peer("server")
    trainer.start("--model", "xor", "--max-rounds", "20", "--no-lan")
    until(lambda: trainer.status()["state"] == "averaging", 60, "xor is trained")
    until(lambda: len(trainer.ask("/v2/models/xor")["versions"]) == 2, 60, "xor is trained and published")
    server.start("--join", str(trainer.token_file(tmp_path)), "--model", "xor", "--no-train", "--no-lan")
    until(lambda: server.status()["state"] == "serving", 60, "the version has come")
    (version,) = server.ask("/v2/models/xor")["versions"]
    status, answer = ask(server, "/predict/xor", [0, 1])
    assert (status, answer["result"], answer["version"]) == (200, 1, version)
    label = publish(server, tmp_path, 4)
    status, answer = ask(server, "/predict/mnist-mlp")
    assert (status, answer["label"], answer["version"]) == (200, "4", label)
    assert ask(server, "/predict/xor", [1, 1])[1]["result"] == 0
    token = (server.home.path / "api-token").read_text().strip()
    orders = (
        ("mnist-mlp/unload", 200, ""),
        ("xor/unload", 400, "what this peer was started for"),
        ("mnist-mlp/load", 200, ""),
        ("nothing/load", 404, "cannot be built on this peer"),
    )
    for what, status, says in orders:
        found, answer = ask(server, f"/v2/repository/models/{what}", {}, authorization=f"Bearer {token}")
        assert found == status and says in answer.get("error", "")
    assert ask(server, "/predict/mnist-mlp")[1]["label"] == "4"
    assert _log(server).count(f"loaded version {label} of mnist-mlp".encode()) == 2, "it was out of memory in between"
    assert b"the predicting process runs" not in _log(server), "the one process hosts both"
