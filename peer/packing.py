"""Makes parcels of what gossip sends: our model in the encoding of each receiver's link, contacts beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from gossipml.env import Clock
from gossipml.ids import Contact, PeerId
from gossipml.peer.exchange import Exchange, Snapshot
from gossipml.peer.gossip import AUTO, Gossip
from gossipml.peer.gossip_events import AskUpdate, ModelFacts, ReplyUpdate, Send, SendUpdate
from gossipml.peer.link import Link, Parcel
from gossipml.peer.wire import Update

LEAST_ROUND = 0.1  # seconds: a round of a small model is shorter than what is known of a link is exact (guess)


class Packing:
    def __init__(self, gossip: Gossip, exchange: Exchange, links: Mapping[PeerId, Link], clock: Clock) -> None:
        self._gossip = gossip
        self._exchange = exchange
        self._links = links
        self._clock = clock
        self._round_at: float | None = None
        self._round_seconds = 0.0  # between the ends of two rounds, smoothed

    def round_ended(self) -> None:
        """Call it at each."""
        now = self._clock.now()
        if self._round_at is not None:
            took = now - self._round_at
            self._round_seconds = took if not self._round_seconds else 0.7 * self._round_seconds + 0.3 * took
        self._round_at = now

    def rounds_ended(self) -> None:
        """No more of them for a while."""
        self._round_at = None

    async def pack(self, sends: Sequence[Send]) -> AsyncIterator[tuple[Send, Parcel]]:
        """One for each, of our model as it is at the first; fewer when it is unloaded meanwhile. Raises NotReady."""
        snapshot: Snapshot | None = None
        hinted = False  # one receiver a push, at random as they all are, is enough for peer sampling
        for action in sends:
            if isinstance(action, AskUpdate):
                snapshot = None
            else:
                encoding = self._encoding(action.to) + action.part
                if snapshot is None or snapshot.encoding != encoding:
                    snapshot = await self._exchange.snapshot(encoding)
            facts = self._gossip.facts
            if facts is None:
                return
            contacts = () if hinted else self._hints(action.to)
            hinted = hinted or bool(contacts)
            yield action, self._parcel(snapshot, facts, action, contacts)

    def pack_one(self, action: Send) -> Parcel | None:
        """The same of one send, if our model is encoded for it: most answers need no task that waits for that."""
        facts, encoding = self._gossip.facts, self._encoding(action.to)
        if facts is None or isinstance(action, AskUpdate):
            return None
        snapshot = self._exchange.at_hand(encoding + action.part)
        return None if snapshot is None else self._parcel(snapshot, facts, action, self._hints(action.to))

    def _encoding(self, peer: PeerId) -> str:
        """Of the next body for the peer; where a link decides, as fine as it carries in its share of a round."""
        config, facts, link = self._gossip.config, self._gossip.facts, self._links.get(peer)
        if config.encoding != AUTO or facts is None:
            return config.encoding
        if link is None:
            return facts.choose("", None, 0.0)
        seconds = self._round_seconds if self._gossip.training else self._gossip.interval
        share = max(seconds, LEAST_ROUND) / config.protocol.fanout
        link.encoding = facts.choose(link.encoding, link.bandwidth.estimate, share)
        return link.encoding

    def _hints(self, peer: PeerId) -> tuple[Contact, ...]:
        """Contacts to attach to an update for the peer; nothing when it got some just now."""
        link, now = self._links.get(peer), self._clock.now()
        if link is not None:
            if now < link.hints_due:
                return ()
            link.hints_due = now + self._gossip.config.contacts_seconds
        return self._gossip.view.contacts(self._gossip.config.contacts, self._links)

    def _parcel(
        self, snapshot: Snapshot | None, facts: ModelFacts, action: Send, contacts: tuple[Contact, ...]
    ) -> Parcel:
        """Without a snapshot, a question."""
        gossip, body = self._gossip, b"" if snapshot is None else snapshot.body
        update = Update(
            model=facts.model,
            digest=facts.digest,
            encoding=self._encoding(action.to) if snapshot is None else snapshot.encoding,
            parameters=facts.parameters,
            body_length=len(body),
            age=gossip.age if snapshot is None else snapshot.age,
            round=gossip.round if snapshot is None else snapshot.round,
            reply_wanted=isinstance(action, AskUpdate) or (isinstance(action, SendUpdate) and action.reply_wanted),
            reply=isinstance(action, ReplyUpdate),
            contacts=contacts,
            mass=action.mass if isinstance(action, SendUpdate) else None,
            rests=gossip.rests,
            settled=gossip.has_settled,
        )
        return Parcel(update, body, self._clock.now())
