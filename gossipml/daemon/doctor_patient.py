"""What the checks of `gossipml peer doctor` know of a peer, and what a check says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gossipml.config import PeerConfig
from gossipml.daemon.contacts import load_contacts
from gossipml.daemon.home import Home, RunInfo
from gossipml.env import Credentials, Env
from gossipml.errors import UserError
from gossipml.identity import SEED_SIZE, Identity
from gossipml.ids import Address, Contact, PeerId, parse_address
from gossipml.keys import NetworkKeys
from gossipml.token import COOKIE_SIZE, NETWORK_ID_SIZE, JoinToken

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    seen: str
    fix: str = ""
    """A sentence or a command; empty when there is nothing to mend."""


@dataclass
class Patient:
    """What the checks know of the peer of a home."""

    home: Home
    env: Env
    config: PeerConfig = field(default_factory=PeerConfig)
    token: JoinToken | None = None
    peer: PeerId | None = None
    """The id of this home's identity; None when it has none."""
    info: RunInfo | None = None
    status: dict[str, Any] | None = None  # Any: JSON of /v1/status
    contacts: list[Contact] = field(default_factory=list)
    skews: dict[PeerId, float] = field(default_factory=dict)
    """Seconds by which the clocks of the members heard are ahead of ours."""
    kept: bytes = b""
    """What the peer remembers of rotations and revocations (HOME/keys)."""
    _keys: NetworkKeys | None = None

    @property
    def is_running(self) -> bool:
        return self.status is not None

    def credentials(self) -> Credentials:
        """A member of the home's network that is not the home's peer; of a made-up network when it has none."""
        secrets = self.env.secrets
        if self._keys is None:
            token = self.token or JoinToken(secrets(NETWORK_ID_SIZE), secrets(COOKIE_SIZE), 0, ())
            self._keys = NetworkKeys.from_token(token)
        credentials = Credentials(Identity(secrets(SEED_SIZE)), self._keys)
        if self.kept:
            credentials.membership.load(self.kept, self.env.clock.wall())
        return credentials

    def addresses(self) -> tuple[Address, ...]:
        """Where the running peer says it is."""
        told = (self.status or {}).get("addresses")
        return tuple(parse_address(str(text)) for text in told) if isinstance(told, list) else ()


Ask = Callable[[RunInfo, str], Any]  # Any: JSON; raises UserError when the endpoint does not answer


def split(error: UserError) -> tuple[str, str]:
    """What is wrong, and what to do: our errors say both, with a semicolon between them."""
    seen, _, fix = str(error).partition("; ")
    return seen, fix


async def known_contacts(patient: Patient) -> list[Contact]:
    """Those of the last run."""
    return await load_contacts(patient.env.disk) if patient.home.path.is_dir() else []


def count(number: int, what: str) -> str:
    """`1 member`, `2 members`."""
    return f"{number} {what}" + ("" if number == 1 else "s")
