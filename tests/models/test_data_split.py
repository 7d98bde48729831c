from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gossipml.errors import UserError
from gossipml.models import sources_table
from gossipml.models.builtin_tables import Linear
from gossipml.models.data import Dataset, load_source, prepare, take_part
from gossipml.models.data_split import write_parts
from gossipml.models.partition import Part, Rule, part_indices
from tests.models.pictures import fill


@pytest.mark.parametrize("rule", [Rule("iid"), Rule("dirichlet", 0.3), Rule("labels", 3), Rule("shards", 2)])
def test_a_written_part_is_the_part_that_a_peer_would_take(tmp_path: Path, digits: Dataset, rule: Rule) -> None:
    written = write_parts(digits, rule, 4, 5, tmp_path / "parts")
    assert [part.source for part in written] == [f"npz:{tmp_path}/parts/part-{n}-of-4.npz" for n in range(1, 5)]
    for number, part in enumerate(written, 1):
        mine = part_indices(digits.train.targets, 10, rule, Part(number, 4), 5)
        data = load_source(part.source)
        assert np.array_equal(data.train.inputs[:], digits.train.inputs[mine])
        assert np.array_equal(data.train.targets, digits.train.targets[mine])
        assert np.array_equal(data.test.inputs[:], digits.test.inputs[:])
        assert data.labels == digits.labels
        assert part.samples == len(mine)
        assert part.counts == tuple(np.bincount(digits.train.targets[mine], minlength=10))


def test_the_same_split_gives_the_same_bytes(tmp_path: Path) -> None:
    iris = load_source("iris")
    for name in ("one", "other"):
        write_parts(iris, Rule("dirichlet", 0.5), 3, 7, tmp_path / name)
    for number in range(1, 4):
        name = f"part-{number}-of-3.npz"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert load_source(f"npz:{tmp_path}/one/part-1-of-3.npz").features == iris.features


def test_values_are_split_and_train(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{n},{n * 0.5}\n" for n in range(100)))
    data = load_source(f"csv:{tmp_path / 't.csv'}#y")
    for rule in (Rule("iid"), Rule("shards", 1)):
        written = write_parts(data, rule, 2, 0, tmp_path / rule.kind)
        part = load_source(written[0].source)
        assert part.labels == () and part.train.targets.dtype == np.float32 and written[0].counts == ()
        prepare(Linear(), part)
    with pytest.raises(UserError, match="dirichlet divides by class, and these targets are values; use iid"):
        write_parts(data, Rule("dirichlet", 1.0), 2, 0, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_table_in_a_file_is_split_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(100)))
    expected = load_source(f"csv:{tmp_path / 't.csv'}#y")
    monkeypatch.setattr(sources_table, "IN_MEMORY", 10)
    monkeypatch.setattr("gossipml.models.data_split.CHUNK_BYTES", 40)
    (part,) = write_parts(load_source(f"csv:{tmp_path / 't.csv'}#y"), Rule("iid"), 1, 0, tmp_path / "parts")
    assert np.array_equal(load_source(part.source).train.inputs[:], expected.train.inputs[:])


def test_pictures_are_linked_into_folders_that_keep_every_class(tmp_path: Path) -> None:
    source = fill(tmp_path / "all", {"cat": 25, "dog": 25, "fox": 25})
    data = load_source(f"images:{source}")
    written = write_parts(data, Rule("labels", 1), 3, 0, tmp_path / "parts")
    for number, part in enumerate(written, 1):
        assert part.source == f"images:{tmp_path}/parts/part-{number}-of-3"
        mine = load_source(part.source)
        assert mine.labels == ("cat", "dog", "fox") and len(np.unique(mine.train.targets)) == 1
        local = take_part(data, Rule("labels", 1), Part(number, 3), 0)
        assert len(mine.train) == len(local.train) + len(local.validation)
        assert np.array_equal(mine.test.inputs[:], data.test.inputs[:])
    first = next((tmp_path / "parts" / "part-1-of-3" / "test" / "cat").iterdir())
    assert os.path.samefile(first, source / "cat" / first.name)


def test_without_links_pictures_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    data = load_source(f"images:{fill(tmp_path / 'all', {'cat': 20, 'dog': 20})}")
    monkeypatch.setattr("os.link", no_links)
    (part,) = write_parts(data, Rule("iid"), 1, 0, tmp_path / "parts")
    assert np.array_equal(load_source(part.source).train.inputs[:], data.train.inputs[:])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, digits: Dataset) -> None:
    (tmp_path / "mine").write_text("precious")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="is there already and not an empty folder"):
            write_parts(digits, Rule("iid"), 2, 0, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_part_that_cannot_be_written_leaves_no_half_of_it(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array_header_2_0", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_parts(digits, Rule("iid"), 2, 0, tmp_path / "parts")
    assert list((tmp_path / "parts").iterdir()) == []
