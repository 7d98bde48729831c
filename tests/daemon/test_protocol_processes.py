"""Every gossip protocol between real processes: three peers that know four digits each learn all ten."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossipml.peer.protocols import PROTOCOLS

from .processes import Peer, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

ALONE = 0.45  # no peer that sees four digits of ten names more
LEARNT = 0.7  # the least that the three come to, in a few seconds; more takes some forms and merges long
PARTS = {"partitioned": ":2", "sub-sampled": ":2"}  # of 8, two receivers would get a quarter of the model a round
CHOICES = [
    *(("--protocol", name + PARTS.get(name, "")) for name in PROTOCOLS),
    ("--merge", "median", "--compression", "int4", "--optimiser", "adamw", "--learning-rate", "0.003"),
]
QUICK = ("push", "push-sum")  # the others are marked slow: together they take two minutes


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


@pytest.mark.parametrize(
    "choice",
    [pytest.param(choice, marks=pytest.mark.slow if choice[1] not in QUICK else ()) for choice in CHOICES],
    ids=lambda choice: "-".join(choice).replace("--", ""),
)
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
    until(lambda: all(_learnt(peer) for peer in peers), 150, f"all three learnt with {' '.join(choice)}")
    for peer in peers:
        assert not re.search("Traceback|broke the protocol", peer.output.read_text())
        others = peer.ask("/v1/peers")["peers"]
        assert [other["strikes"] for other in others] == [0, 0]
        assert min(other["bytes_received"] for other in others) > 10_000, "each hears of both"
        weight = peer.metric("gossipml_push_sum_weight")
        assert ("push-sum" in choice) == (weight is not None)
        assert weight is None or (math.isfinite(weight) and 0 < weight <= 3)
    for peer in peers:
        peer.kill()  # how they end in order is tested elsewhere


def _learnt(peer: Peer) -> bool:
    accuracy = peer.status()["accuracy"]
    return (
        accuracy is not None and accuracy > LEARNT and (peer.metric('gossipml_merges_total{result="merged"}') or 0) > 10
    )
