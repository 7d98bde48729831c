"""Peers that cannot have the data that they were started with: the process says why and ends, as for a wrong option."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .processes import Peer, gossipml, peers_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(100)]

GOOD = "a,b,kind\n" + "".join(f"{n},{n % 7},{n % 2}\n" for n in range(40))


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def ended(peer: Peer) -> tuple[int, str]:
    assert peer.process is not None
    return peer.process.wait(60), peer.output.read_text()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (GOOD + "7,,1\n", "missing"),
        ("a,b,kind\n" + "".join(f"{n},{n % 7},0\n" for n in range(40)), "class"),
    ],
)
def test_a_peer_ends_with_what_is_wrong_with_its_data_and_starts_when_it_is_mended(
    tmp_path: Path, make_peer: Callable[[str], Peer], table: str, says: str
) -> None:
    file = tmp_path / "table.csv"
    file.write_text(table)
    options = ("--model", "logistic", "--data", f"csv:{file}#kind", "--no-lan")
    peer = make_peer("ann")
    peer.launch(*options)
    status, said = ended(peer)
    assert status == 1
    assert says in said.splitlines()[-1] or says in said.splitlines()[-2], said
    assert "Traceback" not in said
    assert peer.home.run_info() is None
    identity = gossipml("--home", str(peer.home.path), "token", "show").stdout

    file.write_text(GOOD)
    peer.start(*options)
    assert gossipml("--home", str(peer.home.path), "token", "show").stdout == identity, "the network is the same"
