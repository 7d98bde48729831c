"""Model versions from peer to peer: serve what we hold, fetch what we want, ask others what they hold.

    stream (ALPN gossipml-swarm/1) -> Serving -> Shelf        what others fetch from us
    download -> Fetching -> sources, Content                  what we fetch from others
    manifest, layer, holds, hold -> one question, one stream  small things

Whoever downloads serves at once what it has. The wire is specified in `gossipml.peer.swarm_wire`. A remote fault
ends the stream on which it happened and is told to `on_fault`; only cancellation comes out of a stream.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from gossipml.env import Credentials, Env, Stream
from gossipml.errors import LocalError, RemoteError
from gossipml.ids import Contact, PeerId, short_peer_id
from gossipml.peer import swarm_wire as w
from gossipml.peer.fetching import Fetching, Progress, Providers, dial
from gossipml.peer.rates import TokenBucket
from gossipml.peer.serving import Serving
from gossipml.peer.swarm_ports import Content, Shelf, SwarmConfig, SwarmStats, Transfer
from gossipml.peer.swarm_stream import Buffers, Channel

__all__ = ["Content", "Shelf", "Swarm", "SwarmConfig", "SwarmStats", "Transfer"]

log = logging.getLogger("gossipml.peer")

T = TypeVar("T")

STAGGER_SECONDS = 1.0  # a question goes to the next contact when this one has not answered so soon
MAX_ASKED_CONTACTS = 16
MAX_ALIVE = 100  # words that are no answer, while one is waited for


class Swarm:
    def __init__(
        self,
        env: Env,
        credentials: Credentials,
        shelf: Shelf,
        config: SwarmConfig | None = None,
        *,
        on_fault: Callable[[PeerId, str], None],
        port: int = 0,
    ) -> None:
        """`port` is where our own listener accepts: whom we ask for a content may fetch from us at once."""
        self.config = config or SwarmConfig()
        self.stats = SwarmStats()
        self.port = port
        self._env = env
        self._credentials = credentials
        self._on_fault = on_fault
        self._serving = Serving(shelf, self.config, env.clock, self.stats, on_fault, self._on_asker)
        self._fetching: dict[bytes, Fetching] = {}
        self.buffers = Buffers(self.config.buffers)
        """Memory of the pieces that are being received and written."""
        self._limit = TokenBucket(self.config.download_rate)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell askers what is new until cancelled; to be run as long as streams are served."""
        task_status.started()
        await self._serving.run()

    async def serve(self, stream: Stream) -> None:
        """The whole life of a stream that was accepted with this protocol."""
        await self._serving.serve(stream)

    async def download(self, content: Content, providers: Providers, on_progress: Progress | None = None) -> None:
        """Fetch what is missing from whoever has it; returns when the content is complete and finished.

        `providers` is asked at once and every now and then; `on_progress` hears the bytes verified and the size.
        RemoteError when nobody sent anything for `patience` seconds: what has come is kept for another try.
        UserError and OSError as the store gives them.
        """
        if content.root in self._fetching:
            raise LocalError(f"content {content.root.hex()[:12]} is being fetched already")
        fetching = Fetching(
            self._env,
            self._credentials,
            content,
            providers,
            self.config,
            self.stats,
            self.buffers,
            self._limit,
            self.port,
            self._on_fault,
            self._serving.arrived,
            on_progress,
        )
        self._fetching[content.root] = fetching
        try:
            await fetching.run()
        finally:
            del self._fetching[content.root]
            if not self._fetching:
                self.buffers.clear()

    def transfers(self) -> list[Transfer]:
        """What is being fetched or asked for now."""
        now, serving = self._env.clock.now(), self._serving
        contents = {**serving.roots(), **{root: fetching.content for root, fetching in self._fetching.items()}}
        transfers = []
        for root, content in contents.items():
            fetching, meter = self._fetching.get(root), serving.meters.get(root)
            transfers.append(
                Transfer(
                    root,
                    content.size,
                    fetching.done if fetching else content.size if content.complete else 0,
                    fetching.meter.rate(now) if fetching else 0.0,
                    meter.rate(now) if meter else 0.0,
                    fetching.sources if fetching else 0,
                    serving.askers(root),
                )
            )
        return transfers

    # Questions.

    async def manifest(self, version: bytes, contacts: Sequence[Contact]) -> bytes:
        """The manifest whose hash is `version`, from the first contact that gives it. RemoteError when none does."""

        def right(answer: w.FromOwner) -> bytes:
            if not isinstance(answer, w.ManifestIs) or hashlib.sha256(answer.data).digest() != version:
                raise RemoteError(f"it sent another manifest than {version.hex()[:12]}")
            return answer.data

        return await self._ask_all(contacts, w.AskManifest(version), right, f"manifest {version.hex()[:12]}")

    async def layer(
        self, root: bytes, count: int, contacts: Sequence[Contact], check: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """The hashes of all `count` pieces. Whether they give the root is for `check`, or the caller, to say."""
        if count == 1:
            return root

        def right(answer: w.FromOwner, body: bytes = b"") -> bytes:
            if not isinstance(answer, w.LayerIs) or len(body) != count * w.HASH_SIZE:
                raise RemoteError(f"it sent no layer of {count} hashes for content {root.hex()[:12]}")
            if check is not None and not check(body):
                raise RemoteError(f"it sent a layer that does not belong to content {root.hex()[:12]}")
            return body

        what = f"piece hashes of content {root.hex()[:12]}"
        return await self._ask_all(contacts, w.AskLayer(root), right, what, count * w.HASH_SIZE)

    async def holds(self, contact: Contact, versions: Sequence[bytes]) -> list[bool]:
        """Which of the versions that peer holds whole. RemoteError when it cannot be asked."""
        have: list[bool] = []
        for start in range(0, len(versions), w.MAX_VERSIONS):
            part = tuple(versions[start : start + w.MAX_VERSIONS])

            def right(answer: w.FromOwner, part: tuple[bytes, ...] = part) -> list[bool]:
                if not isinstance(answer, w.HoldsAre) or len(answer.have) != len(part):
                    raise RemoteError(f"it did not say which of {len(part)} versions it holds")
                return list(answer.have)

            have += await self._ask(contact, w.AskHolds(part), right)
        return have

    async def hold(self, contact: Contact, manifest: bytes) -> str:
        """Ask a peer to keep a version too: empty when it will, else its reason. RemoteError as for `holds`."""

        def right(answer: w.FromOwner) -> str:
            if not isinstance(answer, w.HoldIs):
                raise RemoteError("it did not say whether it will keep the version")
            return answer.reason

        return await self._ask(contact, w.AskHold(manifest), right)

    async def _ask_all(
        self,
        contacts: Sequence[Contact],
        question: w.FromDialler,
        right: Callable[..., T],
        what: str,
        body: int = 0,
    ) -> T:
        """The first right answer; the next contact is asked when one fails, or has not answered for a second."""
        answers: list[T] = []
        troubles: list[str] = []

        async def attempt(contact: Contact, over: trio.Event) -> None:
            try:
                answers.append(await self._ask(contact, question, right, body))
                nursery.cancel_scope.cancel()
            except RemoteError as error:
                troubles.append(f"{short_peer_id(contact.peer)}: {error}")
            over.set()

        others = [contact for contact in contacts if contact.peer != self._credentials.identity.peer_id]
        async with trio.open_nursery() as nursery:
            for contact in others[:MAX_ASKED_CONTACTS]:
                over = trio.Event()
                nursery.start_soon(attempt, contact, over)
                with trio.move_on_after(STAGGER_SECONDS):
                    await over.wait()
        if not answers:
            raise RemoteError(
                f"nobody gave the {what}: {len(others[:MAX_ASKED_CONTACTS])} peers were asked"
                f"{' (' + troubles[-1] + ')' if troubles else ''}; try again when a peer that has it is online"
            )
        return answers[0]

    async def _ask(self, contact: Contact, question: w.FromDialler, right: Callable[..., T], body: int = 0) -> T:
        """One question on a stream of its own. RemoteError when there is no right answer, whatever the reason."""
        stream = await dial(self._env, self._credentials, contact, self.config.dial_seconds)
        channel = Channel(stream, self.config, self._env.clock)
        try:
            with trio.fail_after(self.config.answer_seconds + body / self.config.slowest):
                answer = await self._answer(channel, question)
                if isinstance(answer, w.LayerIs) and answer.length == body:
                    data = bytearray(body)
                    await channel.receive_body(memoryview(data))
                    return right(answer, bytes(data))
            if isinstance(answer, w.No):
                raise _Refused(answer.reason)
            return right(answer)
        except _Refused:
            raise
        except RemoteError as error:
            self.stats.faults += 1
            self._on_fault(contact.peer, str(error))
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
            raise RemoteError(str(error) or "it did not answer in time") from None
        finally:
            await channel.close()

    async def _answer(self, channel: Channel, question: w.FromDialler) -> w.FromOwner:
        await channel.send(w.encode(question))
        for _ in range(MAX_ALIVE):
            answer = await channel.receive(w.from_owner)
            if answer is None:
                raise trio.BrokenResourceError("it hung up without an answer")
            if not isinstance(answer, w.Alive):
                return answer
        raise RemoteError("it says that it lives, and gives no answer")

    def _on_asker(self, root: bytes, contact: Contact) -> None:
        fetching = self._fetching.get(root)
        if fetching is not None:
            fetching.learn([contact])


class _Refused(RemoteError):
    """It has not got it, or no room now: no fault."""
