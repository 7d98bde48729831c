"""A link on a stream that the test holds in its hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
import trio.testing

from gossipml.env import GOSSIP
from gossipml.ids import Address, PeerId
from gossipml.peer import session as s
from gossipml.peer.link import READ_AHEAD, Link, LinkConfig, Parcel, Traffic
from gossipml.peer.wire import Goodbye, Hello, HelloReply, Message, Ping, Pong, Profile, Update, decode_header, encode

from .peers import make_profile, make_update, peer_id

ANN, BOB = peer_id(1), peer_id(2)


class HandStream:
    """What is put into `incoming` is received; what is sent lies in `outgoing`; `stuck` lets nothing out; `room` is for
    so many bytes of what is to go out at once."""

    def __init__(self) -> None:
        self.peer_id: PeerId = BOB
        self.remote = Address("10.0.0.2", 40000)
        self.protocol = GOSSIP
        self.key_id = ""
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.stuck = False
        self.room = 0
        self._rest = b""
        self.closed = False
        self._news = trio.Event()

    def put(self, data: bytes) -> None:
        self.incoming += data
        self._news.set()

    def post(self, *parts: bytes | bytearray | memoryview) -> bool:
        if self.room <= 0:
            return False
        data = b"".join(parts)
        self.outgoing += data[: self.room]
        self._rest, self.room = data[self.room :], max(0, self.room - len(data))
        return True

    @property
    def unsent(self) -> bool:
        return bool(self._rest)

    async def send_all(self, *parts: bytes | bytearray | memoryview) -> None:
        if self.stuck:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        for part in (self._rest, *parts):
            self.outgoing += part
        self._rest = b""

    async def receive_into(self, view: memoryview) -> int:
        while not self.incoming:
            self._news = trio.Event()
            await self._news.wait()
        await trio.lowlevel.checkpoint()
        count = min(len(view), len(self.incoming))
        view[:count] = self.incoming[:count]
        del self.incoming[:count]
        return count

    async def serve(self, target: Callable[[], memoryview], came: Callable[[int], bool]) -> None:
        while came(await self.receive_into(target())):
            pass

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()

    def sent(self) -> list[Message]:
        """The messages sent since the last look, which must have no bodies."""
        messages = []
        while self.outgoing:
            length = int.from_bytes(self.outgoing[:4], "big")
            messages.append(decode_header(self.outgoing[4 : 4 + length]))
            del self.outgoing[: 4 + length]
        return messages


class TrioClock:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return 0.0


class Notes:
    """An owner that admits everybody, keeps what it hears, and answers pings."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.sent: list[str] = []
        self.lost = 0
        self.asked = 0
        self.faults: list[str] = []
        self.keep = True

    def on_introduced(self, link: Link, hello: Hello) -> s.Admit | s.Decline:
        return s.Admit()

    def on_opened(self, link: Link, profile: Profile) -> None: ...

    def on_profile(self, link: Link, profile: Profile) -> None: ...

    def on_message(self, link: Link, message: Message) -> None:
        if isinstance(message, Ping):
            link.post(Pong(message.nonce))

    def on_heard(self, link: Link) -> None: ...

    def on_asked(self, link: Link, update: Update) -> None:
        self.asked += 1

    def on_offer(self, link: Link, update: Update) -> bool:
        return self.keep

    def on_body(self, link: Link, update: Update, body: bytearray) -> None:
        self.bodies.append(bytes(body))

    def on_body_lost(self, link: Link, update: Update) -> None:
        self.lost += 1

    def on_sent(self, link: Link, parcel: Parcel, reason: str) -> None:
        self.sent.append(reason)

    def on_fault(self, link: Link, reason: str) -> None:
        self.faults.append(reason)

    def body_length(self, update: Update) -> int | None:
        return update.body_length


def make_link(config: LinkConfig | None = None) -> tuple[Link, HandStream, Notes]:
    stream, notes, clock = HandStream(), Notes(), TrioClock()
    session = s.Session(ANN, BOB, make_profile("ann"), b"aaaaaaaa", dialled=False, now=clock.now())
    return Link(stream, session, notes, clock, Traffic(), config or LinkConfig()), stream, notes


async def opened(nursery: trio.Nursery, config: LinkConfig | None = None) -> tuple[Link, HandStream, Notes]:
    link, stream, notes = make_link(config)
    nursery.start_soon(link.run)
    stream.put(encode(Hello(1, 1, b"bbbbbbbb", make_profile("bob"))))
    await trio.testing.wait_all_tasks_blocked()
    assert isinstance(stream.sent()[0], HelloReply)
    return link, stream, notes


async def test_a_flood_of_pings_that_is_never_read_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, _ = await opened(nursery, LinkConfig(control=10, stall=math.inf))
        stream.stuck = True
        stream.put(encode(Ping(1)) * 100)
    assert (link.end_code, stream.closed) == ("broken", True)
    assert link.end_reason == "10 messages wait unread"


async def test_small_messages_overtake_a_waiting_update_and_a_second_update_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        parcel = Parcel(make_update(), bytes(32), 0.0)
        assert link.post_update(parcel)
        assert not link.post_update(parcel)
        link.post(Ping(1))
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(stream.outgoing) == encode(Ping(1)) + encode(parcel.update) + bytes(32)
        assert notes.sent == [""]
        nursery.cancel_scope.cancel()


async def test_what_is_small_goes_out_at_once_and_an_update_has_left_when_all_of_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        parcel = Parcel(make_update(), bytes(32), 0.0)
        frame = encode(parcel.update) + bytes(32)
        stream.room = 2 * len(frame) - 1
        assert link.post_update(parcel)
        assert (bytes(stream.outgoing), notes.sent) == (frame, [""])
        assert link.post_update(parcel)
        assert (bytes(stream.outgoing), notes.sent) == ((frame + frame)[:-1], [""])
        stream.room = 1000
        link.post(Ping(1))
        assert len(stream.outgoing) == 2 * len(frame) - 1, "not into the middle of a body"
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(stream.outgoing) == frame + frame + encode(Ping(1))
        assert notes.sent == ["", ""]
        nursery.cancel_scope.cancel()


async def test_a_rest_that_never_leaves_ends_the_link(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.room, stream.stuck = 1, True
        assert link.post_update(Parcel(make_update(), bytes(32), 0.0))
    assert notes.sent == ["the other side reads too slowly"]
    assert (link.end_code, trio.current_time()) == ("broken", 10.0)


async def test_large_bodies_go_out_in_slices(autojump_clock: trio.testing.MockClock) -> None:
    sizes: list[int] = []

    class Watched(HandStream):
        async def send_all(self, *parts: bytes | bytearray | memoryview) -> None:
            sizes.append(sum(len(part) for part in parts))
            await super().send_all(*parts)

    async with trio.open_nursery() as nursery:
        link, _, notes = make_link(LinkConfig(slice=1000))
        stream = link.stream = Watched()
        nursery.start_soon(link.run)
        stream.put(encode(Hello(1, 1, b"bbbbbbbb", make_profile("bob"))))
        await trio.testing.wait_all_tasks_blocked()
        sizes.clear()
        update = make_update(size=625)
        body = bytes(range(250)) * 10
        assert link.post_update(Parcel(update, body, 0.0))
        await trio.testing.wait_all_tasks_blocked()
        assert sizes == [len(encode(update)) + 1000, 1000, 500]
        assert stream.outgoing.endswith(body)
        assert notes.sent == [""]
        nursery.cancel_scope.cancel()


async def test_every_posted_update_comes_to_its_end_when_the_link_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.stuck = True
        link.post_update(Parcel(make_update(), bytes(32), 0.0))
        await trio.testing.wait_all_tasks_blocked()
        link.post_update(Parcel(make_update(), bytes(32), 0.0))
    assert notes.sent == ["the other side reads too slowly"] * 2
    assert trio.current_time() - link.used_at == 10.0


async def test_the_last_words_are_not_put_into_the_middle_of_a_body(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.stuck = True
        link.post_update(Parcel(make_update(), bytes(32), 0.0))
        await trio.testing.wait_all_tasks_blocked()
        stream.stuck = False
        nursery.cancel_scope.cancel()
    assert stream.outgoing == b""
    assert stream.closed
    assert notes.sent == ["stopping"]


async def test_cancellation_says_goodbye_and_closes(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        _, stream, _ = await opened(nursery)
        nursery.cancel_scope.cancel()
    assert stream.sent() == [Goodbye("stopping")]
    assert stream.closed


async def test_a_slow_body_is_answered_with_signs_of_life(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        _, stream, notes = await opened(nursery, LinkConfig(beat=2.5, slowest=1))
        stream.put(encode(make_update(size=5)))
        for _ in range(19):
            await trio.sleep(1)
            stream.put(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert stream.sent() == [Pong(0)] * 6, "in 19 s, each after more than 2.5 s of our own silence"
        assert notes.bodies == []
        stream.put(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert notes.bodies == [b"x" * 20]
        nursery.cancel_scope.cancel()


async def test_a_body_that_comes_at_once_is_answered_by_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        _, stream, notes = await opened(nursery, LinkConfig(beat=2.5))
        await trio.sleep(5)
        stream.put(encode(make_update()) + bytes(32))
        await trio.testing.wait_all_tasks_blocked()
        assert notes.bodies == [bytes(32)]
        assert stream.sent() == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [1, 3, 50, READ_AHEAD - 1, READ_AHEAD, 1 << 20])
async def test_however_the_bytes_come_messages_and_bodies_are_the_same(
    size: int, autojump_clock: trio.testing.MockClock
) -> None:
    small, large = bytes(range(32)), bytes(range(250)) * 50
    said = (
        encode(Ping(1))
        + encode(make_update()) + small
        + encode(make_update(size=len(large) // 4)) + large
        + encode(Ping(2)) + encode(Ping(3))
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        _, stream, notes = await opened(nursery)
        for start in range(0, len(said), size):
            stream.put(said[start : start + size])
            await trio.testing.wait_all_tasks_blocked()
        assert notes.bodies == [small, large]
        assert stream.sent() == [Pong(1), Pong(2), Pong(3)]
        nursery.cancel_scope.cancel()


async def test_who_does_not_say_hello_in_time_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    link, stream, _ = make_link()
    stream.put(encode(Hello(1, 1, b"bbbbbbbb", make_profile("bob")))[:-1])
    await link.run()
    assert (link.end_code, trio.current_time()) == ("timeout", s.HELLO_SECONDS)
    assert stream.closed


async def test_a_lost_body_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.put(encode(make_update()) + b"half")
    assert notes.lost == 1
    assert notes.bodies == []
    assert (link.end_code, link.end_reason) == ("broken", "a message came too slowly")
    assert trio.current_time() == 10.0


async def test_a_broken_frame_is_reported_and_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.put(bytes(4))
    assert notes.faults == ["header of 0 bytes; allowed are 1 to 16384"]
    assert stream.sent() == [Goodbye(notes.faults[0])]
    assert link.end_code == "fault"


async def test_a_deaf_peer_does_not_delay_the_end(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream, _ = await opened(nursery)
        stream.stuck = True
        link.finish("enough of you")
    assert trio.current_time() == 1.0
    assert stream.closed


async def test_words_that_cross_our_last_ones_are_no_breach(autojump_clock: trio.testing.MockClock) -> None:
    """Two peers that dialled each other at once close the same one of the two sessions, each with a goodbye."""
    async with trio.open_nursery() as nursery:
        link, stream, notes = await opened(nursery)
        stream.stuck = True  # our goodbye is on its way for long
        link.finish("a second session")
        stream.put(encode(Ping(1)) + encode(Goodbye("a second session")))
    assert notes.faults == []
    assert (link.end_code, link.end_reason) == ("local", "a second session")
