"""The manifest of a model version: what it is, where it comes from, who says so. Its hash is the version's identity.

Canonical msgpack of a list, at most 720 bytes so that it fits into one record of the DHT:

    [format = 1, network id, name, specification digest, height, [parent ids], age, {metric: value}, size,
     piece length, root, created, publisher's public key, note, signature]

The signature is Ed25519 over `gossipml/v1/manifest` and all bytes before the signature (its two bytes of msgpack
header and itself, which are always the last 66). The version id is the SHA-256 of all bytes.

Which version of a name is the latest: the one with the greatest (height, age, version id) among the valid manifests
that a reader finds. Height is 1 more than the greatest of the parents, so a version that builds on another always wins
over it; of versions made at the same time the one that has seen more samples wins; the id breaks ties. Every reader
decides the same from the same manifests, and the next publisher names the concurrent ones as parents. A height above
the seconds since 2020 is refused, as is a creation time in the future: nobody can make a name unsurpassable, and the
height of an honest history (less than one version a second) never meets that bound.

A rollback is a new manifest above the present ones, with the root of an older version.

Left out: whether the parents exist. They may have been collected long ago.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gossipml import codec
from gossipml.errors import RemoteError, UserError
from gossipml.identity import Identity, verify
from gossipml.ids import PeerId, PublicKey, peer_id_of
from gossipml.models.merkle import HASH, MAX_SIZE, piece_length

FORMAT = 1
MAX_MANIFEST = 720  # BEP 44's 1,000 bytes of value less what a sealed, signed datagram adds
MAX_NAME = 64
MAX_PARENTS = 4
MAX_METRICS = 8
MAX_METRIC_KEY = 24
MAX_METRICS_BYTES = 212  # 8 keys of 16 characters; longer keys when there are fewer. Fills the 720 bytes at worst
MAX_NOTE = 80  # bytes of UTF-8
MIN_SIZE = 10  # of a safetensors file: 8 bytes of length, `{}`
MAX_AGE = 1e18  # samples
NETWORK_ID = 16
CLOCK_SLACK = 120  # seconds that two clocks may differ, as for records of the DHT
EPOCH = 1_577_836_800  # 2020-01-01 UTC
MAX_CREATED = 1 << 32  # 2106; keeps the field at 5 bytes

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_METRIC = re.compile(r"[a-z0-9][a-z0-9_]{0,23}")
_DOMAIN = b"gossipml/v1/manifest"
_SIGNATURE = 64
_TAIL = 2 + _SIGNATURE  # msgpack's header of 64 bytes, and they
_FIELDS = 15


@dataclass(frozen=True)
class Manifest:
    network_id: bytes
    name: str
    spec: bytes
    """Digest of the model's specification (`Layout.digest`), 32 bytes; empty for an imported file."""
    height: int
    parents: tuple[bytes, ...]
    """Version ids, at most 4."""
    age: float
    """Samples that the parameters have seen."""
    metrics: Mapping[str, float] = field(hash=False)
    size: int
    piece_length: int
    root: bytes
    """BEP 52 `pieces root` of the safetensors file."""
    created: int
    """Wall seconds."""
    publisher: PublicKey
    note: str
    data: bytes = field(repr=False)
    """The bytes that were signed and whose hash is the version id."""

    @cached_property
    def version(self) -> bytes:
        return version_id(self.data)

    @property
    def peer(self) -> PeerId:
        """Who published it."""
        return peer_id_of(self.publisher)

    @property
    def order(self) -> tuple[int, float, bytes]:
        """The greatest is the latest."""
        return self.height, self.age, self.version


def version_id(data: bytes) -> bytes:
    """SHA-256 of the manifest's bytes: 32 bytes."""
    return hashlib.sha256(data).digest()


def latest(manifests: Iterable[Manifest]) -> Manifest | None:
    """The version that stands for a name, the same for every reader; None of none."""
    return max(manifests, key=lambda manifest: manifest.order, default=None)


def succession(heads: Iterable[Manifest]) -> tuple[int, tuple[bytes, ...]]:
    """Height and parents of a version that follows these: the four latest when there are more."""
    found = {head.version: head for head in heads}
    parents = sorted(found.values(), key=lambda head: head.order, reverse=True)[:MAX_PARENTS]
    return 1 + max((head.height for head in parents), default=0), tuple(head.version for head in parents)


def check_name(name: str) -> str:
    """The name of a model, or UserError."""
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"model name {name!r:.100} is not a name; use at most {MAX_NAME} of a-z, 0-9, - and _, and begin with a "
            "letter or digit"
        )
    return name


def sign_manifest(
    identity: Identity,
    *,
    network_id: bytes,
    name: str,
    spec: bytes,
    height: int,
    parents: Sequence[bytes],
    age: float,
    metrics: Mapping[str, float],
    size: int,
    root: bytes,
    created: float,
    note: str = "",
) -> bytes:
    """The bytes of a manifest by `identity`. UserError when a value is out of its bounds."""
    check_name(name)
    body = [
        FORMAT,
        network_id,
        name,
        spec,
        height,
        list(parents),
        float(age),
        {key: float(value) for key, value in metrics.items()},
        size,
        piece_length(size),
        root,
        int(created),
        identity.public_key,
        note,
    ]
    try:
        # The signature's place is filled first: what is signed are the very bytes that travel.
        data = codec.pack([*body, bytes(_SIGNATURE)])[:-_SIGNATURE]
        data += identity.sign(_DOMAIN + data[: _SIGNATURE - _TAIL])  # without the two bytes of header
        parse_manifest(data)
    except (RemoteError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"this version of {name!r} cannot be published: {error}") from None
    return data


def read_manifest(data: bytes, network_id: bytes, wall: float) -> Manifest:
    """A manifest from somebody else. RemoteError unless it is well formed, of this network, of the present or the
    past, and signed by its publisher."""
    manifest = parse_manifest(data)
    if manifest.network_id != network_id:
        raise RemoteError("the manifest is of another network")
    if manifest.created > wall + CLOCK_SLACK:
        raise RemoteError(f"the manifest was made {manifest.created - wall:.0f} s in the future")
    if not verify(manifest.publisher, data[-_SIGNATURE:], _DOMAIN + data[:-_TAIL]):
        raise RemoteError("the manifest is not signed by its publisher")
    return manifest


def parse_manifest(data: bytes) -> Manifest:
    """A manifest that was checked before, as those on disk: RemoteError when it is not well formed; says nothing of
    signature, network and time."""
    if len(data) > MAX_MANIFEST:
        raise RemoteError(f"manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST}")
    values = codec.unpack(data, limit=MAX_MANIFEST)
    if not isinstance(values, list) or len(values) != _FIELDS:
        raise RemoteError(f"a manifest is a list of {_FIELDS} values")
    if type(values[0]) is not int or values[0] != FORMAT:
        raise RemoteError(f"manifest of format {values[0]!r:.20}; this gossipml reads format {FORMAT}")
    fields = dict(zip(_NAMES, values, strict=True))
    name = codec.get_str(fields, "name", limit=MAX_NAME)
    if NAME.fullmatch(name) is None:
        raise RemoteError(f"manifest of {name!r:.100}, which is not a name")
    spec = codec.get_bytes(fields, "spec", limit=HASH)
    if len(spec) not in (0, HASH):
        raise RemoteError(f"the specification digest has {len(spec)} bytes, not {HASH} or none")
    created = codec.get_int(fields, "created", low=EPOCH, high=MAX_CREATED - 1)
    # 1 at least, so that a clock at the very epoch can still publish.
    height = codec.get_int(fields, "height", low=1, high=max(1, created - EPOCH))
    parents = tuple(
        codec.get_bytes({"parent": parent}, "parent", size=HASH)
        for parent in codec.get_list(fields, "parents", limit=MAX_PARENTS)
    )
    if len(set(parents)) != len(parents) or bool(parents) != (height > 1):
        raise RemoteError(f"a version of height {height} cannot have {len(parents)} parents, or has one twice")
    size = codec.get_int(fields, "size", low=MIN_SIZE, high=MAX_SIZE)
    length = codec.get_int(fields, "piece length")
    if length != piece_length(size):
        raise RemoteError(f"{size} bytes are cut into pieces of {piece_length(size)}, not {length}")
    note = codec.get_str(fields, "note", limit=MAX_NOTE)
    if len(note.encode()) > MAX_NOTE or not note.isprintable():
        raise RemoteError(f"the note must be printable text of at most {MAX_NOTE} bytes")
    codec.get_bytes(fields, "signature", size=_SIGNATURE)
    return Manifest(
        network_id=codec.get_bytes(fields, "network", size=NETWORK_ID),
        name=name,
        spec=spec,
        height=height,
        parents=parents,
        age=_float(fields["age"], "age", low=0, high=MAX_AGE),
        metrics=_metrics(fields["metrics"]),
        size=size,
        piece_length=length,
        root=codec.get_bytes(fields, "root", size=HASH),
        created=created,
        publisher=PublicKey(codec.get_bytes(fields, "publisher", size=32)),
        note=note,
        data=bytes(data),
    )


_NAMES = (
    "format",
    "network",
    "name",
    "spec",
    "height",
    "parents",
    "age",
    "metrics",
    "size",
    "piece length",
    "root",
    "created",
    "publisher",
    "note",
    "signature",
)


def _metrics(value: codec.Value) -> dict[str, float]:
    metrics = codec.as_map(value)
    if len(metrics) > MAX_METRICS:
        raise RemoteError(f"{len(metrics)} metrics; a manifest has room for {MAX_METRICS}")
    for key in metrics:
        if _METRIC.fullmatch(key) is None:
            raise RemoteError(f"metric {key!r:.100} is not a name of at most {MAX_METRIC_KEY} of a-z, 0-9 and _")
    if (length := len(codec.pack(metrics))) > MAX_METRICS_BYTES:
        raise RemoteError(f"the metrics take {length} bytes of {MAX_METRICS_BYTES}; use fewer or shorter names")
    return {key: _float(number, key) for key, number in metrics.items()}


def _float(value: codec.Value, what: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """One form for each number: 1 is not 1.0 (the codec has refused what is not finite)."""
    if type(value) is not float or not low <= value <= high:
        raise RemoteError(f"field {what!r} must be a floating-point number from {low:g} to {high:g}")
    return value
