"""The published models as one peer deals with them: find, fetch, publish, roll back, hold for others.

    publish: content -> store -> head and provider records in the DHT -> holders are asked to fetch it
    fetch:   name -> heads -> manifest -> providers -> pieces from many at once -> store -> provider record

The latest version of a name is the greatest by (height, age, id) among the valid manifests that the heads name;
every reader decides the same from the same heads. Whoever publishes names all heads of the greatest height as
parents, so that versions made at the same time come together again. A rollback is a new version with old content.

What lies on the disk is the store's (`gossipml.models.store`), who has what the catalogue's (`gossipml.dht.catalogue`),
moving pieces the swarm's (`gossipml.peer.swarm`); how many hold a version `gossipml.daemon.replication` sees to.
"""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from gossipml.api.ports import UnknownModel
from gossipml.dht.catalogue import Catalogue, HeadClaim
from gossipml.dht.storage import MAX_RECORDS_PER_KEY
from gossipml.env import Credentials, Env
from gossipml.errors import GossipmlError, RemoteError, UserError
from gossipml.ids import Address, Contact, PeerId, short_peer_id
from gossipml.models.manifest import Manifest, check_name, latest, read_manifest, sign_manifest, succession, version_id
from gossipml.models.merkle import check_layer
from gossipml.models.store import Measured, Store, StoreConfig
from gossipml.models.store_content import Content
from gossipml.models.store_rules import choose
from gossipml.peer.swarm import Swarm

log = logging.getLogger("gossipml.library")

MAX_KNOWN = 4096  # manifests remembered, 3 MB
MAX_RIVALS = 8  # heads of one height that are looked at
MAX_HISTORY = 100  # versions that `history` walks back
MAX_ASKED = 64  # versions that others asked us to keep and that are not fetched yet
FETCHES = 4  # downloads under way at once; each takes from many peers
ENDED_SECONDS = 60.0  # how long a download that ended is still told of
RETRY_SECONDS = 30.0  # before an unfinished version that nobody gave is tried again
RESERVE = 1 << 30  # bytes of the disk that are left free when holding for others
NEWCOMER_SECONDS = 3.0  # for meeting others after the start; a network that is there answers in milliseconds
CLAIMS = 16  # of a head, where no more are needed: R holders say what is new at once, and one is asked soon again
HEAD_PAUSE = 0.3  # seconds until a peer that has just met the first others looks for a head again; doubled each time


@dataclass(frozen=True)
class Draft:
    """What whoever publishes says about a new version."""

    name: str
    spec: bytes = b""
    """Digest of the model's specification; empty when it is not known."""
    age: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass
class Fetch:
    """A download, under way or just over."""

    manifest: Manifest
    done: int = 0
    """Bytes that are here."""
    error: str = ""
    ended: float | None = None
    failure: Exception | None = None
    over: trio.Event = field(default_factory=trio.Event)


class Library:
    """One peer's dealings with published models. Downloads go on while `run` runs."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        store: Store,
        catalogue: Catalogue,
        swarm: Swarm,
        config: StoreConfig,
        *,
        addresses: Callable[[], tuple[Address, ...]],
        meet_others: Callable[[], Awaitable[None]],
        sees_far: Callable[[], bool],
    ) -> None:
        """`addresses`: where others may reach us; `meet_others` returns when the DHT knows somebody, `sees_far`
        tells whether it knows as many as answer a look."""
        self.store = store
        self.catalogue = catalogue
        self.swarm = swarm
        self.config = config
        self.changed = trio.Event()
        """Set, and replaced by a new one, when versions have come or gone."""
        self.followed: set[str] = set()
        """Names whose latest version is always to be here: of the model that is trained or served."""
        self.on_publish: Callable[[], None] = lambda: None
        """Called when this peer has published a version: others are to take it."""
        self._env = env
        self._credentials = credentials
        self._addresses = addresses
        self._meet_others = meet_others
        self._sees_far = sees_far
        self._begun = trio.current_time()
        store.on_damage = self._damaged
        self._known: OrderedDict[bytes, Manifest] = OrderedDict()
        self._fetches: dict[bytes, Fetch] = {}
        self._slots = trio.CapacityLimiter(FETCHES)
        self._nursery: trio.Nursery | None = None
        self._unfinished = trio.Event()  # something may be
        self._told_heads: set[str] = set()
        self._told: set[bytes] = set()
        self._removed: set[bytes] = set()  # by hand: we are not to be asked to hold them again

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve downloads until cancelled, and go on with those that a former run left unfinished."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self.announce()
                task_status.started()
                while True:
                    self._unfinished = trio.Event()
                    await self._finish_unfinished()
                    if not (self.store.wanted() or self.store.lost()):
                        await self._unfinished.wait()
                    await trio.sleep(RETRY_SECONDS * self._env.rng.uniform(0.7, 1.3))
            finally:
                self._nursery = None

    # Finding

    def is_here(self, version: Manifest) -> bool:
        return self.store.holds(version.version)

    async def heads(self, name: str, enough: int = MAX_RECORDS_PER_KEY) -> list[Manifest]:
        """The versions of the greatest height that anybody names, the latest first; empty when there are none.

        A holder names one head, its latest: of versions made at the same time the later ones stay visible. `enough`
        holders are heard, if there are as many.
        """
        check_name(name)
        best = self.store.versions(name)[:1]
        wrong = 0
        for claim in await self.catalogue.heads(name, enough):  # the greatest height first
            if (best and claim.height < best[0].height) or len(best) >= MAX_RIVALS or wrong >= MAX_RIVALS:
                break
            if any(claim.version == version.version for version in best):
                continue
            version = await self._claimed(claim, name)
            if version is None or version.name != name:
                wrong += 1
            elif not best or version.height > best[0].height:
                best = [version]
            elif version.height == best[0].height and version not in best:
                best.append(version)
        return sorted(best, key=lambda version: version.order, reverse=True)

    async def latest(self, name: str) -> Manifest | None:
        """The latest version of `name` in the network, as far as it can be seen from here."""
        return latest(await self.heads(name))

    async def find(self, name: str, prefix: str = "") -> Manifest:
        """The version that a person means: the latest, or the one whose id begins with `prefix`.

        UnknownModel when there is none, UserError when it is ambiguous.
        """
        if not prefix:
            head = await self.latest(name)
            if head is None:
                raise UnknownModel(f"no version of a model {name!r} is published; see `gossipml models list`")
            return head
        if re.fullmatch("[0-9a-f]{1,64}", prefix.lower()) is None:
            raise UserError(f"{prefix[:70]!r} is no version: give some of the hexadecimal digits of its id")
        here = [version for version in self.store.versions(name) if version.version.hex().startswith(prefix.lower())]
        versions = here or await self.history(name)
        if not versions:
            raise UnknownModel(f"no version of a model {name!r} is published; see `gossipml models list`")
        return choose(versions, name, prefix)

    async def history(self, name: str) -> list[Manifest]:
        """The versions of a model, newest first: those that are here and those that the parents lead to."""
        heads = await self.heads(name)
        versions = {version.version: version for version in (*heads, *self.store.versions(name))}
        contacts = await self.catalogue.providers(heads[0].version) if heads else []
        waiting = [parent for version in versions.values() for parent in version.parents]
        seen = set(versions)
        while waiting and len(seen) < MAX_HISTORY:
            parent = waiting.pop(0)
            if parent in seen:
                continue
            seen.add(parent)
            version = await self._by_id(parent, contacts)
            if version is not None and version.name == name:
                versions[parent] = version
                waiting += version.parents
        return sorted(versions.values(), key=lambda version: version.order, reverse=True)

    async def names(self) -> list[str]:
        """The models of the network."""
        return sorted({*await self.catalogue.names(), *(version.name for version in self.store.versions())})

    async def content(self, version: Manifest) -> bytes | None:
        """The safetensors bytes of a version that is whole here, verified; None otherwise."""
        held = self.store.content(version.root) if self.is_here(version) else None
        if held is None:
            return None
        with self.store.using(version.root):
            pieces = [await held.read(index) for index in range(held.count)]
        return b"".join(piece for piece in pieces if piece is not None) if None not in pieces else None

    async def newcomers_head(self, name: str, digest: str) -> Manifest | None:
        """The latest version of a model of that specification, fetched; None when there is none.

        For a peer that starts: it has `NEWCOMER_SECONDS` since its start to meet others, which mostly have gone by
        while torch was loaded.
        """
        self.follow(name)
        head = latest(self.store.versions(name))
        with trio.move_on_at(self._begun + NEWCOMER_SECONDS):
            await self._meet_others()
        with trio.move_on_after(NEWCOMER_SECONDS):
            # Who has just met the first others may not see far yet; after that one look is enough.
            pause = HEAD_PAUSE
            while True:
                far = self._sees_far()
                found = await self.latest(name)
                if found is not None or far or trio.current_time() >= self._begun + NEWCOMER_SECONDS:
                    break
                await trio.sleep(pause)
                pause *= 2
            head = found
        if head is None or head.spec.hex() not in ("", digest):
            return None
        await self.fetch(head)
        return head

    async def _claimed(self, claim: HeadClaim, name: str) -> Manifest | None:
        known = self._at_hand(claim.version)
        if known is not None:
            return known
        data = await self.catalogue.head_manifest(claim, name)
        version = self._checked(data) if data is not None else None
        if version is None:  # the record is lost: who holds the version has its manifest, too
            version = await self._by_id(claim.version, await self.catalogue.providers(claim.version))
        return version

    async def _by_id(self, version: bytes, contacts: list[Contact]) -> Manifest | None:
        """The manifest of an id, from memory, from the store, or from a peer."""
        known = self._at_hand(version)
        if known is not None:
            return known
        try:
            return self._checked(await self.swarm.manifest(version, contacts))
        except RemoteError:
            return None

    def _at_hand(self, version: bytes) -> Manifest | None:
        return self._known.get(version) or self.store.get(version)

    def _checked(self, data: bytes) -> Manifest | None:
        """The version that a manifest from outside describes; None when it is not valid."""
        try:
            known = self._at_hand(version_id(data))
            version = known or read_manifest(data, self._credentials.keys.network_id, self._env.clock.wall())
        except RemoteError as error:
            log.debug("a manifest is not valid: %s", error)
            return None
        self._known[version.version] = version
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return version

    # Publishing

    async def publish(self, draft: Draft, content: bytes) -> Manifest:
        """A new version of the content. UserError when it is no safetensors file or the store is full."""
        return await self._publish(draft, await self.store.prepare(content))

    async def publish_file(self, draft: Draft, path: str) -> Manifest:
        """The same of a file in the home, which is taken over."""
        return await self._publish(draft, await self.store.measure(path))

    async def roll_back(self, old: Manifest) -> Manifest:
        """A new latest version with the content of an old one, which is fetched first when it is not here."""
        await self.fetch(old)
        note = f"rollback to {old.version.hex()[:12]}"
        draft = Draft(old.name, old.spec, old.age, old.metrics, note)
        with self.store.using(old.root):
            version = self._sign(draft, await self.heads(old.name), old.size, old.root)
            await (await self.store.begin(version)).finish()
        self._has_changed()
        self.on_publish()
        log.info("published %s, a rollback to %s", name_of(version), name_of(old))
        return version

    async def _publish(self, draft: Draft, measured: Measured) -> Manifest:
        try:
            heads = await self.heads(draft.name)
            version = await self.store.ingest(self._sign(draft, heads, measured.size, measured.root), measured)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.store.discard(measured)
            raise
        self._has_changed()
        self.on_publish()
        log.info("published %s, version %d, %d bytes", name_of(version), version.height, version.size)
        return version

    def _sign(self, draft: Draft, heads: list[Manifest], size: int, root: bytes) -> Manifest:
        height, parents = succession(heads)
        network_id, wall = self._credentials.keys.network_id, self._env.clock.wall()
        data = sign_manifest(
            self._credentials.identity,
            network_id=network_id,
            name=draft.name,
            spec=draft.spec,
            height=height,
            parents=parents,
            age=draft.age,
            metrics=draft.metrics,
            size=size,
            root=root,
            created=int(wall),
            note=draft.note,
        )
        return read_manifest(data, network_id, wall)

    # Fetching

    def follow(self, name: str) -> None:
        """From now on have the latest version of `name` here."""
        self.followed.add(name)

    async def catch_up(self) -> None:
        """Begin to fetch the latest versions of the followed names that are not here."""
        for name in sorted(self.followed):
            head = latest(await self.heads(name, CLAIMS))
            if head is not None and head.version not in self._removed:
                self.start_fetch(head)

    async def fetch(self, version: Manifest) -> None:
        """Return when the version is whole here.

        RemoteError when nobody gives it, UserError when the store is full.
        """
        fetch = self.start_fetch(version)
        if fetch is not None:
            await fetch.over.wait()
            if fetch.failure is not None:
                raise fetch.failure

    def start_fetch(self, version: Manifest) -> Fetch | None:
        """The download of a version, begun or under way; None when it is here."""
        if self.is_here(version):
            return None
        fetch = self._fetches.get(version.version)
        if fetch is None or fetch.ended is not None:
            self._forget_ended()
            fetch = self._fetches[version.version] = Fetch(version)
            if self._nursery is None:
                self._end(fetch, RemoteError("this peer is stopping"))
            else:
                self._nursery.start_soon(self._fetch, fetch)
        return fetch

    def fetches(self) -> list[Fetch]:
        """Downloads under way, and those that ended a moment ago."""
        self._forget_ended()
        return list(self._fetches.values())

    async def hold(self, peer: PeerId, data: bytes) -> str:
        """Somebody asks us to hold a version: "" when we do or begin to, otherwise why not."""
        version = self._checked(data)
        if version is None:
            return "the manifest is not valid"
        if self.is_here(version):
            return ""
        if version.version in self._removed:
            return "it was removed here by hand"
        newer = [held for held in self.store.versions(version.name) if held.order > version.order]
        if len(newer) >= self.config.keep_last:
            return f"{len(newer)} newer versions are here"
        if sum(fetch.ended is None for fetch in self._fetches.values()) >= MAX_ASKED:
            return "too many versions are being fetched"
        if version.size > await self._room():
            return f"there is no room for {version.size} bytes"
        log.info("%s asks us to hold %s", short_peer_id(peer), name_of(version))
        self.start_fetch(version)
        return ""

    async def _room(self) -> float:
        """Bytes that may be taken to hold versions for others."""
        quota = self.config.quota
        return min(quota - self.store.used if quota else math.inf, await self._env.disk.free() - RESERVE)

    async def _fetch(self, fetch: Fetch) -> None:
        """Fetch one version; its failure is told to those who wait and in the log, and harms nothing else."""
        version, failure = fetch.manifest, None
        try:
            async with self._slots:
                with self.store.using(version.root):
                    content = await self._begin(version)
                    if content.count > 1:  # whoever fetches a single piece has nothing for others until it has all
                        self._tell_provider(version, complete=False)
                    await self.swarm.download(
                        content,
                        lambda: self.catalogue.providers(version.version),
                        lambda done, size: setattr(fetch, "done", done),
                    )
                    self._has_changed()
            log.info("fetched %s, %d bytes", name_of(version), version.size)
        except (OSError, GossipmlError) as error:
            failure = error
            log.warning("%s was not fetched: %s", name_of(version), error)
        finally:
            self._end(fetch, failure)
            self.announce()

    async def _begin(self, version: Manifest) -> Content:
        """Where the pieces go; what is here of the same content already counts."""
        if self.store.layer(version.root) is not None or version.size <= version.piece_length:
            return await self.store.begin(version)
        contacts = await self.catalogue.providers(version.version)
        count = -(-version.size // version.piece_length)

        def fits(layer: bytes) -> bool:
            try:
                check_layer(layer, version.root, version.size)
            except RemoteError:
                return False
            return True

        return await self.store.begin(version, await self.swarm.layer(version.root, count, contacts, fits))

    def _end(self, fetch: Fetch, failure: Exception | None) -> None:
        fetch.failure = failure
        fetch.error = str(failure) if failure else ""
        fetch.ended = self._env.clock.now()
        fetch.over.set()
        self._unfinished.set()

    def _forget_ended(self) -> None:
        latest_end = self._env.clock.now() - ENDED_SECONDS
        self._fetches = {
            version: fetch
            for version, fetch in self._fetches.items()
            if fetch.ended is None or fetch.ended > latest_end
        }

    async def _finish_unfinished(self) -> None:
        """Fetch what a crash, a damaged disk or a lost peer has left unfinished."""
        for version in self.store.wanted():
            self.start_fetch(version)
        for identity in self.store.lost():
            found = await self._by_id(identity, await self.catalogue.providers(identity))
            if found is not None:
                self.start_fetch(found)

    def _damaged(self, content: Content) -> None:
        """A piece that was read back is not what was written: fetch it anew."""
        log.error("the disk gave back a damaged piece of %s; it is fetched anew", content.root.hex()[:12])
        for version in self.store.wanted():
            if version.root == content.root:
                self.start_fetch(version)
        self._unfinished.set()
        self.announce()

    # Keeping and letting go

    async def pin(self, version: Manifest, pinned: bool) -> None:
        """Keep a version whatever comes after it, or no longer."""
        if pinned:
            await self.fetch(version)
            await self.store.pin(version.version)
        else:
            await self.store.unpin(version.version)

    async def remove(self, versions: list[Manifest]) -> int:
        """Remove versions from this peer; the bytes that this frees. They are not taken back when others ask."""
        before = self.store.used
        for version in versions:
            self._removed.add(version.version)
            await self.store.remove(version.version)
        self._has_changed()
        return before - self.store.used

    async def tidy(self) -> None:
        """Let go of what is neither pinned nor among the newest of its name."""
        gone = await self.store.collect()
        if gone:
            log.info("let go of %s", ", ".join(name_of(version) for version in gone))
            self._has_changed()

    def announce(self) -> None:
        """Tell the DHT what this peer holds; what was told before costs nothing."""
        versions = self.store.versions()
        heads: dict[str, Manifest] = {}
        for version in versions:
            heads.setdefault(version.name, version)  # the latest comes first
            self._tell_provider(version, complete=True)
        under_way = {v for v, fetch in self._fetches.items() if fetch.ended is None}
        for identity in self._told - {version.version for version in versions} - under_way:
            self.catalogue.unprovide(identity)
            self._told.discard(identity)
        for name, head in heads.items():
            self.catalogue.set_head(name, head.height, head.version, head.data)
        for name in self._told_heads - set(heads):
            self.catalogue.drop_head(name)
        self._told_heads = set(heads)
        self.catalogue.set_names(sorted(heads))

    def _tell_provider(self, version: Manifest, *, complete: bool) -> None:
        self._told.add(version.version)
        self.catalogue.provide(version.version, self._addresses(), complete)

    def _has_changed(self) -> None:
        self.announce()
        changed, self.changed = self.changed, trio.Event()
        changed.set()


def name_of(version: Manifest) -> str:
    """What people call a version: name@id, shortened."""
    return f"{version.name}@{version.version.hex()[:12]}"
