"""The wire format: round trips, any split of the bytes, and everything a hostile peer may send."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossipml import codec
from gossipml.errors import LocalError, RemoteError
from gossipml.ids import Address, Contact, PeerId
from gossipml.orders import MAX_ORDER
from gossipml.peer.wire import (
    DISCARD_CHUNK,
    MAX_AGE,
    MAX_HEADER,
    MAX_ORDERS,
    Body,
    Decoder,
    Goodbye,
    Hello,
    HelloReply,
    Message,
    NewProfile,
    News,
    Orders,
    Ping,
    Pong,
    Profile,
    Refusal,
    Update,
    UpdateAck,
    clean_reason,
    decode_header,
    encode,
)

from .peers import DIGEST, make_update

hosts = st.one_of(
    st.tuples(*[st.integers(1, 223)] * 4).map(lambda parts: ".".join(map(str, parts))),
    st.integers(1, 0xFFFF).map(lambda n: f"2001:db8::{n:x}"),
)
addresses = st.builds(Address, hosts, st.integers(1, 65535))
names = st.text(st.characters(categories=["L", "N", "P"]), max_size=64)
models = st.from_regex(r"([a-z0-9][a-z0-9_-]{0,63})?", fullmatch=True)
digests = st.sampled_from(["", DIGEST, "0" * 64])
reasons = st.text(max_size=50).map(clean_reason)
some_addresses = st.lists(addresses, max_size=4, unique=True).map(tuple)
profiles = st.builds(Profile, names, models, digests, st.integers(0, 65535), some_addresses)
peer_ids = st.binary(min_size=32, max_size=32).map(PeerId)
contacts = st.builds(Contact, peer_ids, some_addresses, models, names)
boots = st.binary(min_size=8, max_size=8)
updates = st.builds(
    Update,
    models,
    digests,
    st.sampled_from(["int8", "float32"]),
    st.integers(1, 2**40),
    st.integers(1, 300),
    st.floats(0, MAX_AGE),
    st.integers(0, 2**63 - 1),
    st.booleans(),
    st.booleans(),
    st.lists(contacts, max_size=8).map(tuple),
    rests=st.booleans(),
    settled=st.booleans(),
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, st.integers(5, 65535), st.integers(1, 5), boots, profiles, boots),
    st.builds(HelloReply, st.integers(5, 65535), st.integers(1, 5), boots, profiles, boots),
    st.builds(Refusal, st.sampled_from(["full", "digest"]), reasons),
    st.builds(NewProfile, profiles),
    updates,
    st.builds(UpdateAck, st.integers(0, 2**63 - 1), st.booleans(), reasons),
    st.builds(
        News,
        st.text("abcdefgh", max_size=16),
        st.integers(0, 2**40),
        st.none() | st.floats(0, 1),
        st.none() | st.floats(-1e9, 1e9),
        st.lists(st.binary(min_size=8, max_size=8), max_size=64).map(tuple),
    ),
    st.builds(Orders, st.lists(st.binary(max_size=MAX_ORDER), max_size=MAX_ORDERS).map(tuple), boots),
    st.builds(Ping, st.integers(0, 2**63 - 1)),
    st.builds(Pong, st.integers(0, 2**63 - 1)),
    st.builds(Goodbye, reasons),
)


def test_news_that_break_the_specification_are_refused() -> None:
    good = News("training", 3, 0.5, 1.5, (b"12345678",))
    assert decode_header(altered(good)) == good
    for wrong in (
        {"state": "a" * 17}, {"state": "two\nlines"}, {"state": 3}, {"round": -1}, {"accuracy": 1.5},
        {"accuracy": "1"}, {"loss": 1e300}, {"links": [b"1234567"]},
        {"links": [b"12345678"] * 65}, {"links": b"12345678"},
    ):  # fmt: skip
        with pytest.raises(RemoteError):
            decode_header(altered(good, **wrong))


def test_the_longest_orders_fit_one_header() -> None:
    full = Orders((b"x" * MAX_ORDER,) * MAX_ORDERS, b"12345678")
    assert decode_header(header_of(full)) == full
    for fields in ({"orders": [b"x"] * (MAX_ORDERS + 1)}, {"orders": [b"x" * (MAX_ORDER + 1)]}, {"digest": b"short"}):
        with pytest.raises(RemoteError):
            decode_header(altered(Orders((), b"12345678"), **fields))
    for order in ("text", 7, None, ["nested"]):
        with pytest.raises(RemoteError):
            decode_header(altered(Orders((), b"12345678"), orders=[order]))


def header_of(message: Message) -> bytes:
    return encode(message)[4:]


def altered(message: Message, **fields: object) -> bytes:
    values = codec.as_map(codec.unpack(header_of(message), limit=MAX_HEADER))
    return codec.pack({**values, **fields})


def feed(decoder: Decoder, data: bytes, cuts: list[int]) -> list[Message | Body]:
    """Give the bytes in pieces that end at the cuts, as a socket would, and keep every second body."""
    events: list[Message | Body] = []
    kept = 0
    ends = sorted({*(cut % (len(data) + 1) for cut in cuts), len(data)})
    start = 0
    for end in ends:
        while start < end:
            target = decoder.target()
            count = min(len(target), end - start)
            target[:count] = data[start : start + count]
            start += count
            event = decoder.received(count)
            if event is not None:
                events.append(event)
            if isinstance(event, Update):
                kept += 1
                if kept % 2:
                    decoder.keep_body()
                else:
                    decoder.discard_body()
    return events


@given(messages)
def test_every_message_survives_encoding(message: Message) -> None:
    assert decode_header(header_of(message)) == message


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 100_000), max_size=20))
def test_any_split_of_the_bytes_gives_the_same_messages(sent: list[Message], cuts: list[int]) -> None:
    data, wanted, updates_seen = b"", list[Message | Body](), 0
    for message in sent:
        data += encode(message)
        wanted.append(message)
        if isinstance(message, Update):
            updates_seen += 1
            body = bytes(index % 251 for index in range(message.body_length))
            data += body
            wanted.append(Body(message, bytearray(body) if updates_seen % 2 else None))
    decoder = Decoder(lambda update: update.body_length)
    assert feed(decoder, data, cuts) == wanted
    assert decoder.between_frames


@given(st.binary(max_size=200))
def test_any_bytes_as_a_header_give_a_message_or_a_remote_error(data: bytes) -> None:
    try:
        decode_header(data)
    except RemoteError:
        pass


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(), st.binary()
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)


@given(updates | st.builds(Hello, st.integers(5, 9), st.integers(1, 5), boots, profiles), st.data())
def test_any_value_in_any_field_gives_a_message_or_a_remote_error(message: Message, data: st.DataObject) -> None:
    fields = codec.as_map(codec.unpack(header_of(message), limit=MAX_HEADER))
    name = data.draw(st.sampled_from(sorted(fields)))
    try:
        hostile = codec.pack({**fields, name: data.draw(values)})
    except (ValueError, OverflowError):
        return  # what our own codec cannot write; the raw cases are below
    try:
        decode_header(hostile)
    except RemoteError:
        pass


UPDATE = make_update()
CONTACT = [b"\1" * 32, "bob", "digits", [["10.0.0.1", 1]]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"t": "exec"}, "unknown kind"),
        ({"t": 1}, "'t'"),
        ({"model": "../etc/passwd"}, "model"),
        ({"model": "Digits"}, "model"),
        ({"model": "a\n"}, "model"),
        ({"digest": "xyz"}, "digest"),
        ({"digest": DIGEST.upper()}, "digest"),
        ({"enc": ""}, "enc"),
        ({"params": 0}, "params"),
        ({"params": True}, "params"),
        ({"bytes": -1}, "bytes"),
        ({"bytes": 0}, "bytes"),
        ({"bytes": 2**63}, "bytes"),
        ({"age": -1.0}, "age"),
        ({"age": 2.0**54}, "age"),
        ({"age": "1"}, "age"),
        ({"round": -1}, "round"),
        ({"want": 1}, "want"),
        ({"peers": [CONTACT] * 9}, "peers"),
        ({"peers": {}}, "peers"),
        ({"peers": [[b"\1" * 31, *CONTACT[1:]]]}, "length"),
        ({"peers": [CONTACT[:3]]}, "contact"),
        ({"peers": [[b"\1" * 32, "\x1b[2J", "digits", []]]}, "printed"),
        ({"peers": [[b"\1" * 32, "bob", "digits", [["example.org", 1]]]]}, "address"),
        ({"peers": [[b"\1" * 32, "bob", "digits", [["10.0.0.1", 0]]]]}, "port"),
        ({"peers": [[b"\1" * 32, "bob", "digits", [["224.0.0.1", 1]]]]}, "nobody"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RemoteError, match=says):
        decode_header(altered(UPDATE, **fields))


def test_ages_that_are_no_numbers_cannot_be_written_nor_read() -> None:
    good = header_of(make_update(age=1.5))
    for bits in ("7ff8000000000000", "7ff0000000000000", "fff0000000000000"):  # NaN, inf, -inf
        hostile = good.replace(bytes.fromhex("cb3ff8000000000000"), bytes.fromhex("cb" + bits))
        assert hostile != good
        with pytest.raises(RemoteError):
            decode_header(hostile)


def test_a_missing_field_is_refused() -> None:
    fields = codec.as_map(codec.unpack(header_of(UPDATE), limit=MAX_HEADER))
    for name in fields:
        with pytest.raises(RemoteError):
            decode_header(codec.pack({key: value for key, value in fields.items() if key != name}))


def test_an_unknown_field_is_ignored() -> None:
    assert decode_header(altered(UPDATE, zz="from a newer peer")) == UPDATE


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    decoder = Decoder(lambda update: None)
    decoder.target()[:] = (MAX_HEADER + 1).to_bytes(4, "big")
    with pytest.raises(RemoteError, match="16385 bytes"):
        decoder.received(4)


def test_an_empty_header_is_refused() -> None:
    decoder = Decoder(lambda update: None)
    decoder.target()[:] = bytes(4)
    with pytest.raises(RemoteError, match="0 bytes"):
        decoder.received(4)


def test_the_largest_update_fits_into_a_header() -> None:
    address = Address("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
    far = Contact(PeerId(b"\xff" * 32), (address,) * 4, "m" * 64, "\U0001f98a" * 64)
    update = replace(UPDATE, model="m" * 64, contacts=(far,) * 8, round=2**63 - 1, age=MAX_AGE)
    assert len(encode(update)) < MAX_HEADER


@pytest.mark.parametrize("declared", [1, 31, 33, 2**43])
def test_a_body_that_the_layout_does_not_imply_is_refused_before_it_is_allocated(declared: int) -> None:
    decoder = Decoder(lambda update: 32)
    with pytest.raises(RemoteError, match=f"{declared} bytes"):
        feed(decoder, encode(replace(UPDATE, body_length=declared)), [])
    with pytest.raises(LocalError):
        decoder.keep_body()


def test_an_update_of_an_unknown_model_is_refused() -> None:
    with pytest.raises(RemoteError, match="not trained here"):
        feed(Decoder(lambda update: None), encode(UPDATE), [])


def test_nothing_is_read_past_the_header_before_the_body_is_decided_on() -> None:
    decoder = Decoder(lambda update: 32)
    data = encode(UPDATE)
    for part in (data[:4], data[4:]):
        decoder.target()[:] = part
        event = decoder.received(len(part))
    assert event == UPDATE
    with pytest.raises(LocalError, match="body"):
        decoder.target()
    decoder.keep_body()
    assert len(decoder.target()) == 32


def test_a_discarded_body_needs_little_memory() -> None:
    decoder = Decoder(lambda update: 10 * DISCARD_CHUNK + 5)
    update = replace(UPDATE, body_length=10 * DISCARD_CHUNK + 5)
    data = encode(update)
    for part in (data[:4], data[4:]):
        decoder.target()[:] = part
        decoder.received(len(part))
    decoder.discard_body()
    left, event = update.body_length, None
    while event is None:
        assert 0 < len(decoder.target()) <= DISCARD_CHUNK
        count = len(decoder.target())
        left -= count
        event = decoder.received(count)
    assert left == 0
    assert event == Body(update, None)
    assert decoder.between_frames


def test_a_reason_is_one_printable_line() -> None:
    assert clean_reason("a\nb\x1b[2J" + "x" * 1000) == "a b [2J" + "x" * 593
    assert decode_header(header_of(Goodbye("a\nb"))) == Goodbye("a b")
    with pytest.raises(RemoteError, match="printed"):
        decode_header(codec.pack({"t": "goodbye", "reason": "\x1b[2J"}))
