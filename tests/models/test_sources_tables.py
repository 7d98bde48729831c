"""Tables: CSV, numpy archives, Parquet, and what they have in common."""

from __future__ import annotations

import gzip
import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models import sources_npz, sources_table
from gossipml.models.data import load_source, prepare, take_part
from gossipml.models.dataset import FileRows, is_stream
from gossipml.models.partition import Part, Rule
from gossipml.models.registry import load_spec
from gossipml.models.sources_table import held_out

HEAD = "width,height,kind\n"
ROWS = "".join(f"{n}.5,{n * n},{('oak', 'elm')[n % 2]}\n" for n in range(20))


def csv(folder: Path, text: str | bytes, name: str = "trees.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(source: str) -> str:
    """What is said when the source is refused."""
    with pytest.raises(UserError) as caught:
        load_source(source)
    return str(caught.value)


# CSV


def test_a_csv_file_gives_rows_classes_and_names(tmp_path: Path) -> None:
    data = load_source(f"csv:{csv(tmp_path, HEAD + ROWS)}#kind")
    assert data.labels == ("elm", "oak") and data.features == ("width", "height")
    assert len(data.train) == 16 and len(data.test) == 4
    assert np.bincount(data.test.targets).tolist() == [2, 2]
    for part in (data.train, data.test):
        for (width, height), target in zip(part.inputs[:], part.targets, strict=True):
            assert height == (width - 0.5) ** 2
            assert data.labels[target] == ("oak", "elm")[int(width) % 2]


@pytest.mark.parametrize(
    "text, label",
    [
        (HEAD + ROWS, "3"),
        (ROWS, "3"),
        ((HEAD + ROWS).replace(",", ";"), "kind"),
        ((HEAD + ROWS).replace(",", "\t"), "kind"),
        ("\ufeff" + (HEAD + ROWS).replace("\n", "\r\n"), "kind"),
        (HEAD + ROWS.replace("\n", "\n\n"), "kind"),
        (HEAD + ROWS.replace("oak", '"oak"'), "kind"),
        (gzip.compress((HEAD + ROWS).encode()), "kind"),
    ],
    ids=["by number", "no names", "semicolons", "tabs", "as Excel writes it", "empty lines", "quotes", "gzip"],
)
def test_every_usual_way_of_writing_gives_the_same(tmp_path: Path, text: str | bytes, label: str) -> None:
    expected = load_source(f"csv:{csv(tmp_path, HEAD + ROWS, 'expected.csv')}#kind")
    data = load_source(f"csv:{csv(tmp_path, text)}#{label}")
    assert np.array_equal(data.train.inputs[:], expected.train.inputs[:])
    assert np.array_equal(data.test.targets, expected.test.targets)
    assert data.labels == expected.labels


@pytest.mark.parametrize(
    "text, label, says",
    [
        ("", "kind", "is empty"),
        (HEAD, "kind", "holds 0 samples; gossipml needs 10"),
        (HEAD + ROWS[:30], "kind", "samples; gossipml needs 10"),
        (HEAD + ROWS, "knid", "has no column 'knid'; did you mean 'kind'"),
        (HEAD + ROWS, "4", "has 3 columns; there is no column 4"),
        ("kind\n" + "oak\n" * 20, "kind", "has no column beside the label"),
        (HEAD + ROWS.replace("\n1.5", "\n"), "kind", "line 3: the value of 'width' is missing"),
        (HEAD + ROWS.replace("\n1.5", "\nnan"), "kind", "line 3: the value of 'width' is missing"),
        (HEAD + ROWS.replace("1.5", "1e99"), "kind", "line 3: the value of 'width' is 1e+99"),
        (HEAD + ROWS.replace("1.5", "tall"), "kind", "line 3: the value of 'width' is 'tall', not a number"),
        (HEAD + "\n" + ROWS.replace("\n2.5", "\ninf"), "kind", "line 5: the value of 'width' is inf"),
        (HEAD + ROWS.replace("elm", "", 1), "kind", "no label in line 3 ('')"),
        (HEAD + ROWS.replace("elm", "NaN", 1), "kind", "no label in line 3 ('NaN')"),
        (HEAD + ROWS.replace("elm", "?", 1), "kind", "no label in line 3 ('?')"),
        (HEAD + ROWS + "1,2\n", "kind", "line 22 has 2 values, the first line 3"),
        ("a,a,kind\n" + ROWS, "kind", "the name 'a' twice"),
        ("a,,kind\n" + ROWS, "kind", "no name for column 2"),
        ("a,\x1b[31m,kind\n" + ROWS, "kind", r"the name '\x1b[31m'"),
        (HEAD + ROWS.replace("oak", "oak\x07"), "kind", r"the name 'oak\x07'"),
        (HEAD + '1,2,"oak\n', "kind", "is not CSV"),
        ((HEAD + ROWS).encode("utf-16"), "kind", "zero byte, so it is no text"),
        (b"a,b,kind\n1,2,\xff\n", "kind", "not text in UTF-8"),
        (b"PK\x03\x04\x00\x00", "kind", "zero byte"),
        (gzip.compress((HEAD + ROWS).encode())[:-9], "kind", "damaged or cut off gzip"),
        ("id,v\n" + "".join(f"row{n},1\n" for n in range(1200)), "id", "over 1000 different labels, such as 'row0'"),
    ],
)
def test_malformed_csv_files_are_refused(tmp_path: Path, text: str | bytes, label: str, says: str) -> None:
    path = csv(tmp_path, text)
    message = refused(f"csv:{path}#{label}")
    assert says in message and str(path) in message


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossipml.models.sources_csv.MAX_LINE", 1000)
    assert "line 2 is longer than 1000 bytes" in refused(f"csv:{csv(tmp_path, HEAD + '1,' * 5000)}#kind")
    bomb = gzip.compress(b"a,b\n" + b"1" * 50_000_000)
    assert len(bomb) < 100_000
    assert "is longer than" in refused(f"csv:{csv(tmp_path, bomb)}#b")


def test_whole_numbers_are_classes_when_few_and_others_are_values(tmp_path: Path) -> None:
    few = load_source(
        f"csv:{csv(tmp_path, 'x,y' + chr(10) + ''.join(f'{n},{n % 3 + 7}.0{chr(10)}' for n in range(30)))}#y"
    )
    assert few.labels == ("7", "8", "9") and few.train.targets.dtype == np.int64
    values = load_source(
        f"csv:{csv(tmp_path, 'x,y' + chr(10) + ''.join(f'{n},{n / 4}{chr(10)}' for n in range(30)))}#y"
    )
    assert values.labels == () and values.train.targets.dtype == np.float32
    assert np.array_equal(values.train.targets, values.train.inputs[:][:, 0] / 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=10, max_size=300))
def test_the_test_part_is_a_fifth_of_each_class_and_the_same_every_time(labels: list[int]) -> None:
    targets = np.unique(np.array(labels), return_inverse=True)[1].astype(np.int64)
    test = held_out(targets)
    assert np.array_equal(test, held_out(targets))
    assert test.any() and not test.all()
    if len(np.unique(targets)) < len(targets):
        for label in np.unique(targets):
            members = test[targets == label]
            assert members.sum() == (max(1, len(members) // 5) if len(members) > 1 else 0)


def test_a_large_set_keeps_its_test_part_small() -> None:
    targets = np.arange(200_000, dtype=np.int64) % 7
    assert 9_980 <= held_out(targets).sum() <= sources_table.MAX_TEST


# Tables larger than memory


def test_a_table_that_does_not_fit_lies_in_a_file_and_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"csv:{csv(tmp_path, HEAD + ROWS)}#kind"
    expected = load_source(source)
    monkeypatch.setattr(sources_table, "IN_MEMORY", 50)
    data = load_source(source)
    assert isinstance(data.train.inputs, FileRows) and not is_stream(expected.train.inputs)
    assert np.array_equal(data.train.inputs[:], expected.train.inputs[:])
    assert np.array_equal(data.test.inputs[np.array([2, 0])], expected.test.inputs[np.array([2, 0])])
    local, same = (take_part(each, Rule("iid"), Part(1, 1), 3) for each in (data, expected))
    assert isinstance(local.train.inputs, FileRows)
    assert np.array_equal(local.train.inputs[:], same.train.inputs[:])
    assert np.array_equal(local.validation.inputs[0], same.validation.inputs[0])


def test_a_full_disk_is_said_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_table, "IN_MEMORY", 50)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "No space left on device); free some space there, or set TMPDIR" in refused(
        f"csv:{csv(tmp_path, HEAD + ROWS)}#kind"
    )


# numpy


def npz(folder: Path, **arrays: Any) -> str:  # Any: whatever numpy takes
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


X = np.random.RandomState(0).rand(20, 3).astype(np.float32)
Y = np.arange(20) % 2


def test_the_usual_names_of_arrays_are_found(tmp_path: Path) -> None:
    keras = load_source(npz(tmp_path, x_train=X, y_train=Y, x_test=X[:4] + 1, y_test=Y[:4]))
    assert np.array_equal(keras.train.inputs[:], X) and np.array_equal(keras.test.inputs[:], X[:4] + 1)
    assert keras.labels == ("0", "1")
    images = np.zeros((20, 5, 5), dtype=np.uint8)
    medical = load_source(
        npz(tmp_path, train_images=images, train_labels=Y[:, None], test_images=images, test_labels=Y[:, None])
    )
    assert medical.train.inputs.shape == (20, 5, 5) and medical.train.targets.tolist() == Y.tolist()
    pair = load_source(npz(tmp_path, X=X, y=np.array(["b", "a"])[Y]))
    assert len(pair.train) + len(pair.test) == 20 and pair.labels == ("a", "b")
    values = load_source(npz(tmp_path, x=X[:, 0], y=X[:, 1]))
    assert values.labels == () and values.train.inputs.shape == (16, 1)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "float16", "float64", ">f8", "bool"])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_of_number_is_read(tmp_path: Path, dtype: str, compressed: bool) -> None:
    x = (np.arange(60).reshape(20, 3) % 2).astype(dtype)
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, x_train=x, y_train=Y, x_test=np.asfortranarray(x), y_test=Y)
    data = load_source(f"npz:{path}")
    assert np.array_equal(data.train.inputs[:], x) and np.array_equal(data.test.inputs[:], x)
    assert data.train.inputs.dtype.isnative


def test_a_large_plain_array_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_npz, "IN_MEMORY", 100)
    x = np.asfortranarray(X)
    data = load_source(npz(tmp_path, x_train=X, y_train=Y, x_test=x, y_test=Y))
    assert isinstance(data.train.inputs, FileRows) and isinstance(data.test.inputs, FileRows)
    assert np.array_equal(data.train.inputs[:], X) and np.array_equal(data.test.inputs[3:5], X[3:5])


def repacked(path: Path, name: str, content: bytes) -> str:
    """The archive with one member's bytes replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return f"npz:{path}"


def npy(array: Any) -> bytes:  # Any: whatever numpy takes
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), allow_pickle=True)
    return out.getvalue()


BAD_HEADER = b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 9999 + b"\n"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x_train.npy", npy(np.array([object()] * 20)), "Python objects, which would be unpickled"),
        ("y_train.npy", npy(np.array([{}] * 20)), "Python objects, which would be unpickled"),
        ("x_train.npy", npy(X)[:-1], "bytes, its header says"),
        ("x_train.npy", npy(X) + b"\0", "bytes, its header says"),
        ("x_train.npy", npy(X).replace(b"(20, 3), }         ", b"(2000000000, 3), } "), "its header says 24000000"),
        ("x_train.npy", b"\x80\x04cos\nsystem\n", "is no .npy array"),
        ("x_train.npy", BAD_HEADER, "is no .npy array"),
        ("x_train.npy", npy(X[:5]), "has 5 samples in 'x_train' and 20 labels in 'y_train'"),
        ("x_train.npy", npy(X[:, :2]), "of shape [2] to train on and of [3] for testing"),
        ("x_train.npy", npy(X.astype(np.complex64)), "values of type complex64"),
        ("x_train.npy", npy(np.array(["a"] * 20)), "not numbers in rows"),
        ("x_train.npy", npy(np.where(X > 0.9, np.nan, X)), "missing or infinite in sample"),
        ("y_train.npy", npy(np.where(Y, np.nan, 1.0)), "which is no label"),
        ("y_train.npy", npy(np.array(["cat", ""] * 10)), "no label in row 2"),
        ("y_train.npy", npy(np.eye(20, 2)), "give one label a sample (for one-hot: argmax)"),
        ("label_names.npy", npy(np.array(["only"])), "does not fit the 1 label_names"),
        ("label_names.npy", npy(np.array(["same", "same"])), "the name 'same' twice"),
        ("feature_names.npy", npy(np.array([1, 2, 3])), "is no list of names"),
    ],
)
def test_malformed_arrays_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    npz(tmp_path, x_train=X, y_train=Y, x_test=X, y_test=Y)
    message = refused(repacked(tmp_path / "data.npz", name, content))
    assert says in message and "data.npz" in message


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    source = npz(tmp_path, a=X, b=Y)
    assert "holds the arrays (none); name the arrays x_train" in refused(source)
    path.write_bytes(b"no archive")
    assert "is not a whole .npz file" in refused(source)
    npz(tmp_path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-30])
    assert "is not a whole .npz file" in refused(source)
    npz(tmp_path, x=X[:4], y=Y[:4])
    assert "holds 4 samples; gossipml needs 10" in refused(source)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(70):
            archive.writestr(f"{number}.npy", b"")
    assert "holds 70 arrays, over 64" in refused(source)


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    source = npz(tmp_path, x=X, y=Y)
    path = tmp_path / "data.npz"
    whole = bytearray(path.read_bytes())
    whole[whole.index(X.tobytes()) + 7] ^= 1
    path.write_bytes(whole)
    assert "Bad CRC-32" in refused(source)


def test_a_compressed_bomb_is_refused_before_it_unfolds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_npz, "MAX_PACKED", 1 << 20)
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((20, 1 << 16)), y=Y)
    assert "write it without compression (numpy.savez)" in refused(f"npz:{tmp_path / 'data.npz'}")


# Parquet


def parquet(folder: Path, columns: dict[str, Any], name: str = "table.parquet") -> Path:  # Any: pyarrow's columns
    pyarrow = pytest.importorskip("pyarrow", reason="the extra gossipml[parquet] is not installed")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table(columns), folder / name, row_group_size=7)
    return folder / name


def test_a_parquet_file_gives_what_the_csv_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "width": [n + 0.5 for n in range(20)],
        "height": [n * n for n in range(20)],
        "kind": [("oak", "elm")[n % 2] for n in range(20)],
    }
    expected = load_source(f"csv:{csv(tmp_path, HEAD + ROWS)}#kind")
    source = f"parquet:{parquet(tmp_path, columns)}#kind"
    for limit in (sources_table.IN_MEMORY, 50):
        monkeypatch.setattr(sources_table, "IN_MEMORY", limit)
        data = load_source(source)
        assert np.array_equal(data.train.inputs[:], expected.train.inputs[:])
        assert np.array_equal(data.train.targets, expected.train.targets)
        assert (data.labels, data.features) == (expected.labels, expected.features)


def test_malformed_parquet_files_are_refused(tmp_path: Path) -> None:
    numbers = [float(n) for n in range(20)]
    names = ["oak", "elm"] * 10
    path = parquet(tmp_path, {"a": [*numbers[:6], None, *numbers[7:]], "kind": names})
    assert "row 7: the value of 'a' is missing" in refused(f"parquet:{path}#kind")
    parquet(tmp_path, {"a": numbers, "kind": [*names[:-1], None]})
    assert "no label in row 20" in refused(f"parquet:{path}#kind")
    assert "has no column 'knd'; did you mean 'kind'" in refused(f"parquet:{path}#knd")
    parquet(tmp_path, {"a": names, "kind": names})
    assert "the column 'a' holds string, not numbers" in refused(f"parquet:{path}#kind")
    parquet(tmp_path, {"a": numbers, "kind": [[1]] * 20})
    assert "the label column 'kind' holds list" in refused(f"parquet:{path}#kind")
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", whole[:-20], b"x" * 500):
        path.write_bytes(broken)
        assert "cannot be read as Parquet" in refused(f"parquet:{path}#kind")


def test_without_pyarrow_parquet_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv(tmp_path, "", "table.parquet")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else found(name))
    assert "pip install 'gossipml[parquet]'" in refused(f"parquet:{path}#kind")


# The shipped ones, and a model of any width


@pytest.mark.parametrize(
    "name, samples, width, classes", [("iris", 150, 4, 3), ("wine", 178, 13, 3), ("breast-cancer", 569, 30, 2)]
)
def test_the_shipped_tables_have_names_and_a_stratified_test_part(
    name: str, samples: int, width: int, classes: int
) -> None:
    data = load_source(name)
    assert len(data.train) + len(data.test) == samples
    assert data.train.inputs.shape[1:] == (width,) and len(data.features) == width
    assert data.classes == classes and min(np.bincount(data.test.targets)) >= 8
    spec, _ = prepare(load_spec("logistic"), data)
    assert spec.features == data.features and spec.labels == data.labels
