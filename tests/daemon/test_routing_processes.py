"""Predictions through a peer without the model: real processes, as a user runs them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from .processes import Peer, gossipml, peers_of, until
from .test_serving import ZEROS, ask, publish

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

OPTIONS = ("--model", "xor", "--max-rounds", "3", "--no-lan", "--replicas", "1")


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def infer(peer: Peer, version: str) -> tuple[dict[str, object], bytes]:
    """By the Open Inference Protocol with binary tensors: the JSON of the answer, and what follows it."""
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 784], "parameters": {"binary_data_size": 3136}}
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    connection = http.client.HTTPConnection(peer.home.require_run_info().api, timeout=30)
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    connection.request(
        "POST", f"/v2/models/mnist-mlp/versions/{version}/infer", head + np.zeros(784, "<f4").tobytes(), headers
    )
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, body
    size = int(response.headers["inference-header-content-length"])
    connection.close()
    return json.loads(body[:size]), body[size:]


def test_every_form_of_prediction_goes_through_and_none_fails_when_a_holder_is_killed(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    first, second, third = (make_peer(name) for name in ("first", "second", "third"))
    first.start(*OPTIONS)
    token = str(first.token_file(tmp_path))
    second.launch(*OPTIONS, "--join", token, "--pull-after", "10")
    third.launch(*OPTIONS, "--join", token, "--pull-after", "0")
    for peer in (second, third):
        peer.wait_until_started()
    for peer in (first, second, third):
        until(lambda peer=peer: peer.status()["age"] > 0, 60, "its own model is loaded")  # type: ignore[misc]
    version = publish(first, tmp_path, 7)
    holders = {peer.status()["peer"]: peer for peer in (first, second)}
    asked: list[tuple[int, Peer, float]] = []

    def ask_second() -> Peer:
        begun = time.monotonic()
        status, answer = ask(second, "/predict/mnist-mlp")
        asked.append((status, holders[answer["peer"]], time.monotonic() - begun))
        return asked[-1][1]

    until(lambda: ask_second() is second, 30, "what is asked for often is fetched")
    assert {status for status, _, _ in asked} == {200} and len(asked) > 10
    assert asked[-1][2] < 1.0, "and is in memory by then"

    status, answer = ask(third, "/predict/mnist-mlp")
    assert (status, answer["label"], answer["version"]) == (200, "7", version) and answer["peer"] in holders
    assert ask(third, f"/predict/mnist-mlp?version={version[:6]}")[1]["label"] == "7"
    metadata = third.ask(f"/v2/models/mnist-mlp/versions/{version}")
    assert metadata["versions"] == [version] and metadata["inputs"][0]["shape"] == [-1, 784]
    assert third.ask("/v2/models/mnist-mlp")["versions"] == [version]
    assert third.ask("/v2/models/mnist-mlp/ready") == {"name": "mnist-mlp", "ready": True}
    (listed,) = (line["serving"] for line in third.ask("/v1/models")["models"] if line["name"] == "mnist-mlp")
    assert (listed["ready"], listed["picture"], listed["labels"]) == (True, [28, 28, 1], list("0123456789"))
    assert ["mnist-mlp", version, "READY"] in [
        [line["name"], line["version"], line["state"]] for line in third.ask("/v2/repository/index", {"ready": True})
    ]
    head, tensors = infer(third, version)
    parameters = head["parameters"]
    assert isinstance(parameters, dict) and parameters["peer"] in holders
    assert np.frombuffer(tensors, "<f4").argmax() == 7
    status, answer = ask(third, "/predict/mnist-mlp", [1, 2])
    assert (status, "the sample has 2 values" in answer["error"]) == (400, True)
    status, answer = ask(third, "/predict/mnist-mlp?version=ffffff")
    assert (status, "no peer of the network has a version 'ffffff'" in answer["error"]) == (404, True)
    status, answer = ask(third, "/predict/nothing")
    assert (status, "there is no model 'nothing' in the network" in answer["error"]) == (404, True)
    status, answer = ask(third, "/predict/mnist-mpl")
    assert (status, "did you mean 'mnist-mlp'?" in answer["error"]) == (404, True)

    seen: list[tuple[int, str]] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            status, answer = ask(third, "/predict/mnist-mlp", ZEROS)
            seen.append((status, answer.get("peer", answer.get("error"))))

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    until(lambda: {peer for _, peer in seen} == set(holders), 30, "both are asked")
    first.kill()
    count = len(seen)
    until(lambda: len(seen) > count + 200, 30, "it goes on")
    over.set()
    for asker in askers:
        asker.join()
    assert {status for status, _ in seen} == {200}, "none failed"
    assert {peer for _, peer in seen[-50:]} == {second.status()["peer"]}

    second.kill()
    connection = http.client.HTTPConnection(third.home.require_run_info().api, timeout=30)
    headers = {"content-type": "application/json", "prediction-timeout": "1.5"}
    connection.request("POST", "/predict/mnist-mlp", json.dumps(ZEROS), headers)
    response = connection.getresponse()
    assert (response.status, response.headers["retry-after"]) == (503, "2")
    assert b"the peers that have the model mnist-mlp do not answer" in response.read()
    connection.close()
    rows = gossipml("--home", str(third.home.path), "audit", "list", "--json").stdout
    assert "/predict/mnist-mlp forwarded to " in rows
