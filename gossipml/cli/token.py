"""`gossipml token`: join tokens."""

from __future__ import annotations

import datetime
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossipml.cli.common import print_json
from gossipml.errors import UserError

if TYPE_CHECKING:
    from gossipml.daemon.home import Home
    from gossipml.env import Net
    from gossipml.ids import Address
    from gossipml.token import JoinToken

app = typer.Typer(help="Make and look at join tokens.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_SECONDS = 10 * 366 * 86400


@app.command("new", epilog="Example: gossipml token new --expires 7d --out class.token")
def new(
    context: typer.Context,
    expires: Annotated[str, typer.Option(help="How long it lets newcomers in: 90m, 12h, 30d, 4w, or never.")] = "30d",
    out: Annotated[
        Path | None, typer.Option(help="File to write, readable by you alone; without it the token is printed.")
    ] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(help="IP:PORT of a peer to meet first, instead of this machine's; may be given again."),
    ] = None,
) -> None:
    """Make a join token: for the network of this home, or for a new one when the home has none."""
    from gossipml.daemon.home import new_network
    from gossipml.env import files
    from gossipml.env.real import real_env
    from gossipml.ids import parse_address

    home: Home = context.obj.home
    env = real_env(home.path)
    seconds = parse_duration(expires)
    until = int(env.clock.wall() + seconds) if seconds else 0
    addresses = tuple(parse_address(text) for text in address or ()) or reachable_at(home, env.net)
    home.prepare()
    kept = home.token()
    if kept is None:
        token = new_network(env.secrets, expires=until, addresses=addresses)
        home.keep_token(token)
    else:
        token = replace(kept, expires=until).with_addresses(addresses)
    if out is None:
        print(token.encode())
        return
    target = out.expanduser().absolute()
    try:
        files.write_atomic(target, (token.encode() + "\n").encode(), private=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file with --out") from None
    typer.echo(
        f"Wrote {out}, readable by you alone. It lets a machine in {_until(token)}.\n"
        f"Copy it there by a safe way, then: gossipml peer start --join {out.name}",
        err=True,
    )


@app.command("show", epilog="Example: gossipml token show")
def show(context: typer.Context, as_json: Json = False) -> None:
    """Print what the token of this home says, without its secret."""
    home: Home = context.obj.home
    token = home.token()
    if token is None:
        raise UserError(f"{home.path} has no token; make one with `gossipml token new`")
    _describe(token, str(home.token_file), as_json)


@app.command("inspect", epilog="Example: gossipml token inspect class.token")
def inspect(
    file: Annotated[Path, typer.Argument(help="A token file.")],
    as_json: Json = False,
) -> None:
    """Print what a token file says, without its secret."""
    from gossipml.daemon.home import read_token

    try:
        token = read_token(file.expanduser())
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    _describe(token, str(file), as_json)


def _describe(token: JoinToken, source: str, as_json: bool) -> None:
    facts = {
        "file": source,
        "network": token.network_id.hex(),
        "expires": datetime.datetime.fromtimestamp(token.expires, datetime.UTC).isoformat() if token.expires else None,
        "addresses": [str(address) for address in token.addresses],
    }
    if as_json:
        print_json(facts)
        return
    print(f"network    {facts['network']}")
    print(f"lets in    {_until(token)}")
    print(f"addresses  {', '.join(str(address) for address in token.addresses) or 'none'}")


def _until(token: JoinToken) -> str:
    if not token.expires:
        return "for ever"
    return datetime.datetime.fromtimestamp(token.expires, datetime.UTC).strftime("until %Y-%m-%d %H:%M UTC")


def parse_duration(text: str) -> int:
    """Seconds in `30d`, `12h`, `90m`, `3600s`, `4w`; 0 for `never`."""
    if text.strip().lower() == "never":
        return 0
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip().lower())
    if match is None or not 0 < (seconds := int(match[1]) * UNITS[match[2]]) <= MAX_SECONDS:
        raise UserError(
            f"expiry {text!r} is no time span of at most ten years; write for example 90m, 12h, 30d or never"
        )
    return seconds


def reachable_at(home: Home, net: Net) -> tuple[Address, ...]:
    """Where the peer of this home is, or will be once it starts."""
    import os

    from gossipml.config import load_config
    from gossipml.ids import parse_address

    info = home.run_info()
    if info is not None:
        return tuple(parse_address(text) for text in info.addresses)
    listen = load_config(home.path, {}, os.environ).listen
    return net.own_addresses(listen) if listen.port else ()
