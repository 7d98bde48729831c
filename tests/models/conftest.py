"""Small data and models for the tests of the learner."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from gossipml.models.data import Dataset, load_source


def real_data() -> Path:
    """The folder of the real datasets: GOSSIPML_DATASETS, or `../shared/data` beside the checkout."""
    return Path(os.environ.get("GOSSIPML_DATASETS") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    folder = real_data() / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}; set GOSSIPML_DATASETS")
    return folder


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fiftieth of the CIFAR-10 pictures, and a fiftieth of those for testing, as class folders."""
    archive = real_data() / "cifar10-images.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no CIFAR-10 pictures in {archive}; set GOSSIPML_DATASETS")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive, "r|xz") as pictures:
        for member in pictures:
            if member.isfile() and int(Path(member.name).stem) % 50 == 0:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = pictures.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
    return folder


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_source("digits")
