"""Every built-in model trains, exports and answers; a model file from the template does, too."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models.builtin import BUILTIN
from gossipml.models.builtin_pictures import CifarCnn, DigitsMlp, HorsesHumans, MnistWide, MnistWideMse
from gossipml.models.central import train_central
from gossipml.models.data import Dataset, Labelled, load_source, prepare, take_part
from gossipml.models.flat import build_flat
from gossipml.models.partition import Part, Rule
from gossipml.models.predict import answer
from gossipml.models.registry import load_spec
from gossipml.models.spec import Spec, picture_shape
from gossipml.models.template import model_name, write_template
from gossipml.models.training import LocalTrainer
from tests.models.pictures import fill

NETWORK = b"n" * 16
ALL = Part(1, 1)
CPU = torch.device("cpu")
SIZES = {  # parameters, and buffers that are averaged like them, counted by hand
    "xor": 2 * 8 + 8 + 8 + 1,
    "digits-mlp": 64 * 64 + 64 + 64 * 10 + 10,
    "mnist-mlp": 784 * 100 + 100 + 100 * 10 + 10,
    "mnist-dense": 784 * 128 + 128 + 128 * 10 + 10,
    "mnist-wide": 784 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10,
    "mnist-wide-mse": 784 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10,
    "cifar-cnn": 3 * 9 * 32 + 32 + 4 * 32 + 32 * 9 * 64 + 64 + 4 * 64 + 4096 * 64 + 64 + 64 * 10 + 10,
    "horses-humans": sum(i * 9 * o + o for i, o in ((4, 16), (16, 32), (32, 64), (64, 64), (64, 64)))
    + (3136 * 512 + 512 + 512 * 2 + 2),
    "logistic": 4 * 3 + 3,
    "linear": 4 * 1 + 1,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def stripes(spec: Spec, count: int, seed: int = 0) -> Dataset:
    """Random samples of the model's shape in which the class shows: a bright stripe."""
    rng = np.random.RandomState(seed)
    classes = len(spec.labels)
    shape = picture_shape(spec) or spec.inputs[0].shape[1:]
    targets = np.arange(count, dtype=np.int64) % classes
    inputs = rng.randint(0, 80, (count, *shape)).astype(np.uint8)
    step = shape[0] // classes
    for number, target in enumerate(targets):
        inputs[number, target * step : (target + 1) * step] += 150
    part = Labelled(inputs, targets)
    return Dataset("stripes", part, part, spec.labels)


def trainer_of(spec: Spec, data: Dataset, part: Part = ALL, seed: int = 0) -> LocalTrainer:
    spec, data = prepare(spec, data)
    return LocalTrainer(spec, take_part(data, Rule("iid"), part, seed), network_id=NETWORK, seed=seed)


def train(trainer: LocalTrainer, steps: int) -> float:
    trainer.begin_round()
    for _ in range(steps):
        trainer.step()
    return trainer.end_round()


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_model_is_as_large_as_its_page_says(name: str) -> None:
    spec = load_spec(name)
    if name == "linear":
        part = Labelled(np.zeros((20, 4), dtype=np.float32), np.arange(0, 10, 0.5, dtype=np.float32))
        spec, _ = prepare(spec, Dataset("values", part, part, ()))
    elif name == "logistic":
        spec, _ = prepare(spec, load_source(spec.data))
    assert build_flat(spec, NETWORK, CPU)[1].size == SIZES[name]


@pytest.mark.parametrize("name", ["mnist-dense", "mnist-wide", "mnist-wide-mse", "cifar-cnn"])
def test_picture_models_learn_what_is_easy_and_go_on_after_a_restart(name: str) -> None:
    def make() -> LocalTrainer:
        spec = load_spec(name)
        spec.batch = 16  # type: ignore[misc]  # an attribute of a Classifier
        return trainer_of(spec, data)

    data = stripes(load_spec(name), 200)
    trainer = make()
    for _ in range(3):
        train(trainer, 10)
    assert trainer.evaluate().accuracy > 0.9
    saved, expected = trainer.save(), train(trainer, 2)
    other = make()
    other.restore(saved)
    assert train(other, 2) == expected
    export = trainer.export()
    served = make()
    served.load(export.content)
    assert served.evaluate().accuracy == pytest.approx(export.evaluation.accuracy, abs=0.02)


def test_horses_and_humans_train_from_their_folders(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"horses": 6, "humans": 6}, size=(300, 300))
    fill(tmp_path / "validation", {"horses": 1, "humans": 1}, size=(40, 50))  # any size is scaled
    spec = HorsesHumans()
    spec.batch = 4
    trainer = trainer_of(spec, load_source(f"images:{tmp_path}"))
    assert trainer.sample_counts == {"train": 11, "validation": 1, "test": 2}
    assert np.isfinite(train(trainer, 2)) and 0 <= trainer.evaluate().accuracy <= 1


def test_batch_norm_buffers_are_averaged_like_parameters_and_stay_usable() -> None:
    """What `cifar-cnn` needs of the exchange: running means and variances are part of the vector."""
    spec = CifarCnn()
    spec.batch = 16
    data = stripes(spec, 200)
    peers = [trainer_of(spec, data, Part(number, 2)) for number in (1, 2)]
    for peer in peers:
        train(peer, 6)
    for _ in range(2):
        updates = [peer.snapshot("float32") for peer in peers]
        for peer, update in zip(peers, reversed(updates), strict=True):
            assert peer.merge(update, "float32", 0.5).applied
        for peer in peers:
            train(peer, 3)
    sent = np.frombuffer(peers[0].snapshot("float32"), dtype=np.float32)
    module, buffers = CifarCnn().build(), 2 * (32 + 64)
    assert len(sent) == sum(p.numel() for p in module.parameters()) + buffers
    assert (np.abs(sent[-buffers:]) > 0).all()
    assert min(peer.evaluate().accuracy for peer in peers) > 0.9


def test_channels_come_first_and_standardised() -> None:
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    pixels[1, 3, 4] = (255, 100, 7)
    out = CifarCnn().ingest(pixels)
    assert out.shape == (2, 3, 32, 32) and out.dtype == np.float32 and out.flags.c_contiguous
    expected = (np.array([255, 100, 7]) - CifarCnn.mean) / CifarCnn.scale
    assert np.allclose(out[1, :, 3, 4], expected, atol=1e-5)
    assert np.allclose(CifarCnn().ingest(pixels.astype(np.float32)), out, atol=1e-5)


def test_squared_error_gives_probabilities_and_the_same_layers() -> None:
    assert build_flat(MnistWide(), NETWORK, CPU)[1].size == build_flat(MnistWideMse(), NETWORK, CPU)[1].size
    (answer,) = MnistWideMse().egest(np.array([[0.1, -0.3, 0.7, *[0.0] * 7]], dtype=np.float32))
    assert answer["label"] == "2"
    assert isinstance(answer["probabilities"], list) and sum(map(float, answer["probabilities"])) == pytest.approx(1)  # type: ignore[arg-type]
    loss = MnistWideMse().loss(torch.zeros(4, 10), torch.tensor([0, 1, 2, 3]))
    assert float(loss) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "source, least, epochs", [("iris", 0.9, 20), ("wine", 0.94, 20), ("breast-cancer", 0.95, 10), ("digits", 0.93, 8)]
)
def test_logistic_regression_of_the_shipped_data(source: str, least: float, epochs: int) -> None:
    assert train_central(load_spec("logistic"), load_source(source), epochs=epochs).accuracy >= least


@pytest.mark.parametrize("width", [1, 300, 3000])
def test_linear_regression_of_any_width_does_not_diverge(width: int) -> None:
    rng = np.random.RandomState(width)
    common = rng.normal(size=(200, 1))
    inputs = (1e3 + 50 * (common + 0.1 * rng.normal(size=(200, width)))).astype(np.float32)  # columns alike: the worst
    part = Labelled(inputs, (7 + 3 * common[:, 0]).astype(np.float32))
    trainer = trainer_of(load_spec("linear"), Dataset("wide", part, part, ()))
    train(trainer, 150)
    assert trainer.evaluate().accuracy > 0.9


# The template


@pytest.mark.parametrize("source, least", [("digits", 0.93), ("iris", 0.85), ("breast-cancer", 0.93), ("xor", 0.95)])
def test_the_template_trains_as_it_is(tmp_path: Path, source: str, least: float) -> None:
    data = load_source(source)
    path = tmp_path / "my_model.py"
    path.write_text(write_template(data, "my_model", str(path)))
    spec = load_spec(f"{path}:Spec")
    assert spec.data == source and spec.labels == data.labels and spec.features == data.features
    assert train_central(spec, load_source(spec.data), epochs=15).accuracy >= least
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_the_template_predicts_values_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n" + "".join(f"{n / 100},{3 * n / 100 + 50}\n" for n in range(200)))
    fill(tmp_path / "pictures", {"cat": 10, "dog": 10}, size=(40, 30))
    path = tmp_path / "model.py"
    path.write_text(write_template(load_source(f"csv:{tmp_path / 't.csv'}#y"), "values"))
    spec = load_spec(f"{path}:Spec")
    trainer = trainer_of(spec, load_source(spec.data))
    train(trainer, 300)
    assert trainer.evaluate().accuracy > 0.95
    assert json.loads(answer(trainer.spec, b'{"a": 1.0}', trainer.forward()))["value"] == pytest.approx(53, abs=0.5)
    path.write_text(write_template(load_source(f"images:{tmp_path / 'pictures'}"), "pictures"))
    spec = load_spec(f"{path}:Spec")
    trainer = trainer_of(spec, load_source(spec.data))
    for _ in range(8):
        train(trainer, 5)
    assert trainer.evaluate().accuracy == 1.0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=5, unique=True),
    st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=2, unique=True),
    st.text(max_size=60),
)
def test_no_name_in_the_data_can_become_code(labels: list[str], features: list[str], source: str) -> None:
    part = Labelled(
        np.random.RandomState(0).rand(20, 2).astype(np.float32), np.arange(20, dtype=np.int64) % len(labels)
    )
    text = write_template(Dataset(source, part, part, tuple(labels), tuple(features)), "m", source)
    (spec,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in spec.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert found["labels"] == tuple(labels) and found["features"] == tuple(features) and found["data"] == source
    assert [type(node).__name__ for node in ast.parse(text).body] == [
        "Expr",
        "ImportFrom",
        "ImportFrom",
        "ImportFrom",
        "If",
        "ClassDef",
    ]


@pytest.mark.parametrize(
    "stem, name", [("my_model", "my_model"), ("My Model 2", "my-model-2"), ("__", "my-model"), ("ä" * 9, "my-model")]
)
def test_the_name_of_a_file_becomes_a_name_for_the_network(stem: str, name: str) -> None:
    assert model_name(stem) == name


# Real data


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist-dense", "mnist-wide-mse"])
def test_real_mnist_is_learnt_in_an_eighth_of_an_epoch(mnist_folder: Path, name: str) -> None:
    data = load_source(f"mnist:{mnist_folder}")
    some = Dataset(data.source, data.train, data.test.at(np.arange(2000)), data.labels)
    assert train_central(load_spec(name), some, epochs=0.125).accuracy > 0.8


@pytest.mark.data
def test_real_cifar10_pictures_are_learnt(cifar_folder: Path) -> None:
    spec = CifarCnn()
    spec.batch = 16
    trainer = trainer_of(spec, load_source(f"images:{cifar_folder}"))
    first = train(trainer, 15)
    assert train(trainer, 30) < first < 2.6
    assert trainer.evaluate().accuracy > 0.15


def test_too_many_pictures_for_memory_still_need_a_picture_model(tmp_path: Path) -> None:
    fill(tmp_path, {"0": 10, "1": 10}, size=(5, 7))

    class Flat(DigitsMlp):
        picture = None

    with pytest.raises(UserError, match=r"takes samples of shape \[64\].*input_shape of \(height, width, channels\)"):
        prepare(Flat(), load_source(f"images:{tmp_path}"))
