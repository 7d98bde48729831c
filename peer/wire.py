"""What two peers say to each other, byte by byte. This docstring is the wire specification, version 1.

A stream carries frames, one after another, in each direction:

    frame  = length header body
    length = 4 bytes, big endian: bytes in the header, 1 to 16,384
    header = canonical msgpack map (`gossipml.codec`): "t" names the kind, the rest are its fields
    body   = raw bytes, only in an update; exactly as many as the field "bytes" of its header says

| kind    | fields                                                                  | meaning |
|---------|-------------------------------------------------------------------------|---------|
| hello   | v, oldest, boot, profile, orders                                        | the dialler's first frame |
| welcome | v, oldest, boot, profile, orders                                        | the answer: the session is open |
| refusal | code, reason                                                            | the other answer: it is not |
| profile | profile                                                                 | what the hello said has changed |
| update  | model, digest, enc, params, bytes, age, round, want, reply, peers, mass | a model, encoded in the body |
| ack     | round, ok, reason, mass                                                 | why an update was refused |
| orders  | orders, digest                                                          | what the network key ordered |
| news    | state, round, accuracy, loss, links                                     | how the sender fares, for people |
| ping    | n                                                                       | are you there? |
| pong    | n                                                                       | the same n; or 0: I live |
| goodbye | reason                                                                  | the session ends on purpose |

    v, oldest  newest and oldest protocol version that the sender speaks; the lesser of both newest is spoken
    boot       8 bytes drawn at each start: tells a restarted peer from a second session of the same one
    profile    map: name (text for people), model, digest (64 hexadecimal characters, or "" while unknown),
               port (where it listens, 0 for nowhere), addrs (list of [IP literal, port], at most 4)
    orders     in hello and welcome, and as digest: 8 bytes, the digest of the orders that the sender knows
               (`gossipml.membership`); in a message of that kind: at most 60 orders (`gossipml.orders`), each of at
               most 256 bytes, in the order in which they are to be taken
    enc        name of the encoding of the body, which says too what part of the model it is; params: length of the
               whole parameter vector
    bytes      of the body; 0 asks for the receiver's model (then want is true) without sending one
    age        samples that went into the model, finite, 0 to 2^53
    want       whether an answer with the receiver's own model is wished for; reply: this is such an answer
    mass       with push-sum, and only then: [total, epoch], a number from 0 to 2^20 and an integer below 2^32
               (`gossipml.peer.push_sum`); in ack: the total of the update that was refused, if it had one
    state      of its learning, at most 16 characters; accuracy: 0 to 1 or nil; loss: finite or nil
    links      at most 64 beginnings (8 bytes) of the ids of peers with which the sender has sessions
    peers      at most 8 of [peer id, name, model, list of [IP literal, port]]: hints for peer sampling

Names of models match [a-z0-9][a-z0-9_-]{0,63} or are empty (trains nothing). Fields that are not listed are
ignored; a kind that is not listed is an error, because a new kind comes with a new version, which both sides
know from the hello. A body's length must be what the receiver's own layout implies for that encoding, and
that is checked before anything is allocated. Everything that breaks these rules is a RemoteError.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gossipml import codec
from gossipml.codec import Value
from gossipml.errors import LocalError, RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, PEER_ID_SIZE, Address, Contact, PeerId, checked_address
from gossipml.membership import DIGEST_SIZE, NO_ORDERS
from gossipml.orders import MAX_ORDER
from gossipml.peer.push_sum import EPOCHS, MAX_WEIGHT, Mass

VERSION = 1
OLDEST_VERSION = 1

MAX_HEADER = 16 * 1024  # an update with 8 full contacts is 3.5 kB; bounds what a stranger's header can cost
MAX_NAME = 64  # of a peer: a line in a table
MAX_DIGEST = 64  # SHA-256 in hexadecimal
MAX_ENCODING = 32  # "bfloat16-1in64-01234567" and some to come
MAX_REASON = 600  # two digests, three names and a sentence
MAX_CONTACTS = 8  # peer sampling works with samples far smaller than the view (Jelasity et al. 2007)
MAX_ORDERS = 60  # of the longest orders fit one header
MAX_STATE = 16  # "averaging" has 9
MAX_LINKS = 64  # the most sessions that a mesh has by default
LINK_SIZE = 8  # bytes of an id that tell peers apart in a picture; nothing else rests on them
MAX_AGE = float(2**53)  # beyond it a float no longer counts single samples
MAX_PARAMETERS = 2**40
MAX_BODY = 2**43
BOOT_SIZE = 8
DISCARD_CHUNK = 64 * 1024  # a refused body is read into this much, over and over

_LENGTH = struct.Struct(">I")
_MODEL = re.compile(r"([a-z0-9][a-z0-9_-]{0,63})?", re.ASCII)
_HEX = re.compile(r"([0-9a-f]{64})?", re.ASCII)
_ENCODING = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)


@dataclass(frozen=True)
class Profile:
    """What a peer says about itself."""

    name: str
    model: str
    digest: str
    """Digest of the model's layout; empty while the peer does not know it yet."""
    port: int
    addresses: tuple[Address, ...]

    def contact(self, peer: PeerId, seen_at: str | None = None) -> Contact:
        """Where that peer can be reached: what it announced, then the host its stream came from."""
        addresses = list(self.addresses[:MAX_CONTACT_ADDRESSES])
        if seen_at is not None and self.port:
            observed = Address(seen_at, self.port)
            if observed not in addresses:
                addresses = [*addresses[: MAX_CONTACT_ADDRESSES - 1], observed]
        return Contact(peer, tuple(addresses), self.model, self.name)


@dataclass(frozen=True)
class Hello:
    version: int
    oldest: int
    boot: bytes
    profile: Profile
    orders: bytes = NO_ORDERS
    """Digest of the orders that the sender knows."""


@dataclass(frozen=True)
class HelloReply:
    version: int
    oldest: int
    boot: bytes
    profile: Profile
    orders: bytes = NO_ORDERS


@dataclass(frozen=True)
class Refusal:
    code: str
    """One word for programs: version, self, digest, duplicate, full, quarantined, revoked."""
    reason: str


@dataclass(frozen=True)
class NewProfile:
    profile: Profile


@dataclass(frozen=True)
class Update:
    model: str
    digest: str
    encoding: str
    parameters: int
    body_length: int
    age: float
    round: int
    reply_wanted: bool
    reply: bool
    contacts: tuple[Contact, ...] = ()
    mass: Mass | None = None
    rests: bool = False
    """Its sender trains no more, or not now ..."""
    settled: bool = False
    """... and the model is an average over time, or what peers made of theirs."""


@dataclass(frozen=True)
class UpdateAck:
    round: int
    accepted: bool
    reason: str
    mass_total: float | None = None


@dataclass(frozen=True)
class Orders:
    """What the network key ordered. Holds secrets: for members alone, over TLS alone."""

    orders: tuple[bytes, ...]
    digest: bytes
    """Of all that the sender knows now."""

    def __repr__(self) -> str:
        return f"Orders({len(self.orders)} orders, digest={self.digest.hex()})"


@dataclass(frozen=True)
class News:
    """How the sender says that it fares; people see it, nothing is decided by it."""

    state: str
    round: int
    accuracy: float | None
    loss: float | None
    links: tuple[bytes, ...]
    """Beginnings of the ids of those it has sessions with."""


@dataclass(frozen=True)
class Ping:
    nonce: int


@dataclass(frozen=True)
class Pong:
    nonce: int


@dataclass(frozen=True)
class Goodbye:
    reason: str


Message: TypeAlias = (
    Hello | HelloReply | Refusal | NewProfile | Update | UpdateAck | Orders | News | Ping | Pong | Goodbye
)


# Encoding.


def encode(message: Message) -> bytes:
    """Length and header of a message. The body of an update follows it and is not copied here."""
    header = codec.pack(_fields(message))
    if len(header) > MAX_HEADER:
        raise LocalError(f"header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    return _LENGTH.pack(len(header)) + header


def clean_reason(text: str) -> str:
    """Text that may travel as a reason: one printable line of bounded length."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_REASON]


def _fields(message: Message) -> dict[str, object]:
    """The keys of what is sent often are in order: it is packed twice as fast."""
    match message:
        case Hello() | HelloReply():
            return {
                "t": "hello" if isinstance(message, Hello) else "welcome",
                "v": message.version,
                "oldest": message.oldest,
                "boot": message.boot,
                "profile": _profile_fields(message.profile),
                "orders": message.orders,
            }
        case Refusal(code, reason):
            return {"t": "refusal", "code": code, "reason": clean_reason(reason)}
        case NewProfile(profile):
            return {"t": "profile", "profile": _profile_fields(profile)}
        case Update():
            mass = [message.mass.total, message.mass.epoch] if message.mass is not None else None
            return {
                "age": message.age,
                "bytes": message.body_length,
                "digest": message.digest,
                "enc": message.encoding,
                **({"mass": mass} if mass is not None else {}),
                "model": message.model,
                "params": message.parameters,
                "peers": [
                    [c.peer, c.name, c.model, [[a.host, a.port] for a in c.addresses[:MAX_CONTACT_ADDRESSES]]]
                    for c in message.contacts[:MAX_CONTACTS]
                ],
                "reply": message.reply,
                "rests": message.rests,
                "round": message.round,
                "settled": message.settled,
                "t": "update",
                "want": message.reply_wanted,
            }
        case UpdateAck(round_, accepted, reason, total):
            told = {"mass": total} if total is not None else {}
            return {"t": "ack", "round": round_, "ok": accepted, "reason": clean_reason(reason), **told}
        case Orders(orders, digest):
            return {"t": "orders", "orders": list(orders[:MAX_ORDERS]), "digest": digest}
        case News():
            return {
                "t": "news",
                "state": message.state,
                "round": message.round,
                "accuracy": message.accuracy,
                "loss": message.loss,
                "links": list(message.links[:MAX_LINKS]),
            }
        case Ping(nonce):
            return {"t": "ping", "n": nonce}
        case Pong(nonce):
            return {"t": "pong", "n": nonce}
        case Goodbye(reason):
            return {"t": "goodbye", "reason": clean_reason(reason)}


def _profile_fields(profile: Profile) -> dict[str, object]:
    return {
        "name": profile.name,
        "model": profile.model,
        "digest": profile.digest,
        "port": profile.port,
        "addrs": [[a.host, a.port] for a in profile.addresses[:MAX_CONTACT_ADDRESSES]],
    }


# Decoding: every field of a hostile map is read through a check.


def decode_header(data: bytes | bytearray | memoryview) -> Message:
    """The message whose header is `data`; RemoteError when it breaks the specification above."""
    fields = codec.as_map(codec.unpack(data, limit=MAX_HEADER))
    kind = codec.get_str(fields, "t", limit=16)
    read = _READERS.get(kind)
    if read is None:
        raise RemoteError(f"message of unknown kind {clean_reason(kind)!r}")
    return read(fields)


def _read_hello(fields: dict[str, Value]) -> Hello:
    return Hello(*_hello_values(fields))


def _read_welcome(fields: dict[str, Value]) -> HelloReply:
    return HelloReply(*_hello_values(fields))


def _hello_values(fields: dict[str, Value]) -> tuple[int, int, bytes, Profile, bytes]:
    version = codec.get_int(fields, "v", low=1, high=65535)
    oldest = codec.get_int(fields, "oldest", low=1, high=version)
    boot = codec.get_bytes(fields, "boot", size=BOOT_SIZE)
    return version, oldest, boot, _read_profile(fields), codec.get_bytes(fields, "orders", size=DIGEST_SIZE)


def _read_profile(fields: dict[str, Value]) -> Profile:
    inner = codec.as_map(fields.get("profile"))
    return Profile(
        name=_printable(codec.get_str(inner, "name", limit=MAX_NAME), "name"),
        model=_matching(_MODEL, codec.get_str(inner, "model", limit=64), "model"),
        digest=_matching(_HEX, codec.get_str(inner, "digest", limit=MAX_DIGEST), "digest"),
        port=codec.get_int(inner, "port", high=65535),
        addresses=_addresses(_pairs(codec.get_list(inner, "addrs", limit=MAX_CONTACT_ADDRESSES))),
    )


def _read_update(fields: dict[str, Value]) -> Update:
    wanted = codec.get_bool(fields, "want")
    model, digest, encoding = _names(
        codec.get_str(fields, "model", limit=64),
        codec.get_str(fields, "digest", limit=MAX_DIGEST),
        codec.get_str(fields, "enc", limit=MAX_ENCODING),
    )
    contacts = codec.get_list(fields, "peers", limit=MAX_CONTACTS)
    return Update(
        model=model,
        digest=digest,
        encoding=encoding,
        parameters=codec.get_int(fields, "params", low=1, high=MAX_PARAMETERS),
        body_length=codec.get_int(fields, "bytes", low=0 if wanted else 1, high=MAX_BODY),
        age=codec.get_float(fields, "age", low=0.0, high=MAX_AGE),
        round=codec.get_int(fields, "round"),
        reply_wanted=wanted,
        reply=codec.get_bool(fields, "reply"),
        rests=codec.get_bool(fields, "rests"),
        settled=codec.get_bool(fields, "settled"),
        contacts=tuple(map(_read_contact, contacts)) if contacts else (),
        mass=_read_mass(fields["mass"]) if "mass" in fields else None,
    )


@functools.lru_cache(256)  # neighbours train the same model, in a few encodings
def _names(model: str, digest: str, encoding: str) -> tuple[str, str, str]:
    return _matching(_MODEL, model, "model"), _matching(_HEX, digest, "digest"), _matching(_ENCODING, encoding, "enc")


def _read_mass(item: Value) -> Mass:
    match item:
        case [float(total), int(epoch)] if 0.0 <= total <= MAX_WEIGHT and 0 <= epoch < EPOCHS and epoch is not True:
            return Mass(total, epoch)
    raise RemoteError(f"a mass is [total from 0 to {MAX_WEIGHT:g}, epoch below 2^32]")


def _read_news(fields: dict[str, Value]) -> News:
    links = []
    for item in codec.get_list(fields, "links", limit=MAX_LINKS):
        if not isinstance(item, bytes) or len(item) != LINK_SIZE:
            raise RemoteError(f"a link is the first {LINK_SIZE} bytes of a peer id")
        links.append(item)
    return News(
        state=_printable(codec.get_str(fields, "state", limit=MAX_STATE), "state"),
        round=codec.get_int(fields, "round"),
        accuracy=None if fields.get("accuracy") is None else codec.get_float(fields, "accuracy", low=0.0, high=1.0),
        loss=None if fields.get("loss") is None else codec.get_float(fields, "loss", low=-MAX_AGE, high=MAX_AGE),
        links=tuple(links),
    )


def _read_orders(fields: dict[str, Value]) -> Orders:
    orders = []
    for item in codec.get_list(fields, "orders", limit=MAX_ORDERS):
        if not isinstance(item, bytes) or len(item) > MAX_ORDER:
            raise RemoteError(f"an order is at most {MAX_ORDER} bytes")
        orders.append(item)
    return Orders(tuple(orders), codec.get_bytes(fields, "digest", size=DIGEST_SIZE))


def _read_contact(item: Value) -> Contact:
    match item:
        case [bytes(peer), str(name), str(model), list(addresses)]:
            if len(peer) != PEER_ID_SIZE or len(name) > MAX_NAME or len(addresses) > MAX_CONTACT_ADDRESSES:
                raise RemoteError("a contact's peer id, name or list of addresses has a wrong length")
            return _contact(peer, name, model, _pairs(addresses))
    raise RemoteError("a contact is [peer id, name, model, addresses]")


@functools.lru_cache(1024)  # neighbours tell of the same ones over and over
def _contact(peer: bytes, name: str, model: str, pairs: tuple[tuple[str, int], ...]) -> Contact:
    return Contact(PeerId(peer), _addresses(pairs), _matching(_MODEL, model, "model"), _printable(name, "name"))


def _pairs(items: list[Value]) -> tuple[tuple[str, int], ...]:
    pairs = []
    for item in items:
        match item:
            case [str(host), int(port)] if not isinstance(port, bool):
                pairs.append((host, port))
            case _:
                raise RemoteError("an address is a pair of host and port")
    return tuple(pairs)


def _addresses(pairs: tuple[tuple[str, int], ...]) -> tuple[Address, ...]:
    try:
        return tuple(dict.fromkeys(checked_address(*pair) for pair in pairs))
    except ValueError as error:
        raise RemoteError(f"bad address: {error}") from None


def _printable(text: str, what: str) -> str:
    if not text.isprintable():  # names are shown on terminals: no escape sequences, no line breaks
        raise RemoteError(f"field {what!r} holds characters that cannot be printed")
    return text


def _matching(pattern: re.Pattern[str], text: str, what: str) -> str:
    if pattern.fullmatch(text) is None:
        raise RemoteError(f"field {what!r} is not of the form {pattern.pattern}")
    return text


_READERS: dict[str, Callable[[dict[str, Value]], Message]] = {
    "hello": _read_hello,
    "welcome": _read_welcome,
    "refusal": lambda f: Refusal(codec.get_str(f, "code", limit=16), _reason(f)),
    "profile": lambda f: NewProfile(_read_profile(f)),
    "update": _read_update,
    "ack": lambda f: UpdateAck(
        codec.get_int(f, "round"),
        codec.get_bool(f, "ok"),
        _reason(f),
        codec.get_float(f, "mass", low=0.0, high=MAX_WEIGHT) if "mass" in f else None,
    ),
    "orders": _read_orders,
    "news": _read_news,
    "ping": lambda f: Ping(codec.get_int(f, "n")),
    "pong": lambda f: Pong(codec.get_int(f, "n")),
    "goodbye": lambda f: Goodbye(_reason(f)),
}


def _reason(fields: dict[str, Value]) -> str:
    return _printable(codec.get_str(fields, "reason", limit=MAX_REASON), "reason")


# The incremental reader of a stream.


@dataclass(frozen=True)
class Body:
    """The whole body of an update has arrived."""

    update: Update
    data: bytearray | None
    """None when it was discarded."""


class Decoder:
    """Frames out of a byte stream, without ever reading past the frame it is in.

        count = await stream.receive_into(decoder.target())
        event = decoder.received(count)

    An event is a Message, a Body, or None while something is incomplete. After an Update, and before the next
    `target`, the caller says what becomes of its body: `keep_body` allocates it, to be filled in place by the
    stream; `discard_body` reads it away in small pieces. `body_length` tells how long the body of an update
    with such a header is by the local layout, None when there is no such layout here.
    """

    def __init__(self, body_length: Callable[[Update], int | None]) -> None:
        self._body_length = body_length
        self._buffer = bytearray(_LENGTH.size)
        self._filled = 0
        self._in_header = False
        self._update: Update | None = None
        self._undecided = False
        self._remaining = 0  # of a body that is being discarded
        self._discarding = False

    @property
    def between_frames(self) -> bool:
        """Whether the stream may end here."""
        return self._filled == 0 and not self._in_header and self._update is None

    def target(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._undecided:
            raise LocalError("say first what becomes of the body: keep_body or discard_body")
        if self._discarding:
            return memoryview(self._buffer)[: min(self._remaining, len(self._buffer))]
        return memoryview(self._buffer)[self._filled :]

    def received(self, count: int) -> Message | Body | None:
        """Count `count` bytes, already written at `target`, and return what they completed."""
        if self._discarding:
            self._remaining -= count
            return self._end_body(None) if self._remaining == 0 else None
        self._filled += count
        if self._filled < len(self._buffer):
            return None
        if self._update is not None:
            return self._end_body(self._buffer)
        if not self._in_header:
            (length,) = _LENGTH.unpack(self._buffer)
            if not 0 < length <= MAX_HEADER:
                raise RemoteError(f"header of {length} bytes; allowed are 1 to {MAX_HEADER}")
            self._expect(length, in_header=True)
            return None
        message = decode_header(self._buffer)
        if isinstance(message, Update) and not message.body_length:
            self._expect(_LENGTH.size)
        elif isinstance(message, Update):
            local = self._body_length(message)
            if local is None:
                raise RemoteError(
                    f"update of model {message.model!r}, layout {message.digest[:12] or 'none'}, encoding "
                    f"{message.encoding!r}: not trained here"
                )
            if message.body_length != local:
                raise RemoteError(
                    f"update of {message.body_length} bytes; {message.model!r} as {message.encoding!r} has {local}"
                )
            self._update, self._undecided = message, True
        else:
            self._expect(_LENGTH.size)
        return message

    def keep_body(self) -> None:
        """Receive the body of the update just announced into a buffer of its own."""
        self._expect(self._take_decision().body_length)

    def discard_body(self) -> None:
        """Read the body of the update just announced away."""
        self._remaining = self._take_decision().body_length
        self._expect(min(self._remaining, DISCARD_CHUNK))
        self._discarding = True

    def _take_decision(self) -> Update:
        if self._update is None or not self._undecided:
            raise LocalError("no body is announced")
        self._undecided = False
        return self._update

    def _end_body(self, data: bytearray | None) -> Body:
        update, self._update, self._discarding = self._update, None, False
        if update is None:
            raise LocalError("no body is under way")
        self._expect(_LENGTH.size)
        return Body(update, data)

    def _expect(self, count: int, *, in_header: bool = False) -> None:
        self._buffer = bytearray(count)
        self._filled = 0
        self._in_header = in_header
