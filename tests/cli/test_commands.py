"""The command line as its user meets it: exit status, one paragraph of error, data for programs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gossipml import token as tokens
from gossipml.cli import main
from gossipml.cli.token import parse_duration
from gossipml.errors import UserError


class Cli:
    """Runs `gossipml --home HOME ...` in this process."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self._monkeypatch.setattr(sys, "argv", ["gossipml", "--home", str(self.home), *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    def fails(self, *arguments: str) -> str:
        """The error of a command that fails: one paragraph on standard error, nothing on standard output."""
        status, out, err = self(*arguments)
        assert status == 1, (out, err)
        assert out == ""
        assert err.startswith("gossipml: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.delenv("GOSSIPML_HOME", raising=False)
    return Cli(tmp_path / "home", monkeypatch, capsys)


def test_help_comes_without_torch_and_with_an_example(cli: Cli) -> None:
    probe = (
        "import sys; sys.argv = ['gossipml', '--help']\n"
        "import atexit; atexit.register(lambda: print('HEAVY', {'torch', 'trio', 'numpy'} & set(sys.modules)))\n"
        "from gossipml.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True)
    assert "gossipml demo" in done.stdout
    assert "HEAVY set()" in done.stdout
    for command in (["peer", "start"], ["peer", "status"], ["token", "new"], ["demo"], ["peer", "logs"]):
        status, out, _ = cli(*command, "--help")
        assert status == 0
        assert "Example: gossipml" in " ".join(out.split())


def test_wrong_usage_is_exit_status_2(cli: Cli) -> None:
    assert cli("peer", "strat")[0] == 2
    assert cli("peer", "start", "--no-such-option")[0] == 2
    assert cli("token", "inspect")[0] == 2


def test_a_new_token_lies_in_a_private_file_and_says_what_it_is(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "class.token"
    status, out, err = cli("token", "new", "--out", str(file), "--expires", "7d", "--address", "192.0.2.7:8711")
    assert (status, out) == (0, "")
    assert "gossipml peer start --join class.token" in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((cli.home / "token").stat().st_mode) == 0o600
    secret = tokens.decode(file.read_text()).cookie

    status, out, _ = cli("token", "inspect", str(file), "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["addresses"] == ["192.0.2.7:8711"]
    assert secret.hex() not in out and file.read_text().strip() not in out
    assert json.loads(cli("token", "show", "--json")[1])["network"] == facts["network"]


def test_another_token_of_the_same_home_is_of_the_same_network(cli: Cli, tmp_path: Path) -> None:
    first = tokens.decode(cli("token", "new", "--expires", "never")[1])
    second = tokens.decode(cli("token", "new", "--expires", "2h")[1])
    assert (first.network_id, first.cookie) == (second.network_id, second.cookie)
    assert first.expires == 0 < second.expires
    assert all(address.port == 8711 for address in first.addresses)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5h", "30 days", "4000w", "0d"])
def test_an_expiry_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write for example"):
        parse_duration(text)


def test_what_is_wrong_with_a_token_file_is_said(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "t"
    assert "there is no token file" in cli.fails("peer", "start", "--join", str(file))
    file.write_text("hello")
    file.chmod(0o600)
    assert "not a join token" in cli.fails("peer", "start", "--join", str(file))
    cli("token", "new", "--out", str(file))
    text = file.read_text()
    file.write_text(text[:20] + ("a" if text[20] != "a" else "b") + text[21:])
    assert "mistyped" in cli.fails("peer", "start", "--join", str(file))
    file.write_text(text)
    file.chmod(0o644)
    assert "chmod 600" in cli.fails("peer", "start", "--join", str(file))
    assert "is a folder" in cli.fails("peer", "start", "--join", str(tmp_path))


def test_an_expired_token_lets_nobody_in(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "old.token"
    token = tokens.JoinToken(bytes(16), bytes(32), 1_600_000_000, ())
    file.write_text(token.encode())
    file.chmod(0o600)
    said = cli.fails("peer", "start", "--join", str(file), "--model", "xor")
    assert "expired on 2020-09-13" in said
    assert "gossipml token new" in said
    assert not (cli.home / "token").exists()


def test_a_home_belongs_to_one_network(cli: Cli, tmp_path: Path) -> None:
    cli("token", "new")
    file = tmp_path / "other.token"
    file.write_text(tokens.JoinToken(b"n" * 16, b"c" * 32, 0, ()).encode())
    file.chmod(0o600)
    assert "join it from a new home" in cli.fails("peer", "start", "--join", str(file), "--model", "xor")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "digits-mpl"], "digits-mlp"),
        (["--model", "nothere.py:Spec"], "nothere.py' for the model"),
        (["--data", "digit"], "digits"),
        (["--data", "mnist:/nowhere"], "does not exist"),
        (["--data", "mnist"], "mnist:DIR"),
        (["--split", "dirichlet"], "dirichlet:"),
        (["--split", "dirichlet:0"], "0"),
        (["--split", "labels:x"], "labels:"),
        (["--split", "random"], "iid"),
        (["--part", "5/4"], "part 5/4 does not exist"),
        (["--listen", "nonsense"], "not IP:PORT"),
        (["--api", "0.0.0.0:8710"], "API key"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--target-accuracy", "95"], "0.95 means 95 %"),
        (["--schedule", "at night"], "write for example 22:00-06:00"),
        (["--pause-on-load", "200"], "0 means never"),
        (["--nice", "20"], "nice 20 is not between 0 and 19"),
    ],
)
def test_a_wrong_option_of_peer_start_is_said_before_anything_starts(cli: Cli, options: list[str], said: str) -> None:
    assert said in cli.fails("peer", "start", *options)
    assert not (cli.home / "identity").exists()


def test_commands_about_a_peer_that_does_not_run_say_how_to_start_it(cli: Cli) -> None:
    for command in ("status", "list", "stop"):
        assert "gossipml peer start" in cli.fails("peer", command)
    assert "no log yet" in cli.fails("peer", "logs")
    assert "gossipml token new" in cli.fails("token", "show")


def test_an_identity_of_a_wrong_size_or_mode_is_refused(cli: Cli) -> None:
    cli("token", "new")
    identity = cli.home / "identity"
    identity.write_bytes(b"short")
    identity.chmod(0o600)
    assert "5 bytes instead of 32" in cli.fails("peer", "start", "--model", "xor")
    identity.write_bytes(bytes(32))
    identity.chmod(0o640)
    assert "chmod 600" in cli.fails("peer", "start", "--model", "xor")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_said(cli: Cli, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "--home DIR" in cli.fails("peer", "start", "--model", "xor")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [ValueError("x"), ExceptionGroup("", [UserError("do that")])]), 1, "do that"),
        (BaseExceptionGroup("", [UserError("do that"), KeyboardInterrupt()]), 130, ""),
        (RuntimeError("odd"), 1, "unexpected RuntimeError: odd. This is a fault of gossipml"),
    ],
)
def test_whatever_ends_a_command_no_traceback_reaches_the_user(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("gossipml.cli.app.app", fail)
    ended, out, err = cli("anything")
    assert (ended, out) == (status, "")
    assert said in err
