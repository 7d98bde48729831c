"""Published models outlive the machines that published them: real processes, kill -9."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from .processes import Peer, gossipml, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def of(peer: Peer, *arguments: str) -> str:
    return gossipml("--home", str(peer.home.path), "models", *arguments).stdout


def listed(peer: Peer) -> dict[str, dict[str, object]]:
    return {line["name"]: line for line in peer.ask("/v1/models")["models"] if line.get("version")}


@pytest.mark.slow
def test_three_models_survive_the_death_of_half_of_twelve_peers(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    first = make_peer("peer-0")
    first.start("--model", "xor", "--max-rounds", "30")
    token = str(first.token_file(tmp_path))
    others = [make_peer(f"peer-{index}") for index in range(1, 12)]
    for peer in others:
        peer.launch("--join", token, "--model", "xor", "--no-train")
    for peer in others:
        peer.wait_until_started()
    peers = [first, *others]
    until(lambda: first.status()["state"] == "averaging", 60, "xor is trained")

    weights = np.random.default_rng(0).normal(size=(700, 1000)).astype(np.float32)
    save_file({"layer.weight": weights}, tmp_path / "large.safetensors")
    save_file({"bias": np.arange(10, dtype=np.float32)}, tmp_path / "small.safetensors")
    of(first, "publish", "large", "--file", str(tmp_path / "large.safetensors"))
    of(others[4], "publish", "small", "--file", str(tmp_path / "small.safetensors"), "--note", "ten numbers")
    until(lambda: set(listed(others[9])) == {"xor", "large", "small"}, 60, "every name is known everywhere")
    until(lambda: all(line["replicas"] == 12 for line in listed(first).values()), 120, "all twelve hold everything")

    for peer in peers[:6]:  # with the one that made the network and both who published
        peer.kill()
    newcomer = make_peer("newcomer")
    survivors = peers[6:]
    fresh = str(survivors[0].token_file(tmp_path))
    newcomer.start("--join", fresh, "--model", "xor", "--no-train")
    for name in ("xor", "large", "small"):
        of(newcomer, "pull", name)
        of(newcomer, "export", name, str(tmp_path / f"pulled-{name}.safetensors"))
    assert np.array_equal(load_file(tmp_path / "pulled-large.safetensors")["layer.weight"], weights)
    assert load_file(tmp_path / "pulled-small.safetensors")["bias"].tolist() == list(range(10))
    assert load_file(tmp_path / "pulled-xor.safetensors")
    until(lambda: newcomer.status()["state"] == "serving", 60, "it serves")
    assert newcomer.ask("/predict/xor?a=1&b=0")["result"] in (0, 1)

    until(lambda: all(line["replicas"] == 7 for line in listed(newcomer).values()), 120, "the dead are not counted")
    for peer in peers[:6]:
        peer.launch()
    for peer in peers[:6]:
        peer.wait_until_started()
    until(
        lambda: all(int(str(line["replicas"])) >= 12 for line in listed(newcomer).values()), 120, "the counts recover"
    )
    shown = json.loads(of(first, "show", "small", "--json"))
    assert [version["note"] for version in shown["versions"]] == ["ten numbers"]
    assert len(shown["holders"]) >= 12
