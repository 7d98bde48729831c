"""`Net` of a simulated machine: datagram sockets, listeners, and the dial that joins two machines.

A connection carries asserted identities: whoever holds a generation of the network's keys that the other side accepts
gets through with the peer id of its credentials, as mutual TLS would prove it; whoever does not is refused before the
listener hears of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import outcome
import trio

from gossipml.env import GOSSIP, PROTOCOLS, Credentials, Handler, Heard
from gossipml.env.simulated_lan import SimulatedBeacons
from gossipml.env.simulated_net import Machine, Network, Process
from gossipml.env.simulated_stream import SimulatedStream, open_streams
from gossipml.errors import RemoteError
from gossipml.ids import Address, PeerId, short_peer_id

log = logging.getLogger(__name__)

INBOX_DATAGRAMS = 512  # about the 208 KiB that Linux gives a socket; more is dropped, as a kernel does
BACKLOG = 128  # connections waiting for a listener
CONNECT_SECONDS = 127.0  # Linux gives up after six unanswered SYNs
WILDCARDS = ("0.0.0.0", "::")


class SimulatedDatagrams:
    """`Datagrams` of a simulated machine."""

    def __init__(self, network: Network, process: Process, local: Address) -> None:
        self.local = local
        self._network = network
        self._process = process
        self._inbox: deque[tuple[bytes, Address]] = deque()
        self._receiver: trio.lowlevel.Task | None = None
        self._heard: Heard | None = None  # what the receiver does, when it serves
        self._closed = False
        host = process.machine.host if local.host in WILDCARDS else local.host
        self._source = Address(host, local.port)  # where answers go

    def post(self, data: bytes, to: Address) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        self._network.send_datagram(self._process, bytes(data), self._source, to)

    async def send(self, data: bytes, to: Address) -> None:
        await trio.lowlevel.checkpoint()
        self.post(data, to)

    async def receive(self) -> tuple[bytes, Address]:
        if self._closed:
            raise trio.ClosedResourceError
        if self._inbox:
            await trio.lowlevel.checkpoint()
            if self._inbox:
                return self._inbox.popleft()
        received: tuple[bytes, Address] = await self._wait()
        return received

    async def serve(self, heard: Heard) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        while self._inbox:
            await trio.lowlevel.checkpoint()
            heard(*self._inbox.popleft())
        await self._wait(heard)

    async def _wait(self, heard: Heard | None = None) -> Any:  # Any: what trio passes on
        if self._receiver is not None:
            raise trio.BusyResourceError("another task is receiving from this socket")
        self._receiver, self._heard = trio.lowlevel.current_task(), heard

        def abort(_: object) -> trio.lowlevel.Abort:
            self._receiver = self._heard = None
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    def deliver(self, data: bytes, sender: Address) -> bool:
        """Whether there was room for it."""
        if self._heard is not None:  # at once: a turn of the loop for each datagram would cost as much as most answers
            try:
                self._heard(data, sender)
            except BaseException as error:
                self._wake(outcome.Error(error))
            return True
        if self._receiver is not None:
            self._wake(outcome.Value((data, sender)))
            return True
        if len(self._inbox) >= INBOX_DATAGRAMS:
            return False
        self._inbox.append((data, sender))
        return True

    async def aclose(self) -> None:
        self._closed = True
        if self._process.sockets.get(self.local.port) is self:
            del self._process.sockets[self.local.port]
        self._wake(outcome.Error(trio.ClosedResourceError()))
        await trio.lowlevel.checkpoint()

    def _wake(self, received: outcome.Outcome[tuple[bytes, Address]]) -> None:
        if self._receiver is not None:
            task, self._receiver, self._heard = self._receiver, None, None
            trio.lowlevel.reschedule(task, received)


class SimulatedListener:
    """`Listener` of a simulated machine."""

    def __init__(self, network: Network, process: Process, local: Address, credentials: Credentials) -> None:
        self.local = local
        self.credentials = credentials
        self._network = network
        self._process = process
        self._send, self._receive = trio.open_memory_channel[SimulatedStream](BACKLOG)

    def accept(self, stream: SimulatedStream) -> None:
        if not self._process.alive:
            return
        try:
            self._send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.die("the other side reset the stream")

    async def serve(self, handler: Handler) -> None:
        async with trio.open_nursery() as nursery:
            async for stream in self._receive:
                nursery.start_soon(self._guarded, handler, stream)

    async def _guarded(self, handler: Handler, stream: SimulatedStream) -> None:
        name = self._process.machine.name
        try:
            await handler(stream)
        except Exception as error:
            self._network.record(f"handler-{type(error).__name__}", name, stream.remote.host, b"")
            log.warning(
                "%s: the session with %s failed: %r",
                name,
                short_peer_id(stream.peer_id),
                error,
                exc_info=True,
            )
        finally:
            stream.close()

    async def aclose(self) -> None:
        if self._process.listeners.get(self.local.port) is self:
            del self._process.listeners[self.local.port]
        self._send.close()
        await trio.lowlevel.checkpoint()


class SimulatedNet:
    """`Net` of one process of a simulated machine."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process

    async def bind_datagrams(self, local: Address) -> SimulatedDatagrams:
        await trio.lowlevel.checkpoint()
        port = self._process.free_port(local.port, self._process.sockets, "UDP")
        socket = SimulatedDatagrams(self._network, self._process, Address(local.host, port))
        self._process.sockets[port] = socket
        return socket

    async def bind_beacons(self, port: int) -> SimulatedBeacons:
        socket = await self.bind_datagrams(Address("0.0.0.0", port))
        return SimulatedBeacons(self._network, self._process, socket)

    async def listen(self, local: Address, credentials: Credentials) -> SimulatedListener:
        await trio.lowlevel.checkpoint()
        port = self._process.free_port(local.port, self._process.listeners, "TCP")
        listener = SimulatedListener(self._network, self._process, Address(local.host, port), credentials)
        self._process.listeners[port] = listener
        return listener

    def own_addresses(self, bound: Address) -> tuple[Address, ...]:
        host = self._process.machine.host if bound.host in WILDCARDS else bound.host
        return (Address(host, bound.port),)

    async def connect(
        self, remote: Address, expected: PeerId | None, credentials: Credentials, protocol: str = GOSSIP
    ) -> SimulatedStream:
        await trio.lowlevel.checkpoint()
        dial = _Dial(self._network, self._process, remote, expected, credentials, protocol)

        def abort(_: object) -> trio.lowlevel.Abort:
            dial.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        dial.start()
        stream: SimulatedStream = await trio.lowlevel.wait_task_rescheduled(abort)
        return stream


class _Dial:
    """One attempt to connect: a SYN, its answer, and a TLS handshake of one more round trip."""

    def __init__(
        self,
        network: Network,
        process: Process,
        remote: Address,
        expected: PeerId | None,
        credentials: Credentials,
        protocol: str,
    ) -> None:
        self.network = network
        self.process = process
        self.remote = remote
        self.expected = expected
        self.credentials = credentials
        self.protocol = protocol
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    def start(self) -> None:
        network, source = self.network, self.process.machine
        target = network.machine_at(source, self.remote)
        unanswered = TimeoutError(110, f"{self.remote} does not answer")
        network.time.call_at(network.time.now() + CONNECT_SECONDS, self._fail, unanswered)
        if target is not None and self.process.alive:
            network.time.call_at(network.stream_arrival(source, target, 60), self._syn_arrives, target)

    def _passes(self, target: Machine, again: Callable[[], None]) -> bool:
        """Whether both machines live and reach each other; a paused one gets to it later."""
        source = self.process.machine
        for machine in (source, target):
            if machine.paused:
                machine.held.append(again)
                return False
        return self.process.alive and target.powered and self.network.reachable(source, target)

    def _syn_arrives(self, target: Machine) -> None:
        if not self._passes(target, lambda: self._syn_arrives(target)):
            return
        network, source = self.network, self.process.machine
        listener = target.process.listeners.get(self.remote.port) if target.process is not None else None
        back = network.stream_arrival(target, source, 60)
        if listener is None:
            network.record("refused", source.name, target.name, b"")
            network.time.call_at(back, self._fail, ConnectionRefusedError(111, f"nobody listens at {self.remote}"))
            return
        done = back + 2 * (back - network.time.now())
        network.time.call_at(done, self._handshake_ends, target, listener)

    def _handshake_ends(self, target: Machine, listener: SimulatedListener) -> None:
        if self.task is None or not self._passes(target, lambda: self._handshake_ends(target, listener)):
            return
        network, source = self.network, self.process.machine
        if target.process is None or target.process.listeners.get(self.remote.port) is not listener:
            self._fail(ConnectionResetError(104, f"{self.remote} hung up"))
            return
        theirs, ours = listener.credentials, self.credentials
        problem = ""
        shared = [keys for keys in ours.membership.accepted if keys in theirs.membership.accepted]
        if not shared:
            problem = f"{self.remote} is not a member of this network or holds another token"
        elif theirs.identity.peer_id == ours.identity.peer_id:
            problem = f"{self.remote} is this peer itself"
        elif self.expected is not None and theirs.identity.peer_id != self.expected:
            problem = (
                f"{self.remote} is peer {short_peer_id(theirs.identity.peer_id)}, "
                f"not {short_peer_id(self.expected)} as expected"
            )
        elif ours.membership.is_revoked(theirs.identity.peer_id):
            problem = f"{self.remote} is peer {short_peer_id(theirs.identity.peer_id)}, which was revoked"
        elif self.protocol not in PROTOCOLS:
            problem = f"{self.remote} speaks no protocol of ours; install the same version of gossipml"
        if problem:
            network.record("rejected", source.name, target.name, b"")
            self._fail(RemoteError(problem))
            return
        network.record("connected", source.name, target.name, b"")
        near, far = open_streams(
            network, self.process, target.process, self.remote, ours, theirs, self.protocol, shared[0].key_id
        )
        task, self.task = self.task, None
        trio.lowlevel.reschedule(task, outcome.Value(near))
        network.time.call_at(network.stream_arrival(source, target, 60), listener.accept, far)

    def _fail(self, error: Exception) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task, outcome.Error(error))
