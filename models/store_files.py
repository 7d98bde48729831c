"""The store's folder for the command line: synchronous, beside a running daemon or without one.

`export` copies a version out and verifies each piece on the way; `stage` copies a user's file in, for the daemon to
measure and take over. Both in bounded memory, both whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from gossipml.env.files import free, fresh_name, fsync_folder, list_folder, read, read_at, size
from gossipml.errors import RemoteError, UserError
from gossipml.models import merkle
from gossipml.models.artifact import read_file_header
from gossipml.models.manifest import MAX_MANIFEST, Manifest, parse_manifest, version_id
from gossipml.models.store_rules import full_bits, hash_of, latest_first, read_have, readable

MANIFESTS = "models/manifests"
CONTENT = "models/content"
INCOMING = "models/incoming"


def read_versions(home: Path) -> list[Manifest]:
    """The versions that are held whole under a home, latest first; damaged ones are left out."""
    found = []
    for name in list_folder(home / MANIFESTS):
        version = hash_of(name)
        if version is None:
            continue
        try:
            data = read(home / MANIFESTS / name, limit=MAX_MANIFEST)
            if version_id(data) != version:
                continue
            manifest = parse_manifest(data)
        except (OSError, RemoteError):
            continue
        if _is_whole(home, manifest):
            found.append(manifest)
    return latest_first(found)


def export(home: Path, version: bytes, target: Path) -> Manifest:
    """Copy a held version to `target`, verified; an old file there is replaced when all is well.

    UserError when it is not held whole, when a piece is corrupt, when `target` cannot be written.
    """
    manifest = next((one for one in read_versions(home) if one.version == version), None)
    if manifest is None:
        raise UserError(f"version {version.hex()[:12]} is not whole on this peer; `gossipml models pull` fetches it")
    layer = _layer(home, manifest)
    if target.is_dir():
        target = target / f"{manifest.name}-{version.hex()[:12]}.safetensors"
    temporary = target.with_name(f".{target.name[:200]}.{fresh_name()}.tmp")
    try:
        with open(temporary, "xb", buffering=0) as file:
            for index in range(merkle.piece_count(manifest.size)):
                file.write(_piece(home, manifest, layer, index))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{target} cannot be written: {error.strerror or error}; choose another place") from None
        raise
    fsync_folder(target.parent)
    return manifest


def stage(source: Path, home: Path) -> str:
    """Copy a `.safetensors` file to where the daemon of `home` can take it over; its path under the home.

    UserError when it is no safetensors file, too large, or the disk too small.
    """
    read_file_header(source)
    length = source.stat().st_size
    if length > merkle.MAX_SIZE:
        raise UserError(f"{source} has {readable(length)}; the largest version has {readable(merkle.MAX_SIZE)}")
    if (room := free(home / INCOMING)) < length:
        raise UserError(f"{source} has {readable(length)}, but {home} has only {readable(room)} free; free some space")
    name = f"{INCOMING}/{fresh_name()}.import"
    target = home / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # the system's own copy: no memory, and where it can, no copy
    except BaseException as error:
        with contextlib.suppress(OSError):
            target.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{source} cannot be copied to {home}: {error.strerror or error}") from None
        raise
    return name


def _is_whole(home: Path, manifest: Manifest) -> bool:
    """As `Store.open` sees it: the file under its own name, and nothing that says that pieces of it are missing."""
    base, count = home / CONTENT / manifest.root.hex(), merkle.piece_count(manifest.size)
    if size(base) != manifest.size:
        return False
    try:
        have = read(base.with_name(f"{base.name}.have"), limit=count + 40)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return read_have(have, manifest.root, count) == full_bits(count)


def _layer(home: Path, manifest: Manifest) -> bytes:
    count = merkle.piece_count(manifest.size)
    if count == 1:
        return manifest.root
    try:
        layer = read(home / CONTENT / f"{manifest.root.hex()}.layer", limit=count * merkle.HASH)
        merkle.check_layer(layer, manifest.root, manifest.size)
    except (OSError, RemoteError):
        raise UserError(
            f"the piece hashes of version {manifest.version.hex()[:12]} are damaged on this disk; a start of the peer "
            "repairs them: `gossipml peer start`"
        ) from None
    return layer


def _piece(home: Path, manifest: Manifest, layer: bytes, index: int) -> bytes:
    path, length = home / CONTENT / manifest.root.hex(), merkle.piece_size(manifest.size, index)
    expected = layer[index * merkle.HASH : (index + 1) * merkle.HASH]
    try:
        piece = read_at(path, index * manifest.piece_length, length)
    except OSError:
        piece = b""
    if len(piece) != length or merkle.piece_hash(piece, merkle.piece_leaves(manifest.size)) != expected:
        raise UserError(
            f"piece {index} of version {manifest.version.hex()[:12]} is corrupt on this disk; `gossipml models pull "
            f"{manifest.name}` fetches it anew from others"
        )
    return piece
