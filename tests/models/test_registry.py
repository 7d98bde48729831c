from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gossipml.errors import UserError
from gossipml.models.registry import check_model_name, load_spec, model_names
from gossipml.models.spec import Classifier, TensorSpec, check_interface

GOOD = """
from dataclasses import dataclass
from gossipml.models.spec import Classifier

@dataclass
class Extra:
    value: int = 1

class Spec(Classifier):
    name = "mine"
    data = "digits"
    input_shape = (64,)
    labels = tuple("0123456789")

    def build(self):
        import torch
        return torch.nn.Linear(64, 10)
"""


def test_built_in_names() -> None:
    assert {"digits-mlp", "mnist-mlp", "xor"} <= set(model_names())
    for name in ("digits-mlp", "mnist-mlp", "xor"):
        assert load_spec(name).name == name


def test_a_file_of_twenty_lines_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "my_model.py"
    path.write_text(GOOD)
    spec = load_spec(f"{path}:Spec")
    assert (spec.name, spec.batch, spec.inputs) == ("mine", 32, (TensorSpec("input", "FP32", (-1, 64)),))


def test_an_import_path_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gossipml_test_package").mkdir()
    (tmp_path / "gossipml_test_package" / "model.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *sys.path])
    assert load_spec("gossipml_test_package.model:Spec").name == "mine"


@pytest.mark.parametrize(
    "model, says",
    [
        ("digit-mlp", "did you mean 'digits-mlp'"),
        ("resnet", "there are cifar-cnn, digits-mlp, horses-humans"),
        ("", "there is no model ''"),
        ("no_such_file.py:Spec", "there is no file 'no_such_file.py'"),
        ("no_such_file.py:", "names no object after the colon"),
        ("a b:Spec", "is no import path"),
        ("../x:Spec", "is no import path"),
    ],
)
def test_wrong_names_are_refused_without_running_anything(model: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model_name(model)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("class Spec: pass", "lacks build(), ingest(), egest(), loss(), metrics(), optimiser(), name, data, batch"),
        ("class Spce: pass", "has no 'Spec'; did you mean 'Spce'"),
        ("x = (", "SyntaxError"),
        ("raise RuntimeError('boom')", "cannot be loaded: RuntimeError: boom"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("class Spec:\n    def __init__(self, size): pass", "cannot be made without arguments"),
        (GOOD.replace("    def build", "    def make"), "it lacks build()"),
        (GOOD.replace('"mine"', '"My Model"'), "is named 'My Model'"),
        (GOOD.replace("input_shape = (64,)", "input_shape = (0,)"), "shape [-1, 0]"),
        (GOOD.replace('labels = tuple("0123456789")', ""), "shape [-1, 0]"),
        (GOOD + "    batch = 0", "batch is 0"),
        (GOOD + "    features = ('a', 'b')", "2 feature names for 64 input values"),
    ],
)
def test_a_file_without_the_interface_says_what_is_missing(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_spec(f"{path}:Spec")
    assert says in str(caught.value)


def test_a_wrong_datatype_names_the_right_ones() -> None:
    class Odd(Classifier):
        name = "odd"
        outputs = (TensorSpec("x", "FLOAT", (-1, 2)),)
        input_shape = (2,)

        def build(self) -> object:  # type: ignore[override]
            return None

    with pytest.raises(UserError, match="datatype 'FLOAT'; use one of BOOL"):
        check_interface(Odd, "odd")
