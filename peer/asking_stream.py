"""Streams on which predictions are asked: kept open for the next one, bounded on both sides.

    Asker.ask -> stream to a peer, an idle one if there is one -> Answerer.serve -> answer or no

A stream carries one prediction at a time, so that what is given up is given up by closing it, and a long body keeps no
other one waiting. Opening one costs a handshake, 3 ms of CPU. The wire is specified in `gossipml.peer.asking_wire`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from gossipml.env import ASK, Credentials, Env, Stream
from gossipml.errors import RemoteError
from gossipml.ids import Contact, PeerId, format_peer_id, short_peer_id
from gossipml.peer import asking_wire as w
from gossipml.peer.fetching import dial
from gossipml.peer.swarm_ports import SwarmConfig
from gossipml.peer.swarm_stream import Channel

log = logging.getLogger("gossipml.peer")

CLOSED = (trio.BrokenResourceError, trio.ClosedResourceError)
CHECKED_AT_ONCE = 1 << 14  # bytes of JSON that are read on the event loop: 0.2 ms


@dataclass(frozen=True)
class AskingConfig:
    streams_peer: int = 32
    """Predictions under way with one peer, each way."""
    streams: int = 256
    """That others may have open here: 25 kB each for TLS."""
    held: int = 1 << 26
    """Bytes of bodies that others asked about at once."""
    idle_seconds: float = 30.0
    """After which the asker closes a stream; the answerer waits twice as long."""
    dial_seconds: float = 2.0
    stall: float = 5.0
    """Seconds for a body, beside what its length takes at `slowest`."""
    slowest: float = 64 * 1024
    """Bytes a second."""

    def seconds_for(self, length: int) -> float:
        return self.stall + length / self.slowest


class Busy(RemoteError):
    """The peer does not answer now, for no fault of its own."""


class Asker:
    """Our streams to those whom we ask."""

    def __init__(self, env: Env, credentials: Credentials, config: AskingConfig) -> None:
        self._env = env
        self._credentials = credentials
        self._config = config
        self._idle: dict[PeerId, list[tuple[float, Channel]]] = {}  # since when; the latest last
        self._limits: dict[PeerId, trio.CapacityLimiter] = {}

    async def ask(self, contact: Contact, ask: w.Ask, body: bytes) -> tuple[w.FromAnswerer, bytes]:
        """The peer's answer and its body. RemoteError when it broke the protocol, Busy when there is no answer."""
        if self._credentials.membership.is_revoked(contact.peer):  # a stream may be left from before
            await self._forget(contact.peer)
            raise Busy("it was revoked")
        limiter = self._limits.setdefault(contact.peer, trio.CapacityLimiter(self._config.streams_peer))
        try:
            async with limiter:
                kept = self._idle.get(contact.peer)
                if kept:
                    try:
                        return await self._ask_on(contact.peer, kept.pop()[1], ask, body)
                    except CLOSED:
                        await self._forget(contact.peer)  # closed since, as the others probably are; a new one shows
                try:
                    stream = await dial(self._env, self._credentials, contact, self._config.dial_seconds, ASK)
                except RemoteError as error:
                    raise Busy(str(error)) from None
                return await self._ask_on(contact.peer, self._channel(stream), ask, body)
        except CLOSED as error:
            raise Busy(str(error) or "it hung up") from None
        finally:
            if not limiter.borrowed_tokens and not self._idle.get(contact.peer):
                self._limits.pop(contact.peer, None)

    async def _ask_on(self, peer: PeerId, channel: Channel, ask: w.Ask, body: bytes) -> tuple[w.FromAnswerer, bytes]:
        whole = False
        try:
            await channel.send(w.encode(ask), body)
            answer = await channel.receive(w.from_answerer)
            if answer is None:
                raise trio.BrokenResourceError("it hung up without an answer")
            data = b""
            if isinstance(answer, w.Answer):
                buffer = bytearray(answer.length)
                await channel.receive_body(memoryview(buffer))
                data = bytes(buffer)
                await self._check(data, answer, ask, peer)
            self._idle.setdefault(peer, []).append((self._env.clock.now(), channel))
            whole = True
            return answer, data
        finally:
            if not whole:
                await channel.close()

    async def _check(self, data: bytes, answer: w.Answer, ask: w.Ask, peer: PeerId) -> None:
        if len(data) <= CHECKED_AT_ONCE:
            w.check_answer(data, answer, ask, format_peer_id(peer))
        else:
            await self._env.compute.run(w.check_answer, data, answer, ask, format_peer_id(peer))

    def _channel(self, stream: Stream) -> Channel:
        return Channel(stream, SwarmConfig(stall=self._config.stall, slowest=self._config.slowest), self._env.clock)

    async def tidy(self) -> None:
        """Close what has been idle for long."""
        latest = self._env.clock.now() - self._config.idle_seconds
        for peer, kept in list(self._idle.items()):
            old = [channel for since, channel in kept if since < latest]
            self._idle[peer] = [(since, channel) for since, channel in kept if since >= latest]
            if not self._idle[peer]:
                await self._forget(peer)
            for channel in old:
                await channel.close()

    async def close(self) -> None:
        for peer in list(self._idle):
            await self._forget(peer)

    async def _forget(self, peer: PeerId) -> None:
        for _, channel in self._idle.pop(peer, []):
            await channel.close()


Answers = Callable[[PeerId, w.Ask, bytes], Awaitable[tuple[w.FromAnswerer, bytes]]]
"""Answers a prediction that a peer asks for; raises nothing but cancellation, at which no answer is sent."""


class Answerer:
    """Streams on which others ask us."""

    def __init__(
        self, env: Env, answer: Answers, on_fault: Callable[[PeerId, str], None], config: AskingConfig
    ) -> None:
        self._env = env
        self._answer = answer
        self._on_fault = on_fault
        self._config = config
        self._streams: Counter[PeerId] = Counter()
        self._held = 0

    async def serve(self, stream: Stream) -> None:
        """The whole life of one stream. Raises nothing but cancellation."""
        peer = stream.peer_id
        channel = Channel(stream, SwarmConfig(stall=self._config.stall, slowest=self._config.slowest), self._env.clock)
        self._streams[peer] += 1
        try:
            # Twice as many: what an asker gave up lives on here until its answer is there.
            if self._streams[peer] > 2 * self._config.streams_peer or self._streams.total() > self._config.streams:
                return
            while await self._serve_one(peer, channel):
                pass
        except RemoteError as error:
            log.info("%s asks for a prediction against the rules: %s", short_peer_id(peer), error)
            self._on_fault(peer, str(error))
        except (*CLOSED, trio.TooSlowError):
            pass  # the asker went, or is slow: it asks another one
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            await channel.close()

    async def _serve_one(self, peer: PeerId, channel: Channel) -> bool:
        """Whether there may be more."""
        with trio.move_on_after(2 * self._config.idle_seconds) as waiting:
            ask = await channel.receive(w.from_dialler)
        if waiting.cancelled_caught or ask is None:
            return False
        if self._held + ask.length > self._config.held:
            reason = f"the bodies of predictions that others ask for have {self._held} bytes here; ask another peer"
            with trio.fail_after(self._config.stall):
                await channel.send(w.encode(w.No("busy", reason, 1)))
            return False
        self._held += ask.length
        try:
            body = bytearray(ask.length)
            with trio.fail_after(self._config.seconds_for(ask.length)):
                await channel.receive_body(memoryview(body))
            with trio.move_on_after(ask.wait) as late:
                answer, data = await self._answer(peer, ask, bytes(body))
            if late.cancelled_caught:
                return False
            with trio.fail_after(self._config.seconds_for(len(data))):
                await channel.send(w.encode(answer), data)
        finally:
            self._held -= ask.length
        return True
