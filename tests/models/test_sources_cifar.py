"""CIFAR-10 as its author distributes it, and pickles that are something else."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossipml.errors import UserError
from gossipml.models import sources_cifar_python
from gossipml.models.data import load_source
from gossipml.models.sources_cifar import CLASSES, TEST, TRAIN
from gossipml.models.sources_cifar_python import Pixels, read_batch

COUNT = 300  # pictures a batch: more than one run of APPENDS, and memo numbers of both sizes


def pictures(seed: int, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3072) as the files have them, channel after channel, and labels."""
    rng = np.random.RandomState(seed)
    return rng.randint(0, 256, (count, 3072)).astype(np.uint8), np.arange(count) % 10


def python_batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """The bytes that cPickle of Python 2 wrote for a batch, protocol 2: instruction for instruction as in
    `pickletools.dis` of data_batch_1."""
    puts = 0

    def put() -> bytes:
        nonlocal puts
        puts += 1
        return b"q" + bytes([puts]) if puts < 256 else b"r" + struct.pack("<I", puts)

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value + put()

    def items(values: list[bytes]) -> bytes:
        runs = [values[start : start + 1000] for start in range(0, len(values), 1000)]
        return b"]" + put() + b"".join(b"(" + b"".join(run) + b"e" for run in runs)

    rows, columns = pixels.shape
    out = b"\x80\x02}" + put() + b"("
    out += text(b"batch_label") + text(b"training batch 1 of 5")
    out += text(b"labels") + items([b"K" + bytes([label]) for label in labels])
    out += text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
    out += b"K\x00\x85" + put() + b"U\x01b" + put() + b"\x87" + put() + b"R" + put()
    out += b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86" + put()
    out += b"cnumpy\ndtype\n" + put() + b"U\x02u1" + put() + b"K\x00K\x01\x87" + put() + b"R" + put()
    out += b"(K\x03U\x01|" + put() + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + put() + b"b\x89"
    out += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + put() + b"t" + put() + b"b"
    out += text(b"filenames") + items([text(b"camion_s_%06d.png" % number) for number in range(rows)])
    return out + b"u."


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    for seed, name in enumerate((*TRAIN, *TEST)):
        pixels, labels = pictures(seed)
        (tmp_path / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())
    return tmp_path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    folder = tmp_path / "python"
    folder.mkdir()
    for seed, name in enumerate((*TRAIN, *TEST)):
        (folder / name).write_bytes(python_batch(*pictures(seed)))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_source(f"cifar10:{folder}")
    return str(caught.value)


def test_the_binary_version_is_read(binary: Path) -> None:
    data = load_source(f"cifar10:{binary}")
    assert data.labels == CLASSES
    assert data.train.inputs.shape == (5 * COUNT, 32, 32, 3) and data.test.inputs.shape == (COUNT, 32, 32, 3)
    pixels, labels = pictures(1)
    assert data.train.targets[COUNT : 2 * COUNT].tolist() == labels.tolist()
    red, green, blue = pixels[7].reshape(3, 32, 32)
    assert np.array_equal(data.train.inputs[COUNT + 7], np.stack([red, green, blue], axis=-1))


def test_the_python_version_gives_the_same(binary: Path, python: Path) -> None:
    one, other = load_source(f"cifar10:{binary}"), load_source(f"cifar10:{python}")
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert np.array_equal(mine.inputs[:], theirs.inputs[:]) and np.array_equal(mine.targets, theirs.targets)


def test_a_whole_batch_is_within_the_bounds() -> None:
    batch = python_batch(*pictures(0, 10_000))
    assert len(batch) < sources_cifar_python.MAX_FILE // 2
    found = read_batch(batch, "data_batch_1")
    assert isinstance(found["data"], Pixels) and found["data"].values is not None
    assert found["data"].values.shape == (10_000, 3072)
    assert isinstance(found["labels"], list) and len(found["labels"]) == 10_000


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("data_batch_2.bin", lambda data: data[:-1], "not whole records of 3073"),
        ("data_batch_2.bin", lambda data: b"", "has 0 bytes"),
        ("data_batch_2.bin", lambda data: b"\x0a" + data[1:], "holds the label 10, not 0 to 9"),
    ],
)
def test_malformed_binary_batches_are_refused(binary: Path, name: str, change, says: str) -> None:  # type: ignore[no-untyped-def]
    path = binary / name
    path.write_bytes(change(path.read_bytes()))
    assert says in refused(binary) and str(path) in refused(binary)


def test_a_folder_that_is_not_whole_says_what_is_missing(binary: Path, tmp_path: Path) -> None:
    (binary / "data_batch_3.bin").unlink()
    assert "holds data_batch_1.bin but no data_batch_3.bin" in refused(binary)
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    assert f"for class folders with pictures write images:{empty}" in refused(empty)


def test_an_oversized_batch_is_not_read(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossipml.models.sources_cifar.MAX_FILE", 1000)
    assert "bytes, over 1000" in refused(binary)


# Pickles that are something else. Each of these ran code, or filled memory, in a reader that trusts pickles.

MARKER = "gossipml-pickle-ran"
HOSTILE = {
    "a call of os.system": b"\x80\x02cos\nsystem\n(U\x1etouch /tmp/gossipml-pickle-ran\x85R.",
    "the same under protocol 0": b"cos\nsystem\n(S'touch /tmp/gossipml-pickle-ran'\ntR.",
    "eval": b"\x80\x02c__builtin__\neval\nU\x011\x85R.",
    "numpy's loader of pickles": b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
    "a function of numpy beside those known": b"\x80\x02cnumpy.core.multiarray\nfromfile\nU\x01x\x85R.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "OBJ": b"\x80\x02(cnumpy\nndarray\no.",
    "NEWOBJ": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "a persistent id": b"\x80\x02Pid\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an array class called": b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
    "an array of objects": b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.",
    "an array made of something else": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R."
    ),
    "a number called": b"\x80\x02K\x05)R.",
    "BUILD of a dictionary": b"\x80\x02}}b.",
    "a name that never ends": b"\x80\x02c" + b"a" * 1000,
    "a text longer than the file": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "a text of negative length": b"\x80\x02T\xff\xff\xff\xffabc.",
    "nothing on the stack": b"\x80\x02R.",
    "what was never stored": b"\x80\x02h\x07.",
    "a list in itself": b"\x80\x02]q\x01h\x01a.",
    "no mark": b"\x80\x02}K\x01K\x02u.",
    "a key that is a list": b"\x80\x02}(]K\x01u.",
    "a key that is no ASCII": b"\x80\x02}(U\x01\xffK\x01u.",
    "more after the end": b"\x80\x02}.}",
    "two values": b"\x80\x02}}.",
    "a number alone": b"\x80\x02K\x05.",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(program: bytes) -> None:
    with pytest.raises(UserError, match=r"never unpickled.*use the binary version"):
        read_batch(program, "data_batch_1")
    assert not Path("/tmp", MARKER).exists()


def test_a_program_of_many_small_objects_is_bounded() -> None:
    with pytest.raises(UserError, match="over 400000 instructions"):
        read_batch(b"\x80\x02" + b"]" * 3_000_000, "data_batch_1")


def test_values_that_contain_each_other_a_thousand_times_cost_nothing() -> None:
    twice = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 60))  # 2 ** 60 values, by reference
    with pytest.raises(UserError, match="calls what is no function"):
        read_batch(b"\x80\x02K\x01q\x01" + twice + b"h\x30h\x31R.", "data_batch_1")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_batch_is_read_or_refused(data: st.DataObject) -> None:
    batch = bytearray(python_batch(*pictures(0, 3)))
    head = [place for place in range(len(batch)) if not 200 < place < 9300]  # the instructions, not the pixels
    for _ in range(data.draw(st.integers(1, 3))):
        batch[data.draw(st.sampled_from(head))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(batch))))
    try:
        found = read_batch(bytes(batch[:cut]), "data_batch_1")
    except UserError as error:
        assert "data_batch_1" in str(error)
    else:
        assert isinstance(found, dict)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *map(bytes, [[b] for b in b"(}])N\x89\x88\x85\x86\x87taeubRb"]),
                b"K\x01",
                b"q\x01",
                b"h\x01",
                b"U\x01b",
                b"cnumpy\nndarray\n",
                b"cnumpy\ndtype\n",
                b"cnumpy.core.multiarray\n_reconstruct\n",
            ]
        ),
        max_size=40,
    )
)
def test_any_program_of_the_known_instructions_ends(program: list[bytes]) -> None:
    try:
        assert isinstance(read_batch(b"\x80\x02" + b"".join(program) + b".", "data_batch_1"), dict)
    except UserError:
        pass
