"""What the swarm needs from the model store, how it is configured, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gossipml.ids import PeerId


class Hasher(Protocol):
    def arrived(self, count: int) -> None:
        """So many more bytes of the piece are in its buffer."""


class Content(Protocol):
    """The bytes of one model file, whole or in part, cut into pieces."""

    @property
    def root(self) -> bytes: ...

    @property
    def size(self) -> int: ...

    @property
    def piece_length(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def complete(self) -> bool: ...

    def have(self) -> bytes:
        """The bitfield of the pieces that are there, in BEP 3's bit order."""

    async def read(self, index: int) -> bytes | bytearray | memoryview | None:
        """A piece, verified; None when it is missing or was found corrupt."""

    def hasher(self, piece: bytearray) -> Hasher:
        """For a piece that arrives in this buffer."""

    async def write(self, index: int, data: bytearray, hasher: Any) -> bool:  # Any: what `hasher` gave
        """Verify a piece and keep it; False when it is wrong. The hasher has heard of all of it. The buffer may be
        kept, too: it is used for another piece when nobody refers to it any more.

        Several pieces may be on their way at once. UserError or OSError when it cannot be kept (quota, full disk).
        """

    async def finish(self) -> None:
        """All pieces are there: make it a lasting file. Reading goes on before, meanwhile and afterwards."""


class Shelf(Protocol):
    """What we hold for others."""

    async def content(self, root: bytes) -> Content | None: ...

    async def layer(self, root: bytes) -> bytes | None:
        """All piece hashes, 32 bytes each."""

    async def manifest(self, version: bytes) -> bytes | None: ...

    def holds(self, version: bytes) -> bool:
        """Whether we hold the version whole."""

    async def hold(self, peer: PeerId, manifest: bytes) -> str:
        """A member asks us to keep a version. Empty when we will, else why not; fetching it is a task of its own."""


@dataclass(frozen=True)
class SwarmConfig:
    upload_rate: float = 0.0
    """Bytes a second to all askers together; 0 for no limit, as in the next three."""
    upload_rate_peer: float = 0.0
    download_rate: float = 0.0
    download_rate_peer: float = 0.0
    slots: int = 8
    """Peers that are sent something at once. Gossip has a stream of its own and so at least a ninth of a full line;
    fewer slots would let a few slow askers keep the fast ones waiting (guess)."""
    askers: int = 64
    """Streams that others have open here: 25 kB each for TLS."""
    askers_peer: int = 8
    """Of one peer: as many contents as it may fetch here at once."""
    peers: int = 8
    """Sources of one download at most. It begins with a few, since each costs a handshake and what it announces (with
    3 in place of 5 of 8 peers on one machine a download takes 3 to 5 % less), and dials more while it is slow."""
    patience: float = 60.0
    """Seconds without a byte of a wanted piece after which a download gives up (guess)."""
    stall: float = 10.0
    """Seconds without a byte inside a message, or without a word from an owner, who says `alive` every 3 s."""
    slowest: float = 16 * 1024
    """Bytes a second that the body of a piece must make on the whole (guess: a quarter of ISDN's double channel)."""
    useless: float = 20.0
    """Seconds after which a source that sent nothing gives its place to another one, if there is one."""
    ask_again: float = 15.0
    """Seconds between two looks for more providers."""
    dial_seconds: float = 5.0
    answer_seconds: float = 10.0
    """For the answer to a question: a manifest, a layer."""
    buffers: int = 64 << 20
    """Bytes of pieces that are being received or written, and again half as many that are read and sent: this, and
    not the size of a model, is the memory that the swarm takes."""


@dataclass
class SwarmStats:
    """Counters since the start, of whole pieces."""

    bytes_up: int = 0
    bytes_down: int = 0
    pieces_up: int = 0
    pieces_down: int = 0
    pieces_bad: int = 0
    pieces_wasted: int = 0
    """Came twice."""
    faults: int = 0


@dataclass(frozen=True)
class Transfer:
    """What is going on with one content now."""

    root: bytes
    size: int
    done: int
    """Bytes that are here and verified."""
    rate_down: float
    rate_up: float
    sources: int
    askers: int
