"""`gossipml token`: join tokens, a new cookie for a network, and putting a peer out of it."""

from __future__ import annotations

import datetime
import math
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
    from gossipml.ids import Address, PeerId
    from gossipml.membership import Membership
    from gossipml.orders import NetworkKey, Order
    from gossipml.token import JoinToken

app = typer.Typer(help="Make, look at, and rotate join tokens; revoke peers.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_SECONDS = 10 * 366 * 86400
LEAST_WINDOW = 60  # seconds; an order takes a few to reach everybody
WHOLE_ID = 52  # characters of a peer id
LEAST_BEGINNING = 6  # characters; fewer are a slip of the hand
TAKEN_SECONDS = 15.0  # the running peer looks every two; its disk may be slow


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
        token = home.found_network(env.secrets, expires=until, addresses=addresses)
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


@app.command("rotate", epilog="Example: gossipml token rotate --window 7d")
def rotate(
    context: typer.Context,
    window: Annotated[
        str, typer.Option(help="How long the old tokens still work beside the new one: 1h, 7d, 4w.")
    ] = "7d",
    as_json: Json = False,
) -> None:
    """Give the network a new secret; tokens of the old one work until the window ends, and nobody is cut off.

    To be run where the network was made (HOME/network-key lies there), or where a copy of that file was put, mode
    0600. Peers that run take the new secret up by themselves, over their encrypted sessions; peers that are off learn
    it when they start before the window ends. Later ones need a new token.
    """
    from gossipml.env.real import real_env
    from gossipml.orders import MAX_WINDOW
    from gossipml.token import COOKIE_SIZE

    seconds = parse_duration(window, what="window")
    if not LEAST_WINDOW <= seconds <= MAX_WINDOW:
        raise UserError(f"window {window!r} is not between one minute and a year; write for example 1h, 7d or 4w")
    home: Home = context.obj.home
    env = real_env(home.path)
    key, token = _authority(home)
    now = env.clock.wall()
    membership = home.membership(token, now)
    generation = membership.newest.generation + 1
    rotation = key.rotation(generation, env.secrets(COOKIE_SIZE), made=int(now), old_until=int(now + seconds))
    running = _give(home, membership, token, rotation, now)
    if as_json:
        until = _iso(rotation.old_until)
        print_json({"network": key.network_id.hex(), "generation": generation, "old_until": until, "running": running})
        return
    print(
        f"Network {key.network_id.hex()[:8]} has a new secret, generation {generation}.\n"
        f"{_taken(running)}\n"
        f"Old and new tokens both work until {_minute(rotation.old_until)}; then the old ones let nobody in any more.\n"
        f"Peers that run, or start before then, take the new secret up by themselves. For a machine that stays off\n"
        f"longer, and for newcomers: gossipml token new --out FILE here, gossipml peer start --join FILE there."
    )


@app.command("revoke", epilog="Example: gossipml token revoke kx4n7yq3")
def revoke(
    context: typer.Context,
    peer: Annotated[str, typer.Argument(help="The peer's id, or its beginning as `gossipml peer list` shows it.")],
    as_json: Json = False,
) -> None:
    """Put one peer out of the network, for good, without a new token for the others.

    To be run where the network was made (HOME/network-key lies there), or where a copy of that file was put. The
    others refuse that peer from now on. It still knows the secret of the network, with which it can come as a new
    peer: to shut its owner out, rotate the token afterwards. A revoked peer is not told the new secret.
    """
    from gossipml.env.real import real_env
    from gossipml.ids import format_peer_id
    from gossipml.membership import MAX_REVOKED

    home: Home = context.obj.home
    env = real_env(home.path)
    key, token = _authority(home)
    revoked = _named_peer(home, peer)
    if revoked == home.identity(env.secrets).peer_id:
        raise UserError("that is the peer of this home itself; revoke it from another home that has the network key")
    now = env.clock.wall()
    membership = home.membership(token, now)
    name = format_peer_id(revoked)
    if membership.is_revoked(revoked):
        raise UserError(f"peer {name[:8]} is revoked already; nothing was done")
    if len(membership.revoked) >= MAX_REVOKED:
        raise UserError(
            f"{MAX_REVOKED} peers are revoked, and no more can be; rotate the token instead and give the new one to "
            "those who should stay: `gossipml token rotate`"
        )
    running = _give(home, membership, token, key.revocation(revoked, made=int(now)), now)
    if as_json:
        print_json({"network": key.network_id.hex(), "peer": name, "running": running})
        return
    print(
        f"Peer {name[:8]} is revoked.\n"
        f"{_taken(running)}\n"
        f"It still knows the network's secret and can come back as a new peer. To shut its owner out:\n"
        f"gossipml token rotate --window 1h (revoked peers are not told the new secret)"
    )


def _authority(home: Home) -> tuple[NetworkKey, JoinToken]:
    """The network key and the token of this home; UserError that says where there are some."""
    token = home.token()
    if token is None:
        raise UserError(f"{home.path} has no token and so no network; make one with `gossipml token new`")
    key = home.network_key()
    if key is None:
        raise UserError(
            f"{home.network_key_file} is missing: only the home where the network was made can do this. Run it there, "
            "or copy that file here by a safe way (chmod 600)"
        )
    if key.network_id != token.network_id:
        raise UserError(
            f"{home.network_key_file} is of network {key.network_id.hex()[:8]}, the token of "
            f"{token.network_id.hex()[:8]}; copy the file from where the latter was made"
        )
    return key, token


def _give(home: Home, membership: Membership, token: JoinToken, order: Order, now: float) -> bool:
    """Hand the order to the running peer of this home, or keep it for the next start; whether a peer runs."""
    from gossipml.cli.waiting import wait_until
    from gossipml.daemon.orders import order_name

    if not home.is_locked():
        with home.lock():
            membership.take(order.raw, now)
            home.keep_membership(membership, token)
        return False
    home.leave_order(order)
    file = home.path / "orders" / order_name(order)
    if not wait_until(lambda: not file.exists(), TAKEN_SECONDS):
        raise UserError(
            f"the running peer has not taken the order in {TAKEN_SECONDS:.0f} s; it lies in {file} and is taken when "
            "the peer can (look at `gossipml peer logs`)"
        )
    return True


def _taken(running: bool) -> str:
    if running:
        return "The peer of this home has taken it up and tells the others now."
    return "No peer of this home runs: the others hear of it when it starts (gossipml peer start)."


def _named_peer(home: Home, text: str) -> PeerId:
    """A whole peer id, or the one that begins so among those that the running peer knows."""
    from gossipml.cli.common import ask
    from gossipml.ids import parse_peer_id

    text = text.strip().lower()
    info = home.run_info()
    if len(text) >= WHOLE_ID or info is None:
        return parse_peer_id(text)
    known = [entry["peer"] for entry in ask(info, "/v1/peers")["peers"]]
    fits = [peer for peer in known if peer.startswith(text)]
    if len(text) < LEAST_BEGINNING or len(fits) != 1:
        raise UserError(
            f"{text!r} is the beginning of {len(fits)} of the {len(known)} peers known here; give at least "
            f"{LEAST_BEGINNING} characters of one (`gossipml peer list`), or its whole id"
        )
    return parse_peer_id(fits[0])


@app.command("show", epilog="Example: gossipml token show")
def show(context: typer.Context, as_json: Json = False) -> None:
    """Print what the token of this home says, without its secret, and what else the home knows of its network."""
    from gossipml.env.real import RealClock
    from gossipml.ids import format_peer_id

    home: Home = context.obj.home
    token = home.token()
    if token is None:
        raise UserError(f"{home.path} has no token; make one with `gossipml token new`")
    membership = home.membership(token, RealClock().wall())
    older = [(keys.generation, membership.ends(keys)) for keys in membership.accepted[1:]]
    revoked = sorted(format_peer_id(peer) for peer in membership.revoked)
    may_order = home.network_key() is not None
    known: dict[str, object] = {
        "older": [{"generation": generation, "until": _iso(end)} for generation, end in older],
        "revoked": revoked,
        "network_key": may_order,
    }
    _describe(token, str(home.token_file), as_json, known)
    if not as_json:
        for generation, end in older:
            print(
                f"older      generation {generation} works until {_minute(end) if end < math.inf else 'further notice'}"
            )
        if revoked:
            print(f"revoked    {', '.join(name[:8] for name in revoked)}")
        print(f"rotate     {'here' if may_order else 'where the network was made, not here'}")


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


def _describe(token: JoinToken, source: str, as_json: bool, known: dict[str, object] | None = None) -> None:
    facts = {
        "file": source,
        "network": token.network_id.hex(),
        "generation": token.generation,
        "expires": _iso(token.expires) if token.expires else None,
        "addresses": [str(address) for address in token.addresses],
    }
    if as_json:
        print_json(facts | (known or {}))
        return
    print(f"network    {facts['network']}")
    print(f"generation {token.generation}")
    print(f"lets in    {_until(token)}")
    print(f"addresses  {', '.join(str(address) for address in token.addresses) or 'none'}")


def _until(token: JoinToken) -> str:
    if not token.expires:
        return "for ever"
    return f"until {_minute(token.expires)}"


def _iso(wall: float) -> str | None:
    return datetime.datetime.fromtimestamp(wall, datetime.UTC).isoformat() if wall < math.inf else None


def _minute(wall: float) -> str:
    return datetime.datetime.fromtimestamp(wall, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def parse_duration(text: str, *, what: str = "expiry") -> int:
    """Seconds in `30d`, `12h`, `90m`, `3600s`, `4w`; 0 for `never`."""
    if text.strip().lower() == "never":
        return 0
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip().lower())
    if match is None or not 0 < (seconds := int(match[1]) * UNITS[match[2]]) <= MAX_SECONDS:
        raise UserError(
            f"{what} {text!r} is no time span of at most ten years; write for example 90m, 12h, 30d or never"
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
