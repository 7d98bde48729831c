"""`gossipml data` and `gossipml models new`, as their user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossipml.models.registry import load_spec
from tests.cli.test_commands import Cli, cli

__all__ = ["cli"]  # the fixture


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    path = tmp_path / "trees.csv"
    path.write_text("width,height,kind\n" + "".join(f"{n}.5,{n * n},{('oak', 'elm')[n % 2]}\n" for n in range(40)))
    return path


def test_list_shows_every_source_and_rule(cli: Cli) -> None:
    status, out, _ = cli("data", "list")
    assert status == 0
    for form in ("digits", "mnist:DIR", "images:DIR", "csv:FILE#LABEL", "parquet:FILE#LABEL", "shards:K"):
        assert form in out
    status, out, _ = cli("data", "list", "--json")
    listed = json.loads(out)
    assert {"source": "npz:FILE", "about": listed["sources"][-2]["about"]} == listed["sources"][-2]
    assert listed["rules"] == ["iid", "dirichlet:ALPHA", "labels:K", "shards:K"]


def test_info_shows_classes_columns_and_models_that_fit(cli: Cli, trees: Path) -> None:
    source = f"csv:{trees}#kind"
    status, out, _ = cli("data", "info", source)
    assert status == 0
    assert "32 samples to train on, 8 for testing" in out and "elm" in out and "height" in out
    assert "models that train on it: logistic" in out
    _, out, _ = cli("data", "info", source, "--json")
    found = json.loads(out)
    assert found["classes"] == [{"name": "elm", "train": 16, "test": 4}, {"name": "oak", "train": 16, "test": 4}]
    assert [column["name"] for column in found["features"]] == ["width", "height"]
    assert (found["shape"], found["dtype"], found["streamed"]) == ([2], "float32", False)


def test_info_of_values_names_linear(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "".join(f"{n},{n / 4}\n" for n in range(40)))
    status, out, _ = cli("data", "info", f"csv:{path}#y")
    assert status == 0 and "values to predict: mean" in out and "models that train on it: linear\n" in out


def test_split_writes_sources(cli: Cli, tmp_path: Path) -> None:
    arguments = ("data", "split", "digits", "--rule", "labels:4", "--parts", "3", "--out")
    status, out, _ = cli(*arguments, str(tmp_path / "a"))
    assert status == 0 and f"npz:{tmp_path}/a/part-2-of-3.npz" in out
    status, out, _ = cli(*arguments, str(tmp_path / "b"), "--json")
    parts = json.loads(out)
    assert [part["source"] for part in parts] == [f"npz:{tmp_path}/b/part-{n}-of-3.npz" for n in (1, 2, 3)]
    assert all(sum(count > 0 for count in part["classes"].values()) <= 4 for part in parts)
    status, out, _ = cli("data", "info", parts[0]["source"], "--json")
    assert json.loads(out)["train"] == parts[0]["samples"]


def test_wrong_data_commands_are_one_sentence(cli: Cli, trees: Path, tmp_path: Path) -> None:
    assert "there is no data source 'digit'; did you mean 'digits'" in cli.fails("data", "info", "digit")
    assert "not a number" in cli.fails("data", "info", f"csv:{trees}#height")
    split = ("data", "split", "digits", "--out", str(tmp_path / "parts"))
    assert "did you mean 'dirichlet:ALPHA'" in cli.fails(*split, "--rule", "dirichelt:1", "--parts", "2")
    assert "there can be 1 to 100000 parts, not 0" in cli.fails(*split, "--rule", "iid", "--parts", "0")
    assert "cannot be divided into 999 parts" in cli.fails(*split, "--rule", "iid", "--parts", "999")
    assert not (tmp_path / "parts").exists()
    assert cli("data", "split", "digits")[0] == 2


def test_a_new_model_file_is_a_model(cli: Cli, tmp_path: Path, trees: Path) -> None:
    path = tmp_path / "tree_model.py"
    status, out, _ = cli("models", "new", str(path), "--data", f"csv:{trees}#kind")
    assert status == 0 and f"gossipml peer start --model {path}:Spec" in out
    spec = load_spec(f"{path}:Spec")
    assert (spec.name, spec.labels, spec.features) == ("tree_model", ("elm", "oak"), ("width", "height"))
    before = path.read_text()
    assert "is there already" in cli.fails("models", "new", str(path))
    assert path.read_text() == before
    assert cli("models", "new", str(path), "--force")[0] == 0
    assert load_spec(f"{path}:Spec").data == "digits"
    assert "give it a name that ends with .py" in cli.fails("models", "new", str(tmp_path / "model.txt"))
    assert "cannot write" in cli.fails("models", "new", str(tmp_path / "no" / "model.py"))


def test_every_data_command_has_help_with_an_example(cli: Cli) -> None:
    for command in (("data", "list"), ("data", "info"), ("data", "split"), ("models", "new")):
        status, out, _ = cli(*command, "--help")
        assert status == 0 and "Example: gossipml" in " ".join(out.split())
