"""The Merkle tree of BEP 52: against hand-made vectors, a plain recursive tree, and libtorrent."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gossipml.errors import LocalError, RemoteError
from gossipml.models import merkle
from gossipml.models.merkle import LEAF, MAX_PIECE, MAX_SIZE

ZERO = bytes(32)


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def plain_root(data: bytes) -> bytes:
    """BEP 52 as it reads: leaves, zeros up to a power of two, pairs."""
    level = [sha(data[i : i + LEAF]) for i in range(0, len(data), LEAF)]
    while len(level) & (len(level) - 1):
        level.append(ZERO)
    while len(level) > 1:
        level = [sha(level[i], level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def filler(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def test_a_file_of_one_block_has_the_hash_of_its_bytes_as_root() -> None:
    assert merkle.root_of(b"abc") == sha(b"abc")
    assert merkle.root_of(bytes(LEAF)) == sha(bytes(LEAF))


def test_roots_of_few_blocks_by_hand() -> None:
    blocks = [bytes([n]) * LEAF for n in range(4)]
    a, b, c, d = (sha(block) for block in blocks)
    assert merkle.root_of(b"".join(blocks[:2])) == sha(a, b)
    assert merkle.root_of(b"".join(blocks[:3])) == sha(sha(a, b), sha(c, ZERO))
    assert merkle.root_of(b"".join(blocks)) == sha(sha(a, b), sha(c, d))
    assert merkle.root_of(b"".join(blocks[:2]) + b"x") == sha(sha(a, b), sha(sha(b"x"), ZERO))


def test_the_last_piece_is_padded_to_a_whole_piece_and_missing_pieces_with_zero_trees() -> None:
    size = LEAF * merkle.TARGET_PIECES + 1  # pieces of two blocks
    data = filler(size)
    assert (merkle.piece_length(size), merkle.piece_count(size)) == (2 * LEAF, 33)
    layer = merkle.layer_of(data)
    assert layer[-32:] == sha(sha(data[-1:]), ZERO)
    empty = sha(ZERO, ZERO)
    hashes = [layer[i : i + 32] for i in range(0, len(layer), 32)] + [empty] * 31
    while len(hashes) > 1:
        hashes = [sha(hashes[i], hashes[i + 1]) for i in range(0, len(hashes), 2)]
    assert merkle.root_of(data) == hashes[0] == plain_root(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40 * LEAF))
@example(1)
@example(LEAF)
@example(LEAF + 1)
@example(2 * LEAF - 1)
@example(33 * LEAF)
def test_any_size_has_the_root_of_the_plain_tree(size: int) -> None:
    data = filler(size)
    layer = merkle.layer_of(data)
    assert len(layer) == 32 * merkle.piece_count(size)
    assert merkle.root_of_layer(layer, size) == plain_root(data)
    merkle.check_layer(layer, plain_root(data), size)


@pytest.mark.parametrize("size", [10, LEAF - 1, LEAF, LEAF + 1, 5 * LEAF + 7, LEAF * 512 + 1, 9_000_001, 40_000_003])
def test_libtorrent_finds_the_same_roots_and_layers(tmp_path: Path, size: int) -> None:
    libtorrent = pytest.importorskip("libtorrent", reason="libtorrent is not installed: no second opinion on BEP 52")
    data = filler(size)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    files = libtorrent.list_files(str(path))
    torrent = libtorrent.create_torrent(
        files, piece_size=merkle.piece_length(size), flags=libtorrent.create_torrent.v2_only
    )
    libtorrent.set_piece_hashes(torrent, str(tmp_path))
    made = libtorrent.bdecode(libtorrent.bencode(torrent.generate()))
    entry = made[b"info"][b"file tree"][path.name.encode()][b""]
    assert entry[b"pieces root"] == merkle.root_of(data)
    if merkle.piece_count(size) > 1:
        assert made[b"piece layers"][entry[b"pieces root"]] == merkle.layer_of(data)


def test_pieces_are_a_function_of_the_size_and_bounded() -> None:
    sizes = [1, LEAF, 1 << 20, (1 << 20) + 1, 1 << 26, 1 << 28, (1 << 28) + 1, 2_500_000_000, MAX_SIZE]
    assert [merkle.piece_length(size) >> 10 for size in sizes] == [16, 16, 16, 32, 1024, 4096, 4096, 4096, 4096]
    assert merkle.piece_count(2_500_000_000) == 597
    for size in sizes:
        length, count = merkle.piece_length(size), merkle.piece_count(size)
        assert LEAF <= length <= MAX_PIECE and length & (length - 1) == 0
        assert 0 < merkle.piece_size(size, count - 1) <= length
        assert merkle.piece_size(size, count - 1) + (count - 1) * length == size
    assert 32 * merkle.piece_count(MAX_SIZE) == 1 << 19


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5 * LEAF), st.lists(st.integers(0, 2 * LEAF), max_size=12))
@example(2 * LEAF, [LEAF, LEAF])
@example(1, [])
def test_a_piece_that_arrives_in_parts_has_the_hash_of_the_whole(size: int, parts: list[int]) -> None:
    data, piece, there = filler(size), bytearray(size), 0
    hasher = merkle.PieceHasher(piece, 8)
    for part in [*parts, size]:
        part = min(part, size - there)
        piece[there : there + part] = data[there : there + part]
        there += part
        if there < size:
            with pytest.raises(LocalError, match=f"hashed after {there - part}"):
                hasher.digest()
        hasher.arrived(part)
    assert hasher.digest() == merkle.piece_hash(data, 8)


def test_a_wrong_layer_is_refused_by_length_then_by_hash() -> None:
    data = filler(3 * LEAF)
    layer, root = merkle.layer_of(data), merkle.root_of(data)
    for wrong in (b"", layer[:-1], layer + ZERO, layer[:-32]):
        with pytest.raises(RemoteError, match="take 96 bytes"):
            merkle.check_layer(wrong, root, len(data))
    for index in range(len(layer)):
        flipped = bytearray(layer)
        flipped[index] ^= 1
        with pytest.raises(RemoteError, match="do not lead to the root"):
            merkle.check_layer(bytes(flipped), root, len(data))
