"""Optimisers by name, their numbers, the batch, and the outer step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossipml.errors import UserError
from gossipml.models.builtin import DigitsMlp
from gossipml.models.data import load_source, take_part
from gossipml.models.merge_rules import parse_merge
from gossipml.models.optimise import FlatSgd, OuterStep, TorchOptimiser
from gossipml.models.partition import Part, Rule
from gossipml.models.training import LocalTrainer
from gossipml.models.tuning import OPTIMISERS, LocalSteps, Outer, Tuning, parse_local_steps, parse_outer


class WithAdam(DigitsMlp):
    name = "digits-adam"

    def optimiser(self, parameters):  # type: ignore[no-untyped-def]
        return torch.optim.Adam(parameters, lr=0.001)


def make(tuning: Tuning | None = None, spec: DigitsMlp | None = None, part: int = 1) -> LocalTrainer:
    local = take_part(load_source("digits"), Rule("iid"), Part(part, 3), 0)
    return LocalTrainer(spec or DigitsMlp(), local, network_id=b"network", seed=part, tuning=tuning)


def train(trainer: LocalTrainer, steps: int) -> float:
    trainer.begin_round()
    for _ in range(steps):
        trainer.step()
    return trainer.end_round()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_of_the_list_learns(name: str) -> None:
    trainer = make(Tuning(optimiser=name, learning_rate=1.0 if name == "adadelta" else None))
    first = train(trainer, 5)
    for _ in range(10):
        last = train(trainer, 10)
    assert last < first, name


def test_the_digest_and_the_first_parameters_are_the_same_whatever_trains() -> None:
    plain, tuned = make(), make(Tuning(optimiser="adamw", learning_rate=0.1, batch=7, outer=Outer()))
    assert plain.layout == tuned.layout
    assert plain.snapshot("float32") == tuned.snapshot("float32")
    assert (plain.batch, tuned.batch) == (DigitsMlp.batch, 7)


def test_numbers_alone_change_the_models_own_optimiser() -> None:
    sgd = make(Tuning(learning_rate=0.5, momentum=0.0))._optimiser
    assert isinstance(sgd, FlatSgd)
    assert (sgd.sgd.learning_rate, sgd.sgd.momentum, sgd.sgd.weight_decay) == (0.5, 0.0, DigitsMlp.weight_decay)
    adam = make(Tuning(weight_decay=0.25), WithAdam())._optimiser
    assert isinstance(adam, TorchOptimiser)
    [group] = adam._optimiser.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.001, 0.25)
    with pytest.raises(UserError, match=r"takes no momentum; leave --momentum out"):
        make(Tuning(momentum=0.5), WithAdam())
    with pytest.raises(UserError, match="adam takes no momentum"):
        make(Tuning(optimiser="adam", momentum=0.5))


def test_local_momentum_is_kept_over_merges() -> None:
    trainer, other = make(), make(part=2)
    train(trainer, 5)
    train(other, 5)
    before = trainer._optimiser.save()[0]["optimiser.velocity"].clone()
    assert before.any()
    assert trainer.merge(other.snapshot("float32"), "float32", 0.5).applied
    assert torch.equal(trainer._optimiser.save()[0]["optimiser.velocity"], before)


def test_another_optimiser_goes_on_with_the_saved_parameters() -> None:
    trainer = make()
    train(trainer, 20)
    for tuning in (Tuning(optimiser="adam"), Tuning(outer=Outer()), Tuning(batch=5)):
        later = make(tuning)
        later.restore(trainer.save())
        assert later.snapshot("float32") == trainer.snapshot("float32")
        train(later, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimiser": "adanw"}, "did you mean 'adamw'"),
        ({"optimiser": "lbfgs"}, "choose sgd, adam"),
        ({"learning_rate": 0.0}, "not above 0"),
        ({"learning_rate": float("nan")}, "not above 0"),
        ({"momentum": 1.0}, "less than 1"),
        ({"weight_decay": -1.0}, "at least 0"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Tuning(**given)  # type: ignore[arg-type]


def test_outer_steps_and_local_steps_are_read() -> None:
    assert parse_outer("") is None
    assert parse_outer("nesterov") == Outer()
    assert parse_outer("nesterov:0.7:0.9") == Outer(0.7, 0.9)
    assert (parse_local_steps("auto"), parse_local_steps("20")) == (None, LocalSteps(20))
    assert parse_local_steps("37.5%") == LocalSteps(epochs=0.375)
    for wrong in ("nestorov", "nesterov:0", "nesterov:1:1", "nesterov:1.2.3", "adam"):
        with pytest.raises(UserError, match=r"choose nesterov"):
            parse_outer(wrong)
    for wrong in ("0", "many", "-3", "1.5", "", "0%", "%", "-3%", "nan%", "1e3%"):
        with pytest.raises(UserError, match="neither auto"):
            parse_local_steps(wrong)


def test_a_share_of_an_epoch_is_more_steps_where_there_are_more_data() -> None:
    assert [LocalSteps(20).of(epoch) for epoch in (1, 100)] == [20, 20]
    assert [LocalSteps(epochs=0.3).of(epoch) for epoch in (1, 10, 100)] == [1, 3, 30]
    assert LocalSteps(epochs=2.0).of(7) == 14


def test_the_outer_step_is_torchs_nesterov_on_the_way_of_a_round() -> None:
    x = torch.zeros(3)
    outer = OuterStep(Outer(0.7, 0.9), x)
    reference = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    rng = np.random.RandomState(1)
    for _ in range(5):
        way = torch.from_numpy(rng.normal(size=3).astype(np.float32))
        x += way
        outer.step()
        reference.grad = -way
        sgd.step()
        assert torch.allclose(x, reference.detach(), atol=1e-6)


def test_an_outer_step_of_rate_1_without_momentum_is_none() -> None:
    plain, outer = make(), make(Tuning(outer=Outer(1.0, 0.0)))
    for trainer in (plain, outer):
        for _ in range(3):
            train(trainer, 5)
    difference = torch.from_numpy(
        np.frombuffer(plain.snapshot("float32"), "<f4") - np.frombuffer(outer.snapshot("float32"), "<f4")
    )
    assert difference.abs().max() < 1e-5


def test_an_outer_step_survives_a_restart_and_forgets_on_a_loaded_version() -> None:
    tuning = Tuning(merge=parse_merge("age"), outer=Outer())
    trainer, later = make(tuning), make(tuning)
    train(trainer, 10)
    train(trainer, 10)
    later.restore(trainer.save())
    train(trainer, 5)
    train(later, 5)
    assert trainer.snapshot("float32") == later.snapshot("float32")
    assert later._outer is not None and later._outer._velocity.any()
    later.load(trainer.export().content)
    assert not later._outer._velocity.any()
