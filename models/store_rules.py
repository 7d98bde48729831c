"""What the store decides without a disk: what collection keeps, what a person means, the forms of small files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence

from gossipml.errors import UserError
from gossipml.models import merkle
from gossipml.models.manifest import Manifest

MAX_PINS = 10_000
MIN_PREFIX = 6  # hexadecimal characters of an id: one in 16 million


def latest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    return sorted(manifests, key=lambda manifest: manifest.order, reverse=True)


def kept(
    manifests: Collection[Manifest], is_whole: Callable[[Manifest], bool], pins: Collection[bytes], keep_last: int
) -> set[bytes]:
    """Ids of what collection leaves: the pinned versions, and of each name the `keep_last` latest that are whole and as
    many wanted ones that are later than the last of these. A head that nobody can give never costs a whole version."""
    found = set(pins)
    for name in {manifest.name for manifest in manifests}:
        whole = wanted = 0
        for manifest in latest_first(one for one in manifests if one.name == name):
            if whole == keep_last:
                break
            if is_whole(manifest):
                whole += 1
            elif wanted < keep_last:
                wanted += 1
            else:
                continue
            found.add(manifest.version)
    return found


def choose(versions: Sequence[Manifest], name: str, prefix: str) -> Manifest:
    """Of versions, latest first, the one whose id begins with `prefix`; the first for none. UserError."""
    if not prefix:
        return versions[0]
    prefix = prefix.lower()
    if len(prefix) < MIN_PREFIX:
        raise UserError(f"version {prefix!r:.80} is too short; give at least {MIN_PREFIX} characters of the id")
    found = [manifest for manifest in versions if manifest.version.hex().startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"version {prefix!r:.80} of {name!r:.80} stands for {len(found)} versions; give more of the id")
    raise UserError(f"{name!r:.80} has no version {prefix!r:.80} here; `gossipml models show {name:.80}` lists them")


def full_bits(count: int) -> bytes:
    """The bitfield of all pieces; the spare bits at the end are 0 (BEP 3)."""
    return bytes([0xFF] * (count // 8) + [0xFF00 >> (count % 8) & 0xFF] * (count % 8 > 0))


def have_file(bits: bytes, root: bytes) -> bytes:
    """A bitfield as it stands on disk."""
    return bits + hashlib.sha256(root + bits).digest()


def read_have(data: bytes, root: bytes, count: int) -> bytes | None:
    """The bitfield in a `.have`; None when it is damaged."""
    bits, digest = data[:-32], data[-32:]
    whole = full_bits(count)
    good = len(bits) == len(whole) and digest == hashlib.sha256(root + bits).digest()
    return bits if good and not any(have & ~every for have, every in zip(bits, whole, strict=True)) else None


def pins_file(pins: set[bytes]) -> bytes:
    lines = "".join(f"{version.hex()}\n" for version in sorted(pins)).encode()
    return hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines


def read_pins(data: bytes) -> set[bytes] | None:
    """None when the file is damaged."""
    first, _, lines = data.partition(b"\n")
    if first != hashlib.sha256(lines).hexdigest().encode():
        return None
    found = [hash_of(line) for line in lines.decode("ascii", "replace").splitlines()]
    return {version for version in found if version is not None}


def readable(size: int) -> str:
    """`2.5 GB`."""
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def cost_of(size: int) -> int:
    """Bytes that content takes on the disk, with its piece hashes."""
    count = merkle.piece_count(size)
    return size + (count * merkle.HASH if count > 1 else 0)


def hash_of(text: str) -> bytes | None:
    """32 bytes from their hexadecimal form, the only one that we write."""
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        return None
    return bytes.fromhex(text)
