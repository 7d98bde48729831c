"""What the dialler and the owner of a stream of `gossipml-swarm/1` say. This docstring is the specification.

Such a stream is for the dialler to fetch; two peers that fetch from each other have two. Frames are those of
`gossipml.peer.wire`: 4 bytes of length, big endian, a canonical msgpack header ("t" names the kind), a raw body.

From the dialler:
| kind   | fields     | meaning |
|--------|------------|---------|
| open   | root, port | I want the content with this Merkle root; once a stream. I listen at that port (0: nowhere) |
| ask    | n          | send these pieces, at most 64 unanswered; each gets exactly one answer: piece or none |
| cancel | n          | no longer wanted: answered by none, or by the piece when it is on its way |
| manifest | id       | the manifest with this hash |
| layer  | root       | all piece hashes of a content |
| holds  | ids        | which of these versions, at most 256, do you hold whole? |
| hold   | data       | a manifest: please keep that version too |

From the owner:
| kind   | fields     | body |
|--------|------------|------|
| bits   | count      | the bitfield of the pieces there are (BEP 3: the high bit of byte 0 is piece 0; spare bits 0) |
| have   | n          | these have come since |
| piece  | n, bytes   | the piece |
| none   | n, lost    | not sent: lost (it is gone or was never there), or cancelled |
| alive  |            | nothing to say; at least every BEAT seconds something is said |
| manifest | data     | |
| layer  | bytes      | 32 bytes for each piece |
| holds  | have       | one byte for each version asked about: 1 or 0 |
| hold   | reason     | empty: it will be kept |
| no     | code, reason | the answer to an open, manifest, layer: unknown, or full (come again later) |

Whole pieces are the unit, so a bad piece has one culprit. There is no choking as in BEP 3: requests wait in the
owner's queue, which serves all askers in fair turns, and `alive` says that waiting is not dying. Fields that are
not listed are ignored; a kind that is not listed, or from the wrong side, is an error. Everything that breaks
these rules is a RemoteError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gossipml import codec
from gossipml.codec import Value
from gossipml.errors import LocalError, RemoteError
from gossipml.peer.wire import MAX_REASON, clean_reason

MAX_HEADER = 16 * 1024  # 256 version ids are 8.7 kB
MAX_PIECES = 1 << 17  # the bitfield is 16 KiB then, the layer 4 MiB
MAX_ASKED = 64  # pieces asked for and not answered: with the smallest pieces of 16 KiB that is 1 MiB under way
MAX_LISTED = 512  # indexes in one message
MAX_VERSIONS = 256
MAX_MANIFEST = 720  # fits into one record of the DHT
MAX_PIECE = 1 << 26
HASH_SIZE = 32
BEAT = 3.0

LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Open:
    root: bytes
    port: int


@dataclass(frozen=True)
class Ask:
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Cancel:
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class AskManifest:
    version: bytes


@dataclass(frozen=True)
class AskLayer:
    root: bytes


@dataclass(frozen=True)
class AskHolds:
    versions: tuple[bytes, ...]


@dataclass(frozen=True)
class AskHold:
    manifest: bytes


@dataclass(frozen=True)
class Bits:
    count: int


@dataclass(frozen=True)
class Have:
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    index: int
    length: int


@dataclass(frozen=True)
class NoPiece:
    indexes: tuple[int, ...]
    lost: bool


@dataclass(frozen=True)
class Alive:
    pass


@dataclass(frozen=True)
class ManifestIs:
    data: bytes


@dataclass(frozen=True)
class LayerIs:
    length: int


@dataclass(frozen=True)
class HoldsAre:
    have: tuple[bool, ...]


@dataclass(frozen=True)
class HoldIs:
    reason: str


@dataclass(frozen=True)
class No:
    code: str
    reason: str


FromDialler: TypeAlias = Open | Ask | Cancel | AskManifest | AskLayer | AskHolds | AskHold
FromOwner: TypeAlias = Bits | Have | Piece | NoPiece | Alive | ManifestIs | LayerIs | HoldsAre | HoldIs | No
Message: TypeAlias = FromDialler | FromOwner


# Encoding.


def encode(message: Message) -> bytes:
    """Length and header; the body of bits, piece and layer follows it and is not copied here."""
    header = codec.pack(_fields(message))
    if len(header) > MAX_HEADER:
        raise LocalError(f"header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    return LENGTH.pack(len(header)) + header


def body_length(message: Message) -> int:
    match message:
        case Piece(_, length) | LayerIs(length):
            return length
        case Bits(count):
            return (count + 7) // 8
    return 0


def _fields(message: Message) -> dict[str, object]:
    match message:
        case Piece(index, length):  # the most frequent ones first
            return {"t": "piece", "n": index, "bytes": length}
        case Ask(indexes):
            return {"t": "ask", "n": indexes}
        case Have(indexes):
            return {"t": "have", "n": indexes}
        case Open(root, port):
            return {"t": "open", "root": root, "port": port}
        case Cancel(indexes):
            return {"t": "cancel", "n": indexes}
        case AskManifest(version):
            return {"t": "manifest", "id": version}
        case AskLayer(root):
            return {"t": "layer", "root": root}
        case AskHolds(versions):
            return {"t": "holds", "ids": versions}
        case AskHold(manifest):
            return {"t": "hold", "data": manifest}
        case Bits(count):
            return {"t": "bits", "count": count}
        case NoPiece(indexes, lost):
            return {"t": "none", "n": indexes, "lost": lost}
        case Alive():
            return {"t": "alive"}
        case ManifestIs(data):
            return {"t": "manifest", "data": data}
        case LayerIs(length):
            return {"t": "layer", "bytes": length}
        case HoldsAre(have):
            return {"t": "holds", "have": bytes(have)}
        case HoldIs(reason):
            return {"t": "hold", "reason": clean_reason(reason)}
        case No(code, reason):
            return {"t": "no", "code": code, "reason": clean_reason(reason)}


# Decoding: every field of a hostile map is read through a check.


def read_length(data: bytes | bytearray | memoryview) -> int:
    """The length of the header that follows."""
    (length,) = LENGTH.unpack(data)
    if not 0 < length <= MAX_HEADER:
        raise RemoteError(f"header of {length} bytes; allowed are 1 to {MAX_HEADER}")
    return int(length)


def from_dialler(data: bytes | bytearray | memoryview) -> FromDialler:
    """The message of a dialler whose header is `data`."""
    kind, fields = _kind(data)
    read = _FROM_DIALLER.get(kind)
    if read is None:
        raise RemoteError(f"message of unknown kind {clean_reason(kind)!r} from the dialler")
    return read(fields)


def from_owner(data: bytes | bytearray | memoryview) -> FromOwner:
    """The message of an owner whose header is `data`."""
    kind, fields = _kind(data)
    read = _FROM_OWNER.get(kind)
    if read is None:
        raise RemoteError(f"message of unknown kind {clean_reason(kind)!r} from the owner")
    return read(fields)


def _kind(data: bytes | bytearray | memoryview) -> tuple[str, dict[str, Value]]:
    fields = codec.as_map(codec.unpack(data, limit=MAX_HEADER))
    return codec.get_str(fields, "t", limit=16), fields


def _index(value: Value) -> int:
    if type(value) is not int or not 0 <= value < MAX_PIECES:
        raise RemoteError(f"the number of a piece must be from 0 to {MAX_PIECES - 1}")
    return value


def _indexes(fields: dict[str, Value]) -> tuple[int, ...]:
    items = codec.get_list(fields, "n", limit=MAX_LISTED)
    if not items:
        raise RemoteError("an empty list of pieces")
    return tuple(_index(item) for item in items)


def _asked(fields: dict[str, Value]) -> tuple[int, ...]:
    indexes = _indexes(fields)
    if len(indexes) > MAX_ASKED:
        raise RemoteError(f"{len(indexes)} pieces in one message; allowed are {MAX_ASKED}")
    return indexes


def _hashes(fields: dict[str, Value]) -> tuple[bytes, ...]:
    hashes = []
    for item in codec.get_list(fields, "ids", limit=MAX_VERSIONS):
        if not isinstance(item, bytes) or len(item) != HASH_SIZE:
            raise RemoteError(f"a version id is {HASH_SIZE} bytes")
        hashes.append(item)
    return tuple(hashes)


def _flags(fields: dict[str, Value]) -> tuple[bool, ...]:
    data = codec.get_bytes(fields, "have", limit=MAX_VERSIONS)
    if data.strip(b"\0\1"):
        raise RemoteError("a flag must be 0 or 1")
    return tuple(flag == 1 for flag in data)


def _text(fields: dict[str, Value]) -> str:
    text = codec.get_str(fields, "reason", limit=MAX_REASON)
    if not text.isprintable():  # it is shown on terminals
        raise RemoteError("field 'reason' holds characters that cannot be printed")
    return text


_FROM_DIALLER: dict[str, Callable[[dict[str, Value]], FromDialler]] = {
    "open": lambda f: Open(codec.get_bytes(f, "root", size=HASH_SIZE), codec.get_int(f, "port", high=65535)),
    "ask": lambda f: Ask(_asked(f)),
    "cancel": lambda f: Cancel(_asked(f)),
    "manifest": lambda f: AskManifest(codec.get_bytes(f, "id", size=HASH_SIZE)),
    "layer": lambda f: AskLayer(codec.get_bytes(f, "root", size=HASH_SIZE)),
    "holds": lambda f: AskHolds(_hashes(f)),
    "hold": lambda f: AskHold(codec.get_bytes(f, "data", limit=MAX_MANIFEST)),
}
_FROM_OWNER: dict[str, Callable[[dict[str, Value]], FromOwner]] = {
    "bits": lambda f: Bits(codec.get_int(f, "count", low=1, high=MAX_PIECES)),
    "have": lambda f: Have(_indexes(f)),
    "piece": lambda f: Piece(_index(f.get("n")), codec.get_int(f, "bytes", low=1, high=MAX_PIECE)),
    "none": lambda f: NoPiece(_indexes(f), codec.get_bool(f, "lost")),
    "alive": lambda f: Alive(),
    "manifest": lambda f: ManifestIs(codec.get_bytes(f, "data", limit=MAX_MANIFEST)),
    "layer": lambda f: LayerIs(codec.get_int(f, "bytes", low=HASH_SIZE, high=HASH_SIZE * MAX_PIECES)),
    "holds": lambda f: HoldsAre(_flags(f)),
    "hold": lambda f: HoldIs(_text(f)),
    "no": lambda f: No(codec.get_str(f, "code", limit=16), _text(f)),
}


# Bitfields: bytes in BEP 3's order on the wire, an integer whose bit i is piece i in memory.

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def read_bits(data: bytes | bytearray | memoryview, count: int) -> int:
    """The bitfield of `count` pieces; RemoteError when its length is wrong or a spare bit is set."""
    if len(data) != (count + 7) // 8:
        raise RemoteError(f"a bitfield of {len(data)} bytes for {count} pieces")
    bits = int.from_bytes(bytes(data).translate(_REVERSED), "little")
    if bits >> count:
        raise RemoteError("a bitfield with spare bits set")
    return bits


def write_bits(bits: int, count: int) -> bytes:
    return bits.to_bytes((count + 7) // 8, "little").translate(_REVERSED)
