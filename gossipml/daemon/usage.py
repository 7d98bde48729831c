"""How much of the machine is used: by everybody, by some processes with their children, by others than this peer.

Two looks make a figure: the times of the processors and processes between them. Shares are of the whole CPU, all
cores, so that what a process has compares with what the machine has. psutil reads them (imported where it is used: it
costs 20 ms). GPUs are in `gossipml.daemon.gpu`.

What others use leaves out work at a positive nice value: that gives way by itself, and the workers of several peers on
one machine would otherwise pause each other for ever. On macOS nice work cannot be told apart, and counts.

Memory of processes is their resident sets added up; what they share counts more than once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gossipml.daemon.idle import Observation
from gossipml.env import Env
from gossipml.errors import UserError

POWER = Path("/sys/class/power_supply")  # Linux

Process = Any  # psutil.Process; psutil comes without types
Key = tuple[int, float]
"""Process id and time of birth: the id alone may be used again."""


@dataclass(frozen=True)
class Spent:
    """CPU seconds of one process since its birth."""

    user: float
    system: float
    nice: bool = False
    """At a positive nice value. Its user time is then in `Moment.nice`, its system time is not (Linux)."""


@dataclass(frozen=True)
class Moment:
    """What the counters said at one look, in CPU seconds."""

    at: float
    busy: float
    """Of all cores, without what was stolen by the host of a virtual machine."""
    nice: float
    """The part of `busy` at a positive nice value, user time alone."""
    total: float
    processes: Mapping[Key, Spent] = field(default_factory=dict)
    resident: int = 0
    """Bytes of those processes."""
    ram: int = 0
    """Bytes in use, not counting what could be had at once."""
    ram_total: int = 0


def machine_percent(before: Moment, after: Moment) -> float | None:
    """The share of the whole CPU that was used; None when the counters stand still."""
    total = after.total - before.total
    return _percent(after.busy - before.busy, total) if total > 0 else None


def processes_percent(before: Moment, after: Moment, cores: int) -> float | None:
    """The share of the whole CPU that the processes of `after` used."""
    seconds = after.at - before.at
    user, nice, system = _spent(before, after)
    return _percent(user + nice + system, seconds * cores) if seconds > 0 else None


def others_percent(before: Moment, after: Moment) -> float | None:
    """The share of the whole CPU that others used than the processes of `after`, nice work left out."""
    total = after.total - before.total
    if total <= 0:
        return None
    user, nice, system = _spent(before, after)
    others_nice = max(0.0, after.nice - before.nice - nice)  # all 0 where the system does not count nice work apart
    return _percent(after.busy - before.busy - user - nice - system - others_nice, total)


def _spent(before: Moment, after: Moment) -> tuple[float, float, float]:
    """User seconds, those of nice processes, and system seconds between the looks.

    A process that was born in between counts with all its life, one that died with nothing: so short a life is little.
    """
    user = nice = system = 0.0
    for key, spent in after.processes.items():
        earlier = before.processes.get(key, Spent(0.0, 0.0))
        if spent.nice:
            nice += spent.user - earlier.user
        else:
            user += spent.user - earlier.user
        system += spent.system - earlier.system
    return user, nice, system


def _percent(part: float, whole: float) -> float:
    return min(100.0, max(0.0, 100.0 * part / whole))


# Looking. All of this waits for the system a little, and belongs into a thread.


def look(roots: Sequence[Process], now: float, *, memory: bool = True) -> Moment:
    """The counters of the machine, and of the processes with all their children."""
    import psutil

    times = psutil.cpu_times()._asdict()
    for part in ("guest", "guest_nice"):
        times.pop(part, None)  # Linux: in user and nice already
    total = sum(times.values())
    idle = sum(times.get(part, 0.0) for part in ("idle", "iowait", "steal"))
    processes, resident = {}, 0
    for process in with_children(roots):
        try:
            with process.oneshot():
                spent = process.cpu_times()
                nice = psutil.POSIX and process.nice() > 0
                processes[process.pid, process.create_time()] = Spent(spent.user, spent.system, nice)
                resident += process.memory_info().rss if memory else 0
        except psutil.Error:
            continue  # it has ended, or is somebody else's child
    ram = psutil.virtual_memory() if memory else None
    return Moment(
        now, total - idle, times.get("nice", 0.0), total, processes, resident,
        ram.total - ram.available if ram else 0, ram.total if ram else 0,
    )  # fmt: skip


def with_children(roots: Iterable[Process]) -> list[Process]:
    """Those of the processes that are alive, and all that descend from them, each once."""
    import psutil

    found: dict[int, Process] = {}
    for root in roots:
        try:
            if root.is_running():
                found |= {process.pid: process for process in (root, *root.children(recursive=True))}
        except psutil.Error:
            continue
    return list(found.values())


def find_processes(wanted: str) -> list[Process]:
    """The process of that id, or all of that name that descend from no other; UserError when there is none.

    The name is that of the program, or for an interpreter that of the script or module that it runs. This process and
    those that started it are never meant by a name.
    """
    import psutil

    if wanted.isdecimal():
        try:
            return [psutil.Process(int(wanted))]
        except (psutil.Error, ValueError, OverflowError):
            raise UserError(f"there is no process {wanted}; give the id or the name of one that runs") from None
    own = {os.getpid()} | _ancestors(psutil.Process())
    found, names = [], set()
    for process in psutil.process_iter():
        try:
            called = process_names(process.name(), process.cmdline())
        except psutil.Error:
            continue
        if process.pid in own:
            continue
        names |= called
        if wanted.lower() in called:
            found.append(process)
    if not found:
        near = difflib.get_close_matches(wanted.lower(), sorted(names), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "give the id or the name of one that runs"
        raise UserError(f"there is no process named {wanted!r}; {hint}")
    pids = {process.pid for process in found}
    return [process for process in found if not pids & _ancestors(process)]


def _ancestors(process: Process) -> set[int]:
    import psutil

    try:
        return {parent.pid for parent in process.parents()}
    except psutil.Error:
        return set()


def process_names(name: str, command: Sequence[str]) -> set[str]:
    """What people call a process, in small letters: `python -m gossipml` is python and gossipml, `run.py` also run."""
    names = [name, *(os.path.basename(word) for word in command[:1])]
    if names[-1].lower().startswith("python"):
        names.append("python")
        words = iter(command[1:])
        for word in words:
            if word == "-m":
                names.append(next(words, ""))
            elif word in ("-W", "-X"):
                next(words, "")
                continue
            elif word.startswith("-"):
                continue
            else:
                names.append(os.path.basename(word))
            break
    return {form for name in names for form in (name.lower(), os.path.splitext(name.lower())[0]) if form}


# For the policy of `gossipml.daemon.idle`.


class Observer:
    """What the policy wants to know, about this machine. `load` is measured only when asked for: it costs most."""

    def __init__(self, env: Env, *, load: bool) -> None:
        self._env = env
        self._load = load
        self._before: Moment | None = None

    async def __call__(self) -> Observation:
        return await self._env.compute.run(self._look)

    def _look(self) -> Observation:
        import psutil

        local = datetime.fromtimestamp(self._env.clock.wall())
        load: float | None = None
        if self._load:
            after = look([psutil.Process()], self._env.clock.now(), memory=False)
            load = others_percent(self._before, after) if self._before is not None else None
            self._before = after
        return Observation(local, on_battery(), load)


def on_battery(folder: Path = POWER) -> bool | None:
    """Whether the machine runs on its battery; None when it has none, or none that can be seen."""
    import psutil

    if psutil.LINUX:
        return _on_battery_linux(folder)
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):  # a platform without, or a driver that fails
        return None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _on_battery_linux(folder: Path) -> bool | None:
    """psutil takes the battery of a wireless mouse for that of the machine; their scope tells them apart."""
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return None
    batteries = []
    for supply in supplies:
        kind, status = _first_word(supply / "type"), _first_word(supply / "status")
        if kind == "mains" and _first_word(supply / "online") == "1":
            return False  # even when the battery helps out
        if kind in ("battery", "ups") and _first_word(supply / "scope") != "device" and status:
            batteries.append(status == "discharging")
    return any(batteries) if batteries else None


def _first_word(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip().lower()
    except OSError:
        return ""
