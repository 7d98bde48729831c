"""Two real peers with one model name and different specifications: no session, and both digests for both users."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from .processes import Peer, gossipml, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(200)]

DIGEST = re.compile("[0-9a-f]{64}")


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def test_different_specifications_of_one_name_are_refused_with_both_digests_in_log_and_list(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    wide = tmp_path / "mine.py"
    gossipml("models", "new", str(wide), "--data", "digits")
    narrow = tmp_path / "narrow.py"
    narrow.write_text(
        re.sub(r", 64\), nn.ReLU\(\), nn.Linear\(64,", ", 32), nn.ReLU(), nn.Linear(32,", wide.read_text())
    )
    assert narrow.read_text() != wide.read_text()
    ann, bob = make_peer("ann"), make_peer("bob")
    ann.start("--model", f"{wide}:Spec", "--no-lan")
    bob.start("--model", f"{narrow}:Spec", "--no-lan", "--join", str(ann.token_file(tmp_path)))

    def problems(peer: Peer) -> set[str]:
        return {digest for other in peer.ask("/v1/peers")["peers"] for digest in DIGEST.findall(other["problem"])}

    until(lambda: len(problems(ann)) == 2, 100, "ann knows both digests")
    until(lambda: problems(bob) == problems(ann), 100, "bob knows the same two")
    for peer in (ann, bob):
        listed = gossipml("--home", str(peer.home.path), "peer", "list").stdout
        assert all(digest[:12] in listed for digest in problems(ann)), "folded, in a narrow column"
        assert "with different specifications" in peer.output.read_text()
        assert problems(ann) <= set(DIGEST.findall(peer.output.read_text()))
        assert [other["strikes"] for other in peer.ask("/v1/peers")["peers"]] == [0], "a mistake is no attack"
        until(partial(_trains_on, peer, peer.status()["round"]), 60, f"{peer.name} trains on alone")
        assert "Traceback" not in peer.output.read_text()


def _trains_on(peer: Peer, before: int) -> bool:
    now: int = peer.status()["round"]
    return now > before
