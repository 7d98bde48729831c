"""A crew of workers ends where one worker would; its helpers start, sleep, die and end as they should."""

from __future__ import annotations

import gc
import os
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from gossipml.errors import LocalError, UserError
from gossipml.models import crew as crew_module
from gossipml.models.batches import Samples
from gossipml.models.crew import Crew, Link, hire
from gossipml.models.data import Dataset, take_part
from gossipml.models.dataset import Labelled
from gossipml.models.kernels_cut import Share, find_pairs
from gossipml.models.kernels_dense import dense_layers
from gossipml.models.kernels_split import Split, choose_split, make_steps
from gossipml.models.optimise import make_optimiser
from gossipml.models.partition import Part, Rule
from gossipml.models.registry import load_spec
from gossipml.models.spec import Array, Spec
from gossipml.models.training import LocalTrainer
from gossipml.models.tuning import Tuning
from tests.models.crews import crew_of_threads
from tests.models.test_kernels import BATCH, CPU, Deep, batch_of, flat_of, specification


class Long(Deep):
    """Two pairs, the second of them not at the beginning, with dropout between them; and a layer without a partner."""

    name = "long"

    def build(self) -> nn.Module:
        pair = nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 7)
        other = nn.Linear(7, 9, bias=False), nn.Sigmoid(), nn.Tanh(), nn.Linear(9, 12)
        return nn.Sequential(nn.Flatten(), *pair, nn.ReLU(), nn.Dropout(0.4), *other, nn.ReLU(), nn.Linear(12, 3))


def spec_of(name: str) -> Spec:
    return Long() if name == "long" else specification(name)


def samples_of(spec: Spec, count: int = BATCH) -> Samples:
    """Of the user's own; `ingest` gives them as they are."""
    inputs, targets = batch_of(spec, 1)
    spec.ingest = lambda samples: samples  # type: ignore[method-assign]
    return Samples(spec, Labelled(inputs[0, :count].numpy(), targets[0, :count].numpy()), CPU)


def orders(count: int, size: int = BATCH) -> list[torch.Tensor]:
    return [torch.randperm(size, generator=torch.Generator().manual_seed(n)) for n in range(count)]


# How it is cut


def pairs_of(*layers: nn.Module) -> list[tuple[int, int, int]]:
    return [(pair.inputs, pair.units, pair.outputs) for _, pair in find_pairs(dense_layers(nn.Sequential(*layers)))]


def test_the_pairs_with_the_most_weights_are_shared() -> None:
    relu = nn.ReLU()
    assert pairs_of(nn.Linear(784, 512), relu, nn.Linear(512, 256), relu, nn.Linear(256, 10)) == [(784, 512, 256)]
    assert pairs_of(nn.Linear(4, 64), relu, nn.Linear(64, 64), relu, nn.Linear(64, 64)) == [(64, 64, 64)]
    four = [nn.Linear(8, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 8)]
    assert pairs_of(*four) == [(8, 9, 9), (9, 9, 8)], "not the two in the middle"


def test_a_layer_alone_and_layers_with_dropout_between_them_are_no_pair() -> None:
    assert pairs_of(nn.Linear(8, 9), nn.ReLU()) == []
    assert pairs_of(nn.Linear(8, 9), nn.Dropout(0.5), nn.Linear(9, 9), nn.Linear(9, 9)) == [(9, 9, 9)]


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("name", ["deep", "long", "mnist-wide", "xor"])
def test_every_parameter_of_a_pair_is_of_one_worker(name: str, workers: int) -> None:
    module = spec_of(name).build()
    for _, pair in find_pairs(dense_layers(module)):
        vector = torch.arange(sum(parameter.numel() for parameter in module.parameters()), dtype=torch.float32)
        found = []
        for worker, units in enumerate(pair.shares(workers)):
            share = Share(pair, units, bias=worker == 0)
            share.load(vector, velocity=False)
            share.store(back := torch.full_like(vector, -1), velocity=False)
            assert torch.equal(back[back >= 0].sort().values, share.values.sort().values)
            found.append(share.values)
        assert torch.equal(torch.cat(found).sort().values, vector[pair.place])


# What it gives


SMALL = [(name, optimiser) for name in ("deep", "own-loss", "squashed", "xor", "long") for optimiser in ("sgd", "adam")]


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize(("name", "optimiser"), [*SMALL, ("mnist-wide", "sgd")])
def test_workers_that_share_a_step_end_where_one_would(name: str, optimiser: str, workers: int) -> None:
    ends = []
    for crew in (None, crew_of_threads(workers)):
        spec = spec_of(name)
        flat = flat_of(spec)
        flat.vector.mul_(0.3)
        momentum = 0.9 if optimiser == "sgd" else None
        tuning = Tuning(optimiser=optimiser, learning_rate=0.01, weight_decay=0.1, momentum=momentum)
        steps = make_steps(spec, flat, make_optimiser(flat, spec, tuning), samples_of(spec), crew)
        torch.manual_seed(4)  # the caller alone draws
        flat.module.train()
        losses = torch.cat([steps.take(order, coming) for order, coming in pairwise(orders(4))])
        steps.settle(optimiser=True)
        ends.append((flat.vector.clone(), flat.gradient.clone(), losses))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_are_scaled_by_every_worker(workers: int) -> None:
    """In the products: the bytes themselves are what is written where helpers read it."""
    ends = []
    for bytes_, crew in ((False, None), (True, None), (True, crew_of_threads(workers))):
        spec = specification("deep")
        inputs, targets = batch_of(spec, 1)
        raw = (inputs[0].numpy() * 50 + 128).clip(0, 255).astype(np.uint8)
        factor = np.float32(1 / 64)
        spec.ingest = lambda samples: np.multiply(samples, factor, dtype=np.float32)  # type: ignore[method-assign]  # noqa: B023
        given = raw if bytes_ else raw.astype(np.float32)
        samples = Samples(spec, Labelled(given, targets[0].numpy()), CPU)
        assert (samples.scale != 1.0) == bytes_
        flat = flat_of(spec)
        flat.vector.mul_(0.3)
        optimiser = make_optimiser(flat, spec, Tuning(optimiser="sgd", learning_rate=0.05, momentum=0.9))
        steps = make_steps(spec, flat, optimiser, samples, crew)
        losses = torch.cat([steps.take(order, coming) for order, coming in pairwise(orders(4))])
        steps.settle(optimiser=True)
        ends.append((flat.vector.clone(), losses))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-4, atol=1e-6)


def test_what_is_changed_between_two_steps_is_trained_on() -> None:
    ends = []
    for crew in (None, crew_of_threads(2)):
        spec = specification("deep")
        flat = flat_of(spec)
        optimiser = make_optimiser(flat, spec, Tuning(optimiser="sgd", learning_rate=0.1, momentum=0.9))
        steps = make_steps(spec, flat, optimiser, samples_of(spec), crew)
        first, second, third, fourth = orders(4)
        steps.take(first, second)
        steps.settle()
        flat.vector.mul_(0.5)  # a merge; helpers have begun with the second batch
        steps.take(second, third)
        steps.settle(optimiser=True)
        optimiser.reset()
        steps.take(third, first)
        steps.take(fourth)  # another one than was said
        steps.settle()
        ends.append(flat.vector.clone())
    torch.testing.assert_close(ends[1], ends[0])


def test_batches_may_grow_and_shrink() -> None:
    ends = []
    for crew in (None, crew_of_threads(3)):
        spec = spec_of("long")
        flat = flat_of(spec)
        steps = make_steps(spec, flat, make_optimiser(flat, spec, Tuning(momentum=0.9)), samples_of(spec), crew)
        torch.manual_seed(4)
        losses = torch.cat([steps.take(torch.arange(count)) for count in (2, BATCH, 1)])
        steps.settle(optimiser=True)
        ends.append((flat.vector.clone(), flat.gradient.clone(), losses))
    torch.testing.assert_close(ends[1], ends[0])


def test_a_batch_that_cannot_be_read_ahead_is_an_error_when_its_turn_comes() -> None:
    ends = []
    for crew in (None, crew_of_threads(2)):
        spec = specification("deep")
        flat = flat_of(spec)
        samples = samples_of(spec)
        samples._ingested = None  # so that each batch is ingested on its own

        def ingest(given: Array) -> Array:
            if len(given) == 2:
                raise UserError("two")
            return given

        spec.ingest = ingest  # type: ignore[method-assign, assignment]
        steps = make_steps(spec, flat, make_optimiser(flat, spec), samples, crew)
        steps.take(torch.arange(BATCH), torch.arange(2))
        with pytest.raises(UserError, match="two"):
            steps.take(torch.arange(2))
        steps.take(torch.arange(3), torch.arange(BATCH))
        steps.settle()
        ends.append(flat.vector.clone())
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize("name", ["mnist-dense", "cifar-cnn", "logistic"])
def test_a_model_that_workers_cannot_share_is_refused_with_what_to_do(name: str) -> None:
    spec = specification(name)
    flat = flat_of(spec)
    with pytest.raises(UserError, match=r"no two dense layers in a row.*use --workers 1 \(and --threads 2 for"):
        make_steps(spec, flat, make_optimiser(flat, spec), samples_of(spec), crew_of_threads(2))


# Calls


def test_a_message_in_pieces_arrives_whole_also_when_it_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "SPIN", 0.0)
    (reading, writing), (back, forth) = os.pipe(), os.pipe()
    link = Link(reading, forth)

    pieces = [b"to", b"get", b"her"]

    class Sleep:
        def poll(self) -> None:
            os.write(writing, pieces.pop(0))

    link._sleep = Sleep()  # type: ignore[assignment]
    assert link.receive(8) == b"together"
    os.close(writing)
    assert link.receive(1) == b"", "the other side has ended"
    os.close(back)
    with pytest.raises(BrokenPipeError):
        link.send(b"x")
    link.close()


def test_the_end_of_a_helper_is_an_error_that_says_what_to_do() -> None:
    (answers, answer), (commands, command) = os.pipe(), os.pipe()
    crew = Crew([Link(answers, command)], os.open(os.devnull, os.O_RDWR), lambda: None)
    os.close(answer)
    with pytest.raises(LocalError, match="use --workers 1"):
        crew.wait()
    os.close(commands)
    with pytest.raises(LocalError, match="use --workers 1"):
        crew.tell(b"x")


# Processes


@pytest.mark.real
def test_a_trainer_with_two_processes_is_one_with_one(digits: Dataset) -> None:
    spec = load_spec("digits-mlp")
    part = take_part(digits, Rule("iid"), Part(1, 1), 0)
    children = set(psutil.Process().children())
    alone, shared = (LocalTrainer(spec, part, network_id=b"", seed=0) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        assert shared.use_cores(2, 2) == (Split(2, 1), {})
        (helper,) = set(psutil.Process().children()) - children
        for trainer in (alone, shared):
            for _ in range(2):
                trainer.begin_round()
                for _ in range(5):
                    trainer.step()
                trainer.end_round()
                assert trainer.merge(LocalTrainer(spec, part, network_id=b"", seed=0).snapshot("int8"), "int8", 0.3)
        torch.testing.assert_close(shared._x, alone._x)
        shared.step()
        saved = shared.save()
        again = LocalTrainer(spec, part, network_id=b"", seed=0)
        again.restore(saved)
        for trainer in (again, shared):
            trainer.step()
        torch.testing.assert_close(shared._x, again._x)
        assert shared.use_cores(1, 1)[0] == Split(1, 1)
    finally:
        torch.set_num_threads(threads)
    gc.collect()
    assert not helper.is_running(), "a crew that is not needed any more"


@pytest.mark.real
def test_a_helper_that_is_killed_is_an_error_and_leaves_nothing(digits: Dataset) -> None:
    children = set(psutil.Process().children())
    crew = hire(2, 1)
    first, second = sorted(set(psutil.Process().children()) - children, key=lambda process: process.pid)
    first.kill()
    with pytest.raises(LocalError, match="has ended"):
        crew.wait()
    del crew
    gc.collect()
    assert not first.is_running()
    assert not second.is_running()


@pytest.mark.real
def test_finding_the_best_number_of_workers_changes_nothing() -> None:
    spec = specification("digits-mlp")
    flat = flat_of(spec)
    samples = samples_of(spec)
    vector, gradient, generator = flat.vector.clone(), flat.gradient.clone(), torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        choice = choose_split(spec, flat, samples, BATCH, 2)
    finally:
        torch.set_num_threads(threads)
    assert list(choice.seconds) == [Split(1, 1), Split(1, 2), Split(2, 1)]
    assert choice.seconds[choice.split] <= choice.seconds[Split(1, 1)]
    assert (choice.crew is None) == (choice.split.workers == 1)
    assert torch.equal(flat.vector, vector)
    assert torch.equal(flat.gradient, gradient)
    assert torch.equal(torch.get_rng_state(), generator)
