"""HOME/orders and HOME/keys: how orders of the network key reach a peer, and how it remembers them.

The command line puts an order into HOME/orders, the running peer finds it there, heeds it and tells the others; no
restart, and nothing for a web page or another program to call. What a peer knows, from there or from others, it keeps
in HOME/keys (0600: it holds cookies), and HOME/token always says the newest cookie, so that `token new` gives a token
that lasts. Leaves out: what an order means (`gossipml.membership`), telling others (`gossipml.peer.herald`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace

import trio

from gossipml import token as tokens
from gossipml.env import Env, write_atomic
from gossipml.errors import RemoteError, UserError
from gossipml.membership import MAX_STATE, Membership
from gossipml.orders import MAX_ORDER, Order, Rotation
from gossipml.token import JoinToken

log = logging.getLogger("gossipml.node")

KEYS_FILE = "keys"
TOKEN_FILE = "token"  # noqa: S105  # its name
FOLDER = "orders"
SUFFIX = ".order"
MAX_FOUND = 256  # at one look; the rest is found by the next


def order_name(order: Order) -> str:
    """The file of an order: revocations first, then as they were made."""
    kind = 1 if isinstance(order, Rotation) else 0
    return f"{kind}-{order.made:013d}-{hashlib.sha256(order.raw).hexdigest()[:12]}{SUFFIX}"


def renewed(token: JoinToken, membership: Membership) -> JoinToken:
    """The token with the newest cookie in place of its own."""
    newest = membership.newest
    return replace(token, cookie=newest.cookie, generation=newest.generation)


class Orders:
    """The part of a daemon that watches for orders and keeps what is known."""

    def __init__(self, env: Env, membership: Membership, watch_seconds: float) -> None:
        self._env = env
        self._membership = membership
        self._watch_seconds = watch_seconds
        self._kept = -1  # the version of the membership that is on disk
        self._news = trio.Event()

    def changed(self) -> None:
        """Another member told us something: it is to be kept."""
        self._news.set()

    async def load(self) -> None:
        """Take in what an earlier life kept. UserError when it is damaged."""
        try:
            state = await self._env.disk.read(KEYS_FILE, limit=MAX_STATE)
        except FileNotFoundError:
            return
        self._membership.load(state, self._env.clock.wall())

    async def run(
        self, order: Callable[[bytes], bool], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Hand each order that lies in the folder to `order`, and keep each change, until cancelled."""
        task_status.started()
        while True:
            self._news = trio.Event()
            self._membership.tick(self._env.clock.wall())
            try:
                found = await self._take_found(order)
                if self._kept != self._membership.version:
                    await self._keep()
                for path in found:  # only now: a crash before this finds them again
                    await self._env.disk.remove(path)
            except OSError as error:
                log.warning("cannot keep the keys of the network: %s; free or mend the disk", error)
            with trio.move_on_after(self._watch_seconds):
                await self._news.wait()

    async def _take_found(self, order: Callable[[bytes], bool]) -> list[str]:
        disk = self._env.disk
        names = [name for name in await disk.list(FOLDER) if name.endswith(SUFFIX) and not name.startswith(".")]
        paths = [f"{FOLDER}/{name}" for name in names[:MAX_FOUND]]
        for path in paths:
            try:
                if order(await disk.read(path, limit=MAX_ORDER)):
                    log.info("took an order from %s", path)
            except (RemoteError, OSError) as error:
                log.warning("%s is no order of this network and is removed: %s", path, error)
        return paths

    async def _keep(self) -> None:
        version = self._membership.version
        await write_atomic(self._env.disk, KEYS_FILE, self._membership.state(), private=True)
        try:
            text = await self._env.disk.read(TOKEN_FILE, limit=tokens.MAX_TEXT)
            token = tokens.decode(text.decode("ascii", "replace"))
            if renewed(token, self._membership) != token:
                renewed_text = renewed(token, self._membership).encode() + "\n"
                await write_atomic(self._env.disk, TOKEN_FILE, renewed_text.encode(), private=True)
        except FileNotFoundError:
            pass  # a simulated home has none
        except UserError as error:
            log.warning("HOME/token is not renewed: %s", error)
        self._kept = version
