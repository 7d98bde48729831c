"""Which generation of the network's keys a connection uses: said by the dialler in TLS's server name (SNI).

    name = "k" | hexadecimal( nonce(8) | HMAC-SHA256(name key, nonce)(first 8) )

While a token is rotated a peer accepts two authorities and must show the certificate that the other side accepts. The
listener finds the key whose HMAC fits; to somebody without the cookie each connection's name looks like another, so
a network cannot be recognised by it. A name of none of our keys is answered with the newest: TLS then fails in the
ordinary way, with its alert.

The name is read from the ClientHello (RFC 8446, 4.1.2; RFC 6066, 3) before TLS begins. `SSLContext.sni_callback` would
do it too, but for a name that is not ASCII CPython prints lines to standard error that strangers could cause without
end. A name is a hint, no proof: the certificates prove.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from gossipml.keys import NetworkKeys

NONCE_SIZE = 8
TAG_SIZE = 8
NAME_LENGTH = 1 + 2 * (NONCE_SIZE + TAG_SIZE)
MAX_HELLO = 4096  # ours are 0.3 to 2 kB, the larger with the key shares of post-quantum TLS


def name_for(keys: NetworkKeys, nonce: bytes) -> str:
    """The server name of a dial that uses these keys; `nonce` is 8 fresh random bytes."""
    return "k" + (nonce + _tag(keys, nonce)).hex()


def keys_named(name: str, candidates: Iterable[NetworkKeys]) -> NetworkKeys | None:
    """Those of the candidates that the name was made with."""
    if len(name) != NAME_LENGTH or name[0] != "k":
        return None
    try:
        raw = bytes.fromhex(name[1:])
    except ValueError:
        return None
    nonce, tag = raw[:NONCE_SIZE], raw[NONCE_SIZE:]
    return next((keys for keys in candidates if hmac.compare_digest(tag, _tag(keys, nonce))), None)


def _tag(keys: NetworkKeys, nonce: bytes) -> bytes:
    return hmac.digest(keys.name_key, nonce, hashlib.sha256)[:TAG_SIZE]


def hello_length(start: bytes) -> int:
    """How many bytes to have before looking for the name; 0 when what begins so is no ClientHello of ours."""
    if len(start) < 5:
        return 5 if start[:1] in (b"", b"\x16") else 0
    length = 5 + int.from_bytes(start[3:5])
    return length if start[0] == 22 and length <= MAX_HELLO else 0  # 22: handshake


def server_name(hello: bytes) -> str:
    """The server name in a ClientHello record; empty when there is none or it is malformed."""
    try:
        return _server_name(_Reader(hello))
    except (IndexError, UnicodeDecodeError):
        return ""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bool__(self) -> bool:
        return bool(self._data)

    def take(self, count: int) -> bytes:
        if count > len(self._data):
            raise IndexError("shorter than it says")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def block(self, size: int) -> bytes:
        """What follows its own length of `size` bytes."""
        return self.take(self.number(size))


def _server_name(record: _Reader) -> str:
    record.take(3)  # type and version
    message = _Reader(record.block(2))
    if message.number(1) != 1:  # ClientHello
        return ""
    hello = _Reader(message.block(3))
    hello.take(2 + 32)  # version, random
    hello.block(1)  # session id
    hello.block(2)  # cipher suites
    hello.block(1)  # compression
    extensions = _Reader(hello.block(2))
    while extensions:
        kind, content = extensions.number(2), _Reader(extensions.block(2))
        if kind == 0:  # server_name
            names = _Reader(content.block(2))
            return names.block(2).decode("ascii") if names.number(1) == 0 else ""  # host_name
    return ""
