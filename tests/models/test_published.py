"""Published versions: out of a module, into another one, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from gossipml.errors import UserError
from gossipml.models import published
from gossipml.models.builtin import DigitsMlp, Xor
from gossipml.models.data import Dataset, take_part
from gossipml.models.flat import build_flat
from gossipml.models.partition import Part, parse_rule
from gossipml.models.predict import answer
from gossipml.models.serving import ServedModel
from gossipml.models.spec import Classifier, Sgd
from gossipml.models.training import LocalTrainer

CPU = torch.device("cpu")
NETWORK = b"network"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Odd(nn.Module):
    """Everything that a state_dict can hold: shared weights, integer buffers, buffers that are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.again = self.first
        self.normal = nn.BatchNorm1d(64)
        self.last = nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(64), persistent=False)

    scale: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.normal(self.again(self.first(inputs * self.scale)).relu()))
        return result


class OddSpec(DigitsMlp):
    name = "odd"

    def build(self) -> nn.Module:
        return Odd()

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | Sgd:
        return torch.optim.Adam(parameters, lr=0.01)


def make(data: Dataset, spec: Classifier | None = None, rule: str = "iid", part: int = 1) -> LocalTrainer:
    local = take_part(data, parse_rule(rule), Part(part, 4), 0)
    return LocalTrainer(spec or DigitsMlp(), local, network_id=NETWORK, seed=part)


def train(trainer: LocalTrainer, steps: int) -> None:
    trainer.begin_round()
    for _ in range(steps):
        trainer.step()
    trainer.end_round()


@pytest.mark.parametrize("spec", [DigitsMlp(), OddSpec()], ids=["digits", "odd"])
def test_an_export_loads_into_a_plain_module_and_answers_the_same(digits: Dataset, spec: Classifier) -> None:
    trainer = make(digits, spec)
    train(trainer, 60)
    export = trainer.export()
    module = spec.build()
    module.load_state_dict(safetensors.torch.load(export.content), strict=True)
    module.eval()
    inputs = torch.from_numpy(spec.ingest(digits.test.inputs[:]))
    with torch.inference_mode():
        right = (module(inputs).argmax(1) == torch.from_numpy(digits.test.targets)).float().mean()
    assert float(right) == pytest.approx(export.evaluation.accuracy, abs=1e-6)
    assert export.metrics == {
        "accuracy": export.evaluation.accuracy,
        "loss": export.evaluation.loss,
        "validation_accuracy": export.evaluation.validation_accuracy,
    }


def test_an_export_needs_the_safetensors_package_alone(digits: Dataset) -> None:
    trainer = make(digits)
    train(trainer, 5)
    arrays = safetensors.numpy.load(trainer.export().content)
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    single = np.dtype(np.float32)
    assert shapes == {
        "0.weight": ((64, 64), single),
        "0.bias": ((64,), single),
        "2.weight": ((10, 64), single),
        "2.bias": ((10,), single),
    }
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_equal_parameters_are_equal_bytes_with_one_entry_of_metadata(digits: Dataset) -> None:
    trainer, other = make(digits), make(digits, part=2)
    content = trainer.export().content
    assert content == other.export().content, "both are still where the network begins"
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entry = json.loads(header["__metadata__"].pop("gossipml"))
    assert header["__metadata__"] == {}
    assert entry == {"model": "digits-mlp", "digest": trainer.layout.digest}
    train(trainer, 50)  # better than the beginning, on validation data
    assert trainer.export().content != content


def test_what_does_better_on_validation_data_is_exported(digits: Dataset) -> None:
    trainer = make(digits)
    train(trainer, 150)  # the average is still the beginning
    export = trainer.export()
    assert export.evaluation.served == "local"
    assert torch.equal(trainer.read(export.content), trainer._x)
    trainer._average.copy_(trainer._x)
    with torch.no_grad():
        trainer._x.add_(1.0)
    export = trainer.export()
    assert export.evaluation.served == "average"
    assert torch.equal(trainer.read(export.content), trainer._average)


def test_a_peer_with_uneven_data_exports_the_average_of_the_neighbourhood(digits: Dataset) -> None:
    trainer = make(digits, rule="labels:4")
    beginning = trainer.snapshot("float32")
    train(trainer, 100)
    assert trainer.merge(beginning, "float32", 0.0).applied
    trainer._average.copy_(trainer._x)
    trainer._average[-10:] += 1.0 * torch.arange(10)  # somewhat worse on every class
    assert trainer.export().evaluation.served == "average"


@pytest.mark.parametrize("spec", [DigitsMlp(), OddSpec()], ids=["digits", "odd"])
def test_a_newcomer_goes_on_from_a_version(digits: Dataset, spec: Classifier) -> None:
    trainer, newcomer = make(digits, spec), make(digits, spec, part=2)
    train(trainer, 150)
    export = trainer.export()
    train(newcomer, 3)
    assert newcomer.merge(newcomer.snapshot("float32"), "float32", 0.5).applied
    newcomer.load(export.content)
    assert newcomer.snapshot("float32") == trainer.snapshot("float32")
    assert torch.equal(newcomer._average, newcomer._x)
    assert newcomer._merger._bound.usual is None, "distances from its former parameters are forgotten"
    fresh = make(digits, spec, part=3)
    assert json.dumps(newcomer._optimiser.save()[1]) == json.dumps(fresh._optimiser.save()[1])
    assert not any(bool(each.any()) for each in newcomer._optimiser.save()[0].values()), "no momentum is left"
    evaluation = newcomer.evaluate()
    assert (evaluation.served, evaluation.accuracy) == ("average", export.evaluation.accuracy)
    train(newcomer, 20)
    assert newcomer.evaluate().accuracy > 0.8


def test_a_score_is_what_the_same_parameters_have_here_and_changes_nothing(digits: Dataset) -> None:
    trainer, other = make(digits), make(digits, part=2)
    train(trainer, 100)
    export = trainer.export()
    before, found = other.save(), other.evaluate()
    score = other.score(export.content)
    assert score > found.validation_accuracy + 0.3
    assert other.save() == before
    other.load(export.content)
    assert other.evaluate().validation_accuracy == score == other.export().score


def test_a_version_from_elsewhere_may_have_other_floats(digits: Dataset) -> None:
    module = DigitsMlp().build()
    half = {name: tensor.half() for name, tensor in module.state_dict().items()}
    double = {name: tensor.double() for name, tensor in half.items()}
    trainer = make(digits)
    trainer.load(safetensors.torch.save(half))
    first = trainer.snapshot("float32")
    trainer.load(safetensors.torch.save(double))
    assert trainer.snapshot("float32") == first


def state(change: dict[str, torch.Tensor | None]) -> bytes:
    tensors = {**DigitsMlp().build().state_dict(), **change}
    return safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "no safetensors file"),
        (b"\xff" * 100, "its header claims 18446744073709551615 of 100 bytes"),
        ((50 << 20).to_bytes(8, "little") + b" " * (51 << 20), "at most 1048576"),
        (state({})[:-1], "no safetensors file"),
        (state({}) + b"\0", "no safetensors file"),
        (state({"2.bias": None}), "lacks tensor '2.bias'"),
        (state({"3.bias": torch.zeros(10)}), "has an unknown tensor '3.bias'"),
        (state({"2.bias": torch.zeros(11)}), "'2.bias' has the shape [11], not [10]"),
        (state({"0.weight": torch.zeros(64 * 64)}), "has the shape [4096], not [64, 64]"),
        (state({"2.bias": torch.zeros(10, dtype=torch.int64)}), "'2.bias' is torch.int64"),
        (state({"2.bias": torch.full((10,), float("nan"))}), "holds the value nan"),
        (state({"2.bias": torch.full((10,), float("inf"))}), "holds the value inf"),
        (state({"2.bias": torch.full((10,), -2e9)}), "holds the value 2e+09"),
        (state({"2.bias": torch.full((10,), 1e300, dtype=torch.float64)}), "holds the value inf"),
    ],
)
def test_what_is_no_version_of_this_model_is_refused_and_changes_nothing(
    digits: Dataset, content: bytes, says: str
) -> None:
    trainer = make(digits)
    served = ServedModel(DigitsMlp(), network_id=NETWORK)
    train(trainer, 3)
    before = trainer.save()
    for use in (trainer.load, trainer.score, served.load):
        with pytest.raises(UserError, match="the version cannot be used with 'digits-mlp'") as caught:
            use(content)
        assert says in str(caught.value)
    assert trainer.save() == before
    with pytest.raises(UserError, match="no version of 'digits-mlp' has been loaded"):
        answer(served.spec, b"[]", served.forward())


def test_shared_tensors_that_differ_are_refused() -> None:
    flat, layout = build_flat(OddSpec(), NETWORK, CPU)
    named = flat.named(flat.vector)
    assert {"first.weight", "again.weight", "normal.num_batches_tracked"} <= named.keys() and "scale" not in named
    assert published.unpack(published.pack(named, layout)).keys() == named.keys()
    assert torch.equal(flat.vector_of(named), flat.vector)
    with pytest.raises(UserError, match=r"'first.weight' and 'again.weight' differ"):
        flat.vector_of({**named, "again.weight": named["again.weight"] + 1})


def test_a_peer_that_only_serves_answers_from_the_last_version(digits: Dataset) -> None:
    trainer = make(digits)
    served = ServedModel(DigitsMlp(), network_id=NETWORK)
    assert served.layout == trainer.layout
    assert served.sample_counts == {"train": 0, "validation": 0, "test": 0}
    request = json.dumps(digits.test.inputs[:20].tolist()).encode()
    for _ in range(2):
        train(trainer, 60)
        served.load(trainer.export().content)
        assert answer(served.spec, request, served.forward()) == answer(trainer.spec, request, trainer.forward())
    xor = ServedModel(Xor(), network_id=NETWORK)
    with pytest.raises(UserError, match=r"lacks tensor.*of another model|unknown tensor|has the shape"):
        xor.load(trainer.export().content)
