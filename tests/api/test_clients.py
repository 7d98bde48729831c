"""The public clients of the Open Inference Protocol, unchanged, against a peer that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.processes import Peer, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

SAMPLES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A peer that has trained xor."""
    with peers_of(tmp_path_factory.mktemp("clients")) as make:
        peer = make("peer")
        peer.start("--model", "xor", "--max-rounds", "20", "--no-lan")
        until(lambda: peer.status()["state"] == "averaging", 60, "xor is trained")
        until(lambda: len(peer.ask("/v2/models/xor")["versions"]) == 2, 60, "a version is published")
        yield peer


def address(peer: Peer) -> str:
    return peer.home.require_run_info().api


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient_works_unchanged(peer: Peer, binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http], of the extra clients")
    with http.InferenceServerClient(address(peer)) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("xor")
        assert client.get_server_metadata()["name"] == "gossipml"
        assert [line["state"] for line in client.get_model_repository_index()] == ["READY", "READY"]
        metadata = client.get_model_metadata("xor")
        (described,) = metadata["inputs"]
        assert (described["datatype"], described["shape"]) == ("FP32", [-1, 2])
        given = http.InferInput(described["name"], [4, 2], "FP32")
        given.set_data_from_numpy(SAMPLES, binary_data=binary)
        wanted = [http.InferRequestedOutput("result", binary_data=binary)]
        for version in metadata["versions"]:
            assert client.is_model_ready("xor", version)
            answer = client.infer("xor", [given], model_version=version, outputs=wanted, request_id="7")
            assert answer.as_numpy("result").tolist() == [[0], [1], [1], [0]]
            assert answer.as_numpy("probability") is None
            response = answer.get_response()
            assert (response["id"], response["model_version"]) == ("7", version)
        bearer = {"Authorization": f"Bearer {(peer.home.path / 'api-token').read_text().strip()}"}
        client.load_model("xor", headers=bearer)
        with pytest.raises(Exception, match="needs the token"):
            client.load_model("xor")
        with pytest.raises(Exception, match="is what this peer was started for"):
            client.unload_model("xor", headers=bearer)
        client.unload_model("mnist-mlp", headers=bearer)
        assert client.infer("xor", [given], timeout=20_000_000).as_numpy("result").shape == (4, 1)
        with pytest.raises(Exception, match="did not answer within 1e-06 s"):
            client.infer("xor", [given], timeout=1)
        everything = client.infer("xor", [given])  # asks for binary outputs
        assert everything.as_numpy("probability").shape == (4, 1)
        with pytest.raises(Exception, match="there is no model 'nothing' in the network"):
            client.infer("nothing", [given])
        wrong = http.InferInput(described["name"], [4, 3], "FP32")
        wrong.set_data_from_numpy(np.zeros((4, 3), np.float32), binary_data=binary)
        with pytest.raises(Exception, match=r"has shape \[4, 3\]; send \[-1, 2\]"):
            client.infer("xor", [wrong])


@pytest.mark.parametrize("binary", [False, True])
def test_the_client_of_kserve_works_unchanged(peer: Peer, binary: bool) -> None:
    """In an interpreter of its own: kserve pins an older psutil than gossipml needs, and its client runs on asyncio."""
    python = os.environ.get("GOSSIPML_KSERVE_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import kserve"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("needs kserve; GOSSIPML_KSERVE_PYTHON names an interpreter that has it")
    program = Path(__file__).with_name("kserve_client.py")
    command = [python, str(program), address(peer), "binary" if binary else "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "live": True,
        "ready": True,
        "model": True,
        "result": [0, 1, 1, 0],
    }
