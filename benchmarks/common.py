"""What the benchmarks share: the data folder, real peers on loopback, and asking them."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossipml.daemon.home import Home, join, new_network
from gossipml.env.real import real_env
from gossipml.ids import parse_address

START_SECONDS = 60.0


def data_folder() -> Path:
    """The folder of the real datasets; ends the program, saying so, where it is missing."""
    folder = Path(os.environ.get("GOSSIPML_DATASETS", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "mnist").is_dir():
        raise SystemExit(f"skipped: no MNIST in {folder}; set GOSSIPML_DATASETS to the folder that holds mnist/")
    return folder


def ask(api: str, path: str, method: str = "GET", body: object = None) -> Any:  # Any: JSON
    connection = http.client.HTTPConnection(api, timeout=10)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def status(api: str) -> Any:  # Any: JSON
    return ask(api, "/v1/status")


@contextmanager
def running_peers(
    folder: Path,
    options: Sequence[dict[str, object]],
    learner: dict[str, object] | None = None,
    gate: Path | None = None,
    *,
    looks: bool = True,
) -> Iterator[list[str]]:
    """Peers of one new network, one for each set of options; their HTTP addresses. All are ended afterwards.

    `learner` changes fields of `LearnerConfig` that no option of `gossipml peer start` has. With a `gate`, all have
    loaded model and data when the block begins, and train when that file is made; with `looks` they keep their state
    after each round then.
    """
    env = real_env(folder)
    token = new_network(env.secrets, expires=0, addresses=())
    processes: list[subprocess.Popen[bytes]] = []
    apis: list[str] = []
    try:
        for index, extra in enumerate(options):
            home = Home(folder / f"peer{index}")
            home.prepare()
            join(home, token, wall=env.clock.wall(), secrets=env.secrets, seconds=0)
            config = {"listen": "127.0.0.1:0", "api": "127.0.0.1:0", "name": f"peer{index}", **extra}
            program = str(Path(__file__).with_name("peer_process.py"))
            command = [sys.executable, "-P", program, str(home.path), json.dumps(config), json.dumps(learner or {})]
            command += [str(gate), *["looks"] * looks] if gate else []
            with (folder / f"peer{index}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            info = None
            until = time.monotonic() + START_SECONDS
            while (info := home.run_info()) is None:
                if processes[-1].poll() is not None or time.monotonic() > until:
                    raise SystemExit((folder / f"peer{index}.log").read_text())
                time.sleep(0.02)
            apis.append(info.api)
            if index == 0:
                token = token.with_addresses(tuple(parse_address(text) for text in info.addresses))
        while gate is not None and not all((folder / f"peer{i}" / "loaded").exists() for i in range(len(options))):
            time.sleep(0.02)
        yield apis
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
