"""Starting and stopping the endpoint. Why the connections are `http1`'s: docs/decisions/0003."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from gossipml.api.guard import MAX_BODY, GuardRules, is_loopback
from gossipml.api.http1 import Limits, Server
from gossipml.api.ports import Node
from gossipml.api.routes import Endpoint
from gossipml.api.sessions import Sessions
from gossipml.errors import UserError
from gossipml.ids import Address

log = logging.getLogger(__name__)

DEFAULT_LISTEN = Address("127.0.0.1", 8710)
MIN_API_KEY = 16  # characters; 16 of base32 are 80 bits, out of reach of guessing over HTTP
BACKLOG = 128  # connections that wait to be accepted while the loop is busy; common


@dataclass(frozen=True)
class ApiConfig:
    listen: Address = DEFAULT_LISTEN
    names: tuple[str, ...] = ()
    """Further host names under which the endpoint may be asked for (a reverse proxy's)."""
    api_key: str = field(default="", repr=False)
    """Then every request needs `Authorization: Bearer KEY`. Comes from a 0600 file."""
    api_token: str = field(default="", repr=False)
    """What requests need that change something; without one they are all refused."""
    secrets: Callable[[int], bytes] = field(default=os.urandom, repr=False)
    """That many unpredictable bytes, for the sessions of the page."""
    max_body: int = MAX_BODY
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.api_key and (len(self.api_key) < MIN_API_KEY or not self.api_key.isascii()):
            raise UserError(
                f"the API key has {len(self.api_key)} characters; it needs {MIN_API_KEY} or more, ASCII only"
            )
        if not self.api_key and not is_loopback(self.listen.host):
            raise UserError(
                f"the HTTP endpoint at {self.listen} would be open to other machines; listen on 127.0.0.1 "
                "(`--api 127.0.0.1:8710`), or give it an API key"
            )


async def serve(
    node: Node, config: ApiConfig, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; then nothing new is taken, and what is under way has `drain_seconds` to end.

    Reports the bound address. UserError when the address cannot be had.
    """
    listeners = await _listen(config.listen)
    bound = Address(*listeners[0].socket.getsockname()[:2])
    stopping = trio.Event()
    names = tuple(name.lower() for name in config.names)
    sessions = Sessions(config.secrets)
    rules = GuardRules(names, config.api_key, config.api_token, config.max_body, sessions)
    server = Server(Endpoint(node, rules, stopping).app, config.limits, stopping)
    async with trio.open_nursery() as nursery:
        draining: trio.CancelScope = await nursery.start(_serve_connections, server, listeners)
        log.info("HTTP endpoint on http://%s", bound)
        task_status.started(bound)
        try:
            await trio.sleep_forever()
        finally:
            stopping.set()
            draining.deadline = trio.current_time() + config.limits.drain_seconds


async def _serve_connections(
    server: Server,
    listeners: list[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    """Accept until `stopping`, then wait for the open connections; outlives a cancellation until its own scope,
    which it reports, is cancelled or at its deadline."""
    with trio.CancelScope(shield=True) as scope:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(trio.serve_listeners, server.handle, listeners, handler_nursery=connections)
                )
                task_status.started(scope)
                await server.stopping.wait()
                accepting.cancel_scope.cancel()  # which closes the listeners
            server.cancel_waiting()


async def _listen(address: Address) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        raise UserError(_why_not(address, _innermost(error))) from error


def _why_not(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {address.port} at {address.host} is in use, perhaps by another peer; stop that one "
            f"(`gossipml peer stop`) or choose another port: `--api {_example(address)}`"
        )
    if error.errno == errno.EACCES:
        return f"port {address.port} is for privileged users; choose one over 1023: `--api {_example(address)}`"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is not an address of this machine; use `--api {_example(Address('127.0.0.1', 8710))}`"
    return f"the HTTP endpoint cannot listen on {address}: {error.strerror or error}"


def _example(address: Address) -> str:
    return str(Address(address.host, address.port + 1 if 1023 < address.port < 65535 else 8711))


def _innermost(error: OSError) -> OSError:
    """The system's own error: trio wraps what it met in one that has no number."""
    while error.errno is None:
        inner = error.__cause__
        if isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        if not isinstance(inner, OSError):
            break
        error = inner
    return error
