"""TCP connections for `Env.net`: a listener that strangers cannot disturb, and a dial that proves who answers.

Each accepted connection runs in a guarded task of its own, because an exception or a slow handshake in a
shared one would take all members down. Whoever floods the listener with connections that never finish their
handshake pushes out his own: over a cap the oldest pending handshake of that address goes (an honest one takes
milliseconds), then the oldest of all.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import math
import socket as stdlib_socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import trio

from gossipml.env import Credentials, Handler
from gossipml.env.sockets import bound_socket, from_sockaddr, to_sockaddr, why_not
from gossipml.env.tls import Contexts, TlsStream, close_socket, explain, is_another_token
from gossipml.errors import RemoteError, UserError
from gossipml.ids import Address, PeerId, short_peer_id
from gossipml.keys import NetworkKeys

log = logging.getLogger(__name__)

BACKLOG = 512  # connections the kernel keeps while the loop is busy
ACCEPT_PAUSE = 0.1  # seconds without accept when descriptors or memory have run out, as trio does
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
NO_MEMBER = (
    "is not a member of this network or holds another token; check that both were joined with the same one "
    "(`gossipml token inspect FILE`). If the token was rotated while this peer was off, ask a member for the new one "
    "(`gossipml token new --out FILE`) and start this peer with `--join FILE`"
)
LOG_BURST = 10  # lines about failed handshakes in each LOG_WINDOW; the rest is counted
LOG_WINDOW = 60.0


@dataclass(frozen=True)
class HandshakeLimits:
    """What connections that have proved nothing may cost."""

    seconds: float = 5.0
    """For the whole handshake; an honest one over a bad line takes about one."""
    pending: int = 256  # at about 300 kB each (TLS state, receive buffer) this bounds memory at 80 MB
    """Handshakes under way in all."""
    per_address: int = 16
    """From one IPv4 address or one IPv6 /64."""
    per_loopback: int = 128
    """From this machine itself, where many peers share one address."""


class TlsListener:
    """`Listener` over TCP and mutual TLS."""

    def __init__(
        self,
        socket: trio.socket.SocketType,
        credentials: Credentials,
        limits: HandshakeLimits,
        buffer: bytearray,
    ) -> None:
        self.local = from_sockaddr(socket.getsockname())
        self._socket = socket
        self._own_id = credentials.identity.peer_id
        self._contexts = Contexts(credentials)
        self._contexts.server("")  # what is wrong with our keys shows now, not at the first connection
        self._limits = limits
        self._buffer = buffer
        self._pending: dict[trio.CancelScope, str] = {}  # oldest first; the value: where from
        self._inform = _RareLog(logging.INFO, trio.current_time)
        self._warn = _RareLog(logging.WARNING, trio.current_time)  # apart, so that garbage cannot drown these

    async def serve(self, handler: Handler) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    socket, _ = await self._socket.accept()
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    # ECONNABORTED is about a connection that is gone already; anything else may stay a while.
                    if error.errno in OUT_OF_RESOURCES:
                        self._warn("cannot accept connections: %s; raise the limit (ulimit -n)", error.strerror)
                        self._drop_oldest(None)
                    await trio.sleep(0 if error.errno == errno.ECONNABORTED else ACCEPT_PAUSE)
                else:
                    connection = stdlib_socket.socket(fileno=socket.detach())
                    connection.setblocking(False)
                    nursery.start_soon(self._guarded, connection, handler)

    async def aclose(self) -> None:
        self._socket.close()
        await trio.lowlevel.checkpoint()

    async def _guarded(self, socket: stdlib_socket.socket, handler: Handler) -> None:
        """Nothing that goes wrong with this connection leaves this task, except cancellation."""
        try:
            stream = await self._prove(socket)
            if stream is not None:
                await self._handle(stream, handler)
        except Exception:
            log.exception("a connection failed in an unexpected way")
        except BaseExceptionGroup as group:
            errors, rest = group.split(Exception)
            if errors is not None:
                log.error("a connection failed in an unexpected way", exc_info=errors)
            if rest is not None:
                raise rest from None
        finally:
            close_socket(socket)

    async def _handle(self, stream: TlsStream, handler: Handler) -> None:
        try:
            await handler(stream)
        except Exception as error:
            who = f"{short_peer_id(stream.peer_id)} at {stream.remote}"
            if isinstance(error, RemoteError | trio.BrokenResourceError):
                log.info("the session with %s ended: %s", who, error)
            else:
                log.exception("the session with %s failed", who)
        finally:
            await stream.aclose()

    async def _prove(self, socket: stdlib_socket.socket) -> TlsStream | None:
        """The stream once the other side has proved to be a member; None, and why in the log, otherwise."""
        try:
            remote = from_sockaddr(socket.getpeername())
            with contextlib.suppress(OSError):
                socket.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
            stream = TlsStream(socket, self._buffer)
        except OSError:  # gone before we looked
            return None
        origin = _origin(remote)
        self._make_room(origin)
        with trio.move_on_after(self._limits.seconds) as scope:
            self._pending[scope] = origin
            try:
                await stream.accept(self._contexts.server)
            except ssl.SSLError as error:
                say = self._warn if is_another_token(error) else self._inform
                say("refused a connection from %s: %s", remote, explain(error))
                return None
            except (OSError, RemoteError) as error:
                self._inform("refused a connection from %s: %s", remote, error)
                return None
            finally:
                self._pending.pop(scope, None)
        if scope.cancelled_caught:
            self._inform("dropped a connection from %s: its handshake did not end in time", remote)
            return None
        if stream.peer_id == self._own_id:  # we dialled ourselves, or someone runs a copy of this home
            await stream.aclose()
            return None
        return stream

    def _make_room(self, origin: str) -> None:
        limits = self._limits
        cap = limits.per_loopback if origin == "loopback" else limits.per_address
        if sum(1 for other in self._pending.values() if other == origin) >= cap:
            self._drop_oldest(origin)
        elif len(self._pending) >= limits.pending:
            self._drop_oldest(None)

    def _drop_oldest(self, origin: str | None) -> None:
        for scope, other in self._pending.items():
            if origin is None or other == origin:
                del self._pending[scope]
                scope.cancel()
                return


def _origin(remote: Address) -> str:
    """What the cap counts by: an address, a /64 of IPv6 (one customer), or this machine."""
    ip = ipaddress.ip_address(remote.host)
    if ip.is_loopback:
        return "loopback"
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


async def listen(local: Address, credentials: Credentials, limits: HandshakeLimits, buffer: bytearray) -> TlsListener:
    socket = await bound_socket(local, stdlib_socket.SOCK_STREAM)
    try:
        try:
            socket.listen(BACKLOG)
        except OSError as error:  # some systems find out only now that the port is in use
            raise UserError(why_not(error, local, "TCP")) from error
        return TlsListener(socket, credentials, limits, buffer)
    except BaseException:
        socket.close()
        raise


class AnotherToken(RemoteError):
    """The other side is no member by the keys that were used."""


async def connect(
    remote: Address, expected: PeerId | None, protocol: str, contexts: Contexts, buffer: bytearray
) -> TlsStream:
    """A stream to the peer at `remote`, proven; see `Net.connect`.

    While a token is rotated, the new keys are tried first: who has heard of them has them. The old ones are for those
    who have not.
    """
    refused: AnotherToken | None = None
    for keys in contexts.credentials.membership.accepted:
        try:
            return await _connect(remote, expected, contexts.credentials, contexts.client(keys, protocol), keys, buffer)
        except AnotherToken as error:
            refused = refused or error
    raise refused or RemoteError(f"no keys to dial {remote} with")


async def _connect(
    remote: Address,
    expected: PeerId | None,
    credentials: Credentials,
    context: ssl.SSLContext,
    keys: NetworkKeys,
    buffer: bytearray,
) -> TlsStream:
    family = stdlib_socket.AF_INET6 if ":" in remote.host else stdlib_socket.AF_INET
    with trio.socket.socket(family, stdlib_socket.SOCK_STREAM) as dialling:
        await dialling.connect(to_sockaddr(remote, family))
        socket = stdlib_socket.socket(fileno=dialling.detach())
    try:
        socket.setblocking(False)
        with contextlib.suppress(OSError):
            socket.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        stream = TlsStream(socket, buffer)
        try:
            await stream.dial(context, keys)
        except ssl.SSLEOFError as error:
            raise ConnectionResetError(f"{remote} hung up in the handshake") from error
        except ssl.SSLError as error:
            if is_another_token(error):
                raise AnotherToken(f"{remote} {NO_MEMBER}") from error
            raise RemoteError(f"{remote} is no gossipml peer of this version: {explain(error)}") from error
        if stream.peer_id == credentials.identity.peer_id:
            raise RemoteError(f"{remote} is this peer itself (or one that runs on a copy of its home)")
        if expected is not None and stream.peer_id != expected:
            raise RemoteError(
                f"{remote} is peer {short_peer_id(stream.peer_id)}, not {short_peer_id(expected)} as expected"
            )
        if credentials.membership.is_revoked(stream.peer_id):
            raise RemoteError(f"{remote} is peer {short_peer_id(stream.peer_id)}, which was revoked")
        return stream
    except BaseException:
        close_socket(socket)
        raise


class _RareLog:
    """Log lines that strangers cause: a few, then a count, so that nobody can fill the disk with them."""

    def __init__(self, level: int, now: Callable[[], float]) -> None:
        self._level = level
        self._now = now
        self._window_ends = -math.inf
        self._lines = 0
        self._left_out = 0

    def __call__(self, message: str, *args: object) -> None:
        if self._now() >= self._window_ends:
            if self._left_out:
                log.log(self._level, "%d more such lines were left out", self._left_out)
            self._window_ends = self._now() + LOG_WINDOW
            self._lines = self._left_out = 0
        if self._lines >= LOG_BURST:
            self._left_out += 1
        else:
            self._lines += 1
            log.log(self._level, message, *args)
