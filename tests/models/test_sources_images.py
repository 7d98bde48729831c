"""Folders of pictures, and pictures that are hostile."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gossipml.errors import UserError
from gossipml.models import sources_images
from gossipml.models.batches import Samples
from gossipml.models.builtin_pictures import CifarCnn, MnistDense
from gossipml.models.data import load_source, prepare, take_part
from gossipml.models.dataset import Labelled
from gossipml.models.partition import Part, Rule
from gossipml.models.sources_images import Pictures
from gossipml.models.sources_picture import MAX_PIXELS, decode, measure
from tests.models.pictures import fill, picture


def refused(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_source(source)
    return str(caught.value)


def test_class_folders_give_pictures_by_name_and_a_test_part(tmp_path: Path) -> None:
    fill(tmp_path, {"dog": 10, "cat": 10})
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    data = load_source(f"images:{tmp_path}")
    assert data.labels == ("cat", "dog")
    assert data.train.inputs.shape == (16, 6, 8, 3) and len(data.test) == 4
    assert isinstance(data.train.inputs, Pictures)
    for part in (data.train, data.test):
        shades = part.inputs[:][:, 0, 0, 0]
        assert (shades // 100 == 1 - part.targets).all()  # dog is the first here, and the second by name
    again = load_source(f"images:{tmp_path}")
    assert np.array_equal(again.train.inputs[:], data.train.inputs[:])


def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 12, "dog": 11})
    fill(tmp_path / "validation", {"dog": 3})
    data = load_source(f"images:{tmp_path}")
    assert (len(data.train), len(data.test)) == (23, 3)
    assert set(data.test.targets.tolist()) == {1}
    (tmp_path / "validation" / "bird").mkdir()
    assert "the class 'bird' is in" in refused(f"images:{tmp_path}")


def test_an_empty_folder_is_a_class_without_pictures(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 10, "dog": 0, "fox": 10})
    data = load_source(f"images:{tmp_path}")
    assert data.labels == ("cat", "dog", "fox")
    assert np.bincount(data.train.targets, minlength=3).tolist() == [8, 0, 8]


@pytest.mark.parametrize(
    "prepare_folder, says",
    [
        (lambda folder: None, "holds no folder with pictures"),
        (lambda folder: (folder / "0.png").write_bytes(b""), "holds no folder with pictures"),
        (lambda folder: (folder / "cat").mkdir(), "holds no folder with pictures"),
        (lambda folder: fill(folder, {"cat": 4}), "holds 4 samples; gossipml needs 10"),
        (lambda folder: fill(folder / "train", {"cat": 4}), "holds 4 samples"),
        (lambda folder: (fill(folder / "train", {"cat": 4}), fill(folder / "test", {"cat": 4})), "holds 4 pictures"),
        (lambda folder: fill(folder, {"cat\n": 10}), "the name 'cat\\n'"),
        (lambda folder: fill(folder, {os.fsdecode(b"\xff"): 10}), "is not UTF-8; rename it"),
    ],
)
def test_folders_without_pictures_say_what_to_do(
    tmp_path: Path, prepare_folder: Callable[[Path], object], says: str
) -> None:
    prepare_folder(tmp_path)
    assert says in refused(f"images:{tmp_path}")


def test_a_model_gets_pictures_in_its_size(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 10, "dog": 10}, size=(50, 40))
    _, colour = prepare(CifarCnn(), load_source(f"images:{tmp_path}"))
    assert colour.train.inputs.shape == (16, 32, 32, 3) and colour.labels == CifarCnn.labels
    assert set(colour.train.targets.tolist()) == {3, 5}  # cat and dog among ten
    digits = fill(tmp_path / "digits", {"3": 10, "7": 10}, size=(50, 40))
    _, grey = prepare(MnistDense(), load_source(f"images:{digits}"))
    assert grey.train.inputs.shape == (16, 28, 28, 1) and grey.test.inputs[0].shape == (28, 28, 1)
    assert set(grey.train.targets.tolist()) == {3, 7}


def test_batches_are_decoded_as_they_are_needed_and_are_what_all_at_once_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"cat": 20, "dog": 20}, size=(32, 32))
    spec, data = prepare(CifarCnn(), load_source(f"images:{tmp_path}"))
    local = take_part(data, Rule("iid"), Part(1, 2), 0)
    whole = Samples(spec, Labelled(local.train.inputs[:], local.train.targets), torch.device("cpu"))
    read: list[str] = []

    def counted(data: bytes, size: tuple[int, int, int], where: str) -> np.ndarray:
        read.append(where)
        return decode(data, size, where)

    monkeypatch.setattr(sources_images, "decode", counted)
    for cache, times in ((1 << 20, 1), (0, 2)):
        monkeypatch.setattr(sources_images, "CACHE", cache)
        samples = Samples(spec, data.train.at(np.sort(np.arange(5))), torch.device("cpu"), keep=0)
        read.clear()
        chosen = torch.tensor([4, 1])
        for _ in range(2):
            inputs, targets = samples.at(chosen)
        assert len(read) == 2 * times
        assert inputs.shape == (2, 3, 32, 32) and targets.tolist() == data.train.targets[[4, 1]].tolist()
    streamed = Samples(spec, local.train, torch.device("cpu"), keep=1 << 30)
    for one, other in zip(streamed.between(2, 5), whole.between(2, 5), strict=True):
        assert torch.equal(one, other)


def test_a_part_of_a_folder_decodes_nothing_until_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"cat": 20, "dog": 20}, size=(32, 32))
    data = load_source(f"images:{tmp_path}")
    monkeypatch.setattr(sources_images, "decode", lambda *_: pytest.fail("a picture was decoded"))
    local = take_part(data, Rule("dirichlet", 0.5), Part(2, 3), 0)
    assert len(local.train) + len(local.validation) < 30


def test_a_picture_that_goes_bad_while_training_is_named(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 10, "dog": 10})
    data = load_source(f"images:{tmp_path}")
    assert isinstance(data.train.inputs, Pictures)
    path = data.train.inputs.files.path(3)
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UserError) as caught:
        data.train.inputs[np.array([3])]
    assert str(path) in str(caught.value) and "replace it, or remove it" in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        data.train.inputs[3]


# One picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_is_decoded_to_the_asked_size(kind: str, channels: int) -> None:
    given = picture(200, (64, 48), kind=kind)
    assert measure(given, "x")[:2] == (48, 64)
    pixels = decode(given, (10, 12, channels), "x")
    assert pixels.shape == (10, 12, channels) and pixels.dtype == np.uint8
    expected = [200 * 0.299 + 55 * 0.587 + 7 * 0.114] if channels == 1 else [200, 55, 7, 255][:channels]
    assert np.abs(pixels[5, 6].astype(int) - expected).max() < 12


@pytest.mark.parametrize(
    "mode, channels", [("1", 1), ("L", 1), ("P", 4), ("RGB", 3), ("RGBA", 4), ("LA", 4), ("I;16", 1)]
)
def test_modes_have_their_natural_channels(mode: str, channels: int) -> None:
    out = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), 0x8000, dtype=np.uint16)).save(out, "PNG")
        assert (decode(out.getvalue(), (4, 5, 1), "x") == 128).all()
    else:
        Image.new("RGBA", (5, 4), (9, 9, 9, 128)).convert(mode).save(out, "PNG")
    assert measure(out.getvalue(), "x") == (4, 5, channels)


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, says",
    [
        (png(100_000, 100_000), f"more than the {MAX_PIXELS} allowed"),
        (png(2**31 - 1, 2**31 - 1), "pixels, more than"),
        (png(9000, 9000), "9000 x 9000 pixels, more than"),
        (png(0, 5), "PIC"),
        (png(50, 50, b"\0" * 10), "PIC is damaged"),
        (picture(1)[:45], "PIC"),
        (picture(1, kind="JPEG")[:200], "PIC"),
        (b"", "PIC is not a picture that can be read (JPEG, PNG"),
        (b"<svg/>", "PIC is not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PIC is not a picture that can be read"),
        (picture(1, kind="TIFF"), "PIC is not a picture that can be read"),
    ],
    ids=["bomb", "largest", "too large", "empty", "short", "cut png", "cut jpeg", "nothing", "svg", "eps", "tiff"],
)
def test_hostile_pictures_are_refused_before_memory_is_taken(data: bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(data, (32, 32, 3), "PIC")
    assert says in str(caught.value) and "PIC" in str(caught.value)


def test_a_file_larger_than_the_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"cat": 10})
    monkeypatch.setattr("gossipml.models.sources_picture.MAX_FILE", 20)
    assert "make the picture smaller" in refused(f"images:{tmp_path}")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_a_picture_is_decoded_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "WEBP"]))
    given = bytearray(picture(90, (20, 20), kind=kind))
    for _ in range(data.draw(st.integers(0, 8))):
        given[data.draw(st.integers(0, len(given) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(given)))
    try:
        assert decode(bytes(given[:cut]), (6, 6, 3), "x").shape == (6, 6, 3)
    except UserError as error:
        assert str(error).startswith("x ")


# Real pictures


@pytest.mark.data
def test_real_cifar10_pictures_are_read(cifar_folder: Path) -> None:
    data = load_source(f"images:{cifar_folder}")
    assert data.labels == CifarCnn.labels and data.train.inputs.shape[1:] == (32, 32, 3)
    assert np.bincount(data.train.targets).tolist() == [100] * 10
    assert np.bincount(data.test.targets).tolist() == [20] * 10
    means = data.train.inputs[:].reshape(-1, 3).mean(0)
    assert np.abs(means - CifarCnn.mean).max() < 6
