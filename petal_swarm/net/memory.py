"""A network inside one process, for tests and simulations: seeded latency, loss, cut links, killed peers.

Streams behave as over TCP: reliable and in order, so a lost packet is a late one. All peers may live in
one event loop, then everything is deterministic on a `VirtualClockLoop`, or each in a loop of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from petal_swarm.errors import (
    ConfigError,
    PeerUnreachableError,
    StreamClosedError,
    UnsupportedProtocolError,
)
from petal_swarm.net.addresses import join_address, split_address
from petal_swarm.net.identity import Identity
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Buffer, Receiver, StreamHandler, run_handler

logger = logging.getLogger(__name__)

RETRANSMIT_S = 0.2
_STUCK_S = 30.0


@dataclass(slots=True)
class Link:
    """What lies between two peers. `latency_s` is one way; `loss` the share of writes sent again.

    `bytes_per_s` is in each direction, for all streams together; 0 is no limit.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0
    is_cut: bool = False


@dataclass(slots=True)
class MemoryNetwork:
    """All peers and links of one network. `default` is the link between peers that have none of their own."""

    seed: int = 0
    default: Link = field(default_factory=Link)
    _random: random.Random = field(init=False, repr=False)
    _peers: dict[str, MemoryTransport] = field(init=False, default_factory=dict, repr=False)
    _links: dict[frozenset[str], Link] = field(init=False, default_factory=dict, repr=False)
    #: When what was sent before has left, by sender and receiver, in the sender's time.
    _sent_at_s: dict[tuple[str, str], float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def transport(self) -> MemoryTransport:
        """A new peer, with a peer id that follows from the seed. Call it in the peer's event loop."""
        transport = MemoryTransport(self, Identity.from_seed(self._random.randbytes(32)))
        self._peers[transport.peer_id] = transport
        return transport

    def link(self, one: str, other: str) -> Link:
        """The link between two peers, to be read or changed at any time."""
        return self._links.setdefault(
            frozenset((one, other)),
            Link(self.default.latency_s, self.default.jitter_s, self.default.loss, self.default.bytes_per_s),
        )

    def cut(self, one: str, other: str) -> None:
        """From now on nothing arrives, and nobody is told: a pulled cable."""
        self.link(one, other).is_cut = True

    def restore(self, one: str, other: str) -> None:
        """Undo `cut`: what was sent meanwhile arrives now."""
        self.link(one, other).is_cut = False
        for peer_id, remote in ((one, other), (other, one)):
            if peer_id in self._peers:
                self._peers[peer_id]._flush(remote)

    def kill(self, peer_id: str) -> None:
        """The peer's process dies: its streams break at once, and it cannot be reached any more."""
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            peer._die()

    def find(self, peer_id: str) -> MemoryTransport | None:
        return self._peers.get(peer_id)

    def delay_s(self, link: Link) -> float:
        """Seconds that a small packet takes over `link`, this time."""
        delay = link.latency_s + link.jitter_s * self._random.random()
        while link.loss and self._random.random() < link.loss:
            delay += RETRANSMIT_S
        return delay

    def transfer_s(self, sender: str, receiver: str, size: int, now_s: float) -> float:
        """Seconds until `size` bytes that are sent now have arrived, behind those sent before."""
        link = self.link(sender, receiver)
        waits_s = 0.0
        if link.bytes_per_s:
            ends = self._sent_at_s
            end_s = max(now_s, ends.get((sender, receiver), now_s)) + size / link.bytes_per_s
            ends[sender, receiver] = end_s
            waits_s = end_s - now_s
        return waits_s + self.delay_s(link)


class MemoryStream:
    """One end of a stream; `write` moves bytes to the other end after the link's delay."""

    def __init__(self, owner: MemoryTransport, peer_id: str) -> None:
        self.peer_id = peer_id
        self.remote_address = ""
        self.owner = owner
        self._other: MemoryStream | None = None
        self._arrived: deque[bytes] = deque()
        self._on_way: deque[bytes | None] = deque()
        self._unread = 0
        self._changed = asyncio.Event()
        self._receiver: Receiver | None = None
        self._paused = False
        self._ended = False
        self._broken = False
        self._closed = False

    async def read(self) -> bytes:
        while not self._arrived:
            if self._broken:
                raise StreamClosedError(f"the stream to {self.peer_id} broke")
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data = self._arrived.popleft()
        self._unread -= len(data)
        if self._other is not None:
            self._other._wake()
        return data

    def subscribe(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._hand_over()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._hand_over()

    def _hand_over(self) -> None:
        """Give a subscriber what has arrived, and the end if that has."""
        while self._receiver is not None and not self._paused and self._arrived:
            data = self._arrived.popleft()
            self._unread -= len(data)
            if self._other is not None:
                self._other._wake()
            self._receiver(data)
        if self._receiver is not None and (self._ended or self._broken) and not self._arrived:
            receiver, self._receiver = self._receiver, None
            receiver(b"")

    def write(self, *buffers: Buffer) -> None:
        if not (self._closed or self._broken):
            self._send(b"".join(buffers))

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the other end has not read yet: there is no other buffer between."""
        return 0 if self._other is None or self._broken else self._other._unread

    async def drain(self) -> None:
        while self.unsent_bytes >= WRITE_HIGH_WATER_BYTES and not self._broken:
            self._changed.clear()
            await self._changed.wait()
        if self._broken:
            raise StreamClosedError(f"the stream to {self.peer_id} broke")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._send(None)
            self._ended = True
            self._wake()
            self.owner._streams.discard(self)

    def abort(self) -> None:
        self.break_off()
        if self._other is not None:
            self._other.owner._loop.call_soon_threadsafe(self._other.break_off)

    def break_off(self) -> None:
        """The connection is gone, seen from this end."""
        self._broken = True
        self._wake()
        self.owner._call(self._hand_over)
        self.owner._streams.discard(self)

    def _send(self, data: bytes | None) -> None:
        """Put bytes, or the end of the stream, on their way."""
        other = self._other
        if other is None or other._broken:
            return
        other._on_way.append(data)
        other._unread += len(data or b"")
        owner = self.owner
        if not owner.network.link(owner.peer_id, self.peer_id).is_cut:
            size, now_s = len(data or b""), owner._loop.time()
            delay = owner.network.transfer_s(owner.peer_id, self.peer_id, size, now_s)
            other.owner._later(delay, other._arrive)

    def _arrive(self) -> None:
        """One more item has arrived: the oldest, whichever timer was first."""
        link = self.owner.network.link(self.owner.peer_id, self.peer_id)
        if link.is_cut or not self._on_way:
            return
        data = self._on_way.popleft()
        if data is None:
            self._ended = True
        elif data:
            self._arrived.append(data)
        self._wake()
        self._hand_over()

    def _flush(self) -> None:
        for _ in range(len(self._on_way)):
            self._arrive()

    def _wake(self) -> None:
        self.owner._call(self._changed.set)


class MemoryTransport:
    """A peer of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, identity: Identity) -> None:
        self.network = network
        self.identity = identity
        self.peer_id = identity.peer_id
        #: The multiaddr that its streams come from, for whoever asks.
        self.seen_at = ""
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[str, StreamHandler] = {}
        self._streams: set[MemoryStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def addresses(self) -> tuple[str, ...]:
        return (join_address("/memory", self.peer_id),)

    async def connect(self, address: str, *, timeout_s: float) -> str:
        peer_id = split_address(address)[1]
        await self._reach(peer_id, timeout_s)
        return peer_id

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> MemoryStream:
        peer = await self._reach(peer_id, timeout_s)
        handler = peer._handlers.get(protocol)
        if handler is None:
            raise UnsupportedProtocolError(
                f"peer {peer_id} does not speak {protocol}; it may run another version"
            )
        mine, theirs = MemoryStream(self, peer_id), MemoryStream(peer, self.peer_id)
        mine._other, theirs._other = theirs, mine
        theirs.remote_address = self.seen_at
        self._streams.add(mine)
        peer._streams.add(theirs)
        peer._call(peer._accept, protocol, handler, theirs)
        return mine

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def close(self) -> None:
        self.network._peers.pop(self.peer_id, None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in list(self._streams):
            await stream.close()

    async def _reach(self, peer_id: str, timeout_s: float) -> MemoryTransport:
        """The round trip of a dial.

        Raises:
            PeerUnreachableError: nobody is there, or the link is cut.
        """
        if self.network.find(self.peer_id) is not self:
            raise PeerUnreachableError("this peer has left the network")
        link = self.network.link(self.peer_id, peer_id)
        if link.is_cut:
            await asyncio.sleep(timeout_s)
            raise PeerUnreachableError(f"no answer from peer {peer_id} within {timeout_s:g} s")
        await asyncio.sleep(2 * self.network.delay_s(link))
        peer = self.network.find(peer_id)
        if peer is None:
            raise PeerUnreachableError(f"cannot reach peer {peer_id}: nobody is there")
        if peer is self:
            raise ConfigError("a peer does not dial itself")
        return peer

    def _accept(self, protocol: str, handler: StreamHandler, stream: MemoryStream) -> None:
        task = self._loop.create_task(run_handler(protocol, handler, stream, logger))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, delay_s: float, function: Callable[[], None]) -> None:
        if delay_s <= 0:
            self._call(function)
        else:
            self._call(self._loop.call_later, delay_s, function)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """In this peer's loop, soon, from wherever."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _flush(self, peer_id: str) -> None:
        for stream in list(self._streams):
            if stream.peer_id == peer_id:
                self._call(stream._flush)

    def _die(self) -> None:
        for stream in list(self._streams):
            if stream._other is not None:
                stream._other.owner._call(stream._other.break_off)
            self._call(stream.break_off)
        for task in list(self._tasks):
            self._call(task.cancel)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever nothing else is left to do.

    An hour of timeouts passes in a moment, always in the same order. Work for threads (`to_thread`)
    runs in place, since the clock could not know to wait for it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self._advance))

    def time(self) -> float:
        return self._now

    def _advance(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, function: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            # Nothing is scheduled, so only another thread can help.
            ready = super().select(_STUCK_S)
            if not ready:
                raise RuntimeError("the virtual clock stands still: everything waits for something else")
            return ready
        self._advance(timeout)
        return []
