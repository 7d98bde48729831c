"""Every question of the Grafana dashboard, asked of a real Prometheus that watches real peers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .processes import peers_of, until
from .test_serving import ask

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(180),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus (apt-get install prometheus)"),
]

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
MAY_BE_EMPTY = "count by (part)"  # of the parts that do not run
STARTING: Any = {"status": "starting", "data": {"result": []}}  # Any: JSON


def questions() -> list[str]:
    """The expressions as Grafana asks them, its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [expr.replace("$job", "gossipml").replace("$__rate_interval", "8s") for expr in found]


@contextmanager
def watching(folder: Path, apis: list[str]) -> Iterator[str]:
    """The address of a Prometheus that looks at these every second."""
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "gossipml", "static_configs": [{"targets": apis}]}],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        str(PROMETHEUS), f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(20)


def query(address: str, question: str) -> Any:  # Any: JSON
    """Prometheus's answer: `{"status": "success", "data": {"result": [...]}}`, or an error and why."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': question})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return STARTING
        return json.load(error)
    except urllib.error.URLError:
        return STARTING


@pytest.mark.slow
def test_prometheus_reads_every_peer_and_answers_every_question_of_the_dashboard(tmp_path: Path) -> None:
    asked = questions()
    assert len(asked) > 20
    with peers_of(tmp_path) as make:
        peers = [make("ada"), make("bela")]
        peers[0].start("--model", "xor", "--no-lan")
        peers[1].start("--model", "xor", "--no-lan", "--join", str(peers[0].token_file(tmp_path)))
        with watching(tmp_path, [peer.home.require_run_info().api for peer in peers]) as address:

            def up() -> list[str]:
                return [line["value"][1] for line in query(address, "up")["data"]["result"]]

            def unanswered() -> list[str]:
                for peer in peers:
                    ask(peer, "/predict/xor", [0, 1])
                return [
                    question
                    for question in asked
                    if not query(address, question)["data"]["result"] and not question.startswith(MAY_BE_EMPTY)
                ]

            until(lambda: up() == ["1", "1"], 60, "both peers are read without an error")
            assert [query(address, question)["status"] for question in asked] == ["success"] * len(asked)
            missing = list(asked)

            def all_answered() -> bool:
                missing[:] = unanswered()
                return not missing

            try:
                until(all_answered, 40, "each shows something")
            finally:
                assert missing == []
