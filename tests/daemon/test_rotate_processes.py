"""The token is rotated and a peer revoked while real peers run: processes, TLS, files."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossipml.token import JoinToken

from .processes import Peer, gossipml, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
OPTIONS = ("--model", "xor", "--max-rounds", "3")


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def kept(peer: Peer) -> JoinToken:
    token = peer.home.token()
    assert token is not None
    return token


def test_running_peers_take_a_rotation_up_and_a_revoked_one_is_told(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    first, second, third = make_peer("first"), make_peer("second"), make_peer("third")
    first.start(*OPTIONS)
    old = first.token_file(tmp_path).rename(tmp_path / "old.token")
    second.start(*OPTIONS, "--join", str(old))
    until(lambda: second.status()["neighbours"] == 1, 60, "they met")
    before = kept(first)

    home = ("--home", str(first.home.path))
    refused = gossipml("--home", str(second.home.path), "token", "rotate", check=False)
    assert refused.returncode == 1 and "only the home where the network was made" in refused.stderr
    said = gossipml(*home, "token", "rotate", "--window", "1h").stdout
    assert "The peer of this home has taken it up" in said
    assert not list((first.home.path / "orders").iterdir())
    until(lambda: kept(first).generation == kept(second).generation == 2, 20, "the other heard of it")
    assert kept(first).cookie == kept(second).cookie != before.cookie
    for peer in (first, second):
        assert stat.S_IMODE((peer.home.path / "keys").stat().st_mode) == 0o600
        assert peer.status()["neighbours"] == 1

    third.start(*OPTIONS, "--join", str(old))  # handed out before, used within the window
    until(lambda: kept(third).generation == 2, 60, "it entered with the old token and has the new one")
    new = first.token_file(tmp_path)
    fourth = make_peer("fourth")
    fourth.start(*OPTIONS, "--join", str(new))
    peers = (first, second, third, fourth)
    until(lambda: all(peer.status()["neighbours"] == 3 for peer in peers), 60, "all met")

    name = third.status()["peer"]
    assert "is revoked" in gossipml(*home, "token", "revoke", name[:8]).stdout
    others = (first, second, fourth)
    until(lambda: all(peer.status()["neighbours"] == 2 for peer in others), 30, "it is out everywhere")
    until(lambda: "was revoked" in json.dumps(third.status()["problems"]), 30, "it is told why")
    assert third.status()["neighbours"] == 0
    secrets = [kept(first).cookie, kept(first).cookie.hex().encode(), kept(first).encode().encode()]
    for peer in peers:
        shown = peer.home.log_file.read_bytes() + peer.output.read_bytes()
        assert not any(secret in shown for secret in secrets)
