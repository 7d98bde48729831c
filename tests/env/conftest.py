"""Credentials of members and of strangers, and a real environment in a temporary home."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from gossipml.env import Credentials, Env
from gossipml.env.real import real_env
from gossipml.identity import Identity
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken


def make_credentials(name: str, network: str = "ours") -> Credentials:
    cookie = hashlib.sha256(network.encode()).digest()
    token = JoinToken(network_id=b"n" * 16, cookie=cookie, expires=0, addresses=())
    return Credentials(Identity(hashlib.sha256(name.encode()).digest()), NetworkKeys.from_token(token))


@pytest.fixture
def credentials() -> Callable[..., Credentials]:
    """`credentials(name, network="ours")`: the same for the same names."""
    return make_credentials


@pytest.fixture
def real(tmp_path: Path) -> Env:
    return real_env(tmp_path, seed=1)
