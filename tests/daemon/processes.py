"""Real peers as a user of several machines would run them, on one: processes, sockets, disks."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossipml.cli.common import fetch_json
from gossipml.daemon.home import Home

START_SECONDS = 60.0


class Peer:
    """A `gossipml peer start` process on a home of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.home = Home(folder / name)
        self.output = folder / f"{name}.out"
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self.launch(*options)
        self.wait_until_started()

    def launch(self, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "gossipml", "--home", str(self.home.path), "peer", "start"]
        command += ["--listen", "127.0.0.1:0", "--api", "127.0.0.1:0", "--name", self.name, *options]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GOSSIPML_")}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environ
            )

    def wait_until_started(self) -> None:
        process = self.process
        assert process is not None
        until(lambda: self.home.run_info() is not None or process.poll() is not None, START_SECONDS, "it started")
        assert process.poll() is None, self.output.read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, path: str, body: object = None) -> Any:  # Any: JSON
        info = self.home.require_run_info()
        return fetch_json(info.api, "GET" if body is None else "POST", path, body)

    def status(self) -> Any:  # Any: JSON
        return self.ask("/v1/status")

    def metric(self, name: str) -> float | None:
        """A value of `GET /metrics`; None where there is none of the name."""
        connection = http.client.HTTPConnection(self.home.require_run_info().api, timeout=10)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def token_file(self, folder: Path) -> Path:
        """A token as `gossipml token new --out FILE` gives it."""
        file = folder / f"{self.name}.token"
        gossipml("--home", str(self.home.path), "token", "new", "--out", str(file))
        return file


def gossipml(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gossipml", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@contextmanager
def peers_of(folder: Path) -> Iterator[Callable[[str], Peer]]:
    """Makes peers with homes in the folder, and ends them all."""
    peers: list[Peer] = []

    def make(name: str) -> Peer:
        peers.append(Peer(folder, name))
        return peers[-1]

    try:
        yield make
    finally:
        end_all(peers)


def end_all(peers: list[Peer]) -> None:
    for peer in peers:
        if peer.process is not None and peer.process.poll() is None:
            peer.process.terminate()
    for peer in peers:
        if peer.process is not None and peer.process.poll() is None:
            try:
                peer.process.wait(20)
            except subprocess.TimeoutExpired:
                peer.process.kill()
                peer.process.wait()
