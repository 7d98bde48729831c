"""What the daemon and its worker process say to each other, and how the bytes lie.

Frame: uint32 header length, uint32 body length (big-endian), header (canonical msgpack map), body (raw bytes;
of predictions and small models). The daemon writes frames to the worker's standard input, the worker to a private
copy of its standard output. Request headers hold `id` and `do`; each is answered once, in any order:

| do | fields | answer |
|---|---|---|
| `configure` | model, train, source, split, part, seed, network, threads, device, inbox, outbox | a `WorkerInfo` |
| `train` | steps, encoding | steps, samples, seconds, work, loss; body: the encoded parameters, unless encoding is "" |
| `cancel` | job (the id of a `train`) | nothing |
| `snapshot` | encoding | size; the bytes are in the outbox |
| `merge` | size (the bytes are in the inbox), encoding, weight | applied, reason, distance |
| `evaluate` | | accuracy, loss, validation, served; nothing without data |
| `choose` | | as `evaluate`; what was measured is kept for `export` |
| `export` | | size; the file of the version is in the outbox |
| `load` | size; the file of a version is in the inbox | nothing |
| `read` | size; the file of a version is in the inbox | nothing; its parameters are kept for `score` |
| `score` | | validation; nothing without data |
| `serve` | network, threads, device, nice, inbox | nothing; in the place of `configure`: no model of its own |
| `host` | key, model, source, size; the file of a version is in the inbox | inputs, outputs, labels |
| `drop` | key | nothing |
| `predict` | key (empty: its own model), form, json_size, model, version, peer, until; body | json_size; body |
| `served` | | size; the file of the served parameters is in the outbox |
| `save` | | size; the bytes are in the outbox |
| `restore` | size; the bytes are in the inbox | |

Predictions that come together are answered together (`gossipml.models.hosting`); their bodies are the client's. With
`train` false there are no data: `train`, `merge` and the like are refused. `choose` and `score` take as long as an
evaluation; they are apart from what needs the files so that gossip has those meanwhile.

An answer is `{id, ok: map}` or `{id, error: text, fault: "user" | "local"}`.

Parameters and states are too large for a pipe: they lie in two shared files, the inbox (written by the daemon)
and the outbox (written by the worker), memfd on Linux and unlinked temporary files of mode 0600 elsewhere,
which the worker inherits. Each holds one thing at a time; the daemon asks for no second one before it is done
with the first.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile

from gossipml import codec
from gossipml.errors import LocalError

HEAD = struct.Struct(">II")
MAX_HEADER = 1 << 20  # names and labels of a large model; bounds what a bug allocates
MAX_BODY = 32 << 20  # one prediction request or its answer; the daemon's HTTP limit is lower
GROWN = 4  # a shared file this many times larger than what is written is cut back


def pack_frame(header: dict[str, object], body: bytes = b"") -> bytes:
    """LocalError when header or body are too large."""
    packed = codec.pack(header)
    if len(packed) > MAX_HEADER or len(body) > MAX_BODY:
        raise LocalError(f"worker message of {len(packed)} + {len(body)} bytes; {MAX_HEADER} + {MAX_BODY} fit")
    return HEAD.pack(len(packed), len(body)) + packed + body


class FrameReader:
    """Frames out of a stream that is cut anywhere."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        self._data += data

    def next_frame(self) -> tuple[dict[str, codec.Value], bytes] | None:
        """The next whole frame; None until there is one. LocalError for a length out of bounds, RemoteError for
        a header that is no message: something else wrote to the channel."""
        if len(self._data) < HEAD.size:
            return None
        header_size, body_size = HEAD.unpack_from(self._data)
        if header_size > MAX_HEADER or body_size > MAX_BODY:
            raise LocalError(f"worker message claims {header_size} + {body_size} bytes; the channel is corrupt")
        end = HEAD.size + header_size + body_size
        if len(self._data) < end:
            return None
        header = bytes(self._data[HEAD.size : HEAD.size + header_size])
        body = bytes(self._data[HEAD.size + header_size : end])
        del self._data[:end]
        return codec.as_map(codec.unpack(header, limit=MAX_HEADER)), body


def create_shared_file(name: str) -> int:
    """The descriptor of an empty file that has no name and that only its holders can reach."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"gossipml-{name}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # mode 0600, unlinked at once
        return os.dup(file.fileno())


def write_shared(descriptor: int, data: bytes | bytearray) -> None:
    """Puts `data` at the beginning of a shared file. Blocks, without Python's lock."""
    _cut_back(descriptor, len(data))
    view, done = memoryview(data), 0
    while done < len(view):  # one call writes 2 GiB at most
        done += os.pwrite(descriptor, view[done:], done)


def read_shared(descriptor: int, size: int) -> bytes:
    """The first `size` bytes of a shared file. Blocks, without Python's lock."""
    pieces, done = [], 0
    while done < size:
        piece = os.pread(descriptor, size - done, done)
        if not piece:
            raise LocalError(f"the shared file ends after {done} of {size} bytes")
        pieces.append(piece)
        done += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SharedView:
    """A shared file in the worker's memory: encoded and decoded in place."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def for_writing(self, size: int) -> memoryview:
        """Room for `size` bytes; the file grows, or shrinks when it had become much larger."""
        _cut_back(self._descriptor, size)
        if os.fstat(self._descriptor).st_size < size:
            os.ftruncate(self._descriptor, size)
        return self.for_reading(size)

    def for_reading(self, size: int) -> memoryview:
        """The first `size` bytes. LocalError when the file is shorter (reading beyond its end would kill us)."""
        length = os.fstat(self._descriptor).st_size
        if length < size:
            raise LocalError(f"the shared file has {length} bytes, the message says {size}")
        if size == 0:
            return memoryview(b"")
        if self._map is None or len(self._map) != length:
            # The old mapping is not closed but forgotten: arrays may still point into it.
            self._map = mmap.mmap(self._descriptor, length)
        return memoryview(self._map)[:size]


def _cut_back(descriptor: int, size: int) -> None:
    if os.fstat(descriptor).st_size > max(GROWN * size, mmap.PAGESIZE):
        os.ftruncate(descriptor, size)
