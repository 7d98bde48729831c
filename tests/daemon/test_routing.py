"""Predictions that other peers answer, among whole peers on virtual time; what a peer computes itself is made up."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import trio
from safetensors.numpy import save

from gossipml.api.ports import (
    ModelCard,
    NotReady,
    Overloaded,
    PredictAnswer,
    Prediction,
    PredictRequest,
    TensorSpec,
    UnknownModel,
)
from gossipml.daemon.cards import Cards, read_card, write_card
from gossipml.daemon.library import Draft
from gossipml.daemon.node import Node
from gossipml.daemon.replication import ReplicationConfig
from gossipml.daemon.routing import Routing, RoutingConfig
from gossipml.env import ASK
from gossipml.env.simulated import World, run_simulation
from gossipml.errors import RemoteError, UserError
from gossipml.ids import format_peer_id
from gossipml.models.manifest import Manifest
from gossipml.peer.asking_stream import AskingConfig
from gossipml.simulations.cluster import Cluster

from .test_library import NEVER

REQUEST = PredictRequest("json", b"[1, 2]", seconds=30.0)
LEAST_COPIES = ReplicationConfig(replicas=1, look_seconds=10.0, count_seconds=20.0)
NO_PULL = RoutingConfig(pull_after=0)
CARD = ModelCard(
    "made-up", "v1", "made up", (TensorSpec("input", "FP32", (-1, 28, 28)),), (TensorSpec("label", "BYTES", (-1, 1)),),
    ready=True, labels=("a", "b"), features=(), picture=(28, 28, 1), versions=("v1",),
)  # fmt: skip


@dataclass
class MadeUp:
    """Answers for the versions of a node's store, after `seconds`; then with `failure`, if there is one."""

    node: Node
    seconds: float = 0.02
    failure: Exception | None = None
    lie: dict[str, object] = field(default_factory=dict)
    asked: int = 0
    described: int = 0
    answered: int = 0
    waiting: int = 0
    warmed: list[str] = field(default_factory=list)
    buildable: bool = True

    def has(self, model: str) -> bool:
        return bool(self.node.library.store.versions(model))

    def could_have(self, model: str) -> bool:
        return self.buildable

    async def warm(self, model: str) -> None:
        self.warmed.append(model)

    async def card(self, model: str, version: str = "") -> ModelCard:
        self.described += 1
        if self.failure is not None:
            raise self.failure
        versions = tuple(one.version.hex()[:12] for one in self.node.library.store.versions(model))
        versions = tuple(one for one in versions if one.startswith(version[:12]))
        if not versions:
            raise UnknownModel(f"there is no model {model!r} here")
        return replace(CARD, name=model, version=versions[0], versions=versions)

    async def predict(self, model: str, request: PredictRequest) -> PredictAnswer:
        self.asked += 1
        self.waiting += 1
        try:
            await trio.sleep(self.seconds)
        finally:
            self.waiting -= 1
        if self.failure is not None:
            raise self.failure
        versions = [one.version.hex()[:12] for one in self.node.library.store.versions(model)]
        versions = [version for version in versions if version.startswith(request.version[:12])]
        if not versions:
            raise UnknownModel(f"there is no model {model!r} here")
        peer = format_peer_id(self.node.credentials.identity.peer_id)
        answer = {"model": model, "version": versions[0], "peer": peer, "got": request.body.decode(), **self.lie}
        self.answered += 1
        return PredictAnswer(versions[0], peer, json.dumps(answer).encode())


@dataclass
class Net:
    """A cluster of which every peer answers and asks."""

    world: World
    cluster: Cluster
    nursery: trio.Nursery
    config: RoutingConfig
    local: dict[int, MadeUp] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)
    recorded: list[Prediction] = field(default_factory=list)
    scopes: dict[int, trio.CancelScope] = field(default_factory=dict)

    def node(self, index: int) -> Node:
        node = self.cluster.members[f"peer-{index}"].node
        assert node is not None
        return node

    async def serve(self, index: int) -> None:
        """Let a running peer answer and ask."""
        self.local[index] = MadeUp(self.node(index))
        self.routing[index] = Routing(self.node(index), self.local[index], self.config, self.recorded.append)
        await self.nursery.start(self._run, index)

    async def _run(self, index: int, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self.scopes[index]:
            await self.routing[index].run(task_status=task_status)

    def crash(self, index: int) -> None:
        self.cluster.crash(f"peer-{index}")
        self.scopes[index].cancel()

    async def restart(self, index: int) -> None:
        await self.cluster.start(f"peer-{index}")
        await self.serve(index)

    async def publish(self, index: int, value: float = 1.0, name: str = "made-up") -> Manifest:
        return await self.node(index).library.publish(
            Draft(name, note=f"{value}"), save({"w": np.full(9, value, np.float32)})
        )

    def peer(self, index: int) -> str:
        return format_peer_id(self.node(index).credentials.identity.peer_id)

    async def ask(self, index: int, model: str = "made-up", **more: object) -> PredictAnswer:
        return await self.routing[index].predict(model, replace(REQUEST, **more))  # type: ignore[arg-type]


def play(
    scenario: Callable[[Net], Awaitable[None]], *, peers: int = 4, holders: int = 2, config: RoutingConfig = NO_PULL
) -> None:
    """The first `holders` of the peers hold version 1 of made-up."""

    async def run(world: World) -> None:
        async with Cluster.of(world, peers=0, config=NEVER) as cluster, trio.open_nursery() as nursery:
            cluster.base = replace(cluster.base, replication=LEAST_COPIES)
            net = Net(world, cluster, nursery, config)
            for index in range(peers):
                await cluster.join(f"peer-{index}", parts=peers)
                await net.serve(index)
            await trio.sleep(20)
            if holders:
                version = await net.publish(0)
                await trio.sleep(2)
            for index in range(1, holders):
                await net.node(index).library.fetch(version)
            await trio.sleep(5)
            await scenario(net)
            nursery.cancel_scope.cancel()

    run_simulation(run, seed=4)


def test_a_model_that_is_not_here_is_answered_by_a_peer_that_has_it() -> None:
    async def scenario(net: Net) -> None:
        for _ in range(20):
            answer = await net.ask(3)
            body = json.loads(answer.body)
            await trio.sleep(1)
            assert answer.peer == body["peer"] in (net.peer(0), net.peer(1)) and body["got"] == "[1, 2]"
        assert net.local[3].asked == net.local[2].asked == 0
        assert net.local[0].answered + net.local[1].answered == 20 == net.routing[3].stats.forwarded
        assert min(net.local[0].answered, net.local[1].answered) > 3, "both have their share"
        assert {one.status for one in net.recorded} == {200} and net.recorded[0].route.startswith("asked by ")
        assert (await net.ask(0)).peer == net.peer(0), "who has it answers itself"

    play(scenario)


def test_nobody_notices_that_the_machine_that_was_asked_dies_in_the_middle_of_an_answer() -> None:
    async def scenario(net: Net) -> None:
        for _ in range(30):
            await net.ask(3)
        for local in net.local.values():
            local.seconds = 0.2
        answers: list[PredictAnswer] = []
        took: list[float] = []

        async def ask() -> None:
            begun = trio.current_time()
            answers.append(await net.ask(3))
            took.append(trio.current_time() - begun)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
            with trio.fail_after(0.5):
                while net.local[0].waiting <= 3:  # until they are being computed
                    await trio.sleep(0.01)
            net.crash(0)
        assert len(answers) == 20 and {answer.peer for answer in answers} == {net.peer(1)}
        assert max(took) < 1.5 and net.routing[3].stats.again >= 4
        took.clear()
        for _ in range(20):
            await ask()
        assert max(took) < 0.6, "and who is dead is not asked again soon"

    play(scenario)


def test_each_of_two_holders_dies_and_comes_back_in_turn_and_no_prediction_fails() -> None:
    async def scenario(net: Net) -> None:
        over = trio.Event()
        answers: list[str] = []

        async def keep_asking() -> None:
            while not over.is_set():
                answers.append((await net.ask(3)).peer)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(keep_asking)
            for index in (0, 1, 0, 1):
                await trio.sleep(10)
                net.crash(index)
                await trio.sleep(5)
                await net.restart(index)
            await trio.sleep(20)
            over.set()
        assert len(answers) > 1000 and set(answers[-200:]) == {net.peer(0), net.peer(1)}, "both answer again"
        assert net.routing[3].stats.unanswered == 0

    play(scenario)


def test_a_machine_that_hangs_costs_one_delay_and_no_answer() -> None:
    async def scenario(net: Net) -> None:
        for _ in range(60):
            await net.ask(3)
        net.local[0].seconds = math.inf
        took = []
        for _ in range(30):
            begun = trio.current_time()
            assert (await net.ask(3)).peer == net.peer(1)
            took.append(trio.current_time() - begun)
        assert max(took) < 1.5 and sorted(took)[20] < 0.3
        assert net.routing[3].stats.extra >= 1

    play(scenario)


def test_nobody_has_it_and_nobody_answers_are_two_things_each_with_a_sentence() -> None:
    async def scenario(net: Net) -> None:
        with pytest.raises(UnknownModel, match="there is no model 'nothing' in the network; there are made-up"):
            await net.ask(3, "nothing")
        with pytest.raises(UnknownModel, match="no peer of the network has a version 'ffffff' of a model 'made-up'"):
            await net.ask(3, version="ffffff")
        for index in (0, 1):
            net.local[index].failure = UnknownModel("no model 'made-up' is installed on this peer")
        with pytest.raises(UnknownModel, match="has the code of 'made-up'; only its file is kept"):
            await net.ask(3)
        with pytest.raises(UnknownModel, match="version 'ffff' is too short; give at least 6"):
            await net.ask(3, version="ffff")
        for index in (0, 1):
            net.local[index].failure = NotReady("it starts")
        begun = trio.current_time()
        with pytest.raises(NotReady, match="the peers that have the model made-up do not answer") as caught:
            await net.ask(3)
        assert trio.current_time() - begun < 13 and caught.value.retry_after > 0
        begun = trio.current_time()
        with pytest.raises(NotReady):
            await net.ask(3, seconds=1.0)
        assert trio.current_time() - begun < 1.0, "before the client's time is over"
        for index in (0, 1):
            net.local[index].failure = UserError("the sample has 2 values, not 3")
        with pytest.raises(UserError, match="the sample has 2 values, not 3"):
            await net.ask(3)
        assert net.routing[3].stats.unanswered == 2

    play(scenario)


def test_a_version_that_is_pinned_is_asked_of_those_that_hold_it() -> None:
    async def scenario(net: Net) -> None:
        old = net.node(1).library.store.versions("made-up")[0].version.hex()
        new = (await net.publish(0, 2.0)).version.hex()
        await net.node(1).library.remove(net.node(1).library.store.versions("made-up"))
        await trio.sleep(5)
        assert (await net.ask(3, version=new[:10])).version == new[:12]
        assert (await net.ask(1, version=old)).version == old[:12]
        assert (await net.ask(3)).version == new[:12]

    play(scenario)


def test_who_is_overloaded_hands_on_and_says_so_when_all_are() -> None:
    async def scenario(net: Net) -> None:
        net.local[0].failure = Overloaded("1024 predictions are under way")
        assert (await net.ask(0)).peer == net.peer(1)
        net.local[1].failure = Overloaded("1024 predictions are under way")
        begun = trio.current_time()
        with pytest.raises(Overloaded, match="1024"):
            await net.ask(0)
        assert trio.current_time() - begun < 3
        assert net.local[2].asked == net.local[3].asked == 0, "what was handed on is handed on no further"

    play(scenario)


def test_whoever_lies_about_what_answered_is_not_believed_and_gets_a_strike() -> None:
    async def scenario(net: Net) -> None:
        net.local[0].lie = {"peer": net.peer(2)}
        for _ in range(12):
            assert (await net.ask(3)).peer == net.peer(1)
        struck = {info.peer: info.strikes for info in net.node(3).mesh.neighbours()}
        assert struck[net.node(0).credentials.identity.peer_id] > 0

    play(scenario)


def test_garbage_on_a_stream_is_a_strike_and_ends_that_stream_alone() -> None:
    async def scenario(net: Net) -> None:
        asker, answerer = net.node(3), net.node(0)
        address = answerer.addresses[0]
        stream = await asker.env.net.connect(address, answerer.credentials.identity.peer_id, asker.credentials, ASK)
        await stream.send_all(b"\0\0\0\x04\xff\xff\xff\xff")
        assert await stream.receive_into(memoryview(bytearray(9))) == 0
        struck = {info.peer: info.strikes for info in answerer.mesh.neighbours()}
        assert struck[asker.credentials.identity.peer_id] > 0
        await net.ask(2)

    play(scenario)


def test_who_was_revoked_is_asked_no_more_and_gets_no_answer() -> None:
    async def scenario(net: Net) -> None:
        await net.ask(3)
        eve = net.node(0).credentials.identity.peer_id
        await net.cluster.leave_order("peer-2", net.cluster.network_key.revocation(eve, made=1_800_000_000))
        while not net.node(3).credentials.membership.is_revoked(eve):
            await net.ask(3)
            await trio.sleep(0.5)
        answered = net.local[0].answered
        for _ in range(20):
            assert (await net.ask(3)).peer == net.peer(1)
        assert net.local[0].answered == answered
        await trio.sleep(30)  # until the last has heard of it
        await net.node(0).library.remove(net.node(0).library.store.versions("made-up"))
        answered = net.local[1].answered
        with pytest.raises((UnknownModel, NotReady)):
            await net.ask(0)
        assert net.local[1].answered == answered

    play(scenario)


def test_what_a_peer_may_have_open_here_is_bounded() -> None:
    async def scenario(net: Net) -> None:
        for index in (0, 1):
            net.local[index].seconds = 0.5
        answers: list[PredictAnswer] = []

        async def ask() -> None:
            answers.append(await net.ask(3))

        most = 0
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(ask)
            while len(answers) < 40:
                await trio.sleep(0.1)
                most = max(most, net.local[0].waiting, net.local[1].waiting)
        assert most <= 4, "each asks for two at once; what was given up may linger"

    play(scenario, config=RoutingConfig(pull_after=0, asking=AskingConfig(streams_peer=2)))


def test_a_model_that_is_asked_for_often_is_fetched_and_then_answered_here_in_its_newest_version() -> None:
    async def scenario(net: Net) -> None:
        for _ in range(10):
            assert (await net.ask(3)).peer != net.peer(3)
        await trio.sleep(5)
        assert net.local[3].warmed == ["made-up"], "it is in memory before it is asked here"
        assert (await net.ask(3)).peer == net.peer(3)
        new = (await net.publish(0, 2.0)).version.hex()
        await trio.sleep(60)
        assert (await net.ask(3)).version == new[:12]
        assert (await net.ask(3)).peer == net.peer(3)

    play(scenario, config=RoutingConfig(pull_after=10))


def test_a_model_that_is_loaded_by_hand_is_here_and_stays_the_newest() -> None:
    async def scenario(net: Net) -> None:
        with pytest.raises(UnknownModel, match="there is no model 'nothing' here"):
            await net.routing[3].load("nothing")
        await net.routing[3].load("made-up")
        assert net.local[3].warmed == ["made-up"]
        assert (await net.ask(3)).peer == net.peer(3)
        new = (await net.publish(0, 2.0)).version.hex()
        await trio.sleep(60)
        assert (await net.ask(3)).version == new[:12]
        net.local[2].buildable = False
        with pytest.raises(UnknownModel, match="cannot be built on this peer"):
            await net.routing[2].load("made-up")

    play(scenario)


def test_what_a_model_takes_is_known_on_a_peer_without_it() -> None:
    async def scenario(net: Net) -> None:
        version = net.node(0).library.store.versions("made-up")[0].version.hex()[:12]
        wanted = replace(CARD, version=version, versions=(version,))
        assert await net.routing[3].card("made-up") == wanted
        assert await net.routing[3].card("made-up", version[:6]) == wanted
        with pytest.raises(UnknownModel, match="there is no model 'nothing' in the network"):
            await net.routing[3].card("nothing")
        with pytest.raises(UnknownModel, match="no peer of the network has a version 'ffffff' of a model 'made-up'"):
            await net.routing[3].card("made-up", "ffffff")
        assert net.routing[3].stats.forwarded == 0 and net.recorded == [], "it is no prediction"
        net.crash(0)
        assert await net.routing[3].card("made-up") == wanted, "from the other one"
        net.crash(1)
        begun = trio.current_time()
        with pytest.raises(NotReady, match="the peers that have the model made-up do not answer"):
            await net.routing[3].card("made-up")
        assert trio.current_time() - begun < 3

    play(scenario)


def test_a_list_of_all_models_asks_others_once_in_a_while_and_never_waits_long() -> None:
    async def scenario(net: Net) -> None:
        cards = Cards(lambda: [replace(CARD, name="own")], net.routing[3].card)
        names = ["made-up", "nothing"]
        made_up = await net.routing[3].card("made-up")
        for _ in range(5):
            own, there, nothing = await cards.of(names)
            assert (own.name, there, nothing.name, nothing.ready) == ("own", made_up, "nothing", False)
            assert "there is no model 'nothing' in the network" in nothing.reason
        assert net.local[0].described + net.local[1].described == 2, "the first one above, and once for five lists"
        for index in (0, 1):
            net.local[index].failure = NotReady("it starts")
        await trio.sleep(30)
        begun = trio.current_time()
        _, there, _ = await cards.of(names)
        assert trio.current_time() - begun <= 2.1
        assert not there.ready or there == made_up

    play(scenario)


def test_a_card_is_told_whole_and_a_strangers_is_checked() -> None:
    data = write_card(CARD, "anna")
    answer = PredictAnswer("v1", "anna", data)
    assert read_card(answer) == CARD
    changes: tuple[dict[str, object], ...] = (
        {"picture": [28, 28]},
        {"picture": [1 << 20, 1 << 20, 3]},
        {"versions": []},
        {"versions": ["v1", "../etc"]},
        {"inputs": []},
        {"inputs": [{"name": "x", "datatype": "FP7", "shape": [-1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [True]}]},
        {"inputs": [{"name": 7, "datatype": "FP32", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": ["FP32"], "shape": [1]}]},
        {"labels": "ab"},
        {"labels": ["a" * 257]},
        {"features": [1]},
        {"more": 1},
    )
    for change in changes:
        told = json.loads(data)
        told["card"].update(change)
        with pytest.raises(RemoteError):
            read_card(replace(answer, body=json.dumps(told).encode()))
    for body in (b"", b"[]", b"{}", b'{"card": 1}', b"\xff", b" " * (1 << 18) + data):
        with pytest.raises(RemoteError):
            read_card(replace(answer, body=body))
    with pytest.raises(UnknownModel, match="cannot be told"):
        write_card(replace(CARD, labels=("a" * 300,)), "anna")
