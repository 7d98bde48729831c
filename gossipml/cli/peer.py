"""`gossipml peer`: run a peer, and ask about the one of this home."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossipml.cli import doctor, peer_control
from gossipml.cli.common import ask, duration, is_terminal, megabytes, print_json
from gossipml.errors import UserError

if TYPE_CHECKING:
    from gossipml.daemon.home import Home, RunInfo
    from gossipml.token import JoinToken

app = typer.Typer(help="Run a peer, and ask about it.", no_args_is_help=True)

app.command("doctor", epilog="Example: gossipml peer doctor --json")(doctor.doctor)
app.command("pause", epilog="Example: gossipml peer pause")(peer_control.pause)
app.command("resume", epilog="Example: gossipml peer resume")(peer_control.resume)
app.command("open", epilog='Example: xdg-open "$(gossipml peer open)"')(peer_control.open_page)

Json = Annotated[bool, typer.Option("--json", help="Print data for a program.")]
WATCH_SECONDS = 1.0  # between two looks
STOP_SECONDS = 30  # the last save of a large model


@app.command(
    "start",
    epilog="Example: gossipml peer start --join class.token --model mnist-mlp --data mnist:~/mnist --part 2/4",
)
def start(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="What to train: a built-in name, package.module:Spec or file.py:Spec.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the data is: digits, xor, mnist:DIR.")] = None,
    split: Annotated[str | None, typer.Option(help="How the parts are cut: iid, dirichlet:ALPHA, labels:K.")] = None,
    part: Annotated[str | None, typer.Option(help="This peer's part, I/N.")] = None,
    join: Annotated[str | None, typer.Option(help="Token file of the network to join; - reads standard input.")] = None,
    listen: Annotated[str | None, typer.Option(help="IP:PORT for other peers, TCP and UDP [0.0.0.0:8711].")] = None,
    api: Annotated[str | None, typer.Option(help="IP:PORT for predictions and status [127.0.0.1:8710].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that training may use [1].")] = None,
    workers: Annotated[
        str | None, typer.Option(help="Processes that share each step: a number, or auto, measured at start [auto].")
    ] = None,
    target_accuracy: Annotated[float | None, typer.Option(help="Stop training at this accuracy, 0 to 1.")] = None,
    max_rounds: Annotated[int | None, typer.Option(help="Stop training after so many rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides how the data is cut into parts [0].")] = None,
    name: Annotated[str | None, typer.Option(help="What people call this peer.")] = None,
    train: Annotated[
        bool | None, typer.Option("--train/--no-train", help="Train, or only serve the newest version.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="How models are exchanged: push:4, push-pull, push-sum, partitioned:8 [push].")
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="How models are merged: clipping, age, mean, slerp, median, krum:1 \\[clipping].")
    ] = None,
    compression: Annotated[
        str | None, typer.Option(help="How models are sent: int8, int4, int8-top10, float16, auto \\[int8].")
    ] = None,
    optimiser: Annotated[
        str | None, typer.Option(help="sgd, adam, adamw, ... as in torch.optim \\[the model's own].")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the optimiser \\[the model's own].")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of the optimiser \\[the model's own].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimiser \\[the model's own].")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of an optimiser step \\[the model's own].")] = None,
    local_steps: Annotated[
        str | None,
        typer.Option(help="Optimiser steps of a round; 30%: of an epoch; auto: what fits a round's time."),
    ] = None,
    outer: Annotated[
        str | None, typer.Option(help="An outer step over the gossip average: nesterov, nesterov:0.7:0.9 \\[none].")
    ] = None,
    lan: Annotated[bool | None, typer.Option("--lan/--no-lan", help="Find peers on the local network.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of each version that the network keeps [12].")] = None,
    keep: Annotated[int | None, typer.Option(help="Versions of each name kept here [5].")] = None,
    quota: Annotated[str | None, typer.Option(help="Space for stored models, 20GB for example \\[all].")] = None,
    upload_rate: Annotated[str | None, typer.Option(help="Bytes a second for uploads of models \\[no limit].")] = None,
    pull_after: Annotated[
        int | None, typer.Option(help="Fetch a model after so many predictions of it in a minute; 0: never [100].")
    ] = None,
    publish_seconds: Annotated[float | None, typer.Option(help="Least time between two own versions [300].")] = None,
    pause_on_battery: Annotated[
        bool | None, typer.Option("--pause-on-battery/--no-pause-on-battery", help="Train only on mains.")
    ] = None,
    pause_on_load: Annotated[
        str | None, typer.Option(help="Pause while others use so many % of the CPU; 0 for never [0].")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="When to train: 22:00-06:00, or mon-fri 18:00-07:00, sat-sun 00:00-24:00.")
    ] = None,
    nice: Annotated[int | None, typer.Option(help="How nice training is to other programs, 0 to 19 [10].")] = None,
    log_format: Annotated[str | None, typer.Option(help="Log as text or as json, a line each [text].")] = None,
    audit: Annotated[
        bool | None, typer.Option("--audit/--no-audit", help="Record every prediction, see `gossipml audit` [yes].")
    ] = None,
    audit_inputs: Annotated[
        bool | None,
        typer.Option("--audit-inputs/--no-audit-inputs", help="Record inputs too, not only their digests [no]."),
    ] = None,
    audit_days: Annotated[float | None, typer.Option(help="Days for which records are kept [90].")] = None,
) -> None:
    """Run an equal peer of a network, in the foreground, until it is stopped.

    Without a token, the first start makes a new network and says where its token lies. The options of the first
    start are kept in the home and hold for later starts.
    """
    from gossipml.config import load_config
    from gossipml.daemon.run import run_peer

    home: Home = context.obj.home
    options = {
        "model": model,
        "data": data,
        "split": split,
        "part": part,
        "listen": listen,
        "api": api,
        "device": device,
        "threads": threads,
        "workers": workers,
        "target_accuracy": target_accuracy,
        "max_rounds": max_rounds,
        "seed": seed,
        "name": name,
        "train": train,
        "protocol": protocol,
        "merge": merge,
        "compression": compression,
        "optimiser": optimiser,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "batch": batch,
        "local_steps": local_steps,
        "outer": outer,
        "lan": lan,
        "replicas": replicas,
        "keep": keep,
        "quota": quota,
        "upload_rate": upload_rate,
        "pull_after": pull_after,
        "publish_seconds": publish_seconds,
        "pause_on_battery": pause_on_battery,
        "pause_on_load": pause_on_load,
        "schedule": schedule,
        "nice": nice,
        "log_format": log_format,
        "audit": audit,
        "audit_inputs": audit_inputs,
        "audit_days": audit_days,
    }
    config = load_config(home.path, options, os.environ)
    run_peer(home, config, _offered_token(join), verbose=context.obj.verbose)


def _offered_token(join: str | None) -> JoinToken | None:
    from gossipml import token as tokens
    from gossipml.daemon.home import read_token

    if join is None:
        return None
    if join == "-":
        return tokens.decode(sys.stdin.read(tokens.MAX_TEXT + 1))
    try:
        return read_token(Path(join).expanduser())
    except FileNotFoundError:
        raise UserError(
            f"there is no token file {join}; ask a member for one: `gossipml token new --out FILE`"
        ) from None


@app.command("status", epilog="Example: gossipml peer status --watch")
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on, second by second, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Say how the peer of this home fares."""
    from gossipml.cli.status_view import print_status

    info = context.obj.home.require_run_info()
    if watch:
        _watch(info, as_json)
    elif as_json:
        print_json(ask(info, "/v1/status"))
    else:
        print_status(ask(info, "/v1/status"))


def _watch(info: RunInfo, as_json: bool) -> None:
    """Show the peer until Ctrl-C, or until it does not answer any more."""
    import json

    from gossipml.cli.status_view import LinesWatch, LiveWatch
    from gossipml.cli.waiting import wait_for

    view = LiveWatch() if is_terminal() and not as_json else LinesWatch()

    def look() -> None:
        status, peers = ask(info, "/v1/status"), ask(info, "/v1/peers")["peers"]
        if as_json:
            print(json.dumps({**status, "peers": peers}), flush=True)
        else:
            view.show(status, peers)

    with view, contextlib.suppress(KeyboardInterrupt):
        wait_for(look, lambda _: False, WATCH_SECONDS, math.inf)


@app.command("list", epilog="Example: gossipml peer list")
def list_peers(context: typer.Context, as_json: Json = False) -> None:
    """List the peers that the peer of this home knows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    peers = ask(context.obj.home.require_run_info(), "/v1/peers")["peers"]
    if as_json:
        print_json(peers)
        return
    if not peers:
        print("no other peer is known yet; let one join with the token: gossipml token new --out FILE")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "peer", "state", "model", "address"):
        table.add_column(column, no_wrap=True)
    for column in ("age", "sent", "received", "seen", "strikes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("problem")
    for peer in peers:
        seen = peer["last_seen"]
        table.add_row(
            peer["name"],
            peer["peer"][:8],
            peer["state"],
            peer["model"] or "-",
            peer["address"],
            "-" if peer["age"] is None else f"{peer['age']:,.0f}",
            megabytes(peer["bytes_sent"]),
            megabytes(peer["bytes_received"]),
            "-" if seen is None else f"{duration(seen)} ago",
            str(peer["strikes"]),
            _trouble(peer),
        )
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


@app.command("stop", epilog="Example: gossipml peer stop")
def stop(context: typer.Context) -> None:
    """Stop the peer of this home; it saves its state and says goodbye to its neighbours first."""
    import signal

    from gossipml.cli.waiting import wait_until

    home: Home = context.obj.home
    info = home.require_run_info()
    try:
        os.kill(info.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError(f"the peer (process {info.pid}) belongs to another user; stop it as that user") from None
    if not wait_until(lambda: not home.is_locked(), STOP_SECONDS):
        raise UserError(
            f"the peer (process {info.pid}) has not stopped in {STOP_SECONDS} s; look at `gossipml peer logs`, and "
            f"as a last resort `kill -9 {info.pid}`: it resumes from its last saved state"
        )
    print(f"stopped {info.name}")


@app.command("logs", epilog="Example: gossipml peer logs -n 100 --follow")
def logs(
    context: typer.Context,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until Ctrl-C.")] = False,
) -> None:
    """Print the log of the peer of this home."""
    from gossipml.cli.waiting import follow_file

    file = context.obj.home.log_file
    try:
        with file.open(encoding="utf-8", errors="replace") as log:
            for line in collections.deque(log, lines):
                print(line, end="")
            if follow:
                follow_file(file, log, lambda text: print(text, end="", flush=True))
    except FileNotFoundError:
        raise UserError(f"there is no log yet at {file}; start the peer with `gossipml peer start`") from None


def _trouble(peer: Any) -> str:  # Any: JSON
    """Why a peer is refused, lost or in quarantine, and until when; or what it had its last strike for."""
    if peer["quarantined_until"] is not None:
        until = datetime.datetime.fromtimestamp(peer["quarantined_until"])
        return f"until {until:%Y-%m-%d %H:%M:%S}: {peer['strike_reason']}"
    return peer["problem"] or (f"last strike: {peer['strike_reason']}" if peer["strike_reason"] else "")
