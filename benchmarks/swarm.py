"""A file from one seed to seven downloaders, each in a process of its own, by our swarm and by libtorrent 2.1.

    python benchmarks/swarm.py [--runs 3] [--megabytes 256] [--downloaders 7] [--folder DIR]

All on loopback, in turns in the same run. Ours is what the daemon uses: mutual TLS 1.3 between all (AES-256-GCM), and
the model store, which hashes each piece before it is written and again before it is served from the disk, and syncs
its files. libtorrent moves a BitTorrent v2 torrent with pieces of the same length over TCP, without uTP, DHT and
limits: once in the clear, and once with the encryption that it has (MSE/PE with RC4, forced on both sides), so that
nobody on the wire can read it, as with ours; it authenticates neither peers nor bytes. The time runs from the word to
all until the last downloader says that it has everything, verified; CPU is user and system time of all processes from
that word until then, and idle what all cores of the machine did not do in that time. Afterwards every file is compared
with the seed's.

The files lie in memory (/dev/shm) where there is room, so that no disk is measured: ours waits for the disk to have
everything, libtorrent does not; `--folder` puts them elsewhere. Takes about a minute; needs the package `libtorrent`
(without it ours runs alone) and nine times the megabytes of room.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from gossipml.env import SWARM, Credentials, Stream
from gossipml.env.real import real_env
from gossipml.identity import Identity
from gossipml.ids import Address, Contact, PeerId
from gossipml.keys import NetworkKeys
from gossipml.models import merkle
from gossipml.models.manifest import parse_manifest, sign_manifest
from gossipml.models.store import Store
from gossipml.peer.swarm import Content, Swarm
from gossipml.token import JoinToken

TIME_LIMIT = 120.0
KEYS = NetworkKeys.from_token(JoinToken(b"n" * 16, b"c" * 32, 0, ()))
LOOPBACK = "127.0.0.1"
MEMORY = Path("/dev/shm")
KINDS = {"ours": "gossipml", "clear": "libtorrent", "rc4": "libtorrent RC4"}
ENCRYPTION = {"clear": (2, 1), "rc4": (0, 2)}  # libtorrent's enc_policy (0 forced, 2 off) and enc_level (1 none, 2 RC4)
FIGURES = {
    "seconds": "seconds",
    "cpu": "CPU seconds",
    "user": "  of them user",
    "idle": "idle, % of the cores",
    "rss": "greatest process, MB",
}


# Between this process and the others: lines of JSON.


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def heard() -> Any:  # Any: JSON
    return json.loads(sys.stdin.readline())


class Usage:
    """CPU seconds of this process since it was made, and its greatest memory in MB."""

    def __init__(self) -> None:
        self._at = os.times()

    def report(self) -> dict[str, float]:
        now, status = os.times(), Path("/proc/self/status").read_text()
        user, system = now.user - self._at.user, now.system - self._at.system
        # Not ru_maxrss, which begins with that of the process that started this one.
        return {"cpu": user + system, "user": user, "rss": int(status.partition("VmHWM:")[2].split()[0]) / 1000}


def core_seconds() -> tuple[float, float]:
    """Seconds that all cores together were idle, and that they were there, since the machine started."""
    # proc(5): user nice system idle iowait irq softirq steal, in ticks; what follows is counted in user already
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return float(ticks[3] + ticks[4]), float(sum(ticks))


# Ours, in a process of its own.


class Shelf:
    """A store as the swarm sees it; the daemon has more to say about manifests."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def content(self, root: bytes) -> Content | None:
        return self._store.content(root)

    async def layer(self, root: bytes) -> bytes | None:
        return self._store.layer(root)

    async def manifest(self, version: bytes) -> bytes | None:
        return self._store.manifest(version)

    def holds(self, version: bytes) -> bool:
        return self._store.holds(version)

    async def hold(self, peer: PeerId, manifest: bytes) -> str:
        return "only what is here already"


def identity(number: int) -> Identity:
    return Identity(bytes([number]) * 32)


async def ours(folder: Path, number: int) -> None:
    env, credentials = real_env(folder / str(number), seed=number), Credentials(identity(number), KEYS)
    manifest = parse_manifest((folder / "manifest").read_bytes())
    store = Store(env.disk, env.compute)
    await store.open()
    listener = await env.net.listen(Address(LOOPBACK, 0), credentials)
    port = listener.local.port
    swarm = Swarm(env, credentials, Shelf(store), on_fault=lambda peer, reason: say(fault=reason), port=port)

    async def serve(stream: Stream) -> None:
        if stream.protocol == SWARM:
            await swarm.serve(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.run)
        nursery.start_soon(listener.serve, serve)
        gc.collect()
        gc.freeze()  # as the daemon does when it has started
        say(port=port)
        ports = await trio.to_thread.run_sync(heard)
        usage = Usage()
        contacts = [
            Contact(identity(other).peer_id, (Address(LOOPBACK, port),), "", "") for other, port in enumerate(ports)
        ]

        async def providers() -> Sequence[Contact]:
            return contacts

        if number:
            content = await store.begin(manifest, (folder / "layer").read_bytes())
            await swarm.download(content, providers)
            if not store.holds(manifest.version):
                raise SystemExit("downloaded, and not held")
            say(done=True)
        await trio.to_thread.run_sync(heard)
        say(**usage.report())
        nursery.cancel_scope.cancel()


async def make_seed(folder: Path, size: int) -> Path:
    """A store with one version of random bytes; where its content lies."""
    home = folder / "0"
    incoming = home / "models" / "incoming" / "file"
    store = Store(real_env(home).disk, real_env(home).compute)
    await store.open()
    incoming.parent.mkdir(parents=True, exist_ok=True)
    write_model(incoming, size)
    measured = await store.measure("models/incoming/file")
    (folder / "layer").write_bytes(measured.layer)
    data = sign_manifest(
        identity(0),
        network_id=KEYS.network_id,
        name="benchmark",
        spec=b"",
        height=1,
        parents=(),
        age=0.0,
        metrics={},
        size=size,
        root=measured.root,
        created=int(real_env(home).clock.wall()),
    )
    (folder / "manifest").write_bytes(data)
    await store.ingest(parse_manifest(data), measured)
    return home / "models" / "content" / measured.root.hex()


def write_model(path: Path, size: int) -> None:
    """A safetensors file of that size with random bytes."""
    header = b"".ljust(128)
    for _ in range(2):  # its own length is a part of what it says
        count = size - 8 - len(header)
        text = json.dumps({"values": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}})
        header = text.encode().ljust(128)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while count:
            file.write(os.urandom(min(count, 1 << 20)))
            count -= min(count, 1 << 20)


# libtorrent, in a process of its own.


def theirs(kind: str, folder: Path, number: int) -> None:
    import libtorrent as lt

    policy, level = ENCRYPTION[kind]
    session = lt.session(
        {
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "allow_multiple_connections_per_ip": True,
            "listen_interfaces": f"{LOOPBACK}:0",
            "connection_speed": 1000,
            "unchoke_slots_limit": -1,
            "upload_rate_limit": 0,
            "download_rate_limit": 0,
            "out_enc_policy": policy,
            "in_enc_policy": policy,
            "allowed_enc_level": level,
            "alert_mask": 0,
        }
    )
    parameters = lt.add_torrent_params()
    parameters.ti = lt.torrent_info(str(folder / "torrent"))
    parameters.save_path = str(folder / ("0/models/content" if number == 0 else str(number)))
    parameters.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    if number == 0:
        parameters.flags |= lt.torrent_flags.seed_mode
    torrent = session.add_torrent(parameters)
    while torrent.status().state == lt.torrent_status.checking_files:
        time.sleep(0.01)
    say(port=session.listen_port())
    ports = heard()
    usage = Usage()
    for port in ports[:number]:
        torrent.connect_peer((LOOPBACK, port))
    if number:
        while not torrent.status().is_seeding:
            time.sleep(0.005)
        say(done=True)
    heard()
    say(**usage.report())
    del torrent, session  # writes what is left


def make_torrent(folder: Path, file: Path) -> None:
    import libtorrent as lt

    creator = lt.create_torrent(
        lt.list_files(str(file)), merkle.piece_length(file.stat().st_size), lt.create_torrent.v2_only
    )
    lt.set_piece_hashes(creator, str(file.parent))
    (folder / "torrent").write_bytes(lt.bencode(creator.generate()))


# The comparison.


def transfer(kind: str, folder: Path, downloaders: int) -> dict[str, float]:
    """One run of one kind."""
    processes: list[subprocess.Popen[str]] = []

    def answer(process: subprocess.Popen[str], key: str) -> Any:  # Any: JSON
        assert process.stdout is not None
        while line := process.stdout.readline():
            values = json.loads(line)
            if key in values:
                return values
            print(values)
        raise SystemExit(f"a process of {kind} ended early")

    def tell(value: object) -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()

    try:
        for number in range(downloaders + 1):
            (folder / str(number)).mkdir(exist_ok=True)
            command = [sys.executable, __file__, "--role", kind, "--number", str(number), "--folder", str(folder)]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        ports = [answer(process, "port")["port"] for process in processes]
        started, idle_before, all_before = time.monotonic(), *core_seconds()
        tell(ports)
        for process in processes[1:]:
            answer(process, "done")
        seconds = time.monotonic() - started
        idle_after, all_after = core_seconds()
        tell("stop")
        usages = [answer(process, "cpu") for process in processes]
        for process in processes:
            process.wait(TIME_LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    figures = {key: sum(usage[key] for usage in usages) for key in ("cpu", "user")}
    idle = 100 * (idle_after - idle_before) / (all_after - all_before)
    return {"seconds": seconds, **figures, "idle": idle, "rss": max(usage["rss"] for usage in usages)}


def digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def compare(folder: Path, kinds: Sequence[str], arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    file = trio.run(make_seed, folder, arguments.megabytes << 20)
    if any(kind != "ours" for kind in kinds):
        make_torrent(folder, file)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    right = digest(file)
    started = time.monotonic()
    for _ in range(arguments.runs):
        for kind in kinds:
            results[kind].append(transfer(kind, folder, arguments.downloaders))
            for number in range(1, arguments.downloaders + 1):
                home = folder / str(number)
                if digest((home / "models" / "content" if kind == "ours" else home) / file.name) != right:
                    raise SystemExit(f"downloader {number} of {KINDS[kind]} has another file")
                shutil.rmtree(home)
        if time.monotonic() - started > TIME_LIMIT:
            print(f"stopped after {TIME_LIMIT:.0f} s; the medians are over fewer runs")
            break
    return results


def report(results: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    runs = len(next(iter(results.values())))
    print(
        f"{arguments.megabytes} MiB from one seed to {arguments.downloaders} downloaders, all verified; "
        f"medians of {runs}"
    )
    one, *others = results
    print(f"{'':<24}{KINDS[one]:>12}" + "".join(f"{KINDS[kind]:>16}{'ratio':>8}" for kind in others))
    for key, name in FIGURES.items():
        first, *rest = (statistics.median(run[key] for run in runs) for runs in results.values())
        ratios = "".join(f"{other:>16.2f}{f'{first / other:.2f}' if other else '':>8}" for other in rest)
        print(f"{name:<24}{first:>12.2f}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--downloaders", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--role", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "ours":
        trio.run(ours, arguments.folder, arguments.number)
    elif arguments.role:
        theirs(arguments.role, arguments.folder, arguments.number)
    else:
        kinds = [arguments.only] if arguments.only else list(KINDS)
        if kinds != ["ours"] and importlib.util.find_spec("libtorrent") is None:
            print("libtorrent is not installed (pip install 'gossipml[bench]'): ours runs alone")
            kinds = ["ours"]
        room = (arguments.megabytes << 20) * (arguments.downloaders + 2)
        where = arguments.folder
        if where is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > room:
            where = MEMORY
        with TemporaryDirectory(dir=where) as folder:
            report(compare(Path(folder), kinds, arguments), arguments)


if __name__ == "__main__":
    main()
