"""A peer that does not train for a while: it averages, answers, says why, and goes on by itself. On virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from functools import partial

import trio

from gossipml.config import PeerConfig
from gossipml.daemon.face import Face
from gossipml.daemon.idle import IdleConfig, Observation
from gossipml.daemon.learner import Learner, LearnerConfig
from gossipml.daemon.pausing import Pausing
from gossipml.daemon.schedule import parse_schedule
from gossipml.daemon.serving import Serving
from gossipml.daemon.worker import open_predictor
from gossipml.env.simulated import World, run_simulation
from gossipml.simulations.cluster import Cluster, Member

QUICK = LearnerConfig(round_seconds=1.0, least_round=2.0, evaluate_seconds=4.0, save_seconds=5.0)
BATTERY = IdleConfig(pause_on_battery=True)


class Machine:
    """What the observing of a machine would say."""

    def __init__(self) -> None:
        self.seen = Observation(datetime(2026, 11, 16, 12), on_battery=False, load=0.0)
        self.looks = 0

    async def __call__(self) -> Observation:
        self.looks += 1
        await trio.lowlevel.checkpoint()
        return self.seen

    def is_now(self, **changes: object) -> None:
        self.seen = replace(self.seen, **changes)  # type: ignore[arg-type]  # fields of Observation


def play(
    scenario: Callable[[World, Cluster], Awaitable[None]], *, peers: int = 2, config: LearnerConfig = QUICK
) -> None:
    async def run(world: World) -> None:
        async with Cluster.of(world, peers=peers, config=config) as cluster:
            await scenario(world, cluster)

    run_simulation(run, seed=5)


def learner(member: Member) -> Learner:
    assert member.node is not None
    found = member.node.learner
    assert isinstance(found, Learner)
    return found


def face(member: Member) -> Face:
    assert member.node is not None
    config = PeerConfig(model="points")
    return Face(member.node, config, Serving(member.node, config, partial(open_predictor, config, b"network")))


async def join(cluster: Cluster, machine: Machine, idle: IdleConfig) -> Member:
    """A newcomer whose machine is looked at."""
    cluster.base = replace(cluster.base, idle=idle)
    await cluster.join("laptop", parts=3)
    member = cluster.members["laptop"]
    cluster.crash("laptop")
    member.observe = machine
    await cluster.start("laptop")
    return member


def test_a_paused_peer_does_not_train_but_averages_and_answers_and_resumes() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(60)
        member, other = cluster.members["peer-0"], cluster.members["peer-1"]
        assert member.node is not None and other.node is not None and member.trainer is not None
        learner(member).pause("asked on the page")
        await trio.sleep(5)
        paused = learner(member).progress
        assert (paused.state, paused.paused) == ("paused", "asked on the page")
        merges, sent, before = member.node.mesh.stats.merges, member.node.mesh.stats.updates_sent, other.node.gossip.age
        await trio.sleep(120)
        now = learner(member).progress
        assert (now.round, now.samples) == (paused.round, paused.samples)
        assert now.evaluation is not paused.evaluation, "it looks at what merging makes of the model"
        assert member.node.mesh.stats.merges > merges
        assert member.node.mesh.stats.updates_sent > sent
        assert other.node.gossip.age > before, "the other one trains on"
        assert await member.trainer.predict(b"[0,0,0,0,0,0,0,0]")

        rests = [member.node.gossip.rests]
        assert learner(member).resume() == ""
        await trio.sleep(0.001)
        assert learner(member).progress.samples == paused.samples, "the first round has not ended"
        rests.append(member.node.gossip.rests)
        assert rests == [True, False], "what it sends is no average any more"
        await trio.sleep(10)
        now = learner(member).progress
        assert (now.state, now.paused) == ("training", "")
        assert now.samples > paused.samples
        assert now.round >= learner(other).progress.round - 2, "rounds follow the neighbourhood"

    play(scenario)


def test_status_says_why_in_a_sentence() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        member = cluster.members["peer-0"]
        await trio.sleep(30)
        assert face(member).status()["paused"] is None
        learner(member).pause()
        await trio.sleep(5)
        status, ready = face(member).status(), face(member).readiness()
        assert status["state"] == "paused"
        assert status["paused"] == "by its user"
        assert str(status["sentence"]).startswith("paused: by its user; averaging and answering go on")
        assert ready.ok, "it answers"
        assert any(
            m.name == "gossipml_state" and m.labels == {"state": "paused"} and m.value == 1.0
            for m in face(member).metrics()
        )

    play(scenario)


def test_on_battery_the_peer_pauses_and_resumes_by_itself() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        machine = Machine()
        member = await join(cluster, machine, BATTERY)
        await trio.sleep(60)
        assert learner(member).progress.state == "training"
        machine.is_now(on_battery=True)
        await trio.sleep(10)
        paused = learner(member).progress
        assert (paused.state, paused.paused) == ("paused", "on battery")
        await trio.sleep(60)
        assert learner(member).progress.round == paused.round
        machine.is_now(on_battery=False)
        await trio.sleep(25)
        assert learner(member).progress.state == "training"
        assert learner(member).progress.round > paused.round

    play(scenario)


def test_a_peer_that_starts_on_battery_trains_nothing_first_and_takes_in_what_others_have() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(120)
        machine = Machine()
        machine.is_now(on_battery=True)
        cluster.base = replace(cluster.base, idle=BATTERY)
        cluster.members["peer-2"].observe = machine
        cluster.crash("peer-2")
        await world.env("peer-2").disk.remove("state/resume")
        world.crash("peer-2")
        await cluster.start("peer-2")
        await trio.sleep(0.5)
        member = cluster.members["peer-2"]
        assert learner(member).progress.samples == 0
        if member.node is not None and member.node.gossip.age <= 0:
            assert face(member).readiness().sentence.startswith("paused: on battery; nothing is trained yet")
        await trio.sleep(120)
        progress = learner(member).progress
        assert (progress.state, progress.samples) == ("paused", 0)
        assert progress.evaluation is not None and progress.evaluation.accuracy > 0.5, "two of five classes are its own"
        assert face(member).readiness().ok

    play(scenario, peers=3)


def test_the_user_and_the_machine_pause_apart() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        machine = Machine()
        member = await join(cluster, machine, BATTERY)
        await trio.sleep(20)
        learner(member).pause()
        machine.is_now(on_battery=True)
        await trio.sleep(15)
        assert learner(member).progress.paused == "by its user and on battery", "a further reason is told, too"
        machine.is_now(on_battery=False)
        await trio.sleep(30)
        assert learner(member).progress.paused == "by its user", "the machine does not lift it"
        machine.is_now(on_battery=True)
        await trio.sleep(15)
        assert learner(member).resume() == "on battery", "nor the user the other one"
        await trio.sleep(15)
        assert learner(member).progress.state == "paused"

    play(scenario)


def test_training_goes_by_the_schedule() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        machine = Machine()
        member = await join(cluster, machine, IdleConfig(schedule=parse_schedule("22:00-06:00")))
        await trio.sleep(30)
        assert learner(member).progress.paused == "outside its hours (22:00-06:00)"
        machine.is_now(local=datetime(2026, 11, 16, 22))
        await trio.sleep(10)
        assert learner(member).progress.state == "training"

    play(scenario)


def test_an_accuracy_that_averaging_reaches_ends_the_pause_for_good() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(1)
        learner(cluster.members["peer-0"]).pause()
        await trio.sleep(120)
        assert learner(cluster.members["peer-0"]).progress.state == "averaging"

    play(scenario, peers=3, config=replace(QUICK, target_accuracy=0.55))


def test_a_pause_holds_over_the_death_of_the_trainer() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        member = cluster.members["peer-0"]
        await trio.sleep(30)
        learner(member).pause()
        await trio.sleep(5)
        before, trainer = learner(member).progress.round, member.trainer
        assert trainer is not None and member.node is not None

        async def dies() -> None:
            raise OSError("the process has died")

        trainer.evaluate = dies  # type: ignore[method-assign]
        await trio.sleep(60)
        assert member.trainer is not trainer, "the supervisor has made a new one"
        assert learner(member).progress.state == "paused"
        assert learner(member).progress.round <= before

    play(scenario)


def test_a_pause_by_the_user_holds_over_a_restart_until_resumed() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(20)
        member = cluster.members["peer-0"]
        assert await face(member).pause() == "training is paused; averaging and answering go on"
        cluster.crash("peer-0")
        await cluster.start("peer-0")
        await trio.sleep(20)
        assert learner(member).progress.state == "paused"
        assert await face(member).resume() == "training goes on"
        cluster.crash("peer-0")
        await cluster.start("peer-0")
        await trio.sleep(20)
        assert learner(member).progress.state == "training"

    play(scenario)


def test_whoever_pauses_a_peer_that_has_finished_hears_that_there_is_nothing_to_pause() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(60)
        member = cluster.members["peer-0"]
        assert learner(member).progress.state == "averaging"
        assert (await face(member).pause()).startswith("training is over already; should it begin again")
        assert learner(member).progress.state == "averaging"

    play(scenario, config=replace(QUICK, max_rounds=2))


def test_state_is_kept_when_a_pause_begins() -> None:
    async def scenario(world: World, cluster: Cluster) -> None:
        await trio.sleep(31)
        member = cluster.members["peer-0"]
        learner(member).pause()
        await trio.sleep(4)  # less than between two saves
        round_ = learner(member).progress.round
        cluster.power_off("peer-0")
        await cluster.start("peer-0")
        await trio.sleep(0.1)
        assert learner(member).progress.round >= round_

    play(scenario, config=replace(QUICK, save_seconds=1000.0))


async def test_without_reasons_to_watch_for_nobody_looks(autojump_clock: trio.testing.MockClock) -> None:
    machine = Machine()
    env_clock = World(seed=1).env("x").clock
    pausing = Pausing(env_clock, IdleConfig(), machine)
    await pausing.look()
    with trio.fail_after(1):
        await pausing.watch()
    assert machine.looks == 0


async def test_the_event_of_a_change_is_set_once_for_each_change(autojump_clock: trio.testing.MockClock) -> None:
    pausing = Pausing(World(seed=1).env("x").clock)
    first = pausing.changed
    pausing.pause("a")
    assert first.is_set()
    second = pausing.changed
    pausing.pause("a")
    assert not second.is_set()
    pausing.pause("")
    assert pausing.reason == "by its user", "a pause has a reason"
    assert pausing.resume() == "" and pausing.reason == ""
    assert second.is_set()
