"""A peer's home: the folder that holds its identity, its token, its options, its state and its log.

One process at a time owns a home, shown by a lock that the system lifts when the process dies, however it
dies. `run.json` tells other commands where the running peer is; without the lock it means nothing.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from gossipml import token as tokens
from gossipml.daemon.orders import FOLDER, KEYS_FILE, TOKEN_FILE, order_name, renewed
from gossipml.env import files
from gossipml.errors import RemoteError, UserError
from gossipml.identity import SEED_SIZE, Identity
from gossipml.ids import Address
from gossipml.keys import NetworkKeys
from gossipml.membership import MAX_STATE, Membership
from gossipml.orders import MAX_ORDER, NETWORK_SEED_SIZE, NetworkKey, Order
from gossipml.token import COOKIE_SIZE, JoinToken

fcntl: ModuleType | None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows: no lock; two peers on one home are not noticed there
    fcntl = None

MAX_API_KEY = 512
API_TOKEN_SIZE = 20  # bytes
MAX_IDENTITY = 64  # bytes; one byte more than a seed is already wrong
Secrets = Callable[[int], bytes]


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` says of the peer that owns the home."""

    pid: int
    name: str
    peer: str
    addresses: list[str]
    api: str
    started: float


@dataclass(frozen=True)
class Home:
    """Paths under one home, and what is kept at them."""

    path: Path

    @property
    def token_file(self) -> Path:
        return self.path / TOKEN_FILE

    @property
    def network_key_file(self) -> Path:
        return self.path / "network-key"

    @property
    def keys_file(self) -> Path:
        return self.path / KEYS_FILE

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def log_file(self) -> Path:
        return self.path / "log" / "peer.log"

    def prepare(self) -> None:
        """Make the folder, for its owner alone."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot use {self.path} as the home of a peer ({error.strerror}); choose another with --home DIR"
            ) from None

    def identity(self, secrets: Secrets) -> Identity:
        """The peer's identity, made at the first call."""
        file = self.path / "identity"
        try:
            return Identity(files.read_private(file, limit=MAX_IDENTITY))
        except FileNotFoundError:
            identity = Identity(secrets(SEED_SIZE))
            files.write_atomic(file, identity.seed, private=True)
            return identity

    def token(self) -> JoinToken | None:
        """The network that this home belongs to, or None."""
        try:
            return read_token(self.token_file)
        except FileNotFoundError:
            return None

    def network_key(self) -> NetworkKey | None:
        """The key that orders rotations and revocations; None where the network was not made."""
        try:
            return NetworkKey(files.read_private(self.network_key_file, limit=2 * NETWORK_SEED_SIZE))
        except FileNotFoundError:
            return None

    def found_network(self, secrets: Secrets, *, expires: int, addresses: tuple[Address, ...]) -> JoinToken:
        """Make a network and keep its key and its token here."""
        key = NetworkKey(secrets(NETWORK_SEED_SIZE))
        token = _first_token(key, secrets, expires=expires, addresses=addresses)
        files.write_atomic(self.network_key_file, key.seed, private=True)  # first: a token makes the home a member's
        self.keep_token(token)
        return token

    def membership(self, token: JoinToken, wall: float) -> Membership:
        """What this home knows of keys and members: its token, HOME/keys, and orders not yet taken."""
        membership = Membership(NetworkKeys.from_token(token))
        try:
            membership.load(files.read_private(self.keys_file, limit=MAX_STATE), wall)
        except FileNotFoundError:
            pass
        for name in files.list_folder(self.path / FOLDER):
            with suppress(RemoteError, OSError):
                membership.take(files.read(self.path / FOLDER / name, limit=MAX_ORDER), wall)
        return membership

    def leave_order(self, order: Order) -> None:
        """Put an order where the running peer of this home finds it."""
        files.write_atomic(self.path / FOLDER / order_name(order), order.raw, private=True)

    def keep_membership(self, membership: Membership, token: JoinToken) -> None:
        """Write HOME/keys and the newest token; for the owner of the home's lock."""
        files.write_atomic(self.keys_file, membership.state(), private=True)
        if renewed(token, membership) != token:
            self.keep_token(renewed(token, membership))

    def api_key(self) -> str:
        """The key that the HTTP endpoint asks for, from HOME/api-key; empty without that file."""
        try:
            return files.read_private(self.path / "api-key", limit=MAX_API_KEY).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""

    def api_token(self) -> str:
        """What the command line proves to the endpoint that it may change something; empty before the first start."""
        try:
            return files.read_private(self.path / "api-token", limit=MAX_API_KEY).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""

    def make_api_token(self, secrets: Secrets) -> str:
        """The same, made at the first call."""
        if not self.api_token():
            text = base64.b32encode(secrets(API_TOKEN_SIZE)).decode().rstrip("=").lower()
            files.write_atomic(self.path / "api-token", (text + "\n").encode(), private=True)
        return self.api_token()

    def keep_token(self, token: JoinToken) -> None:
        files.write_atomic(self.token_file, (token.encode() + "\n").encode(), private=True)

    def run_info(self) -> RunInfo | None:
        """The running peer of this home, or None when there is none."""
        if not self.is_locked():
            return None
        try:
            return RunInfo(**json.loads(files.read(self.run_file, limit=4096)))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # still starting

    def require_run_info(self) -> RunInfo:
        info = self.run_info()
        if info is None:
            raise UserError(f"no peer of {self.path} is running; start it with `gossipml peer start`")
        return info

    def write_run_info(self, info: RunInfo) -> None:
        files.write_atomic(self.run_file, json.dumps(asdict(info), indent=1).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the home; UserError when another process does."""
        self.prepare()
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"a peer of {self.path} is already running; see it with `gossipml peer status`, stop it "
                        "with `gossipml peer stop`, or choose another home with --home DIR"
                    ) from None
            self.run_file.unlink(missing_ok=True)  # of a run that was killed
            try:
                yield
            finally:
                self.run_file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        if fcntl is None:
            return self.run_file.exists()
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def read_token(file: Path) -> JoinToken:
    """The token in a private file; UserError when others may read the file or it holds no token."""
    try:
        text = files.read_private(file, limit=tokens.MAX_TEXT).decode("ascii", "replace")
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, not a token file") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"cannot read the token file {file}: {error.strerror}") from None
    try:
        return tokens.decode(text)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def new_network(secrets: Secrets, *, expires: int, addresses: tuple[Address, ...]) -> JoinToken:
    """A token of a network that did not exist before, and whose key nobody keeps: it cannot be rotated."""
    return _first_token(NetworkKey(secrets(NETWORK_SEED_SIZE)), secrets, expires=expires, addresses=addresses)


def _first_token(key: NetworkKey, secrets: Secrets, *, expires: int, addresses: tuple[Address, ...]) -> JoinToken:
    return JoinToken(key.network_id, secrets(COOKIE_SIZE), expires, ()).with_addresses(addresses)


def join(home: Home, offered: JoinToken | None, *, wall: float, secrets: Secrets, seconds: float) -> JoinToken:
    """The token that this home is to use from now on, kept in the home.

    A home belongs to one network for good; a newer token of that network takes the place of an older one. Without any
    token a new network is made, whose token lets others in for `seconds`.
    """
    kept = home.token()
    if offered is None:
        if kept is None:
            kept = home.found_network(secrets, expires=int(wall + seconds) if seconds else 0, addresses=())
        return kept
    if kept is None:
        offered.check_expiry(wall)
        home.keep_token(offered)
        return offered
    if kept.network_id != offered.network_id:
        raise UserError(
            f"{home.path} belongs to the network {kept.network_id.hex()[:8]}, the token to "
            f"{offered.network_id.hex()[:8]}; join it from a new home: `gossipml --home DIR peer start --join FILE`"
        )
    newer = NetworkKeys.from_token(offered).rank > NetworkKeys.from_token(kept).rank
    if newer:  # this peer was off while the token was rotated
        offered.check_expiry(wall)
    # An older one is what a script that starts the peer always gives.
    merged = (offered if newer else kept).with_addresses(offered.addresses + kept.addresses)
    if merged != kept:
        home.keep_token(merged)
    return merged
