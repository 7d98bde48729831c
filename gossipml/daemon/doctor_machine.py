"""The checks of `gossipml peer doctor` that need no network: home, peer, disk, clock."""

from __future__ import annotations

import datetime
import errno
import os
import stat
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import trio

from gossipml.config import load_config
from gossipml.daemon.doctor_patient import Ask, Check, Patient, State, count, split
from gossipml.daemon.home import Home
from gossipml.env import Env, files
from gossipml.errors import UserError
from gossipml.keys import NetworkKeys
from gossipml.membership import MAX_STATE, Membership
from gossipml.token import JoinToken

SECRETS = ("identity", "token", "api-key", "api-token", "keys", "network-key")
OLDEST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC).timestamp()  # a clock that was never set says 1970 or 2000
SKEW_FAILED = 120.0  # seconds: what datagrams and beacons are refused beyond
SKEW_WARNING = 10.0  # a clock that is kept by NTP is within a second
TRIAL_BYTES = 1 << 20
SLOW_SECONDS = 2.0  # for writing those lastingly; a spinning disk takes 0.1
FREE_FAILED = 64 << 20  # less than one saved state of a middling model
FREE_WARNING = 1 << 30  # a few versions of a middling model (guess)


# The home and its peer.


def check_home(patient: Patient, environ: Mapping[str, str]) -> list[Check]:
    """Modes and owners of the folder and its secrets, the token, the options."""
    home = patient.home
    if not home.path.is_dir():
        fix = "`gossipml peer start --join FILE` makes it, with the token file of the network to join"
        return [Check("home", "warning", f"{home.path} does not exist yet", fix)]
    found = _modes(home)
    try:
        patient.token = home.token()
        if (home.path / "identity").exists():
            patient.peer = home.identity(patient.env.secrets).peer_id
        if patient.token is not None:
            _read_keys(patient, patient.token)
    except UserError as error:
        if not any(check.state == "failed" for check in found):  # else it is said
            found.append(Check("home", "failed", *split(error)))
    except OSError as error:
        found.append(_unreadable(home.path, error))
    try:
        patient.config = load_config(home.path, {}, environ)
    except UserError as error:
        seen, fix = split(error)
        fix = fix or f"set it right in {home.config_file} or in the environment; see `gossipml peer start --help`"
        found.append(Check("home", "failed", seen, fix))
    except OSError as error:
        found.append(_unreadable(home.config_file, error))
    if found:
        return found
    if patient.token is None:
        fix = "join one: `gossipml peer start --join FILE`; or make one: `gossipml token new --out FILE`"
        return [Check("home", "warning", f"{home.path} belongs to no network yet", fix)]
    network = patient.token.network_id.hex()[:8]
    return [Check("home", "ok", f"{home.path} is yours alone and belongs to the network {network}")]


def _read_keys(patient: Patient, token: JoinToken) -> None:
    """What the peer knows of rotations and revocations. UserError when it is damaged, or the peer itself is out."""
    try:
        kept = files.read_private(patient.home.path / "keys", limit=MAX_STATE)
    except FileNotFoundError:
        return
    membership = Membership(NetworkKeys.from_token(token))
    membership.load(kept, patient.env.clock.wall())
    patient.kept = kept
    if patient.peer is not None and membership.is_revoked(patient.peer):
        raise UserError(
            "this peer was revoked: no member takes it in; ask for a token and join from a new home: "
            "`gossipml --home DIR peer start --join FILE`"
        )


def _modes(home: Home) -> list[Check]:
    """What others may read or what is not ours."""
    found = []
    if sys.platform == "win32":
        return found
    me = os.geteuid()
    paths = [home.path, *(home.path / name for name in (*SECRETS, "orders", "state", "models", "log", "config.toml"))]
    foreign = [path for path in paths if path.exists() and path.stat().st_uid != me]
    if foreign:
        who = "root" if foreign[0].stat().st_uid == 0 else f"user {foreign[0].stat().st_uid}"
        fix = f'sudo chown -R "$(id -un)" {home.path} (was the peer started with sudo once?)'
        state: State = "warning" if me == 0 else "failed"
        found.append(Check("home", state, f"{foreign[0]} belongs to {who}", fix))
    secrets = [home.path / name for name in SECRETS]
    open_ones = [path for path in secrets if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_ones:
        names = " ".join(str(path) for path in open_ones)
        found.append(Check("home", "failed", f"others may reach the secret in {names}", f"chmod 600 {names}"))
    mode = stat.S_IMODE(home.path.stat().st_mode)
    if mode & 0o077:
        seen = f"{home.path} has mode {mode:04o}: others see what it holds"
        found.append(Check("home", "warning", seen, f"chmod 700 {home.path}"))
    return found


def _unreadable(path: Path, error: OSError) -> Check:
    fix = "start the peer as the user that owns the home, or choose another with --home DIR"
    return Check("home", "failed", f"{error.filename or path} cannot be read: {error.strerror}", fix)


async def check_peer(patient: Patient, ask: Ask) -> Check:
    """Whether the peer of this home runs, and what it says of itself."""
    home = patient.home
    try:
        locked = home.is_locked()
    except OSError as error:
        return replace(_unreadable(home.path / "lock", error), name="peer")
    if not locked:
        seen = "not running; its ports are tried instead"
        return Check("peer", "ok", seen)
    patient.info = info = home.run_info()
    if info is None:
        fix = "wait a moment; if it stays so: `gossipml peer logs`"
        return Check("peer", "warning", "it is starting or stopping", fix)
    try:
        status = await trio.to_thread.run_sync(ask, info, "/v1/status")
        patient.status = status if isinstance(status, dict) else {}
    except UserError as error:
        fix = f"look at `gossipml peer logs`; if it hangs: `gossipml peer stop`, or kill {info.pid}"
        return Check("peer", "failed", str(error).partition("; ")[0], fix)
    problems = patient.status.get("problems") or []
    if problems:
        seen = "; ".join(str(problem) for problem in problems)
        return Check("peer", "failed", f"{info.name} runs (process {info.pid}): {seen}", "look at `gossipml peer logs`")
    seen = f"{info.name} runs (process {info.pid}), {count(patient.status.get('neighbours', 0), 'neighbour')}"
    return Check("peer", "ok", seen)


# The machine.


async def check_disk(patient: Patient) -> Check:
    """A trial write in the home, lasting, and the room that is left."""
    home, env = patient.home, patient.env
    if not home.path.is_dir():
        return Check("disk", "ok", "nothing to try: there is no home yet")
    name = f"doctor-{os.getpid()}.tmp"
    begun = env.clock.now()
    try:
        try:
            await env.disk.write(name, bytes(TRIAL_BYTES))
            await env.disk.fsync(name)
            await env.disk.fsync_folder("")
        finally:
            with trio.CancelScope(shield=True):
                await _remove(env, name)
        seconds, free = env.clock.now() - begun, await env.disk.free()
    except OSError as error:
        return Check("disk", "failed", f"cannot write in {home.path}: {error.strerror}", _disk_fix(home, error))
    seen = f"{free / 1e9:,.1f} GB free at {home.path}; 1 MiB written lastingly in {1000 * seconds:,.0f} ms"
    if free < FREE_WARNING:
        fix = "free some: `gossipml models list` and `gossipml models rm NAME@VERSION`, or choose another --home DIR"
        return Check("disk", "failed" if free < FREE_FAILED else "warning", seen, fix)
    if seconds > SLOW_SECONDS:
        fix = "saving and fetching models will be slow; choose a faster disk with --home DIR"
        return Check("disk", "warning", seen, fix)
    return Check("disk", "ok", seen)


async def _remove(env: Env, name: str) -> None:
    try:
        await env.disk.remove(name)
    except OSError:
        pass  # it was never written; what was wrong is said


def _disk_fix(home: Home, error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some room, or choose another disk with --home DIR"
        case errno.EROFS:
            return (
                f"the disk is mounted read-only: `dmesg` may say why; then `mount -o remount,rw` what holds {home.path}"
            )
        case errno.EACCES | errno.EPERM:
            return f'sudo chown -R "$(id -un)" {home.path}'
        case _:
            return "check the disk (`dmesg`, `smartctl`), or choose another with --home DIR"


async def check_clock(patient: Patient) -> Check:
    """Our wall clock against those of the members heard, and against our own files."""
    now = patient.env.clock.wall()
    shown = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    lan = (patient.status or {}).get("lan")
    skews = list(patient.skews.values())
    if not skews and isinstance(lan, dict) and isinstance(lan.get("clock_difference"), int | float):
        skews = [float(lan["clock_difference"])]
    if now < OLDEST:
        return Check("clock", "failed", f"it says {shown}", clock_fix())
    if skews:
        skew = statistics.median(skews)
        if abs(skew) <= SKEW_WARNING:
            return Check("clock", "ok", f"it says {shown}; that of members heard is within {max(0.1, abs(skew)):.1f} s")
        seen = f"it says {shown}; that of members heard is {abs(skew):,.0f} s {'ahead' if skew > 0 else 'behind'}"
        if abs(skew) > SKEW_FAILED:
            return Check("clock", "failed", f"{seen}: neither hears the other", clock_fix())
        return Check("clock", "warning", seen, clock_fix())
    newest = max((path.stat().st_mtime for path in _kept(patient.home)), default=0.0)
    if newest > now + SKEW_FAILED:
        ahead = datetime.timedelta(seconds=int(newest - now))
        return Check("clock", "warning", f"it says {shown}, but files of the home are {ahead} newer", clock_fix())
    return Check("clock", "ok", f"it says {shown}; no member is heard to compare it with")


def _kept(home: Home) -> list[Path]:
    """Files that the peer writes often."""
    places = [home.path / "identity", home.path / "token", home.log_file, home.path / "state" / "resume"]
    return [path for path in places if path.exists()]


def clock_fix() -> str:
    if sys.platform == "darwin":
        return "set it by network time: System Settings, General, Date & Time, or `sudo sntp -sS time.apple.com`"
    return "set it by network time: `sudo timedatectl set-ntp true`, and the others' clocks alike"
