"""`gossipml peer doctor` as its user meets it: columns for people, data for programs, an exit status for scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gossipml.cli import main

pytestmark = pytest.mark.real

NAMES = ["home", "peer", "disk", "ports", "reachable", "members", "lan", "clock"]


def doctor(home: Path, *options: str) -> int:
    sys.argv = ["gossipml", "--home", str(home), "peer", "doctor", *options]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("GOSSIPML_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("GOSSIPML_API", "127.0.0.1:0")
    monkeypatch.setenv("GOSSIPML_LAN", "off")  # quick; beacons are tried in tests/env/test_lan.py
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home


def test_every_check_is_a_line_for_people_and_an_object_for_programs(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(home, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert [check["name"] for check in told["checks"]] == NAMES
    assert all(set(check) == {"name", "state", "seen", "fix"} for check in told["checks"])
    assert doctor(home) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")][:-1] == NAMES
    assert "nothing is wrong; look at: home, reachable" in out
    assert "\x1b" not in out, "no colours where no terminal is"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_something_wrong_is_exit_status_1_with_its_fix(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "token").write_text("gml1-secret")
    (home / "token").chmod(0o644)
    assert doctor(home) == 1
    out, _ = capsys.readouterr()
    assert f"fix      chmod 600 {home / 'token'}" in out
    assert out.endswith("wrong: home\n")
    assert "secret" not in out.replace("the secret in", "")
