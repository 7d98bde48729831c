"""Who is in the network, where, and which model each trains: signed announcements under two keys.

    members     SHA-256("gossipml/v1/members" | network id)
    a model     SHA-256("gossipml/v1/model" | network id | model name)

The value of an announcement is canonical msgpack of a map: `a` up to four addresses (6 or 18 bytes each), `m` model
name, `d` the first 8 bytes of the digest of its specification, `n` the peer's name. An empty value says that the
publisher has left; it lives as long as what it replaces, so that no older copy comes back.

What is listed is a hint: the signature says that this peer claims it, and the dial proves the peer id. A long
list is sampled by those who hold it, so each look adds to what is known until that expires.

Leaves out: liveness. Somebody killed stays listed until the announcement expires; failure detection is gossip's.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from gossipml import codec
from gossipml.dht.messages import pack_address, unpack_address
from gossipml.dht.publish import Publisher
from gossipml.dht.records import Kind, Record, topic_key
from gossipml.dht.service import Dht
from gossipml.env import Credentials, Env
from gossipml.errors import RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Address, Contact, PeerId

TTL = 900.0  # seconds; a killed peer stays listed for at most this long
DIGEST_SIZE = 8  # tells specifications apart; who trains with whom is settled by the full digest, peer to peer
MAX_NAME = 64
MAX_LISTED = 1024  # peers remembered; ten times what gossip samples from
LEFT = b""


@dataclass(frozen=True)
class Announcement:
    addresses: tuple[Address, ...]
    model: str
    """Empty for none."""
    digest: str
    """Hexadecimal digest of the model's specification, in full or shortened; empty for no model."""
    name: str


@dataclass(frozen=True)
class Listing:
    """One verified announcement. No contact: the peer has left."""

    contact: Contact | None
    digest: str
    seq: int
    expires: int


class Directory:
    """Announces this peer and lists the others."""

    def __init__(
        self, env: Env, dht: Dht, credentials: Credentials, *, ttl: float = TTL, seq_path: str = "state/dht-seq"
    ) -> None:
        self._env = env
        self._dht = dht
        self._own = credentials.identity.peer_id
        self._network_id = credentials.keys.network_id
        self._membership = credentials.membership
        self._ttl = ttl
        self._model_key: bytes | None = None
        self._listed: dict[PeerId, Listing] = {}
        self.publisher = Publisher(env, dht, credentials, seq_path=seq_path)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what was announced alive until cancelled."""
        await self.publisher.run(task_status=task_status)

    def announce(self, announcement: Announcement) -> None:
        """Say where this peer is and what it trains, from now on, instead of what was said before."""
        value = _encode(announcement)
        model_key = self.model_key(announcement.model) if announcement.model else None
        if self._model_key is not None and self._model_key != model_key:
            self.publisher.withdraw(Kind.ANNOUNCEMENT, self._model_key, LEFT)
        self.publisher.publish(Kind.ANNOUNCEMENT, self.members_key, value, ttl=self._ttl)
        if model_key is not None:
            self.publisher.publish(Kind.ANNOUNCEMENT, model_key, value, ttl=self._ttl)
        self._model_key = model_key

    async def leave(self) -> None:
        """Say that this peer goes, so that others need not find out; the caller sets the time for it."""
        for key in [self.members_key, *([self._model_key] if self._model_key else [])]:
            self.publisher.withdraw(Kind.ANNOUNCEMENT, key, LEFT)
        self._model_key = None
        await self.publisher.flush()

    async def members(self, enough: int = MAX_LISTED) -> list[Contact]:
        """The other peers of the network, in the order of their ids; not all of them, where `enough` are."""
        await self._look(self.members_key, enough)
        return self.known()

    async def providers(self, model: str, digest: str = "", *, enough: int = MAX_LISTED) -> list[Contact]:
        """The other peers that train `model`, with that digest when one is given; `enough` as in `members`."""
        await self._look(self.model_key(model), enough)
        short = digest[: 2 * DIGEST_SIZE]
        return [
            contact
            for contact in self.known()
            if contact.model == model and self._listed[contact.peer].digest.startswith(short)
        ]

    def known(self) -> list[Contact]:
        """What the last looks have found and what has not expired, without asking anybody."""
        self._forget_expired()
        contacts = [listing.contact for listing in self._listed.values() if listing.contact is not None]
        return sorted(contacts)

    @property
    def members_key(self) -> bytes:
        return topic_key(b"gossipml/v1/members" + self._network_id)

    def model_key(self, model: str) -> bytes:
        return topic_key(b"gossipml/v1/model" + self._network_id + model.encode())

    async def _look(self, key: bytes, enough: int) -> None:
        for record in await self._dht.get(key, full=True, enough=enough):
            if record.kind is not Kind.ANNOUNCEMENT or record.peer == self._own:
                continue
            try:
                listing = _decode(record)
            except RemoteError:
                continue
            held = self._listed.get(record.peer)
            if held is None or listing.seq > held.seq:  # seq is one counter for all keys of a publisher
                self._listed[record.peer] = listing
        self._forget_expired()
        while len(self._listed) > MAX_LISTED:
            del self._listed[min(self._listed, key=lambda peer: (self._listed[peer].expires, peer))]

    def _forget_expired(self) -> None:
        """And who was revoked since it was listed."""
        wall, revoked = self._env.clock.wall(), self._membership.is_revoked
        self._listed = {
            peer: listing for peer, listing in self._listed.items() if listing.expires > wall and not revoked(peer)
        }


def _encode(announcement: Announcement) -> bytes:
    if len(announcement.addresses) > MAX_CONTACT_ADDRESSES:
        raise ValueError(f"{len(announcement.addresses)} addresses are over {MAX_CONTACT_ADDRESSES}")
    for text in (announcement.model, announcement.name):
        if len(text) > MAX_NAME:
            raise ValueError(f"{text!r} is longer than {MAX_NAME} characters")
    return codec.pack(
        {
            "a": [pack_address(address) for address in announcement.addresses],
            "m": announcement.model,
            "d": bytes.fromhex(announcement.digest)[:DIGEST_SIZE],
            "n": announcement.name,
        }
    )


def _decode(record: Record) -> Listing:
    """The listing in a verified record; RemoteError when its value is of a wrong form."""
    if record.value == LEFT:
        return Listing(None, "", record.seq, record.expires)
    fields = codec.as_map(codec.unpack(record.value, limit=len(record.value)))
    addresses = []
    for item in codec.get_list(fields, "a", limit=MAX_CONTACT_ADDRESSES):
        if not isinstance(item, bytes):
            raise RemoteError("an address is bytes")
        addresses.append(unpack_address(item))
    contact = Contact(
        record.peer,
        tuple(addresses),
        codec.get_str(fields, "m", limit=MAX_NAME),
        codec.get_str(fields, "n", limit=MAX_NAME),
    )
    return Listing(contact, codec.get_bytes(fields, "d", limit=DIGEST_SIZE).hex(), record.seq, record.expires)
