"""Who is served next: fair turns among the askers, without I/O.

Start-time fair queueing (Goyal, Vin, Cheng 1996) in bytes: each peer has a virtual time that grows by what it is
given; the one that is furthest behind is next. Whoever was away does not save up turns, whoever comes back after
a short absence does not get new ones, and several streams of one peer share its turns. At most `slots` peers are
served at once, and of one peer one piece is sent while the next is read from the disk, so that one asker with a
fast line does not wait for our disk, and a slow one holds two pieces of memory and one slot.
Leaves out: limits in bytes a second (`gossipml.peer.rates`; they bind while a piece is sent).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gossipml.errors import RemoteError
from gossipml.ids import PeerId
from gossipml.peer.swarm_wire import MAX_ASKED

AT_ONCE = 2  # pieces of one peer that are read or sent
CREDIT = 2  # pieces that an asker may be behind
REMEMBERED = 256  # peers without a stream whose virtual time is kept


@dataclass(frozen=True)
class Grant:
    """Read and send this piece on the stream `key`, then say `done`."""

    key: int
    index: int


@dataclass
class _Stream:
    peer: PeerId
    queue: deque[tuple[int, int]] = field(default_factory=deque)  # piece, bytes
    granted: dict[int, int] = field(default_factory=dict)


@dataclass
class _Asker:
    time: float
    streams: dict[int, _Stream] = field(default_factory=dict)
    active: int = 0


class Uploads:
    def __init__(self, slots: int, most_bytes: int) -> None:
        self.slots = slots
        self.most_bytes = most_bytes
        """Of all pieces that are granted at once: bounds memory; one piece is always granted."""
        self._bytes = 0
        self._streams: dict[int, _Stream] = {}
        self._askers: dict[PeerId, _Asker] = {}
        self._away: dict[PeerId, float] = {}
        self._time = 0.0

    def join(self, key: int, peer: PeerId) -> None:
        asker = self._askers.get(peer)
        if asker is None:
            asker = self._askers[peer] = _Asker(max(self._time, self._away.pop(peer, 0.0)))
        self._streams[key] = asker.streams[key] = _Stream(peer)

    def leave(self, key: int) -> None:
        stream = self._streams.pop(key, None)
        if stream is None:
            return
        asker = self._askers[stream.peer]
        asker.active -= len(stream.granted)
        self._bytes -= sum(stream.granted.values())
        del asker.streams[key]
        if not asker.streams:
            del self._askers[stream.peer]
            self._away[stream.peer] = asker.time
            if len(self._away) > REMEMBERED:
                del self._away[next(iter(self._away))]

    def ask(self, key: int, index: int, length: int) -> None:
        """RemoteError when too much is asked for, or twice."""
        stream = self._streams[key]
        if len(stream.queue) + len(stream.granted) >= MAX_ASKED:
            raise RemoteError(f"more than {MAX_ASKED} pieces are asked for and not answered")
        if index in stream.granted or any(index == other for other, _ in stream.queue):
            raise RemoteError(f"piece {index} is asked for twice")
        asker = self._askers[stream.peer]
        if not asker.active and not any(other.queue for other in asker.streams.values()):
            asker.time = max(asker.time, self._time)
        stream.queue.append((index, length))

    def cancel(self, key: int, index: int) -> bool:
        """Whether the piece was still in the queue, so that nothing of it will be sent."""
        queue = self._streams[key].queue
        for item in queue:
            if item[0] == index:
                queue.remove(item)
                return True
        return False

    def next(self) -> Grant | None:
        """What is to be done now, if anything; call it again until it gives None."""
        ready = [asker for asker in self._askers.values() if any(stream.queue for stream in asker.streams.values())]
        waiting = [asker for asker in ready if not asker.active]
        if waiting and sum(1 for asker in self._askers.values() if asker.active) >= self.slots:
            return None  # nobody reads ahead while another has nothing
        best = min(
            waiting or [asker for asker in ready if asker.active < AT_ONCE], key=lambda asker: asker.time, default=None
        )
        if best is None:
            return None
        key, stream = next((key, stream) for key, stream in best.streams.items() if stream.queue)
        index, length = stream.queue[0]
        if self._bytes and self._bytes + length > self.most_bytes:
            return None
        stream.queue.popleft()
        best.streams[key] = best.streams.pop(key)  # the streams of one peer take turns
        stream.granted[index] = length
        self._bytes += length
        best.active += 1
        # Who took less than its share, being slow, has no claim on all that when it becomes fast.
        best.time = max(best.time, self._time - CREDIT * length)
        self._time = max(self._time, best.time)
        best.time += length
        return Grant(key, index)

    def done(self, grant: Grant, *, sent: bool) -> None:
        """The piece has left, or could not be had, which costs its asker nothing."""
        stream = self._streams.get(grant.key)
        if stream is None:
            return
        length = stream.granted.pop(grant.index)
        asker = self._askers[stream.peer]
        asker.active -= 1
        self._bytes -= length
        if not sent:
            asker.time -= length

    def waiting(self, key: int) -> int:
        """Requests of a stream that are not answered."""
        stream = self._streams[key]
        return len(stream.queue) + len(stream.granted)

    def is_serving(self, key: int) -> bool:
        return bool(self._streams[key].granted)
