"""Real peers: processes, sockets, disks. What a user of several machines would do, on one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossipml.daemon.home import new_network
from gossipml.env.real import real_env
from gossipml.errors import UserError
from gossipml.ids import parse_address

from .processes import Peer, gossipml, peers_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    with peers_of(tmp_path) as make:
        yield make


def test_three_peers_survive_the_first_one_and_take_it_back(tmp_path: Path, make_peer: Callable[[str], Peer]) -> None:
    part = ("--model", "digits-mlp", "--data", "digits", "--split", "labels:4")
    first, second, third = make_peer("first"), make_peer("second"), make_peer("third")
    first.start(*part, "--part", "1/3")  # without a token: makes the network
    token = first.token_file(tmp_path)
    second.start(*part, "--part", "2/3", "--join", str(token))
    third.start(*part, "--part", "3/3", "--join", str(token))
    peers = (first, second, third)
    until(lambda: all(peer.status()["neighbours"] == 2 for peer in peers), 60, "they met")
    # four of ten classes each: without the others nobody could pass 45 %
    until(lambda: all((peer.status()["accuracy"] or 0) > 0.85 for peer in peers), 60, "they learnt from each other")

    before = first.status()
    asked = time.time()
    resume = first.home.path / "state/resume"
    until(lambda: resume.exists() and resume.stat().st_mtime > asked, 20, "the state was kept")
    first.kill()
    second_round = second.status()["round"]
    until(lambda: second.status()["round"] > second_round + 10, 30, "the others go on")
    question = [0, 0, 5, 13, 9, 1, 0, 0] * 8
    for peer in (second, third):
        answer = peer.ask("/predict/digits-mlp", question)
        assert answer["label"] in "0123456789"
        assert answer["peer"] == peer.status()["peer"]
        assert len(answer["probabilities"]) == 10

    first.start()  # the home remembers its options, its token and its identity
    until(lambda: first.status()["round"] > 0, 60, "it resumed")
    after = first.status()
    assert after["peer"] == before["peer"]
    assert after["network"] == before["network"]
    assert after["split"] == "labels:4"
    assert after["age"] >= before["age"]
    assert after["round"] >= before["round"]
    until(lambda: first.status()["neighbours"] == 2, 60, "it met the others again")
    until(lambda: (first.status()["accuracy"] or 0) > 0.85, 60, "it caught up")

    listed = json.loads(gossipml("--home", str(second.home.path), "peer", "list", "--json").stdout)
    assert {peer["name"] for peer in listed} == {"first", "third"}
    assert gossipml("--home", str(second.home.path), "peer", "stop").stdout == "stopped second\n"
    assert second.process is not None
    assert second.process.wait(10) == 0
    assert second.home.run_info() is None
    until(lambda: first.status()["neighbours"] == 1, 30, "its goodbye was heard")


def test_a_stranger_stays_out_and_the_reason_stands_in_the_log(
    tmp_path: Path, make_peer: Callable[[str], Peer]
) -> None:
    member, stranger = make_peer("member"), make_peer("stranger")
    member.start("--model", "xor", "--max-rounds", "3")
    info = member.home.require_run_info()
    env = real_env(stranger.home.path)
    address = parse_address(info.addresses[0])
    stranger.home.prepare()
    stranger.home.keep_token(new_network(env.secrets, expires=0, addresses=(address,)))
    stranger.start("--model", "xor", "--max-rounds", "3")

    def log(peer: Peer) -> str:
        return gossipml("--home", str(peer.home.path), "peer", "logs").stdout

    until(lambda: "token" in log(stranger), 30, "the stranger is told")
    until(lambda: "token" in log(member), 30, "the member says whom it refused")
    assert any("token" in problem for problem in stranger.status()["problems"])
    assert member.status()["neighbours"] == stranger.status()["neighbours"] == 0
    # The easy route of the model answers as its specification says.
    until(lambda: member.ask("/v1/status")["state"] == "averaging", 60, "xor is trained")
    answer = member.ask("/predict/xor?a=0&b=1")
    assert answer["result"] in (0, 1)
    assert answer["model"] == "xor"


def test_a_second_peer_on_one_home_or_port_is_refused(tmp_path: Path, make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("only")
    peer.start("--model", "xor", "--max-rounds", "1")
    info = peer.home.require_run_info()
    same_home = gossipml("--home", str(peer.home.path), "peer", "start", check=False)
    assert same_home.returncode == 1
    assert "already running" in same_home.stderr
    other = ("--home", str(tmp_path / "other"), "peer", "start", "--model", "xor")
    same_port = gossipml(*other, "--listen", info.addresses[0], "--api", "127.0.0.1:0", check=False)
    assert same_port.returncode == 1
    assert "in use" in same_port.stderr and info.addresses[0].rpartition(":")[2] in same_port.stderr
    same_api = gossipml(*other, "--listen", "127.0.0.1:0", "--api", info.api, check=False)
    assert same_api.returncode == 1
    assert "in use" in same_api.stderr and "--api" in same_api.stderr


def test_nothing_that_a_peer_shows_holds_its_secret(tmp_path: Path, make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("canary")
    peer.start("--model", "xor")
    token = peer.home.token()
    assert token is not None
    until(lambda: peer.status()["round"] > 0, 60, "it trains")
    canaries = [
        token.cookie,
        token.cookie.hex().encode(),
        token.encode().encode(),
        (peer.home.path / "identity").read_bytes(),
    ]
    shown = b"".join(
        json.dumps(peer.ask(path)).encode() for path in ("/v1/status", "/v1/peers", "/v1/models", "/openapi.json")
    )
    shown += peer.home.log_file.read_bytes() + (peer.home.path / "config.toml").read_bytes()
    shown += peer.home.run_file.read_bytes()
    assert peer.process is not None
    processes = [peer.process.pid, *children(peer.process.pid)]
    assert len(processes) > 1, "the worker is a process of its own"
    for pid in processes:
        shown += Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    for canary in canaries:
        assert canary not in shown
    for private in ("identity", "token"):
        assert (peer.home.path / private).stat().st_mode & 0o077 == 0


def children(pid: int) -> list[int]:
    """Processes that any thread of `pid` has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


def test_a_dead_worker_is_replaced(make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("phoenix")
    peer.start("--model", "digits-mlp")
    until(lambda: peer.status()["round"] > 5, 60, "it trains")
    until((peer.home.path / "state/resume").exists, 20, "the state was kept")
    assert peer.process is not None
    (worker,) = children(peer.process.pid)
    os.kill(worker, signal.SIGKILL)
    pid = peer.process.pid
    until(lambda: children(pid) not in ([worker], []), 30, "a new worker came")
    until(lambda: peer.status()["state"] == "training" and peer.status()["round"] > 5, 60, "it goes on")
    assert peer.ask("/healthz")["ok"]


def test_a_peer_that_has_trained_nothing_answers_503(make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("young")
    peer.start("--model", "digits-mlp")
    # asked at once: the worker needs seconds to import torch
    with pytest.raises(UserError, match=r"loading its model.*HTTP 503|HTTP 404"):
        peer.ask("/predict/digits-mlp", [0] * 64)
    with pytest.raises(UserError, match=r"loading its model.*HTTP 503"):
        peer.ask("/readyz")
    assert peer.ask("/healthz")["ok"]
