"""A model meets its data: shapes, classes by name, what is learnt and what is agreed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gossipml.errors import UserError
from gossipml.models.builtin_pictures import DigitsMlp
from gossipml.models.builtin_tables import Linear, Logistic
from gossipml.models.data import Dataset, Labelled, load_source, prepare, take_part
from gossipml.models.data_fit import describe
from gossipml.models.flat import build_flat
from gossipml.models.partition import Part, Rule
from gossipml.models.predict import answer
from gossipml.models.registry import load_spec
from gossipml.models.spec import Classifier, Facts, Spec, check_interface
from gossipml.models.training import LocalTrainer

CPU = torch.device("cpu")
NETWORK = b"n" * 16


class Animals(Classifier):
    name = "animals"
    input_shape = (2,)
    labels: tuple[str, ...] = ("cat", "dog", "fish")

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 3)


def table(labels: tuple[str, ...], count: int = 30, width: int = 2, features: tuple[str, ...] = ()) -> Dataset:
    """Samples whose first value is the number of their class in `labels`."""
    targets = np.arange(count, dtype=np.int64) % max(1, len(labels))
    inputs = np.random.RandomState(0).rand(count, width).astype(np.float32)
    inputs[:, 0] = targets
    part = Labelled(inputs, targets if labels else inputs[:, 1])
    return Dataset("here", part, part, labels, features)


def digest(spec: Spec) -> str:
    return build_flat(spec, NETWORK, CPU)[1].digest


def test_classes_are_matched_by_name_not_by_place() -> None:
    _, data = prepare(Animals(), table(("fish", "cat")))
    assert data.labels == Animals.labels
    assert data.train.targets[:4].tolist() == [2, 0, 2, 0]
    assert data.test.targets[:2].tolist() == [2, 0]


def test_a_source_without_names_is_matched_by_place() -> None:
    _, data = prepare(Animals(), table(("0", "1", "2")))
    assert data.labels == Animals.labels and data.train.targets[:3].tolist() == [0, 1, 2]


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(UserError, match=r"has the class 'fsih', which the model 'animals' does not know; did you mean"):
        prepare(Animals(), table(("cat", "fsih")))
    with pytest.raises(UserError, match="knows 3 classes, the source 'here' has 4"):
        prepare(Animals(), table(("cat", "dog", "fish", "cow")))


def test_a_peer_with_one_class_of_a_known_list_trains() -> None:
    spec, data = prepare(Animals(), table(("dog",)))
    local = take_part(data, Rule("iid"), Part(1, 1), 0)
    trainer = LocalTrainer(spec, local, network_id=NETWORK, seed=0)
    trainer.step()
    assert set(local.train.targets.tolist()) == {1}


def test_one_class_of_an_unknown_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"has one class only, 'dog'.*add samples of another class"):
        prepare(Logistic(), table(("dog",)))


def test_values_and_classes_are_told_apart() -> None:
    with pytest.raises(UserError, match=r"has numbers to predict, such as .*: use linear"):
        prepare(Animals(), table(()))
    with pytest.raises(UserError, match=r"has values to predict and no classes; .*: use linear"):
        prepare(Logistic(), table(()))
    with pytest.raises(UserError, match=r"classes such as 'cat', not values; .*use --model logistic"):
        prepare(Linear(), table(("cat", "dog")))


def test_a_model_of_any_width_takes_shape_names_and_scale_from_the_data() -> None:
    given = table(("a", "b"), width=5, features=tuple("vwxyz"))
    spec, _ = prepare(load_spec("logistic"), given)
    assert spec.inputs[0].shape == (-1, 5) and spec.labels == ("a", "b") and spec.features == tuple("vwxyz")
    standard = spec.ingest(given.train.inputs[:])
    assert np.allclose(standard.mean(0), 0, atol=1e-6) and np.allclose(standard.std(0), 1, atol=1e-5)
    assert build_flat(spec, NETWORK, CPU)[1].size == 5 * 2 + 2
    for name in ("logistic", "linear"):
        with pytest.raises(UserError, match="takes its shape from the data; name the data"):
            build_flat(load_spec(name), NETWORK, CPU)


def test_moments_are_those_of_all_rows_and_a_constant_has_scale_one() -> None:
    given = table(("a", "b"), count=1000, width=3)
    given.train.inputs[:, 2] = 1e6 + 0.001  # type: ignore[index]  # an array
    facts = describe(given)
    rows = given.train.inputs[:].astype(np.float64)
    assert np.allclose(facts.mean, rows.mean(0), rtol=1e-12)
    assert np.allclose(facts.scale[:2], rows.std(0)[:2], rtol=1e-12) and facts.scale[2] == 1.0


def test_moments_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = table(("a", "b"), count=500, width=4)
    whole = describe(given)
    monkeypatch.setattr("gossipml.models.data_fit.CHUNK_VALUES", 28)
    pieces = describe(given)
    assert np.allclose(whole.mean, pieces.mean, rtol=1e-12) and np.allclose(whole.scale, pieces.scale, rtol=1e-12)


def test_peers_must_agree_on_classes_columns_and_a_fixed_scale_but_not_on_one_they_learn() -> None:
    class Other(Animals):
        labels = ("dog", "cat", "fish")

    class Scaled(Animals):
        mean = (0.5, 0.25)

    class Same(Animals):
        learning_rate = 0.3

    assert len({digest(spec) for spec in (Animals(), Other(), Scaled())}) == 3
    assert digest(Same()) == digest(Animals())
    one, other = table(("a", "b"), features=("x", "y")), table(("a", "b"), count=50, features=("x", "y"))
    swapped = table(("a", "b"), features=("y", "x"))
    logistic = [digest(prepare(Logistic(), data)[0]) for data in (one, other, swapped)]
    assert logistic[0] == logistic[1] != logistic[2]


@pytest.mark.parametrize(
    "mean, scale, says",
    [
        ((1.0, 2.0, 3.0), 1.0, "mean is one finite number, or 2 of them"),
        (float("nan"), 1.0, "mean is one finite number"),
        (0.0, (1.0, 0.0), "none of them 0"),
        ("x", 1.0, "mean is one finite number"),
    ],
)
def test_an_impossible_normalisation_is_refused(mean: object, scale: object, says: str) -> None:
    spec = Animals()
    spec.mean, spec.scale = mean, scale  # type: ignore[assignment]
    with pytest.raises(UserError, match=says):
        check_interface(spec, "animals")


def test_years_and_prices_are_predicted_in_their_own_units() -> None:
    rng = np.random.RandomState(0)
    inputs = rng.rand(400, 3).astype(np.float32)
    values = (1900 + 100 * inputs[:, 0] - 40 * inputs[:, 2]).astype(np.float32)
    part = Labelled(inputs, values)
    spec, data = prepare(Linear(), Dataset("years", part, part, (), ("a", "b", "c")))
    trainer = LocalTrainer(spec, take_part(data, Rule("iid"), Part(1, 1), 0), network_id=NETWORK, seed=0)
    for _ in range(400):
        trainer.step()
    assert trainer.evaluate().accuracy > 0.99
    value = json.loads(answer(trainer.spec, b'{"a": 0.5, "b": 0.1, "c": 0.5}', trainer.forward()))["value"]
    assert abs(value - 1930) < 2


def test_classes_named_by_numbers_are_values_to_linear(tmp_path: Path) -> None:
    rows = "".join(f"{n % 4 / 3},{10 * (n % 4) + 5}\n" for n in range(200))
    (tmp_path / "t.csv").write_text("x,y\n" + rows)
    data = load_source(f"csv:{tmp_path / 't.csv'}#y")
    assert data.labels == ("5", "15", "25", "35")
    spec, data = prepare(Linear(), data)
    trainer = LocalTrainer(spec, take_part(data, Rule("labels", 2), Part(1, 2), 0), network_id=NETWORK, seed=0)
    for _ in range(400):
        trainer.step()
    assert trainer.evaluate().served == "local"
    assert abs(json.loads(answer(trainer.spec, b"[1.0]", trainer.forward()))["value"] - 35) < 0.5


def test_a_large_stream_of_another_model_is_never_read_whole() -> None:
    class Counting:
        shape, dtype = (10**12, 64), np.dtype(np.uint8)

        def __len__(self) -> int:
            return self.shape[0]

        def __getitem__(self, key: object) -> np.ndarray:
            assert key == slice(None, 1, None)
            return np.zeros((1, 64), dtype=np.uint8)

        def take(self, indices: object) -> Counting:
            return self

    part = Labelled(Counting(), np.arange(10, dtype=np.int64))
    _, data = prepare(DigitsMlp(), Dataset("large", part, part, tuple("0123456789")))
    assert isinstance(data.train.inputs, Counting)


def test_facts_are_what_a_model_of_ones_own_may_adapt_to() -> None:
    class Mine(Animals):
        def adapt(self, facts: Facts) -> Spec:
            assert facts.sample_shape == (7,) and facts.labels == ("a", "b")
            mine = Mine()
            mine.input_shape, mine.labels = facts.sample_shape, facts.labels
            return mine

    spec, data = prepare(Mine(), table(("a", "b"), width=7))
    assert spec.inputs[0].shape == (-1, 7) and data.labels == ("a", "b")
