"""What is measured of machine, processes, battery and GPUs, from counters and files as systems write them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio

from gossipml.daemon import gpu
from gossipml.daemon.gpu import Gpus, read_answers
from gossipml.daemon.usage import (
    Moment,
    Observer,
    Spent,
    find_processes,
    look,
    machine_percent,
    on_battery,
    others_percent,
    process_names,
    processes_percent,
)
from gossipml.env.real import real_env
from gossipml.errors import UserError

OWN, WORKER = (10, 1.0), (11, 2.0)


def moment(
    at: float,
    *,
    busy: float,
    nice: float = 0.0,
    cores: int = 4,
    processes: dict[tuple[int, float], Spent] | None = None,
) -> Moment:
    return Moment(at, busy, nice, 1000.0 + at * cores, processes or {})


def test_shares_are_of_the_whole_machine() -> None:
    before = moment(0.0, busy=50.0, processes={OWN: Spent(3.0, 1.0)})
    after = moment(10.0, busy=60.0, processes={OWN: Spent(5.0, 3.0)})
    assert machine_percent(before, after) == 25.0, "10 of 40 CPU seconds"
    assert processes_percent(before, after, 4) == 10.0, "4 of 40"
    assert others_percent(before, after) == 15.0


def test_our_own_nice_training_is_not_the_work_of_others() -> None:
    before = moment(0.0, busy=50.0, processes={OWN: Spent(3.0, 1.0), WORKER: Spent(9.0, 1.0, nice=True)})
    after = moment(
        10.0, busy=50.0 + 1 + 20 + 4, nice=20.0, processes={OWN: Spent(4.0, 1.0), WORKER: Spent(29.0, 1.0, nice=True)}
    )
    assert others_percent(before, after) == 10.0, "4 of 40; 21 are ours"


def test_nice_work_of_others_gives_way_by_itself_and_is_no_load() -> None:
    before = moment(0.0, busy=50.0, processes={WORKER: Spent(0.0, 0.0, nice=True)})
    after = moment(10.0, busy=50.0 + 36, nice=32.0, processes={WORKER: Spent(16.0, 0.0, nice=True)})
    assert others_percent(before, after) == 10.0, "another peer's worker had 16 of the 40, somebody else 4"


def test_where_nice_work_is_not_counted_apart_ours_is_still_not_that_of_others() -> None:
    before = moment(0.0, busy=50.0, processes={WORKER: Spent(0.0, 0.0, nice=True)})
    after = moment(10.0, busy=50.0 + 24, nice=0.0, processes={WORKER: Spent(20.0, 0.0, nice=True)})
    assert others_percent(before, after) == 10.0


def test_born_died_and_replaced_processes_count_what_they_spent_in_between() -> None:
    before = moment(0.0, busy=0.0, processes={(7, 1.0): Spent(500.0, 0.0), (8, 1.0): Spent(30.0, 0.0)})
    after = moment(10.0, busy=9.0, processes={(7, 5.0): Spent(2.0, 0.0), (9, 6.0): Spent(2.0, 0.0)})  # 7 was reused
    assert processes_percent(before, after, 4) == 10.0


def test_counters_that_stand_still_or_jump_give_no_nonsense() -> None:
    still = Moment(5.0, 1.0, 0.0, 10.0)
    assert machine_percent(still, still) is None
    assert others_percent(still, still) is None
    assert processes_percent(still, still, 2) is None
    assert machine_percent(Moment(0, 5.0, 0.0, 10.0), Moment(1, 4.0, 0.0, 11.0)) == 0.0, "Linux: idle may go back"
    assert machine_percent(Moment(0, 5.0, 0.0, 10.0), Moment(1, 9.0, 0.0, 11.0)) == 100.0


@pytest.mark.parametrize(
    ("name", "command", "called"),
    [
        ("gossipml", ["/venv/bin/python", "/venv/bin/gossipml", "peer"], {"gossipml", "python"}),
        ("python3.12", ["python3.12", "-P", "-m", "gossipml", "peer"], {"python3.12", "python3", "python", "gossipml"}),
        ("python", ["python", "-X", "dev", "-W", "error", "/a/Train.py", "-m", "x"], {"python", "train.py", "train"}),
        ("python", ["python", "-c", "pass"], {"python", "pass"}),
        ("python", ["python", "-m"], {"python"}),
        ("Code.exe", ["C:/Code.exe"], {"code.exe", "code"}),
        ("kthreadd", [], {"kthreadd"}),
    ],
)
def test_a_process_is_called_by_its_program_or_what_it_interprets(
    name: str, command: list[str], called: set[str]
) -> None:
    assert process_names(name, command) == called


CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()']); input()"


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits, with a child that waits, too."""
    script = tmp_path / f"waits{os.getpid()}.py"
    script.write_text(CHILD)
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE) as process:
        until = time.monotonic() + 20
        while not psutil.Process(process.pid).children() and time.monotonic() < until:
            time.sleep(0.02)
        yield process
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()


@pytest.mark.real
def test_processes_are_found_by_id_and_by_name_and_measured_with_their_children(
    parent: subprocess.Popen[bytes],
) -> None:
    assert [found.pid for found in find_processes(str(parent.pid))] == [parent.pid]
    assert [found.pid for found in find_processes(f"WAITS{os.getpid()}")] == [parent.pid]
    seen = look(find_processes(str(parent.pid)), 0.0)
    assert len(seen.processes) == 2
    assert 1 << 20 < seen.resident < seen.ram_total
    assert seen.busy < seen.total


@pytest.mark.real
def test_a_name_means_the_topmost_processes_and_never_ourselves(parent: subprocess.Popen[bytes]) -> None:
    children = {child.pid for child in psutil.Process(parent.pid).children()}
    pids = {found.pid for found in find_processes("python")}
    assert parent.pid in pids
    assert not pids & children, "it counts with its parent"
    assert os.getpid() not in pids


@pytest.mark.parametrize("wanted", ["999999999", "9" * 40, "0x1", "no such program"])
def test_a_process_that_is_not_there_is_said(wanted: str) -> None:
    with pytest.raises(UserError, match="there is no process"):
        find_processes(wanted)


@pytest.mark.real
def test_what_has_ended_is_measured_no_more() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        roots = find_processes(str(process.pid))
        assert len(look(roots, 0.0).processes) == 1
        process.kill()
    assert look(roots, 0.0).processes == {}


@pytest.mark.real
async def test_an_observer_tells_hour_battery_and_from_the_second_look_on_the_load(tmp_path: Path) -> None:
    observe = Observer(real_env(tmp_path), load=True)
    first = await observe()
    assert first.load is None
    assert first.local.tzinfo is None
    await trio.sleep(0.2)
    second = await observe()
    assert second.load is None or 0.0 <= second.load <= 100.0
    assert second.on_battery in (None, False, True)
    assert (await Observer(real_env(tmp_path), load=False)()).load is None


# Battery.


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / file).write_text(text + "\n")


def test_a_laptop_is_on_battery_when_that_discharges_and_no_mains_is_on(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", scope="System")
    supply(tmp_path, "BAT1", type="Battery", status="Full")
    supply(tmp_path, "AC", type="Mains", online="0")
    assert on_battery(tmp_path) is True
    (tmp_path / "AC" / "online").write_text("1\n")
    assert on_battery(tmp_path) is False, "even when the battery helps out"
    (tmp_path / "AC" / "online").write_text("0\n")
    (tmp_path / "BAT0" / "status").write_text("Charging\n")
    assert on_battery(tmp_path) is False, "by USB"


def test_a_mouse_is_not_the_battery_of_its_machine(tmp_path: Path) -> None:
    supply(tmp_path, "hidpp_battery_0", type="Battery", status="Discharging", scope="Device")
    assert on_battery(tmp_path) is None


def test_a_server_on_its_ups_is_on_battery(tmp_path: Path) -> None:
    supply(tmp_path, "ups", type="UPS", status="Discharging")
    assert on_battery(tmp_path) is True


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert on_battery(tmp_path / "nothing") is None
    assert on_battery(tmp_path) is None
    supply(tmp_path, "BAT0", type="Battery")
    (tmp_path / "file").write_text("x")
    assert on_battery(tmp_path) is None


# GPUs. The outputs are as nvidia-smi writes them.

TWO = "45, 10240, 24576\n15, 0, 24576\n"
PMON = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       4242     C     40     20      -      -      -      -    python -m a b
    0       4243     G      -      -      -      -      -      -    Xorg
    1       4242     C     10      2      -      -      -      -    python
    1          -     -      -      -      -      -      -      -    -
"""


def test_gpus_are_one_as_cores_are() -> None:
    use = read_answers(TWO, "4242, 9000\n4242, 1000\n4243, [N/A]\n", PMON)
    assert use is not None
    assert (use.percent, use.vram, use.vram_total) == (30.0, 10240 << 20, 49152 << 20)
    assert use.process_percent == {4242: 25.0}, "40 and 10 of two"
    assert use.process_vram == {4242: 10000 << 20}


def test_columns_of_the_process_table_are_found_by_name() -> None:
    older = "# gpu        pid  type    sm   mem   enc   dec   command\n    0       7     C    60    2     0     0   x\n"
    use = read_answers("60, 1, 2", "", older)
    assert use is not None and use.process_percent == {7: 60.0}


@pytest.mark.parametrize("text", ["", "No devices were found\n", "NVIDIA-SMI has failed, because, it\n, could not"])
def test_no_gpu_is_none(text: str) -> None:
    use = read_answers(text, "", "")
    assert use is None or (use.percent, use.vram, use.vram_total) == (None, None, None)


def test_what_the_driver_does_not_tell_is_not_known() -> None:
    use = read_answers("[N/A], 100, [Not Supported]\n", "garbage\n1, x\n-,-\n", "# a b\n1\n")
    assert use is not None
    assert (use.percent, use.vram, use.vram_total) == (None, 100 << 20, None)
    assert (use.process_vram, use.process_percent) == ({}, {})


def fake_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)


ANSWERS = f"""case "$1" in
--query-gpu*) printf '{TWO.replace(chr(10), chr(92) + "n")}' ;;
--query-compute-apps*) echo '4242, 9000' ;;
pmon) cat <<X
{PMON}X
;;
esac
"""


@pytest.mark.real
async def test_the_driver_is_asked_for_gpus_and_for_processes_when_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, ANSWERS)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with trio.open_nursery() as inner:
        gpus = Gpus(processes=True)
        await inner.start(gpus.run, 60.0)
        assert gpus.latest is not None
        assert gpus.latest.percent == 30.0
        assert gpus.latest.process_percent == {4242: 25.0}
        assert gpus.latest.process_vram == {4242: 9000 << 20}
        alone = Gpus(processes=False)
        await inner.start(alone.run, 60.0)
        assert alone.latest is not None and alone.latest.process_vram == {}
        inner.cancel_scope.cancel()


@pytest.mark.real
@pytest.mark.parametrize("script", ["exit 9\n", "echo '1, 2, 3'; exit 1\n", "exec no-such-interpreter\n"])
async def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake_smi(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with trio.open_nursery() as inner:
        gpus = Gpus(processes=True)
        await inner.start(gpus.run, 60.0)
        assert gpus.latest is None
        inner.cancel_scope.cancel()


async def test_without_a_driver_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus = Gpus(processes=True)
    with trio.fail_after(1):
        await gpus.run(60.0)
    assert gpus.latest is None


@pytest.mark.real
async def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, "exec sleep 60\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    async with trio.open_nursery() as inner:
        gpus = Gpus(processes=False)
        with trio.fail_after(10):
            await inner.start(gpus.run, 60.0)
        assert gpus.latest is None
        inner.cancel_scope.cancel()
