"""`peer doctor`: each thing that can be wrong is seen and comes with its remedy; what is right is left alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from gossipml.daemon.contacts import save_contacts
from gossipml.daemon.doctor import examine
from gossipml.daemon.doctor_patient import Check
from gossipml.daemon.home import Home, RunInfo, new_network
from gossipml.env import Credentials, Env, Stream, files
from gossipml.env.simulated import EPOCH, World, run_simulation
from gossipml.errors import UserError
from gossipml.identity import Identity
from gossipml.ids import Address, Contact, PeerId
from gossipml.keys import NetworkKeys
from gossipml.membership import Membership
from gossipml.orders import NetworkKey
from gossipml.peer.lan import Lan
from gossipml.token import JoinToken

ANYWHERE = Address("0.0.0.0", 8711)
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")


@dataclass
class Ward:
    """One machine with a home, and others on its LAN."""

    world: World
    env: Env
    home: Home
    nursery: trio.Nursery
    neighbours: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    status: dict[str, object] | UserError = field(default_factory=dict)

    def credentials(self, name: str) -> Credentials:
        token = self.home.token()
        assert token is not None
        return Credentials(Identity(name.encode().ljust(32)), NetworkKeys.from_token(token))

    async def examine(self) -> dict[str, Check]:
        """The last check of each name."""

        def ask(info: RunInfo, path: str) -> object:
            assert path == "/v1/status"
            if isinstance(self.status, UserError):
                raise self.status
            return self.status

        told: list[Check] = []
        checks = await examine(self.home, self.env, self.environ, ask, told.append)
        assert checks == told
        for check in checks:
            assert check.seen and (check.fix or check.state == "ok"), f"{check} names no remedy"
        return {check.name: check for check in checks}

    async def member(
        self, name: str, *, wall_skew: float = 0.0, lan: bool = True, credentials: Credentials | None = None
    ) -> Contact:
        """Another peer of the network on this LAN, as far as dials and beacons see."""
        env, credentials = self.world.env(name, wall_skew=wall_skew), credentials or self.credentials(name)
        listener = await env.net.listen(ANYWHERE, credentials)

        async def accept(stream: Stream) -> None:
            await trio.sleep_forever()

        self.nursery.start_soon(listener.serve, accept)
        if lan:
            self.neighbours.append(name)
            self.world.lan("patient", *self.neighbours)
            shouting = Lan(env, credentials, ANYWHERE, lambda contact: None, describe=lambda: ("", name))
            self.nursery.start_soon(shouting.run)
        return Contact(credentials.identity.peer_id, (Address(self.world.host(name), 8711),), "", name)

    def says(self, **facts: object) -> None:
        """What the running peer answers."""
        place = str(Address(self.world.host("patient"), 8711))
        self.status = {"addresses": [place], "neighbours": 1, "uptime": 3600.0, "problems": [], **facts}


@pytest.fixture
def ward(tmp_path: Path) -> Callable[[Callable[[Ward], Awaitable[None]]], None]:
    """Runs a scenario with a healthy home."""

    def play(scenario: Callable[[Ward], Awaitable[None]]) -> None:
        async def run(world: World) -> None:
            home = Home(tmp_path / "home")
            home.prepare()
            rng = world.rng("home")
            home.keep_token(new_network(rng.randbytes, expires=0, addresses=()))
            home.identity(rng.randbytes)
            for path in home.path.iterdir():
                os.utime(path, (EPOCH, EPOCH))
            world.lan("patient")
            async with trio.open_nursery() as nursery:
                await scenario(Ward(world, world.env("patient"), home, nursery))
                nursery.cancel_scope.cancel()

        run_simulation(run, seed=1)

    return play


Play = Callable[[Callable[[Ward], Awaitable[None]]], None]


def test_a_healthy_home_has_nothing_to_mend_and_is_left_as_it_was(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        before = sorted(path.name for path in ward.home.path.iterdir()), ward.world.disk("patient").files()
        checks = await ward.examine()
        assert {name: check.state for name, check in checks.items()} == dict.fromkeys(checks, "ok")
        assert list(checks) == ["home", "peer", "disk", "ports", "reachable", "members", "lan", "clock"]
        after = sorted(path.name for path in ward.home.path.iterdir()), ward.world.disk("patient").files()
        assert before == after

    ward(scenario)


def test_a_home_that_does_not_exist_is_not_made(ward: Play, tmp_path: Path) -> None:
    async def scenario(ward: Ward) -> None:
        ward.home = Home(tmp_path / "nowhere")
        checks = await ward.examine()
        assert checks["home"].state == "warning"
        assert "gossipml peer start --join" in checks["home"].fix
        assert {check.state for name, check in checks.items() if name != "home"} == {"ok"}
        assert not ward.home.path.exists()

    ward(scenario)


def mend(check: Check) -> None:
    subprocess.run(check.fix, shell=True, check=True)  # noqa: S602  # a command of ours, which a person would type


@posix
def test_modes_that_let_others_in_are_seen_and_the_fix_mends_them(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        ward.home.token_file.chmod(0o644)
        (ward.home.path / "identity").chmod(0o640)
        check = (await ward.examine())["home"]
        assert check.state == "failed"
        assert str(ward.home.token_file) in check.seen
        mend(check)
        assert (await ward.examine())["home"].state == "ok"
        ward.home.path.chmod(0o755)
        check = (await ward.examine())["home"]
        assert check.state == "warning"
        mend(check)
        assert (await ward.examine())["home"].state == "ok"

    ward(scenario)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root gives files away")
def test_files_of_another_user_are_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        os.chown(ward.home.token_file, 12345, -1)
        check = (await ward.examine())["home"]
        assert check.state == "warning", "root may still use them"
        assert "user 12345" in check.seen
        assert "chown -R" in check.fix

    ward(scenario)


def test_a_damaged_token_and_a_wrong_option_are_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        ward.environ["GOSSIPML_THREADS"] = "many"
        assert "threads" in (await ward.examine())["home"].seen
        ward.environ.clear()
        ward.home.token_file.write_text("gml1-nonsense")
        check = (await ward.examine())["home"]
        assert (check.state, "mistyped" in check.seen, "gossipml token new" in check.fix) == ("failed", True, True)

    ward(scenario)


def test_rotations_are_known_and_a_revoked_peer_is_told_so(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        key, now = NetworkKey(b"k" * 32), int(EPOCH)
        ward.home.keep_token(JoinToken(key.network_id, b"old".ljust(32), 0, ()))
        kitchen = ward.credentials("kitchen")
        membership = Membership(kitchen.keys)
        membership.take(key.rotation(2, b"new".ljust(32), made=now - 100, old_until=now - 1).raw, now)
        files.write_atomic(ward.home.path / "keys", membership.state(), private=True)
        kitchen.membership.load(membership.state(), now)
        await ward.member("kitchen", credentials=kitchen)
        checks = await ward.examine()
        assert checks["home"].state == "ok"
        assert "1 other peer heard: kitchen" in checks["lan"].seen, "under the new key, which no token here says"
        own = ward.home.identity(ward.env.secrets).peer_id
        membership.take(key.revocation(own, made=now).raw, now)
        files.write_atomic(ward.home.path / "keys", membership.state(), private=True)
        check = (await ward.examine())["home"]
        assert (check.state, "was revoked" in check.seen, "new home" in check.fix) == ("failed", True, True)
        files.write_atomic(ward.home.path / "keys", b"garbage", private=True)
        check = (await ward.examine())["home"]
        assert (check.state, "damaged" in check.seen) == ("failed", True)

    ward(scenario)


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "free some room"), (errno.EROFS, "read-only"), (errno.EACCES, "chown"), (errno.EIO, "dmesg")],
)
def test_a_disk_that_does_not_take_the_trial_is_seen(ward: Play, number: int, fix: str) -> None:
    async def scenario(ward: Ward) -> None:
        disk = ward.world.disk("patient")
        disk.fault = lambda operation: number if operation.kind in ("write", "fsync") else None
        check = (await ward.examine())["disk"]
        assert check.state == "failed"
        assert fix in check.fix
        disk.fault = None
        assert disk.files() == {}

    ward(scenario)


def test_a_nearly_full_and_a_slow_disk_are_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        disk = ward.world.disk("patient")
        disk.capacity = 500 << 20
        check = (await ward.examine())["disk"]
        assert (check.state, "gossipml models rm" in check.fix) == ("warning", True)
        disk.capacity = 20 << 20
        assert (await ward.examine())["disk"].state == "failed"
        disk.capacity, disk.latency = None, 1.0
        check = (await ward.examine())["disk"]
        assert (check.state, "faster disk" in check.fix) == ("warning", True)

    ward(scenario)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_port_that_another_program_has_is_seen(ward: Play, protocol: str) -> None:
    async def scenario(ward: Ward) -> None:
        if protocol == "UDP":
            await ward.env.net.bind_datagrams(ANYWHERE)
        else:
            await ward.env.net.listen(ANYWHERE, ward.credentials("other program"))
        checks = await ward.examine()
        assert checks["ports"].state == "failed"
        assert f"{protocol} port 8711 is in use" in checks["ports"].seen
        assert "grep :8711" in checks["ports"].fix

    ward(scenario)


def test_the_port_of_the_endpoint_is_tried_too(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        await ward.env.net.listen(Address("127.0.0.1", 8710), ward.credentials("other program"))
        check = (await ward.examine())["ports"]
        assert "TCP port 8710 is in use" in check.seen
        assert "grep :8710" in check.fix

    ward(scenario)


def test_a_peer_for_this_machine_alone_is_said_to_be_that(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        ward.environ["GOSSIPML_LISTEN"] = "127.0.0.1:8711"
        check = (await ward.examine())["reachable"]
        assert (check.state, "--listen 0.0.0.0" in check.fix) == ("warning", True)

    ward(scenario)


def test_members_that_do_not_answer_are_named(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        alive = await ward.member("alive")
        ward.world.env("dead")
        dead = Contact(PeerId(b"d" * 32), (Address(ward.world.host("dead"), 8711),), "", "dead")
        await save_contacts(ward.env.disk, [dead])
        check = (await ward.examine())["members"]
        assert check.state == "warning"
        assert str(dead.addresses[0]) in check.seen
        assert "firewall" in check.fix
        await save_contacts(ward.env.disk, [dead, alive])
        check = (await ward.examine())["members"]
        assert (check.state, "1 of 2 known members answer" in check.seen) == ("ok", True)

    ward(scenario)


def test_members_of_another_network_are_told_from_dead_ones(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        other = await ward.member("other", lan=False)
        ward.home.keep_token(new_network(ward.world.rng("new").randbytes, expires=0, addresses=(other.addresses[0],)))
        check = (await ward.examine())["members"]
        assert (check.state, "not a member of this network" in check.seen) == ("warning", True)
        assert "gossipml token new" in check.fix

    ward(scenario)


def test_peers_on_the_lan_are_heard_and_named(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        await ward.member("kitchen")
        await ward.member("attic")
        await trio.sleep(300)
        checks = await ward.examine()
        assert checks["lan"].state == "ok"
        assert "2 other peers heard: attic, kitchen" in checks["lan"].seen
        assert "within 0.1 s" in checks["clock"].seen

    ward(scenario)


def test_a_lan_that_swallows_beacons_is_seen(ward: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(ward: Ward) -> None:
        monkeypatch.setattr(ward.world._network, "send_datagram", lambda *arguments: None)
        check = (await ward.examine())["lan"]
        assert (check.state, "not heard back" in check.seen) == ("failed", True)
        assert "18711/udp" in check.fix

    ward(scenario)


def test_a_beacon_port_that_a_program_has_for_itself_is_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        await ward.env.net.bind_datagrams(Address("0.0.0.0", 18711))
        check = (await ward.examine())["lan"]
        assert (check.state, "18711 is in use" in check.seen) == ("failed", True)

    ward(scenario)


def test_a_lan_that_is_switched_off_is_not_tried(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        ward.environ["GOSSIPML_LAN"] = "off"
        check = (await ward.examine())["lan"]
        assert (check.state, "switched off" in check.seen) == ("ok", True)

    ward(scenario)


@pytest.mark.parametrize(
    ("skew", "state", "text"),
    [(86400.0, "failed", "86,400 s ahead"), (-500.0, "failed", "500 s behind"), (30.0, "warning", "30 s ahead")],
)
def test_a_clock_that_differs_from_the_members_is_seen(ward: Play, skew: float, state: str, text: str) -> None:
    async def scenario(ward: Ward) -> None:
        await ward.member("right", wall_skew=skew)  # it has just come, and shouts
        checks = await ward.examine()
        assert (checks["clock"].state, text in checks["clock"].seen) == (state, True)
        assert "time" in checks["clock"].fix
        assert checks["lan"].state == ("warning" if state == "failed" else "ok")

    ward(scenario)


def test_a_clock_behind_our_own_files_is_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        then = ward.env.clock.wall() + 7200
        os.utime(ward.home.token_file, (then, then))
        os.utime(ward.home.path / "identity", (then, then))
        check = (await ward.examine())["clock"]
        assert (check.state, "1:59:" in check.seen) == ("warning", True)

    ward(scenario)


# While the peer runs.


def running(ward: Ward, scenario: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Holds the home's lock and its ports, as the peer does, while the scenario runs."""

    async def play() -> None:
        with ward.home.lock():
            own = Credentials(ward.home.identity(ward.env.secrets), ward.credentials("").keys)
            ward.home.write_run_info(RunInfo(4242, "alice", "", [], "127.0.0.1:8710", 0.0))
            listener = await ward.env.net.listen(ANYWHERE, own)

            async def accept(stream: Stream) -> None:
                await trio.sleep_forever()

            ward.nursery.start_soon(listener.serve, accept)
            await scenario()

    return play


def test_a_running_peer_is_asked_and_its_ports_are_left_to_it(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        async def healthy() -> None:
            ward.says(accepted=2)
            free = (await ward.examine())["ports"]
            assert (free.state, "UDP port 8711 is not in use" in free.seen) == ("failed", True)
            await ward.env.net.bind_datagrams(ANYWHERE)
            checks = await ward.examine()
            assert {check.state for check in checks.values()} == {"ok"}
            assert "alice runs (process 4242), 1 neighbour" in checks["peer"].seen
            assert "have dialled us 2 times" in checks["reachable"].seen

        await running(ward, healthy)()

    ward(scenario)


def test_a_running_peer_that_nobody_dials_is_suspected_behind_a_firewall(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        async def lonely() -> None:
            await ward.env.net.bind_datagrams(ANYWHERE)
            ward.says(accepted=0, neighbours=5)
            check = (await ward.examine())["reachable"]
            assert (check.state, "none has ever dialled us" in check.seen) == ("warning", True)
            assert "ufw allow 8711" in check.fix
            ward.says(accepted=0, neighbours=5, uptime=10.0)
            assert (await ward.examine())["reachable"].state == "ok", "too soon to say"

        await running(ward, lonely)()

    ward(scenario)


def test_an_address_that_leads_to_somebody_else_is_seen(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        stranger = await ward.member("stranger", lan=False)

        async def wrong() -> None:
            ward.says(addresses=[str(stranger.addresses[0])])
            check = (await ward.examine())["reachable"]
            assert (check.state, "as expected" in check.seen) == ("failed", True)
            assert "another program" in check.fix

        await running(ward, wrong)()

    ward(scenario)


def test_problems_of_the_running_peer_are_passed_on(ward: Play) -> None:
    async def scenario(ward: Ward) -> None:
        async def ill() -> None:
            ward.says(problems=["learner: the data is gone"], lan={"problem": "no interface takes multicast"})
            checks = await ward.examine()
            assert (checks["peer"].state, "the data is gone" in checks["peer"].seen) == ("failed", True)
            assert checks["lan"].state == "warning"
            ward.says(lan={"problem": "", "clock_difference": 200.0, "deaf": 1})
            checks = await ward.examine()
            assert (checks["clock"].state, checks["lan"].state) == ("failed", "warning")
            ward.status = UserError("the peer at http://127.0.0.1:8710 does not answer; look at its log")
            checks = await ward.examine()
            assert checks["peer"].state == "failed"
            assert "kill 4242" in checks["peer"].fix

        await running(ward, ill)()

    ward(scenario)
