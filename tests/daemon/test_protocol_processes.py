"""Every gossip protocol between real processes: three peers that know four digits each learn all ten."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossipml.peer.protocols import PROTOCOLS

from .processes import Peer, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

ALONE = 0.45  # no peer that sees four digits of ten names more
CHOICES = [
    *(("--protocol", name) for name in PROTOCOLS if not name.startswith("token-account-")),
    ("--merge", "median", "--compression", "int4", "--optimiser", "adamw", "--learning-rate", "0.003"),
]


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice).replace("--", ""))
def test_three_processes_learn_from_each_other(
    choice: tuple[str, ...], tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    options = ("--model", "digits-mlp", "--split", "labels:4", "--no-lan", "--nice", "0", *choice)
    peers = [make_peer(name) for name in ("ann", "bob", "eve")]
    peers[0].start(*options, "--part", "1/3")
    token = peers[0].token_file(tmp_path)
    for number, peer in enumerate(peers[1:], 2):
        peer.launch(*options, "--part", f"{number}/3", "--join", str(token))
    for peer in peers[1:]:
        peer.wait_until_started()
    until(lambda: all(_learnt(peer) for peer in peers), 60, f"all three learnt with {' '.join(choice)}")
    for peer in peers:
        assert not re.search("Traceback|broke the protocol", peer.output.read_text())
        assert [other["strikes"] for other in peer.ask("/v1/peers")["peers"]] == [0, 0]
        weight = peer.metric("gossipml_push_sum_weight")
        assert ("push-sum" in choice) == (weight is not None)
        assert weight is None or (math.isfinite(weight) and 0 < weight <= 3)
    for peer in peers:
        peer.kill()  # how they end in order is tested elsewhere


def _learnt(peer: Peer) -> bool:
    accuracy = peer.status()["accuracy"]
    return (
        accuracy is not None
        and accuracy > 2 * ALONE
        and (peer.metric('gossipml_merges_total{result="merged"}') or 0) > 10
    )
