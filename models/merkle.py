"""The Merkle tree of a file as in BEP 52 (BitTorrent v2): pure functions over bytes.

Leaves are the SHA-256 hashes of blocks of 16 KiB; the last block is as short as the file leaves it. A node is the
SHA-256 of its two children; missing leaves up to the next power of two are 32 zero bytes. A *piece* is a run of a
power of two of leaves, its hash the root of its subtree, and the *layer* the hashes of all pieces in order. A file of
at most one piece has no layer of its own in BEP 52; here its layer is its root.

The root alone does not tell how deep the tree is (an inner node is the hash of 64 bytes, as a leaf of 64 bytes is), so
a root is always taken together with the size of the file.

Left out: proofs for single leaves. A whole piece is the unit of transfer, so that a bad one has one culprit.
"""

from __future__ import annotations

import hashlib

from gossipml.errors import LocalError, RemoteError

LEAF = 16 * 1024  # BEP 52
HASH = 32
MIN_PIECE = LEAF
MAX_PIECE = 1 << 22  # bounds memory: pieces in flight x piece length
TARGET_PIECES = 64  # enough for a swarm to share; each costs some 0.5 to 1 ms in Python, asked for, sent and kept
MAX_SIZE = 64 << 30  # 16,384 pieces, a layer of 512 KiB

_ZERO = bytes(HASH)


def piece_length(size: int) -> int:
    """Bytes of each piece but the last, for a file of `size` bytes: the same on every peer."""
    length = MIN_PIECE
    while length < MAX_PIECE and size > length * TARGET_PIECES:
        length *= 2
    return length


def piece_count(size: int) -> int:
    return -(-size // piece_length(size))


def piece_size(size: int, index: int) -> int:
    """Bytes of one piece of a file of `size` bytes."""
    length = piece_length(size)
    return min(length, size - index * length)


def piece_leaves(size: int) -> int:
    """Leaves under the hash of a piece. A file of one piece is padded no further than its own next power of two."""
    length = piece_length(size)
    return length // LEAF if size > length else _power_of_two(-(-size // LEAF))


def piece_hash(piece: bytes | bytearray | memoryview, leaves: int) -> bytes:
    """The hash of a piece, padded to `leaves` leaves."""
    view, sha256 = memoryview(piece), hashlib.sha256
    return _fold([sha256(view[start : start + LEAF]).digest() for start in range(0, len(view), LEAF)], leaves, _ZERO)


class PieceHasher:
    """The hash of a piece that arrives in place: each leaf is hashed while it is still in the processor's cache."""

    def __init__(self, piece: bytearray, leaves: int) -> None:
        self._piece = memoryview(piece)
        self._leaves = leaves
        self._there = self._done = 0
        self._hashes: list[bytes] = []

    def arrived(self, count: int) -> None:
        """So many more bytes of the piece are there."""
        view, sha256 = self._piece, hashlib.sha256
        self._there += count
        whole = self._there // LEAF * LEAF
        self._hashes += [sha256(view[start : start + LEAF]).digest() for start in range(self._done, whole, LEAF)]
        self._done = whole

    def digest(self) -> bytes:
        """As `piece_hash`. LocalError while some of it is missing."""
        if self._there != len(self._piece):
            raise LocalError(f"a piece of {len(self._piece)} bytes was hashed after {self._there}")
        rest = self._piece[self._done :]
        return _fold([*self._hashes, *([hashlib.sha256(rest).digest()] if rest else [])], self._leaves, _ZERO)


def root_of_layer(layer: bytes, size: int) -> bytes:
    """The root over the piece hashes of a file of `size` bytes."""
    hashes = [layer[start : start + HASH] for start in range(0, len(layer), HASH)]
    if len(hashes) == 1:
        return hashes[0]
    pad, leaves = _ZERO, piece_leaves(size)
    while leaves > 1:
        pad, leaves = hashlib.sha256(pad + pad).digest(), leaves // 2
    return _fold(hashes, _power_of_two(len(hashes)), pad)


def check_layer(layer: bytes, root: bytes, size: int) -> None:
    """RemoteError unless `layer` is the layer of the file with this root and size."""
    expected = piece_count(size) * HASH
    if len(layer) != expected:
        raise RemoteError(f"the piece hashes of {size} bytes take {expected} bytes, not {len(layer)}")
    if root_of_layer(layer, size) != root:
        raise RemoteError(f"the piece hashes do not lead to the root {root.hex()[:12]}")


def layer_of(data: bytes | bytearray | memoryview) -> bytes:
    """The layer of a file that is in memory."""
    view, length, leaves = memoryview(data), piece_length(len(data)), piece_leaves(len(data))
    return b"".join(piece_hash(view[start : start + length], leaves) for start in range(0, len(view), length))


def root_of(data: bytes | bytearray | memoryview) -> bytes:
    """The root of a file that is in memory (BEP 52: `pieces root`)."""
    return root_of_layer(layer_of(data), len(data))


def _fold(hashes: list[bytes], width: int, pad: bytes) -> bytes:
    """The root over `width` (a power of two) nodes, those missing at the end being `pad`."""
    sha256 = hashlib.sha256
    while width > 1:
        if len(hashes) % 2:
            hashes.append(pad)
        hashes = [sha256(hashes[i] + hashes[i + 1]).digest() for i in range(0, len(hashes), 2)]
        pad, width = sha256(pad + pad).digest(), width // 2
    return hashes[0]


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
