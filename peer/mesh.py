"""The trio shell around gossip, view, failure detector and sessions: who is connected, and what goes where.

    listener -> Link -> wire -> Gossip -> Exchange -> learner        (in)
    round or tick -> Gossip -> Exchange -> Link -> wire              (out)

Decisions are made by the state machines, synchronously; this file performs them. Nothing here waits for a
neighbour: dials, hellos and bodies have deadlines, an update that finds another one waiting is dropped and
counted. Between two peers one session stays: of two that were dialled at the same time the one dialled by
the peer with the smaller id; of two that say different boots, or when the older one is silent, the newer.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import trio

from gossipml.env import GOSSIP, Credentials, Env, Handler, Listener, Stream
from gossipml.errors import LocalError
from gossipml.ids import MAX_CONTACT_ADDRESSES, Address, Contact, PeerId, short_peer_id
from gossipml.peer import failure as f
from gossipml.peer import gossip_events as g
from gossipml.peer import session as s
from gossipml.peer.dialling import Dialling
from gossipml.peer.exchange import Exchange, Merged
from gossipml.peer.gossip import BUSY, Gossip
from gossipml.peer.herald import Herald
from gossipml.peer.learner import Learner, NotReady
from gossipml.peer.link import Link, LinkConfig, Parcel, Traffic
from gossipml.peer.neighbours import NeighbourInfo, Stats, describe
from gossipml.peer.packing import Packing
from gossipml.peer.wire import (
    BOOT_SIZE,
    LINK_SIZE,
    Hello,
    Message,
    News,
    Orders,
    Ping,
    Pong,
    Profile,
    Update,
    UpdateAck,
)

log = logging.getLogger("gossipml.peer")

RENEW_SECONDS = 60.0  # between two tries to move a session to the newest keys


@dataclass(frozen=True)
class MeshConfig:
    sessions: int = 64
    """Open at once: 25 kB each for TLS; with more peers than that the least used session makes room."""
    wanted: int = 8
    """Sessions kept open: a random graph of that degree holds together with thousands of peers (Kermarrec,
    Massoulie, Ganesh 2003 need log n)."""
    idle: float = 1.0
    """Seconds without an update after which a session may make room for another peer: in a network larger than
    `sessions` nobody is kept out, and none is cut off in the middle of an exchange (guess)."""
    hellos: int = 64
    """Accepted streams whose hello is still due; further ones are closed at once."""
    dials: int = 8
    """Dials under way at once."""
    dial_seconds: float = 5.0
    """For one address, handshake included."""
    upkeep: float = 1.0
    """Seconds between looks at whom to dial while more sessions are wanted."""
    link: LinkConfig = field(default_factory=LinkConfig)
    failure: f.FailureConfig = field(default_factory=f.FailureConfig)


class Mesh:
    """Our sessions with other peers. Everything but `run` and `gossip_round` returns at once."""

    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        profile: Profile,
        listener: Listener,
        *,
        gossip: Gossip,
        facts: g.ModelFacts | None = None,
        config: MeshConfig | None = None,
        streams: Mapping[str, Handler] | None = None,
        on_orders: Callable[[], None] = lambda: None,
    ) -> None:
        """`streams`: who serves accepted streams of the other protocols, by protocol; without one they are closed.

        `on_orders` is called when another member told us an order of the network key: it is to be kept on disk.
        """
        self.config = config or MeshConfig()
        self.gossip = gossip
        self.view = gossip.view
        self.stats = Stats()
        self.send_seconds = 0.0
        """How long an update takes from its encoding until it has left, smoothed; 0 before the first."""
        self.profile = replace(profile, model=facts.model, digest=facts.digest) if facts else profile
        self.own = credentials.identity.peer_id
        self._env = env
        self._clock = env.clock
        self._credentials = credentials
        self._listener = listener
        self._streams = dict(streams or {})
        self._guests: dict[int, tuple[Stream, trio.CancelScope]] = {}  # streams of other protocols, by serial number
        self._membership = credentials.membership
        self._herald = Herald(credentials.membership)
        self._on_orders = on_orders
        self._heeded = -1  # the version of the membership that was last enforced
        self._boot = env.secrets(BOOT_SIZE)
        self._exchange = Exchange(gossip)
        self._failure = f.FailureDetector(self.config.failure)
        self._links: dict[PeerId, Link] = {}
        self._packing = Packing(gossip, self._exchange, self._links, env.clock)
        self._all: dict[int, Link] = {}  # also those still in their hello, by serial number
        self._serial = 0
        self._hellos = 0
        self._facts = facts
        dials, seconds = self.config.dials, self.config.dial_seconds
        self._dialling = Dialling(env, credentials, self.view, self, most=dials, seconds=seconds)
        self._notes: dict[PeerId, str] = {}  # for NeighbourInfo.reason
        self._traffic: dict[PeerId, Traffic] = {}
        self._news: dict[PeerId, News] = {}  # of the peers with an open session
        self._nonce = 0
        self._nursery: trio.Nursery | None = None
        self._time_changed = trio.Event()
        self._awake_at = math.inf
        self._peers_changed = trio.Event()
        self._merge_now = trio.Event()
        self._to_merge: g.Merge | g.MergeTogether | None = None  # gossip has one under way at a time
        self._to_settle = False
        self._encoding = 0  # sends that still wait for our model to be encoded

    # What the daemon calls.

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, dial, gossip until cancelled; then say goodbye to everybody."""
        if self._nursery is not None:
            raise LocalError("the mesh runs already")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = self._dialling.nursery = nursery
                nursery.start_soon(self._listener.serve, self._accepted)
                nursery.start_soon(self._merge_all)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._keep_up)
                task_status.started()
        finally:
            self._nursery = self._dialling.nursery = None

    def accept(self, protocol: str, handler: Handler) -> None:
        """From now on `handler` serves accepted streams of another protocol."""
        self._streams[protocol] = handler

    def learn(self, contacts: Iterable[Contact]) -> None:
        """Contacts from the DHT, the saved file, the local network."""
        if self.view.learn(contacts):
            self._peers_changed.set()

    def bootstrap(self, addresses: Iterable[Address]) -> None:
        """Addresses to dial without knowing who answers, until somebody does."""
        self.view.knock(address for address in addresses if address not in self.profile.addresses)
        self._peers_changed.set()

    def contacts(self) -> list[Contact]:
        """The contacts worth saving, best first."""
        return self.view.export()

    def announce(self, profile: Profile) -> None:
        """Say something new about ourselves, to all open sessions too."""
        self.profile = profile
        for link in list(self._all.values()):
            link.announce(profile)

    def attach(self, learner: Learner, facts: g.ModelFacts) -> None:
        """The model is loaded: from here on updates are sent and merged."""
        self._facts = facts
        self._exchange.attach(learner)
        self._act(self.gossip.handle(g.LearnerReady(facts), self._clock.now()))
        profile = replace(self.profile, model=facts.model, digest=facts.digest)
        if profile != self.profile:
            self.announce(profile)

    def detach(self) -> None:
        """The learner is gone: updates are refused as "not ready", sessions stay."""
        self._act(self.gossip.handle(g.LearnerGone(), self._clock.now()))
        self._exchange.detach()
        self._to_merge = None

    def restore(self, age: float, round: int) -> None:
        """The learner goes on from a saved model; to be called before `attach`."""
        self._act(self.gossip.handle(g.Restored(age, round), self._clock.now()))

    def blame(self, peer: PeerId, reason: str) -> None:
        """Somebody broke a rule elsewhere (a bad piece, say): a strike, as for a fault in a session."""
        self.stats.faults += 1
        self.note(peer, reason)
        self._act(self.gossip.handle(g.Misbehaved(peer, reason), self._clock.now()))

    @property
    def strangers(self) -> Mapping[Address, str]:
        """Addresses where somebody answered who is no member as we are, and what is wrong; the latest of them."""
        return self._dialling.strangers

    @property
    def age(self) -> float:
        """Samples behind our model: what `restore` wants after a restart."""
        return self.gossip.age

    async def gossip_round(self, samples: int, round: int, body: bytes = b"") -> None:
        """A local round is done: hand the model to the receivers' queues, encoded in `body`, or as the learner encodes
        it now. Does not wait for the receivers."""
        self._packing.round_ended()
        sends = self._act(self.gossip.handle(g.RoundFinished(samples, round), self._clock.now()))
        if body:
            self._exchange.offer(body)
        self._encoding += 1
        await self._send(sends)

    def training_finished(self) -> None:
        """From here on only average, slower and slower, until `training_resumed` or the next `gossip_round`."""
        self._packing.rounds_ended()
        self._send_soon(self._act(self.gossip.handle(g.TrainingFinished(), self._clock.now())))

    def training_resumed(self) -> None:
        self._send_soon(self._act(self.gossip.handle(g.TrainingResumed(), self._clock.now())))

    def order(self, order: bytes) -> bool:
        """Do what the network key ordered, and tell everybody; whether it was news. RemoteError when it is none."""
        news = self._membership.take(order, self._clock.wall())
        if news:
            self._spread([order])
        return news

    def tell(self, state: str, round: int, accuracy: float | None, loss: float | None) -> None:
        """Tell our neighbours how we fare, for people to see."""
        news = News(state, round, accuracy, loss, tuple(peer[:LINK_SIZE] for peer in self._links))
        for link in list(self._links.values()):
            link.post_news(news)

    def news(self, peer: PeerId) -> News | None:
        """What a neighbour told last; None without a session or a word."""
        return self._news.get(peer)

    def links(self) -> list[PeerId]:
        """The peers with an open session."""
        return list(self._links)

    def neighbours(self) -> list[NeighbourInfo]:
        """Everybody we have met or refused, connected ones first."""
        now = self._clock.now()
        infos = [
            describe(
                entry,
                self._links.get(peer),
                self._failure.health(peer),
                self.gossip.conduct.record(peer, now),
                self.gossip.ages.claim(peer),
                self._traffic.get(peer) or Traffic(),
                self._notes.get(peer, ""),
                now,
            )
            for entry in self.view.entries()
            for peer in [entry.contact.peer]
        ]
        met = [info for info in infos if info.state != "known" or info.last_seen is not None]
        return sorted(met, key=lambda info: (info.state != "connected", info.name, info.peer))

    # Sessions: accepting, dialling, ending.

    async def _accepted(self, stream: Stream) -> None:
        if stream.protocol != GOSSIP:
            await self._receive_guest(stream)
            return
        if self._hellos >= self.config.hellos:
            await stream.aclose()
            return
        await self.run_link(stream, dialled=False)

    async def _receive_guest(self, stream: Stream) -> None:
        """A stream of another protocol, until it ends or its peer is no member any more."""
        handler = self._streams.get(stream.protocol)
        if handler is not None and not self._membership.is_revoked(stream.peer_id):
            self._serial += 1
            serial = self._serial
            with trio.CancelScope() as scope:
                self._guests[serial] = (stream, scope)
                try:
                    await handler(stream)
                finally:
                    del self._guests[serial]
        await stream.aclose()

    async def run_link(self, stream: Stream, *, dialled: bool) -> Link:
        peer = stream.peer_id
        now, orders = self._clock.now(), self._membership.digest
        session = s.Session(self.own, peer, self.profile, self._boot, dialled=dialled, now=now, orders=orders)
        link = Link(stream, session, self, self._clock, self._traffic_of(peer), self.config.link)
        self._serial += 1
        serial = self._serial
        self._all[serial] = link
        self._hellos += 1
        try:
            await link.run()
        finally:
            del self._all[serial]
            if link.opened_at is None:
                self._hellos -= 1
            self._closed(link)
        return link

    def _closed(self, link: Link) -> None:
        peer, now = link.peer, self._clock.now()
        if link.opened_at is not None:
            self.stats.sessions_closed += 1
        if self._links.get(peer) is not link:
            self._note_refusal(link, now)
            return
        del self._links[peer]
        self._news.pop(peer, None)
        if link.end_code == "broken":
            self.note(peer, link.end_reason)
            self.view.failed(peer, now)
            self._watch(f.SessionBroke(peer))
        else:
            self.view.left(peer, now)
            self._note_refusal(link, now)
            self._watch(f.SessionClosed(peer))
        self._peers_changed.set()

    def _note_refusal(self, link: Link, now: float) -> None:
        if link.end_code not in ("digest", "version", "revoked"):
            return
        theirs = link.session.theirs
        if theirs is not None and link.peer not in self.view:
            self.view.learn([theirs.contact(link.peer, link.stream.remote.host)])
        if self.view.get(link.peer) is None or link.peer in self._links:
            return
        log.warning("no session with %s at %s: %s", short_peer_id(link.peer), link.stream.remote, link.end_reason)
        self.view.refused(link.peer, link.end_reason, now)

    # What dialling asks and tells (`gossipml.peer.dialling.Host`).

    def has_session(self, peer: PeerId) -> bool:
        return peer in self._links or peer == self.own

    def dialled(self, peer: PeerId, link: Link | None) -> None:
        now = self._clock.now()
        if link is None or (link.opened_at is None and link.end_code in ("broken", "timeout", "fault", "full")):
            self.stats.dials_failed += 1
            if peer not in self._links:
                self.view.failed(peer, now)
                self._watch(f.DialFailed(peer))
        elif link.end_code in ("quarantined", "self"):
            self.view.put_off(peer, now + self.view.config.backoff_refused)
        elif link.end_code == "duplicate":
            self.view.put_off(peer, now + self.view.config.backoff)

    def note(self, peer: PeerId, text: str) -> None:
        self._notes.pop(peer, None)
        self._notes[peer] = text
        if len(self._notes) > 2 * self.view.config.capacity:
            del self._notes[next(iter(self._notes))]

    # What a link asks and tells (`gossipml.peer.link.Owner`).

    def on_introduced(self, link: Link, hello: Hello) -> s.Admit | s.Decline:
        """Whether the peer that says hello on an accepted stream comes in."""
        if self._membership.is_revoked(link.peer):
            return s.Decline("revoked", self._why_revoked(link.peer))
        record = self.gossip.conduct.record(link.peer, self._clock.now())
        if record.quarantined_until is not None:
            return s.Decline("quarantined", f"in quarantine for {record.reason}")
        rival = self._links.get(link.peer)
        if rival is not None and not self._replaces(link, rival):
            return s.Decline("duplicate", "there is a session already")
        if rival is None and len(self._links) >= self.config.sessions and not self._make_room():
            return s.Decline("full", f"{self.config.sessions} sessions are open and in use")
        return s.Admit()

    def on_opened(self, link: Link, profile: Profile) -> None:
        self._hellos -= 1
        peer, now = link.peer, self._clock.now()
        self.stats.sessions_opened += 1
        self.stats.sessions_accepted += not link.session.dialled
        rival = self._links.get(peer)
        if rival is not None:
            if link.session.dialled and not self._replaces(link, rival):
                link.finish("there is a session already", code="duplicate")
                return
            del self._links[peer]  # first: its end is then no news
            rival.finish("replaced by a newer session", code="duplicate")
        elif len(self._links) >= self.config.sessions and not self._make_room():
            link.finish("no room", code="full")
            return
        self._links[peer] = link
        self._notes.pop(peer, None)
        self.view.introduced(self._contact(link, profile), profile.digest, now)
        if link.session.dialled:
            self.view.door_opened(link.stream.remote)
        self._watch(f.SessionOpened(peer))
        self._act(self.gossip.handle(g.Met(peer, link.session.their_boot), now))
        log.info("session with %s %s at %s", profile.name, short_peer_id(peer), link.stream.remote)
        for message in self._herald.greeting(link.session.their_orders):
            link.post(message)
        parcels = self._dialling.take(peer)
        while parcels:
            self.deliver(peer, parcels.pop(), dial=False)

    def on_profile(self, link: Link, profile: Profile) -> None:
        if self._links.get(link.peer) is link:
            self.view.profiled(self._contact(link, profile), profile.digest)

    def on_message(self, link: Link, message: Message) -> None:
        match message:
            case Ping(nonce):
                link.post(Pong(nonce))
            case News():
                if self._links.get(link.peer) is link:
                    self._news[link.peer] = message
            case Orders():
                news = self._herald.hear(message, self._clock.wall())
                if news:
                    log.info("%d orders of the network key from %s", len(news), short_peer_id(link.peer))
                    self._spread(news, heard_from=link)
                    self._on_orders()
            case UpdateAck(_, False, reason, total):
                if reason != BUSY:  # being busy says nothing about anybody
                    self.note(link.peer, f"refused our update: {reason}")
                if total is not None:
                    self._act(self.gossip.handle(g.SendRefused(link.peer, total), self._clock.now()))

    def on_heard(self, link: Link) -> None:
        if self._links.get(link.peer) is link:
            self._watch(f.Heard(link.peer))

    def on_asked(self, link: Link, update: Update) -> None:
        self.view.learn(_within_reach(link, contact) for contact in update.contacts)
        self._send_soon(self._act(self.gossip.handle(g.Asked(link.peer, update), self._clock.now())))

    def on_offer(self, link: Link, update: Update) -> bool:
        if update.contacts:
            self.view.learn(_within_reach(link, contact) for contact in update.contacts)
        verdict, *rest = self.gossip.handle(g.UpdateOffered(link.peer, update), self._clock.now())
        if isinstance(verdict, g.Refuse):
            self.stats.updates_refused += 1
            self.stats.faults += verdict.fault
            link.post(_refusal(update, verdict.reason))
        self._send_soon(self._act(rest))
        return isinstance(verdict, g.Accept)

    def on_body(self, link: Link, update: Update, body: bytearray) -> None:
        self.stats.updates_received += 1
        if self.gossip.expects(link.peer):
            self._exchange.hold(link.peer, update, body)
        self._send_soon(self._act(self.gossip.handle(g.UpdateReceived(link.peer), self._clock.now())))

    def on_body_lost(self, link: Link, update: Update) -> None:
        self._act(self.gossip.handle(g.UpdateLost(link.peer), self._clock.now()))

    def on_sent(self, link: Link, parcel: Parcel, reason: str) -> None:
        if not reason and parcel.body:
            took = self._clock.now() - parcel.made
            self.note(link.peer, "")  # no answer means that it was taken
            self.send_seconds = took if not self.send_seconds else 0.9 * self.send_seconds + 0.1 * took
        self._send_done(link.peer, reason, in_doubt=bool(reason))

    def on_fault(self, link: Link, reason: str) -> None:
        log.warning("%s broke the protocol: %s", short_peer_id(link.peer), reason)
        self.blame(link.peer, reason)

    def body_length(self, update: Update) -> int | None:
        facts = self._facts  # also while the learner is away: its updates are refused, but are no fault
        if facts is None or (update.model, update.digest) != (facts.model, facts.digest):
            return None
        return facts.body_length(update.encoding)

    # Performing what the state machines ask for.

    def _act(self, actions: list[g.Action]) -> list[g.Send]:
        """Perform all but the sends, which need our model encoded first; those are returned."""
        sends: list[g.Send] = []
        for action in actions:
            match action:
                case g.SendUpdate() | g.AskUpdate() | g.ReplyUpdate():
                    sends.append(action)
                case g.Merge() | g.MergeTogether():
                    self._to_merge = action
                    self._merge_now.set()
                case g.Settle():
                    self._to_settle = True
                    self._merge_now.set()
                case g.Forget(sender):
                    self._exchange.drop(sender)
                case g.Quarantine(peer, until, reason):
                    seconds = until - self._clock.now()
                    log.warning("%s is in quarantine for %.0f s: %s", short_peer_id(peer), seconds, reason)
                    self.view.put_off(peer, until)
                    link = self._links.get(peer)
                    if link is not None:
                        self._drop(link, f"in quarantine: {reason}", code="quarantined")
                case g.Accept() | g.Refuse():
                    raise LocalError("only an offer is accepted or refused")
        due = self.gossip.next_deadline()
        if due is not None and due < self._awake_at:
            self._time_changed.set()
        return sends

    async def _send(self, sends: list[g.Send]) -> None:
        """Encode the model and queue it for each receiver; every send comes to its SendDone."""
        left = list(sends)
        try:
            async for action, parcel in self._packing.pack(sends):
                left.remove(action)
                self.deliver(action.to, parcel)
        except NotReady as error:
            log.debug("nothing sent: %s", error)
        finally:
            self._encoding -= 1
            self._merge_now.set()
            for action in left:
                self._send_done(action.to, "not ready")

    def _send_soon(self, sends: list[g.Send]) -> None:
        if not sends:
            return
        parcel = self._packing.pack_one(sends[0]) if len(sends) == 1 else None
        if parcel is not None and self._nursery is not None:
            self.deliver(sends[0].to, parcel)
        elif self._nursery is not None:
            self._encoding += 1
            self._nursery.start_soon(self._send, sends)
        else:
            for action in sends:
                self._send_done(action.to, "stopping")

    def deliver(self, peer: PeerId, parcel: Parcel, *, dial: bool = True) -> None:
        """Queue the parcel on the peer's session, dialling for one if need be."""
        link = self._links.get(peer)
        theirs = link.session.theirs if link is not None else None
        if link is None or theirs is None:
            if dial and self._nursery is not None and peer in self.view:
                self._dialling.dial(peer, parcel)
            else:
                self._send_done(peer, self._notes.get(peer) or "cannot be reached")
        elif (theirs.model, theirs.digest) != (parcel.update.model, parcel.update.digest):
            self._send_done(peer, "trains another model")
        elif not link.post_update(parcel):
            self.stats.updates_dropped += 1
            self._send_done(peer, "an earlier update still waits", failed=False)

    def _send_done(self, peer: PeerId, reason: str, *, failed: bool = True, in_doubt: bool = False) -> None:
        if not reason:
            self.stats.updates_sent += 1
        elif failed:
            self.stats.updates_failed += 1
        self._act(self.gossip.handle(g.SendDone(peer, not reason, reason, in_doubt), self._clock.now()))

    def _watch(self, event: f.Event) -> None:
        for action in self._failure.handle(event, self._clock.now()):
            peer, link = action.peer, self._links.get(action.peer)
            match action:
                case f.Probe():
                    if link is not None:
                        self._nonce += 1
                        link.post(Ping(self._nonce))
                case f.Suspect(_, reason):
                    log.info("%s is suspect: %s", short_peer_id(peer), reason)
                case f.Lost(_, reason):
                    log.info("%s is lost: %s", short_peer_id(peer), reason)
                    if link is not None:
                        del self._links[peer]
                        self.note(peer, reason)
                        self.view.failed(peer, self._clock.now())
                        link.break_off(reason)
                        self._peers_changed.set()
                case f.Recovered():
                    log.info("%s is back", short_peer_id(peer))
        if isinstance(event, f.SessionOpened) and self._clock.now() + self.config.failure.silence < self._awake_at:
            self._time_changed.set()

    # Orders of the network key.

    def _spread(self, orders: list[bytes], *, heard_from: Link | None = None) -> None:
        """Heed what is new, then tell it to whoever is still a member."""
        self._heed()
        for link in list(self._links.values()):
            for message in [self._herald.acknowledge()] if link is heard_from else self._herald.tell(orders):
                link.post(message)

    def _heed(self) -> None:
        """End what is no longer allowed: sessions with revoked peers, and those by keys whose time is over."""
        membership = self._membership
        membership.tick(self._clock.wall())
        if membership.version == self._heeded:
            return
        self._heeded = membership.version
        self._peers_changed.set()
        for link in list(self._all.values()):
            if membership.is_revoked(link.peer):
                log.warning("%s was revoked: its session ends", short_peer_id(link.peer))
                self._end(link, self._why_revoked(link.peer), code="revoked")
            elif not membership.accepts(link.stream.key_id):
                self._end(link, "the token was rotated and this session was opened with the old one", code="key")
        for stream, scope in self._guests.values():
            if membership.is_revoked(stream.peer_id) or not membership.accepts(stream.key_id):
                scope.cancel()
        self.view.ban(membership.revoked)
        if membership.is_revoked(self.own):
            log.error("this peer was revoked: %s", self._why_revoked(self.own))

    def _end(self, link: Link, reason: str, *, code: str) -> None:
        if self._links.get(link.peer) is link:
            self._drop(link, reason, code=code)
        else:
            link.finish(reason, code=code)

    def _why_revoked(self, peer: PeerId) -> str:
        made = datetime.datetime.fromtimestamp(self._membership.revoked[peer].made, datetime.UTC)
        return (
            f"peer {short_peer_id(peer)} was revoked on {made:%Y-%m-%d} with `gossipml token revoke`; to come back, "
            "ask for a token and join with a new home, which is a new peer"
        )

    def _renew_one(self) -> None:
        """Move one session that we dialled with older keys to the newest, before the older ones end."""
        newest, now = self._membership.newest.key_id, self._clock.now()
        for link in self._links.values():
            if (
                link.session.dialled
                and link.stream.key_id != newest
                and link.session.their_orders == self._membership.digest  # so it has the newest keys, too
                and now - link.used_at > self.config.idle
                and now >= link.renew_at
            ):
                link.renew_at = now + RENEW_SECONDS
                self._dialling.dial(link.peer)  # the new session takes the place of the old one
                return

    # Long-lived tasks.

    async def _merge_all(self) -> None:
        while True:
            # A model that is to be sent is encoded first: the answer to a push is our model from before the merge.
            if self._to_settle and not self._encoding:
                self._to_settle = False
                await self._exchange.settle()
                continue
            if self._to_merge is None or self._encoding:
                self._merge_now = trio.Event()
                await self._merge_now.wait()
                continue
            merge, self._to_merge = self._to_merge, None
            senders = (merge.sender,) if isinstance(merge, g.Merge) else merge.senders
            done: list[Merged] = [(g.MergeFailed(sender), None) for sender in senders]
            try:
                done = await self._exchange.merge(merge)
            finally:
                for event, update in done:
                    self._merge_ended(event, update)

    def _merge_ended(self, event: g.MergeDone | g.MergeFailed, update: Update | None) -> None:
        self._send_soon(self._act(self.gossip.handle(event, self._clock.now())))
        if isinstance(event, g.MergeDone):
            self.stats.merges += event.applied
            self.stats.merges_refused += not event.applied
            if update is not None and not event.applied:
                self.note(event.sender, event.reason)
                link = self._links.get(event.sender)
                if link is not None:
                    link.post(_refusal(update, event.reason))

    async def _keep_time(self) -> None:
        """Feed the state machines when their deadlines come."""
        while True:
            self._time_changed = trio.Event()
            due = [d for d in (self._failure.next_deadline(), self.gossip.next_deadline()) if d is not None]
            self._awake_at = min(due, default=math.inf)
            # Never less than a millisecond: a rounding error of the clock must not become a busy loop.
            with trio.move_on_after(max(0.001, self._awake_at - self._clock.now())):
                await self._time_changed.wait()
            self._watch(f.Tick())
            self._send_soon(self._act(self.gossip.handle(g.Tick(), self._clock.now())))

    async def _keep_up(self) -> None:
        """Keep the wanted number of sessions."""
        while True:
            self._peers_changed = trio.Event()
            self._heed()
            if len(self._membership.accepted) > 1:
                self._renew_one()
            now = self._clock.now()
            missing = self.config.wanted - len(self._links) - self._dialling.contacts
            for peer in self.view.to_dial(max(0, min(missing, self._dialling.free)), self.profile.model, now):
                if peer not in self._links and not self.gossip.conduct.is_quarantined(peer, now):
                    self._dialling.dial(peer)
            if missing > 0:
                self._dialling.knock(self.view.doors(now))
            # Nothing but such a change matters while there are enough sessions, by keys that do not end.
            enough = len(self._links) >= self.config.wanted and len(self._membership.accepted) == 1
            pause = math.inf if enough else self.config.upkeep * (0.5 + self._env.rng.random())
            with trio.move_on_after(pause):
                await self._peers_changed.wait()

    # Small decisions.

    def _replaces(self, link: Link, rival: Link) -> bool:
        """Whether a new session takes the place of an open one with the same peer; both sides decide alike."""
        if link.session.their_boot != rival.session.their_boot:
            return True  # the peer was started anew: the old stream leads nowhere
        if link.session.dialled == rival.session.dialled:
            return True  # whoever dialled has lost the old one
        if self._clock.now() - rival.heard_at > self.config.failure.silence:
            return True
        dialler = self.own if link.session.dialled else link.peer
        return dialler == min(self.own, link.peer)

    def _make_room(self) -> bool:
        """End the session that was least used, if there is one that is idle."""
        idle = [link for link in self._links.values() if self._clock.now() - link.used_at > self.config.idle]
        if not idle:
            return False
        self._drop(min(idle, key=lambda link: link.used_at), "making room for other peers", code="full")
        return True

    def _drop(self, link: Link, reason: str, *, code: str) -> None:
        """End a session of our own will; from this moment on it does not count."""
        del self._links[link.peer]
        self.view.left(link.peer, self._clock.now())
        self._watch(f.SessionClosed(link.peer))
        link.finish(reason, code=code)
        self._peers_changed.set()

    def _contact(self, link: Link, profile: Profile) -> Contact:
        if not link.session.dialled:
            return _within_reach(link, profile.contact(link.peer, link.stream.remote.host))
        contact = _within_reach(link, profile.contact(link.peer))  # behind the address that has just worked
        addresses = dict.fromkeys((link.stream.remote, *contact.addresses))
        return contact._replace(addresses=tuple(addresses)[:MAX_CONTACT_ADDRESSES])

    def _traffic_of(self, peer: PeerId) -> Traffic:
        traffic = self._traffic.pop(peer, None) or Traffic(total=self.stats.traffic)
        self._traffic[peer] = traffic  # the latest last; the oldest without a session goes
        if len(self._traffic) > 2 * self.view.config.capacity:
            del self._traffic[next(iter(self._traffic))]
        return traffic


def _refusal(update: Update, reason: str) -> UpdateAck:
    return UpdateAck(update.round, accepted=False, reason=reason, mass_total=update.mass.total if update.mass else None)


def _within_reach(link: Link, contact: Contact) -> Contact:
    """The contact without the loopback addresses that a peer on another machine tells: there they mean us.

    Nobody far away makes us knock at the services of our own machine.
    """
    if link.stream.remote.is_loopback or not any(address.is_loopback for address in contact.addresses):
        return contact
    return contact._replace(addresses=tuple(a for a in contact.addresses if not a.is_loopback))
