"""Small data and models for the tests of the learner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gossipml.models.data import Dataset, load_source


def real_data() -> Path:
    """The folder of the real datasets: GOSSIPML_DATA, or `../shared/data` beside the checkout."""
    return Path(os.environ.get("GOSSIPML_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    folder = real_data() / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}; set GOSSIPML_DATA")
    return folder


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_source("digits")
