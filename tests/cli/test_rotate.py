"""`gossipml token rotate` and `revoke`, without and with a running peer."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from gossipml import token as tokens
from gossipml.daemon.home import Home, join
from gossipml.daemon.orders import order_name
from gossipml.env.real import real_env
from gossipml.errors import UserError
from gossipml.identity import Identity
from gossipml.ids import format_peer_id, parse_peer_id
from gossipml.orders import NetworkKey, network_id_of
from gossipml.token import JoinToken

from .test_commands import Cli

PEER = Identity(b"p" * 32).peer_id


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.delenv("GOSSIPML_HOME", raising=False)
    return Cli(tmp_path / "home", monkeypatch, capsys)


def new_token(cli: Cli) -> JoinToken:
    return tokens.decode(cli("token", "new", "--expires", "never")[1])


def test_whoever_makes_a_network_holds_its_key_and_nobody_else(cli: Cli, tmp_path: Path) -> None:
    token = new_token(cli)
    home = Home(cli.home)
    key = home.network_key()
    assert key is not None and key.network_id == token.network_id == network_id_of(key.public_key)
    assert stat.S_IMODE(home.network_key_file.stat().st_mode) == 0o600
    env = real_env(tmp_path)
    member = Home(tmp_path / "member")
    join(member, token, wall=env.clock.wall(), secrets=env.secrets, seconds=0)
    assert member.network_key() is None
    founder = Home(tmp_path / "founder")
    first = join(founder, None, wall=env.clock.wall(), secrets=env.secrets, seconds=0)
    key = founder.network_key()
    assert key is not None and key.network_id == first.network_id


def test_a_rotation_gives_new_tokens_a_new_secret_and_says_until_when_old_ones_work(cli: Cli) -> None:
    before = new_token(cli)
    status, out, err = cli("token", "rotate", "--window", "2h")
    assert status == 0 and err == ""
    for part in ("generation 2", "both work until 20", "UTC", "token new --out FILE", "starts (gossipml peer start)"):
        assert part in out
    after = new_token(cli)
    assert after.network_id == before.network_id and after.cookie != before.cookie and after.generation == 2
    for text in (out, json.dumps(json.loads(cli("token", "show", "--json")[1]))):
        assert after.cookie.hex() not in text and before.cookie.hex() not in text
    assert json.loads(cli("token", "show", "--json")[1])["generation"] == 2
    facts = json.loads(cli("token", "rotate", "--json")[1])
    assert facts["generation"] == 3 and facts["network"] == before.network_id.hex() and not facts["running"]

    shown = json.loads(cli("token", "show", "--json")[1])
    assert [older["generation"] for older in shown["older"]] == [2, 1] and shown["network_key"]
    assert "generation 1 works until 20" in cli("token", "show")[1]

    home = Home(cli.home)
    assert stat.S_IMODE(home.keys_file.stat().st_mode) == 0o600
    now = real_env(cli.home).clock.wall()
    membership = home.membership(new_token(cli), now)
    assert [keys.generation for keys in membership.accepted] == [3, 2, 1]
    assert membership.ends(membership.accepted[2]) == pytest.approx(now + 7200, abs=60)
    home.keys_file.chmod(0o644)
    assert "chmod 600" in cli.fails("token", "rotate")


@pytest.mark.parametrize("window", ["59s", "0s", "never", "400d", "soon", ""])
def test_a_window_that_is_none_is_refused(cli: Cli, window: str) -> None:
    new_token(cli)
    assert "write for example" in cli.fails("token", "rotate", "--window", window)
    assert new_token(cli).generation == 1


def test_without_the_network_key_the_commands_say_where_to_run_them(cli: Cli) -> None:
    for command in (["rotate"], ["revoke", format_peer_id(PEER)]):
        assert "gossipml token new" in cli.fails("token", *command)
    token = new_token(cli)
    home = Home(cli.home)
    seed = home.network_key_file.read_bytes()
    home.network_key_file.unlink()
    for command in (["rotate"], ["revoke", format_peer_id(PEER)]):
        said = cli.fails("token", *command)
        assert "only the home where the network was made" in said and "copy that file" in said
    home.network_key_file.write_bytes(NetworkKey(b"o" * 32).seed)
    home.network_key_file.chmod(0o600)
    assert "is of network" in cli.fails("token", "rotate")
    home.network_key_file.write_bytes(b"short")
    assert "instead of 32" in cli.fails("token", "rotate")
    home.network_key_file.write_bytes(seed)
    home.network_key_file.chmod(0o644)
    assert "chmod 600" in cli.fails("token", "rotate")
    home.network_key_file.chmod(0o600)
    assert cli("token", "rotate")[0] == 0
    assert new_token(cli).network_id == token.network_id


def test_a_revocation_says_what_it_does_not_do(cli: Cli) -> None:
    new_token(cli)
    name = format_peer_id(PEER)
    status, out, _ = cli("token", "revoke", name.upper())
    assert status == 0
    assert f"Peer {name[:8]} is revoked" in out and "come back as a new peer" in out and "token rotate" in out
    home = Home(cli.home)
    token = home.token()
    assert token is not None and home.membership(token, 0).is_revoked(PEER)
    assert f"revoked    {name[:8]}" in cli("token", "show")[1]
    assert json.loads(cli("token", "show", "--json")[1])["revoked"] == [name]
    assert "already" in cli.fails("token", "revoke", name)
    for wrong in ("kx4n7yq3", name[:-1], name + "a", "not a peer", "ä" * 52, name[:-1] + "b"):
        assert "is not a peer id" in cli.fails("token", "revoke", wrong)
    own = home.identity(real_env(cli.home).secrets).peer_id
    assert "this home itself" in cli.fails("token", "revoke", format_peer_id(own))


def test_a_peer_id_is_read_as_it_is_written() -> None:
    assert parse_peer_id(format_peer_id(PEER)) == PEER
    assert parse_peer_id(f" {format_peer_id(PEER).upper()}\n") == PEER
    with pytest.raises(UserError):
        parse_peer_id("")


def test_an_order_for_a_running_peer_lies_in_its_folder_until_it_is_taken(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_token(cli)
    home = Home(cli.home)
    monkeypatch.setattr("gossipml.cli.token.TAKEN_SECONDS", 0.3)
    with home.lock():  # as a peer that runs but does not answer
        said = cli.fails("token", "rotate", "--window", "1h")
    (file,) = (cli.home / "orders").iterdir()
    assert str(file) in said and stat.S_IMODE(file.stat().st_mode) == 0o600
    token = home.token()
    assert token is not None and token.generation == 1
    membership = home.membership(token, real_env(cli.home).clock.wall())
    assert [keys.generation for keys in membership.accepted] == [2, 1]
    order = membership.orders()[0]
    key = home.network_key()
    assert key is not None
    revocation = key.revocation(PEER, made=10**10)
    home.leave_order(revocation)
    assert sorted(f.name for f in file.parent.iterdir()) == [order_name(revocation), file.name], "revocations first"
    assert file.read_bytes() == order


def test_a_home_joins_again_with_a_newer_token_and_shrugs_at_an_older_one(cli: Cli, tmp_path: Path) -> None:
    old = new_token(cli)
    cli("token", "rotate")
    new = new_token(cli)
    env = real_env(tmp_path)
    now = env.clock.wall()
    member = Home(tmp_path / "member")
    for offered, cookie in ((old, old.cookie), (new, new.cookie), (old, new.cookie), (new, new.cookie)):
        token = join(member, offered, wall=now, secrets=env.secrets, seconds=0)
        assert token.cookie == cookie
        assert (kept := member.token()) is not None and kept.cookie == cookie
    expired = JoinToken(new.network_id, b"third".ljust(32), int(now) - 10, (), 3)
    with pytest.raises(UserError, match="expired"):
        join(member, expired, wall=now, secrets=env.secrets, seconds=0)
    with pytest.raises(UserError, match="belongs to the network"):
        join(member, JoinToken(b"o" * 16, new.cookie, 0, (), 9), wall=now, secrets=env.secrets, seconds=0)
