from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gossipml.errors import UserError
from gossipml.models.builtin import DigitsMlp, MnistMlp, Xor
from gossipml.models.data import Dataset, check_fit, load_source, source_names, sources
from gossipml.models.idx import read_idx


def idx(values: np.ndarray, *, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small MNIST: 20 and 10 images."""
    for part, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count * 784).reshape(count, 28, 28).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10))
        )
    return tmp_path


def test_digits_has_a_fixed_stratified_test_part(digits: Dataset) -> None:
    assert len(digits.train) + len(digits.test) == 1797
    counts = np.bincount(digits.test.targets)
    assert counts.min() >= 35 and counts.max() <= 37
    assert digits.train.inputs[:].max() == 16
    assert np.array_equal(load_source("digits").test.inputs[:], digits.test.inputs[:])


def test_xor_tests_on_the_four_corners() -> None:
    data = load_source("xor")
    assert data.test.inputs[:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert data.test.targets.tolist() == [0, 1, 1, 0]
    assert ((data.train.inputs[:] > 0.5).sum(1) % 2 == data.train.targets).mean() > 0.99


def test_loading_imports_neither_sklearn_nor_torch() -> None:
    code = (
        "import sys; from gossipml.models import data, registry, encoding, partition, merging, predict\n"
        "data.load_source('digits'); registry.check_model_name('digits-mlp'); registry.load_spec('xor')\n"
        "assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_idx_files_are_read_gzipped_or_not(folder: Path) -> None:
    data = load_source(f"mnist:{folder}")
    assert data.train.inputs.shape == (20, 28, 28) and data.test.inputs.shape == (10, 28, 28)
    assert data.train.inputs[0, 0, 5] == 5
    assert data.train.targets.tolist() == [*range(10), *range(10)]


@pytest.mark.data
def test_real_mnist_is_whole(mnist_folder: Path) -> None:
    data = load_source(f"mnist:{mnist_folder}")
    assert data.train.inputs.shape == (60000, 28, 28) and data.test.inputs.shape == (10000, 28, 28)
    assert np.bincount(data.test.targets).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


IMAGES = idx(np.zeros((20, 28, 28), dtype=np.uint8))
LABELS = idx(np.zeros(20, dtype=np.uint8))


@pytest.mark.parametrize(
    "name, content, says",
    [
        (
            "train-images-idx3-ubyte",
            b"label,1x1,1x2\n5,0,0\n",
            "begins with b'label,1x' and looks like text, perhaps CSV",
        ),
        ("train-images-idx3-ubyte", b"\x89PNG\r\n\x1a\n" * 9, "is not an IDX file"),
        ("train-images-idx3-ubyte", b"", "is not an IDX file"),
        ("train-images-idx3-ubyte", IMAGES[:9], "cut off in its header after 9 bytes"),
        ("train-images-idx3-ubyte", IMAGES[:-1], f"has {len(IMAGES) - 1} bytes, its header says {len(IMAGES)}"),
        ("train-images-idx3-ubyte", IMAGES + b"\0", f"has {len(IMAGES) + 1} bytes, its header says {len(IMAGES)}"),
        ("train-images-idx3-ubyte", gzip.compress(IMAGES)[:-30], "gzip data ends early"),
        ("train-images-idx3-ubyte", gzip.compress(IMAGES[:-5]), "15675 of 15680 values"),
        ("train-images-idx3-ubyte", gzip.compress(IMAGES + b"x"), "goes on after its 15680 values"),
        ("train-images-idx3-ubyte", b"\x1f\x8bgarbage that is no gzip", "damaged gzip"),
        ("train-images-idx3-ubyte", LABELS + bytes(20), "1 dimensions instead of 3"),
        ("train-images-idx3-ubyte", b"\0\0\x0d" + IMAGES[3:], "IDX type 0x0d"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12 + bytes(9), "over the limit of"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 8, 8), dtype=np.uint8)), "images of 8x8, not 28x28"),
        ("train-images-idx3-ubyte", idx(np.zeros((19, 28, 28), dtype=np.uint8)), "has 19 images"),
        ("train-labels-idx1-ubyte", idx(np.full(20, 10, dtype=np.uint8)), "holds the label 10, over 9"),
        ("train-labels-idx1-ubyte", IMAGES, "3 dimensions instead of 1"),
    ],
)
def test_malformed_idx_files_are_refused(folder: Path, name: str, content: bytes, says: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_source(f"mnist:{folder}")
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "fetch the file again" in str(caught.value)


def test_a_damaged_gzip_body_is_refused(folder: Path) -> None:
    packed = bytearray(gzip.compress(IMAGES, compresslevel=0))
    packed[len(packed) // 2] ^= 0xFF  # the checksum at the end does not fit
    (folder / "bad").write_bytes(packed)
    with pytest.raises(UserError, match="damaged gzip"):
        read_idx(folder / "bad", 3)


@pytest.mark.parametrize(
    "source, says",
    [
        ("digit", "did you mean 'digits'"),
        ("minst:/data", "did you mean 'mnist:DIR'"),
        ("mnist", "names no folder; write mnist:DIR"),
        ("mnist:", "names no folder"),
        ("mnist:/no/such/folder", "does not exist"),
        ("digits:3", "takes nothing after a colon"),
        ("cvs:x.csv#y", "did you mean 'csv:FILE#LABEL'"),
        ("breast_cancer", "did you mean 'breast-cancer'"),
        ("csv:", "names no file; write csv:FILE#LABEL"),
        ("csv:x.csv", "names no column of labels; write csv:FILE#LABEL, as in csv:x.csv#label"),
        ("csv:x.csv#", "names no column of labels"),
        ("csv:/no/such.csv#y", "the file '/no/such.csv' of the data source 'csv' does not exist"),
        ("npz:/", "is a folder, not a file; write npz:FILE"),
        ("images:/no/such", "the folder '/no/such' of the data source 'images' does not exist"),
        ("", "there is no data source ''"),
    ],
)
def test_unknown_sources_name_the_right_ones(source: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_source(source)
    assert says in str(caught.value)


def test_every_kind_of_source_is_listed_with_its_form() -> None:
    forms = [each.form for each in sources()]
    assert forms == [
        *("digits", "iris", "wine", "breast-cancer", "xor", "mnist:DIR", "cifar10:DIR", "images:DIR"),
        *("csv:FILE#LABEL", "npz:FILE", "parquet:FILE#LABEL"),
    ]
    assert source_names() == sorted(form.partition(":")[0] for form in forms)


def test_a_hash_in_the_name_of_a_file_is_not_its_label(tmp_path: Path) -> None:
    path = tmp_path / "day#1.csv"
    path.write_text("x,y\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(20)))
    assert load_source(f"csv:{path}#y").labels == ("a", "b")


def test_a_folder_without_the_files_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is empty"):
        load_source(f"mnist:{tmp_path}")
    (tmp_path / "train.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte \(or .gz\).*it holds train.csv"):
        load_source(f"mnist:{tmp_path}")
    with pytest.raises(UserError, match="is a file, not a folder"):
        load_source(f"mnist:{tmp_path / 'train.csv'}")


def test_a_model_refuses_data_of_another_shape(digits: Dataset) -> None:
    check_fit(DigitsMlp(), digits)
    with pytest.raises(UserError, match=r"'mnist-mlp'.*'digits'.*choose another --data or --model"):
        check_fit(MnistMlp(), digits)
    with pytest.raises(UserError, match="'xor'"):
        check_fit(Xor(), digits)
