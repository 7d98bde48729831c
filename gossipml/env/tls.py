"""Mutual TLS 1.3 over a trio socket: contexts, the handshake, and a stream that moves whole models fast.

`trio.SSLStream` encrypts all that it is given into memory before it sends, receives one record of 16 KiB at a
time, and sends no alert when a handshake fails. Here an `SSLObject` between two `MemoryBIO`s is pumped by hand:
256 KiB are read into a buffer that is used again, decrypted straight into the caller's view; sent in slices of
256 KiB. That is about three times as fast, bounds memory, and the other side is told why it was refused.

The sockets are the standard library's, non-blocking, waited for with trio: so nothing runs between reading
into the buffer and emptying it, and all streams share one buffer instead of holding 256 KiB each.

Left out: renegotiation (gone in TLS 1.3), session tickets (a resumed session shows no certificate).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket as stdlib_socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator

import trio
from cryptography.hazmat.primitives import serialization

from gossipml.certificates import authority_certificate, leaf_certificate, peer_id_from_der
from gossipml.env import PROTOCOLS, Credentials
from gossipml.env.hello import NONCE_SIZE, hello_length, keys_named, name_for, server_name
from gossipml.env.sockets import from_sockaddr
from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.keys import NetworkKeys

SLICE_BYTES = 1 << 19  # two processes alone are as fast with half of it, a swarm is 3 % faster with this
RECEIVE_BYTES = (1 << 18) + (1 << 14)  # half a slice in records, and the message before it
POST_BYTES = 1 << 16  # encrypted between two turns of the loop: 30 us
MAX_UNSENT = 1 << 16  # answers to key updates that the other side asks for and does not read
GOODBYE_SECONDS = 0.5  # for close_notify and alerts; a peer that does not read has no right to more

Bytes = bytes | bytearray | memoryview


class Contexts:
    """The TLS contexts of one peer: one for each generation of the keys, and of the protocols it dials with."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._made: dict[tuple[str, str], ssl.SSLContext] = {}
        self._version = credentials.membership.version

    def client(self, keys: NetworkKeys, protocol: str) -> ssl.SSLContext:
        return self._context(keys, protocol)

    def server(self, name: str) -> tuple[ssl.SSLContext, str]:
        """The context for a dialler that gave this server name, and the id of the keys in it."""
        accepted = self.credentials.membership.accepted
        keys = keys_named(name, accepted) or accepted[0]
        return self._context(keys, ""), keys.key_id

    def _context(self, keys: NetworkKeys, protocol: str) -> ssl.SSLContext:
        membership = self.credentials.membership
        if self._version != membership.version:
            self._version = membership.version
            self._made = {slot: made for slot, made in self._made.items() if membership.accepts(slot[0])}
        slot = (keys.key_id, protocol)
        if slot not in self._made:  # it costs a millisecond
            offered = (protocol,) if protocol else PROTOCOLS
            self._made[slot] = tls_context(self.credentials, server=not protocol, protocols=offered, keys=keys)
        return self._made[slot]


def tls_context(
    credentials: Credentials,
    *,
    server: bool,
    protocols: tuple[str, ...] = PROTOCOLS,
    keys: NetworkKeys | None = None,
) -> ssl.SSLContext:
    """A context that proves `credentials` by one generation of the keys, and accepts the members by that one alone.

    A server takes the protocol that the client offers; a client therefore offers one.
    """
    keys = keys or credentials.membership.newest
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # peers are keys, not names
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(list(protocols))
    if server:
        context.num_tickets = 0
    context.load_verify_locations(cadata=authority_certificate(keys))
    key = credentials.identity.private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificate = ssl.DER_cert_to_PEM_cert(leaf_certificate(keys, credentials.identity))
    with _readable_file(key + certificate.encode()) as path:
        context.load_cert_chain(path)
    return context


@contextlib.contextmanager
def _readable_file(content: bytes) -> Iterator[str]:
    """A path under which OpenSSL can read `content`, which does not touch a disk where that can be had."""
    if sys.platform == "linux":
        try:
            number = os.memfd_create("gossipml", os.MFD_CLOEXEC)
        except OSError:
            pass
        else:
            with open(number, "wb") as memory:
                memory.write(content)
                memory.flush()
                path = f"/proc/self/fd/{number}"
                if os.path.exists(path):  # /proc may be missing in a container
                    yield path
                    return
    number, path = tempfile.mkstemp()  # mode 0600
    try:
        with open(number, "wb") as file:
            file.write(content)
        yield path
    finally:
        os.unlink(path)


class TlsStream:
    """`Stream` over a trio socket. One task may send while another receives."""

    peer_id: PeerId
    protocol: str
    key_id: str

    def __init__(self, socket: stdlib_socket.socket, buffer: bytearray) -> None:
        """Takes over a connected, non-blocking socket. `buffer` is shared by the streams of one trio run."""
        self.remote = from_sockaddr(socket.getpeername())
        self._socket = socket
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject
        self._buffer = buffer
        self._sending = trio.Lock()  # whoever takes ciphertext from the BIO sends it before another does
        self._rest = b""  # ciphertext of what was posted that the socket had no room for
        self._send_broken: str | None = None
        self._broken: str | None = None
        self._writing = self._receiving = self._closed = False
        self._waited = False  # for the socket, since the other tasks had their last turn here

    async def dial(self, context: ssl.SSLContext, keys: NetworkKeys) -> None:
        """Prove both sides to each other and set `peer_id`, `protocol`, `key_id`. `context` is of these keys.

        Raises ssl.SSLError, RemoteError, or OSError as the socket gives it. The timeout is the caller's.
        """
        self.key_id = keys.key_id
        name = name_for(keys, secrets.token_bytes(NONCE_SIZE))
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        await self._handshake()

    async def accept(self, choose: Callable[[str], tuple[ssl.SSLContext, str]]) -> None:
        """As `dial`, for the side that was dialled: with the context that `choose` gives for the server name."""
        hello = b""
        while len(hello) < hello_length(hello):
            if not await self._fill():
                raise ConnectionResetError(f"{self.remote} hung up in the handshake")
            hello += self._incoming.read()
        self._incoming.write(hello)
        context, self.key_id = choose(server_name(hello))
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        await self._handshake()

    async def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._answer()
                if not await self._fill():
                    raise ConnectionResetError(f"{self.remote} hung up in the handshake") from None
            except ssl.SSLError:
                await self._say_goodbye()  # the alert that tells the other side why
                raise
        await self._answer()
        protocol = self._tls.selected_alpn_protocol()
        if protocol is None:  # the two share none; OpenSSL sees to it that what is selected was offered
            raise RemoteError(f"{self.remote} speaks no protocol of ours; install the same version of gossipml")
        self.protocol = protocol
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:  # CERT_REQUIRED leaves no way here
            raise RemoteError(f"{self.remote} showed no certificate")
        self.peer_id = peer_id_from_der(certificate)

    async def send_all(self, *parts: Bytes) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self._broken or self._send_broken:
            raise trio.BrokenResourceError(self._broken or self._send_broken)
        if self._writing:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._writing = True
        try:
            async with self._sending:
                await self._send_parts(parts)
        finally:
            self._writing = False

    def post(self, *parts: Bytes) -> bool:
        if self._closed or self._broken or self._send_broken or self._writing or self._sending.locked():
            return False
        if self._rest or self._outgoing.pending or sum(map(len, parts)) > POST_BYTES:
            return False
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[self._tls.write(view) :]
            data = self._outgoing.read()
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
        except (OSError, ssl.SSLError) as error:
            self._break(error)  # whoever reads or sends next is told
            return False
        self._rest = data[sent:]
        return True

    @property
    def unsent(self) -> bool:
        return bool(self._rest)

    async def serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        while came(await self.receive_into(target())):
            pass

    async def receive_into(self, view: memoryview) -> int:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self._broken:
            raise trio.BrokenResourceError(self._broken)
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()  # other tasks get their turn at each `_fill`
            view = view.cast("B")
            while (count := self._read(view)) is None:
                await self._answer()
                await self._fill()
            return count
        except (OSError, ssl.SSLError) as error:
            raise self._break(error) from error
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                if not (self._broken or self._send_broken or self._writing):
                    with contextlib.suppress(ssl.SSLError):
                        self._tls.unwrap()  # writes close_notify, then complains that theirs is missing
                    await self._say_goodbye()
            finally:
                close_socket(self._socket)
        await trio.lowlevel.checkpoint()

    # Plaintext in and out of the BIOs.

    async def _send_parts(self, parts: tuple[Bytes, ...]) -> None:
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    if self._outgoing.pending >= SLICE_BYTES:
                        await self._send_pending()
                        await trio.lowlevel.checkpoint()  # a fast reader must not starve the other tasks
                    # Never the whole view: all of it would be encrypted into memory.
                    view = view[self._tls.write(view[:SLICE_BYTES]) :]
            await self._send_pending()
        except (OSError, ssl.SSLError) as error:
            raise self._break(error) from error
        except BaseException:  # cancelled: a part of a message is out, and what follows it is lost
            self._send_broken = "an earlier send on this stream was cancelled in the middle"
            raise

    def _read(self, view: memoryview) -> int | None:
        """Decrypt what is there into `view`: how many bytes, 0 at the end, None when more must come first."""
        filled, size, read = 0, len(view), self._tls.read
        try:
            while filled < size:
                # typeshed has not heard of buffers: it is any writable buffer in, a count out
                count: int = read(size - filled, view[filled:])  # type: ignore[assignment]
                if count == 0:  # close_notify
                    return filled
                filled += count
        except ssl.SSLWantReadError:
            return filled or None
        except ssl.SSLError:
            if not filled:  # else what came before it counts first; the next call meets the error again
                raise
        return filled

    # Ciphertext in and out of the socket.

    async def _fill(self) -> bool:
        """Receive ciphertext; False at the end of the TCP stream."""
        if not self._waited:
            await trio.lowlevel.checkpoint()  # a fast sender must not starve the other tasks
        self._waited = False
        while True:
            try:
                count = self._socket.recv_into(self._buffer)
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                self._waited = True
        if count == 0:
            self._incoming.write_eof()
            return False
        with memoryview(self._buffer) as view:
            self._incoming.write(view[:count])
        return True

    async def _send_pending(self) -> None:
        """Send what the BIO holds; the caller has the lock."""
        while self._rest or self._outgoing.pending:
            data, self._rest = memoryview(self._rest or self._outgoing.read()), b""
            while data:
                try:
                    data = data[self._socket.send(data) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)

    async def _answer(self) -> None:
        """Send what reading made TLS say: handshake messages, answers to key updates."""
        if not self._outgoing.pending:
            return
        try:
            if self._rest:
                raise trio.WouldBlock
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            # A writer is at it, or is to be, and sends ours with its own. Waiting for it could wait for ever: the
            # other side may read nothing until we have read what it sends.
            if self._outgoing.pending > MAX_UNSENT:
                raise ConnectionAbortedError("it asks for key updates and reads no answer") from None
            return
        try:
            await self._send_pending()
        except trio.Cancelled:
            self._send_broken = "an answer of TLS was cancelled in the middle"
            raise
        finally:
            self._sending.release()

    async def _say_goodbye(self) -> None:
        """Send an alert or a close_notify if that goes quickly, also when we are being cancelled."""
        with (
            trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_SECONDS),
            contextlib.suppress(OSError, trio.WouldBlock),
        ):
            self._sending.acquire_nowait()
            try:
                await self._send_pending()
            finally:
                self._sending.release()

    def _break(self, error: OSError) -> Exception:  # ssl.SSLError is an OSError
        if self._closed:  # by another task, between two steps of this one
            return trio.ClosedResourceError("this stream is closed")
        self._broken = f"the stream with {self.remote} broke: {explain(error)}"
        return trio.BrokenResourceError(self._broken)


def close_socket(socket: stdlib_socket.socket) -> None:
    """Close, and wake the tasks that wait for it."""
    if socket.fileno() != -1:
        trio.lowlevel.notify_closing(socket)
        socket.close()


def is_another_token(error: OSError) -> bool:
    """Whether a handshake failed because the two sides hold different cookies."""
    return isinstance(error, ssl.SSLCertVerificationError) or _refused_us(error)


def explain(error: OSError) -> str:
    """What went wrong with TLS, for people: who refused whom, and for what."""
    reason = _reason(error)
    if _refused_us(error):
        return "it refused our certificate (it holds another token)"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "it holds another token (its certificate is of another network)"
    if "DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return "it showed no certificate (a stranger)"
    if isinstance(error, ssl.SSLEOFError):
        return "it hung up without a goodbye"
    if isinstance(error, ssl.SSLError):
        return f"it does not speak our TLS ({reason.replace('_', ' ').lower() or error})"
    return error.strerror or str(error) or type(error).__name__


def _refused_us(error: OSError) -> bool:
    # The alerts of TLS 1.3 (RFC 8446, 6.2) that a member sends about the certificate of another network.
    reason = _reason(error)
    return "ALERT" in reason and any(
        name in reason for name in ("UNKNOWN_CA", "DECRYPT_ERROR", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN")
    )


def _reason(error: OSError) -> str:
    return (getattr(error, "reason", None) or "").upper()  # ssl.SSLError alone has one
