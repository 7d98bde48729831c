from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from gossipml.errors import UserError
from gossipml.simulations import population
from gossipml.simulations.population_helpers import CAN_FORK, Helpers
from gossipml.simulations.population_setting import device_of
from gossipml.simulations.population_training import Threads
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Byzantine, Scenario, Train

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="processes are not forked on this system")

SMALL = Scenario("small", peers=5, rounds=3, split="dirichlet:0.5", train=Train(steps=7))


class Job:
    """Writes who did it, and how often that one has worked."""

    def __init__(self, peers: int, count: int) -> None:
        self.helpers = Helpers(count, torch.device("cpu"))
        self.helpers.offer("work", self._work)
        self.seen = self.helpers.memory(peers, 3)
        self.calls = 0

    def do(self, work: list[tuple[int, int]]) -> list[bool]:
        return self.helpers.do("work", work)

    def _work(self, work: list[tuple[int, int]]) -> list[bool]:
        self.calls += 1
        for peer, steps in work:
            if steps == 99:
                raise UserError(f"peer {peer} asks for too much")
            if steps == 98:
                raise ValueError("a slip")
            if steps == 97:
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == 96:
                time.sleep(600)
            self.seen[peer] = torch.tensor([float(os.getpid()), float(self.calls), float(steps)])
        return [steps == 0 for _, steps in work]


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job(6, 3)
    yield made
    made.helpers.close()


def test_every_peer_has_its_process_for_good_and_its_work_is_seen_by_all(job: Job) -> None:
    assert job.do([(peer, peer) for peer in range(6)]) == [True, False, False, False, False, False]
    first = job.seen.clone()
    assert first[:, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(set(first[:3, 0].tolist())) == 3
    assert first[0, 0] == os.getpid()
    assert torch.equal(first[:3, 0], first[3:, 0])
    job.do([(4, 5)])
    assert job.seen[4].tolist() == [first[1, 0], 2.0, 5.0], "the same one, which remembers the time before"
    assert torch.equal(job.seen[5], first[5])


def test_what_goes_wrong_in_a_helper_is_said_here_and_the_next_work_is_done(job: Job) -> None:
    with pytest.raises(UserError, match="peer 1 asks for too much"):
        job.do([(0, 1), (1, 99), (2, 1)])
    with pytest.raises(RuntimeError, match="a slip"):
        job.do([(1, 98)])
    with pytest.raises(UserError, match="peer 0 asks"):
        job.do([(0, 99), (1, 0)])
    assert job.do([(2, 1), (1, 0), (4, 0)]) == [False, True, True], "in the order of what was asked"


def test_a_helper_that_ends_is_told(job: Job) -> None:
    for _ in range(2):  # while it works, and before it is asked again
        with pytest.raises(UserError, match="has ended"):
            job.do([(0, 1), (1, 97)])


def test_pieces_of_memory_are_common_also_where_they_came_after_the_fork() -> None:
    helpers = Helpers(2, torch.device("cpu"))
    block = helpers.blocks(2, 5000)
    early = block(0)

    def write(items: list[tuple[int, int]]) -> list[float]:
        there = block(items[0][1])
        there += 1
        return [float(there.sum())]

    helpers.offer("write", write)
    try:
        assert helpers.do("write", [(1, 0)]) == [10_000.0]
        assert float(early.sum()) == 10_000.0
        late = block(2)
        late[1] = 3
        assert helpers.do("write", [(1, 2)]) == [25_000.0]
        assert float(late.sum()) == 25_000.0
        assert float(early.sum()) == 10_000.0
    finally:
        helpers.close()


@pytest.mark.parametrize(
    "scenario",
    [
        replace(SMALL, compression="float32"),
        replace(SMALL, compression="int8-top10", byzantine=Byzantine("nan", 0.2)),
        replace(SMALL, compression="int4", merge="median", protocol="push:3"),
    ],
)
def test_two_processes_merge_as_one_does(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for count in (1, 2):
        monkeypatch.setattr(population, "Threads", partial(Threads, count=count))
        last = [row for row in population.run(scenario, 1, "cpu") if isinstance(row, Row)][-1]
        rows.append(replace(last, wall=0.0))
    assert rows[0].messages > 0
    for name, value in vars(rows[0]).items():
        assert getattr(rows[1], name) == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_nobody_waits_for_helpers_that_are_dismissed() -> None:
    job = Job(6, 2)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            job.do([(1, 96)])
    finally:
        signal.signal(signal.SIGALRM, before)
    job.helpers.close()
    job.helpers.close()


def test_helpers_end_with_their_parent() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        job = Job(6, 2)
        job.do([(1, 1)])
        os.write(write, str(int(job.seen[1, 0])).encode())
        os._exit(0)  # without a word to them
    os.waitpid(child, 0)
    helper = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    until = time.monotonic() + 10
    while _runs(helper):
        assert time.monotonic() < until
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "train",
    [
        Train(steps=7),
        Train(steps=7, learning_rate=0.1, momentum=0.5),
        Train(steps=7, learning_rate=0.01, optimiser="adam"),
    ],
)
def test_two_processes_train_as_one_does(train: Train) -> None:
    found = []
    for count in (1, 2):
        device = device_of("cpu")
        threads = Threads(device, count)
        with threads.open():
            trainees, _, _ = population.population(replace(SMALL, train=train), 1, device, threads)
            for _ in range(3):
                trainees.train(range(5), [7, 3, 0, 7, 20])
            trainees.forget_velocity(1)
            trainees.train([1, 2], [4, 4])
            assert trainees._helpers.forked == (count == 2)
            found.append(trainees.x.clone())
        assert not trainees._helpers.forked
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_a_peer_that_diverges_in_a_helper_is_as_it_was() -> None:
    device = device_of("cpu")
    threads = Threads(device, 2)
    with threads.open():
        trainees, _, _ = population.population(SMALL, 1, device, threads)
        trainees.x[1:3, 5] = float("inf")  # peer 1 is the helper's, peer 2 is not
        before = trainees.x.clone()
        assert trainees.train(range(5), [3] * 5) == [1, 2]
        assert [torch.equal(*pair) for pair in zip(before, trainees.x, strict=True)] == [
            False,
            True,
            True,
            False,
            False,
        ]
