"""Where the published models are: who holds which version, and what each holder believes is the latest of a name.

    names        announcement under SHA-256("gossipml/v1/names" | network id)
    heads        announcement under SHA-256("gossipml/v1/head" | network id | name)
    a manifest   mutable record of each holder of a head: its own public key, salt = name
    a version    announcement under SHA-256("gossipml/v1/version" | network id | version id)

Values are canonical msgpack, but for the manifest, which stands as it is. A head is `[height, version id]`; a
provider `{"a": addresses, "c": whole or still fetching}`; names are a list, as many as fit, and each holder tells
others of a long list. An empty value withdraws what stood there. BEP 5 (announcements), BEP 44 (mutable records).

What is found are claims, each signed by its peer: a manifest is checked by who reads it, a piece by its hash, and
the dial proves the peer id. Since every holder of a head says so itself, a name lives while one of them does.

Leaves out: this peer's own claims (it knows them), who of the listed is alive (TTL says at most half an hour late),
and which head is the latest (that takes the manifests: the store decides).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gossipml import codec
from gossipml.dht.messages import pack_address, unpack_address
from gossipml.dht.publish import Publisher
from gossipml.dht.records import MAX_VALUE, Kind, Record, mutable_key, topic_key
from gossipml.dht.service import Dht
from gossipml.dht.storage import MAX_RECORDS_PER_KEY
from gossipml.env import Credentials, Env
from gossipml.errors import RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Address, Contact, PeerId, PublicKey

TTL = 1800.0  # seconds that a dead holder stays listed; a hundred versions are then one put in six seconds
VERSION_SIZE = 32
MAX_NAMES = 1024  # told by others; more than anybody reads
NAMES_PER_PEER = 256  # of 2 characters each they fit one record
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # THREATS.md: what a name may be
YEAR_2020 = 1_577_836_800  # no height is greater than the seconds since then: nobody makes a name unsurpassable
CLOCK_SLACK = 120
GONE = b""


@dataclass(frozen=True)
class HeadClaim:
    """Somebody says that this version is the latest of the name."""

    peer: PeerId
    public_key: PublicKey
    height: int
    version: bytes


@dataclass(frozen=True)
class Provider:
    """Somebody says that it holds a version."""

    contact: Contact
    complete: bool
    """False while it still fetches the version: it serves the pieces it has."""


class Catalogue:
    """Tells what this peer holds, and finds what others do.

    `set_...`, `provide` and their opposites take effect through the publisher's `run`, at its pace, and are
    repeated by it; what was told before is told again without cost.
    """

    def __init__(self, env: Env, dht: Dht, publisher: Publisher, credentials: Credentials, *, ttl: float = TTL) -> None:
        self._env = env
        self._dht = dht
        self._publisher = publisher
        self._public_key = credentials.identity.public_key
        self._network_id = credentials.keys.network_id
        self._ttl = ttl
        self._told: dict[tuple[Kind, bytes], bytes] = {}

    # Heads

    def set_head(self, name: str, height: int, version: bytes, manifest: bytes) -> None:
        """This peer holds `version`, whose manifest this is, and believes that it is the latest of `name`.

        ValueError when the name, the version id or the size of the manifest is impossible.
        """
        salt = checked_name(name).encode()
        if len(version) != VERSION_SIZE:
            raise ValueError(f"a version id of {len(version)} bytes instead of {VERSION_SIZE}")
        if not 0 < len(manifest) <= MAX_VALUE:
            raise ValueError(f"a manifest of {len(manifest)} bytes is not between 1 and {MAX_VALUE}")
        self._tell(Kind.MUTABLE, mutable_key(self._public_key, salt), manifest, salt)
        self._tell(Kind.ANNOUNCEMENT, self.head_key(name), codec.pack([height, version]))

    def drop_head(self, name: str) -> None:
        """This peer holds no version of `name` any more."""
        self._withdraw(Kind.ANNOUNCEMENT, self.head_key(name))
        self._withdraw(Kind.MUTABLE, mutable_key(self._public_key, checked_name(name).encode()))

    async def heads(self, name: str, enough: int = MAX_RECORDS_PER_KEY) -> list[HeadClaim]:
        """What the other holders of `name` believe is its latest version, the greatest (height, version) first.

        Not of all of them, where `enough` have said so.
        """
        highest = self._env.clock.wall() - YEAR_2020 + CLOCK_SLACK
        claims = []
        for record in await self._announced(self.head_key(name), enough):
            match _value(record):
                case [int(height), bytes(version)] if (
                    type(height) is int and 0 <= height <= highest and len(version) == VERSION_SIZE
                ):
                    claims.append(HeadClaim(record.peer, record.public_key, height, version))
        return sorted(claims, key=lambda claim: (claim.height, claim.version, claim.peer), reverse=True)

    async def head_manifest(self, claim: HeadClaim, name: str) -> bytes | None:
        """The manifest that the claim's peer now names as head of `name`; None when none is found.

        Normally that of `claim.version`; another one when the peer has moved on since it was asked. Not checked.
        """
        key = mutable_key(claim.public_key, checked_name(name).encode())
        manifest = None
        for full in (False, True):  # a few liars may give an older record: then everybody is asked
            for record in await self._dht.get(key, full=full):
                if record.kind is Kind.MUTABLE and record.value != GONE:
                    manifest = record.value
                    if hashlib.sha256(manifest).digest() == claim.version:
                        return manifest
        return manifest

    # Providers

    def provide(self, version: bytes, addresses: Iterable[Address], complete: bool) -> None:
        """This peer serves `version` at these addresses (at most four): all of it, or what it has fetched so far."""
        packed = [pack_address(address) for address in addresses][:MAX_CONTACT_ADDRESSES]
        self._tell(Kind.ANNOUNCEMENT, self.version_key(version), codec.pack({"a": packed, "c": complete}))

    def unprovide(self, version: bytes) -> None:
        """This peer no longer serves `version`."""
        self._withdraw(Kind.ANNOUNCEMENT, self.version_key(version))

    async def replicas(self, version: bytes, enough: int = MAX_RECORDS_PER_KEY) -> list[Provider]:
        """The others who say that they hold `version` or fetch it, those with all of it first; not all, where `enough`
        are found."""
        found = []
        for record in await self._announced(self.version_key(version), enough):
            try:
                found.append(_provider(record))
            except RemoteError:
                continue
        return sorted(found, key=lambda provider: (not provider.complete, provider.contact))

    async def providers(self, version: bytes) -> list[Contact]:
        """Where `version` can be fetched, those who have all of it first."""
        return [provider.contact for provider in await self.replicas(version)]

    # Names

    def set_names(self, names: Iterable[str]) -> None:
        """This peer holds versions of these names; of more than fit one record each peer tells others."""
        chosen: list[str] = []
        room = MAX_VALUE - 3  # the head of the list
        for name in sorted(names, key=lambda name: hashlib.sha256(self._public_key + name.encode()).digest()):
            room -= len(checked_name(name)) + 2
            if room < 0 or len(chosen) == NAMES_PER_PEER:
                break
            chosen.append(name)
        if chosen:
            self._tell(Kind.ANNOUNCEMENT, self.names_key, codec.pack(sorted(chosen)))
        else:
            self._withdraw(Kind.ANNOUNCEMENT, self.names_key)

    async def names(self) -> list[str]:
        """The names that others hold, sorted; beyond 1,024 those that most peers tell."""
        told: dict[str, int] = {}
        for record in await self._announced(self.names_key):
            listed = _value(record)
            for item in listed[:NAMES_PER_PEER] if isinstance(listed, list) else ():
                if isinstance(item, str) and NAME.fullmatch(item):
                    told[item] = told.get(item, 0) + 1
        return sorted(sorted(told, key=lambda name: (-told[name], name))[:MAX_NAMES])

    # Keys

    @property
    def names_key(self) -> bytes:
        return topic_key(b"gossipml/v1/names" + self._network_id)

    def head_key(self, name: str) -> bytes:
        return topic_key(b"gossipml/v1/head" + self._network_id + checked_name(name).encode())

    def version_key(self, version: bytes) -> bytes:
        return topic_key(b"gossipml/v1/version" + self._network_id + version)

    # Telling and asking

    def leave(self) -> None:
        """Withdraw everything; the publisher's `flush` says it at once."""
        for kind, key in list(self._told):
            self._withdraw(kind, key)

    def _tell(self, kind: Kind, key: bytes, value: bytes, salt: bytes = b"") -> None:
        if self._told.get((kind, key)) != value:
            self._told[kind, key] = value
            self._publisher.publish(kind, key, value, ttl=self._ttl, salt=salt)

    def _withdraw(self, kind: Kind, key: bytes) -> None:
        if self._told.pop((kind, key), None) is not None:
            self._publisher.withdraw(kind, key, GONE)

    async def _announced(self, key: bytes, enough: int = MAX_RECORDS_PER_KEY) -> list[Record]:
        records = await self._dht.get(key, full=True, enough=enough)
        return [record for record in records if record.public_key != self._public_key and record.value != GONE]


def checked_name(name: str) -> str:
    """The name itself; ValueError when it cannot be one."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a model: 1 to 64 of a-z, 0-9, _ and -, beginning with a-z or 0-9")
    return name


def _value(record: Record) -> codec.Value:
    """What the record says; None when that is of no form at all."""
    try:
        return codec.unpack(record.value, limit=MAX_VALUE)
    except RemoteError:
        return None


def _provider(record: Record) -> Provider:
    """RemoteError when the value is of a wrong form."""
    fields = codec.as_map(_value(record))
    addresses = []
    for item in codec.get_list(fields, "a", limit=MAX_CONTACT_ADDRESSES):
        if not isinstance(item, bytes):
            raise RemoteError("an address is bytes")
        addresses.append(unpack_address(item))
    return Provider(Contact(record.peer, tuple(addresses), "", ""), codec.get_bool(fields, "c"))
