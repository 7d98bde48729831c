"""What is built is what is in the repository, and the tests run against what is built."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import gossipml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"gossipml": "", "peer": "peer/", "dht": "dht/", "models": "models/", "simulations": "simulations/"}


def tracked() -> set[str]:
    """Files of the repository as paths inside the installed package."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--", *FOLDERS], capture_output=True, text=True, check=False
    )
    if git.returncode:
        pytest.skip("not a git checkout")
    files = set()
    for line in git.stdout.splitlines():
        top, _, rest = line.partition("/")
        if (ROOT / line).is_symlink():
            continue  # gossipml/peer -> ../peer serves developer tools alone
        files.add(FOLDERS[top] + rest)
    return files


def test_the_built_package_holds_every_tracked_file_and_no_other() -> None:
    distribution = importlib.metadata.distribution("gossipml")
    installed = {
        str(path).removeprefix("gossipml/")
        for path in distribution.files or []
        if str(path).startswith("gossipml/") and "__pycache__" not in str(path)
    }
    assert installed == tracked()


def test_the_tests_run_against_the_installed_package() -> None:
    where = Path(gossipml.__file__).resolve()
    assert ROOT not in where.parents or ".venv" in where.parts, (
        f"{where} is the checkout; run the tests with `make test`, which installs the built package first"
    )


def test_version_of_package_and_code_agree() -> None:
    assert importlib.metadata.version("gossipml") == gossipml.__version__


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gossipml", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"gossipml {gossipml.__version__}\n"
