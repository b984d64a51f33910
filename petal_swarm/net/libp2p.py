"""The transport without a daemon, for macOS, Windows, ARM and notebooks: py-libp2p in a trio thread.

    transport = await Libp2pTransport.create()
    stream = await transport.open_stream(PEER_ID, "/x/1", addresses=[ADDRESS], timeout_s=5)

It speaks TCP, Noise and yamux: what the Go daemon of `p2pd` and every other libp2p peer speak. It knows no
relays and no hole punching, so it reaches peers that can be dialled, and serves those and the ones that
it has dialled itself. libp2p and trio are imported by `create`, in the trio thread: libp2p cannot share
a process with hivemind.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from petal_swarm.errors import ConfigError, NetworkError, StreamClosedError
from petal_swarm.net.addresses import join_address, split_address
from petal_swarm.net.identity import Identity
from petal_swarm.net.libp2p_address import endpoint_of, multiaddr_of, require_peer_id
from petal_swarm.net.libp2p_thread import TrioThread
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Buffer, StreamHandler

if TYPE_CHECKING:
    from petal_swarm.net.libp2p_connection import Channel
    from petal_swarm.net.libp2p_host import Endpoint, Host

logger = logging.getLogger(__name__)

#: The most that one `read` returns.
READ_BYTES = 256 << 10

#: Reads are reported to the trio thread, which may then let the peer send more, in steps of this.
CONSUMED_STEP_BYTES = 64 << 10

#: What `close` waits for, at most: a stream's queue; a transport's handlers, streams and thread, each.
CLOSE_TIMEOUT_S = 1.0


class Libp2pStream:
    """The asyncio side of a stream. Its trio side, the channel, calls `deliver` and the like in the loop."""

    def __init__(self, channel: Channel, thread: TrioThread) -> None:
        self.peer_id = channel.peer_id
        #: Set while somebody waits for the queue to shrink below this; the trio thread looks at it.
        self.drain_below_bytes: int | None = None
        self._channel = channel
        self._thread = thread
        self._chunks: deque[bytes] = deque()
        self._consumed = 0
        self._queued_bytes = 0
        self._ended = False
        self._failure: str | None = None
        self._closing = False
        self._changed: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        thread.post(channel.attach, self)

    async def read(self) -> bytes:
        while not self._chunks:
            if self._failure is not None:
                raise StreamClosedError(self._failure)
            if self._ended:
                return b""
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._changed)
        data = self._take()
        self._consumed += len(data)
        if self._consumed >= CONSUMED_STEP_BYTES:
            self._thread.post(self._channel.consumed, self._consumed)
            self._consumed = 0
        return data

    def write(self, *buffers: Buffer) -> None:
        if self._failure is None and not self._closing:
            # Made here, so that what is not a buffer is the caller's error and not the trio thread's.
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            self._queued_bytes += sum(view.nbytes for view in views)
            self._thread.post(self._channel.write, *views)

    async def drain(self) -> None:
        await self._wait_below(WRITE_HIGH_WATER_BYTES)

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        # The end follows what is queued; trio sees to it even if this is cancelled or out of patience.
        self._thread.post(self._channel.finish)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._wait_below(1)
        except (TimeoutError, StreamClosedError):
            pass
        finally:
            self._drop(f"the stream to {self.peer_id} was closed here")

    def abort(self) -> None:
        self._closing = True
        self._thread.post(self._channel.reset)
        self._drop(f"the stream to {self.peer_id} was aborted here")

    # -- called by the channel, in the loop

    def deliver(self, data: bytes) -> None:
        if self._failure is None:
            self._chunks.append(data)
            _wake(self._changed)
            self._changed = None

    def end(self) -> None:
        self._ended = True
        _wake(self._changed)
        self._changed = None

    def fail(self, reason: str) -> None:
        """No more can come. What came before stays readable."""
        if self._failure is None:
            self._failure = reason
        _wake(self._changed)
        self._changed = None
        self.drained()

    def drained(self) -> None:
        if self._failure is not None or self._unsent() < (self.drain_below_bytes or 0):
            self.drain_below_bytes = None
            _wake(self._drained)
            self._drained = None

    # -- inside

    def _take(self) -> bytes:
        if len(self._chunks) == 1:
            return self._chunks.popleft()
        parts: list[bytes] = []
        size = 0
        while self._chunks and (not parts or size + len(self._chunks[0]) <= READ_BYTES):
            parts.append(self._chunks.popleft())
            size += len(parts[-1])
        return b"".join(parts)

    def _unsent(self) -> int:
        return self._queued_bytes - self._channel.sent_bytes

    async def _wait_below(self, limit: int) -> None:
        while self._failure is None and self._unsent() >= limit:
            # First say what is waited for, then look again: the trio thread counts, then looks.
            self.drain_below_bytes = max(limit, self.drain_below_bytes or 0)
            if self._unsent() < limit:
                break
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        if self._failure is not None:
            raise StreamClosedError(self._failure)

    def _drop(self, reason: str) -> None:
        self._chunks.clear()
        self.fail(reason)


class Libp2pTransport:
    """A peer without a daemon. Made by `create`, to be closed with `close`."""

    def __init__(self, thread: TrioThread, host: Host, addresses: tuple[str, ...]) -> None:
        self.peer_id = host.peer_id
        self._thread = thread
        self._host = host
        self._addresses = addresses
        self._known: dict[str, tuple[Endpoint, ...]] = {}
        self._served: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def create(
        cls,
        *,
        identity: Identity | None = None,
        listen: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> Libp2pTransport:
        """Start the trio thread. `announce` replaces what others are told to dial; no `listen`: a client.

        Raises:
            ConfigError: py-libp2p is missing or hivemind is loaded, or an address cannot be used.
        """
        if any(find_spec(name) is None for name in ("libp2p", "trio")):
            raise ConfigError("the libp2p transport needs py-libp2p: pip install libp2p")
        identity = identity or Identity.generate()
        endpoints = [_listen_endpoint(address) for address in listen]
        thread = await TrioThread.start("petal-swarm-libp2p")
        try:
            host, bound = await thread.call(_start_host, thread, identity.private_key_protobuf(), endpoints)
        except BaseException:
            await thread.stop(CLOSE_TIMEOUT_S)
            raise
        told = announce or [multiaddr_of(*endpoint) for endpoint in bound]
        return cls(thread, host, tuple(join_address(address, host.peer_id) for address in told))

    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def connect(self, address: str, *, timeout_s: float) -> str:
        peer_id = require_peer_id(split_address(address)[1])
        endpoints = self._endpoints(peer_id, [address])
        await self._thread.call(self._host.connect, peer_id, endpoints, timeout_s)
        self._known[peer_id] = endpoints
        return peer_id

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> Libp2pStream:
        endpoints = self._endpoints(require_peer_id(peer_id), addresses)
        channel = await self._thread.call(
            self._host.open_stream, peer_id, protocol, endpoints, timeout_s, discard=_reset
        )
        self._known[peer_id] = endpoints
        return Libp2pStream(channel, self._thread)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See `Transport.serve`. Without `listen`, it is the peers that this one has dialled that are served.

        Raises:
            ConfigError: `protocol` is served already.
        """
        if protocol in self._served:
            raise ConfigError(f"{protocol} is served already")
        self._served.add(protocol)

        def accept(channel: Channel) -> None:
            if self._closed:
                self._thread.post(channel.reset)
                return
            stream = Libp2pStream(channel, self._thread)
            task = asyncio.get_running_loop().create_task(_handle(protocol, handler, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._thread.post(self._host.serve, protocol, accept)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        try:
            await self._thread.call(self._host.shut_down, CLOSE_TIMEOUT_S)
        except NetworkError:
            logger.warning("the trio thread had ended before the transport was closed")
        finally:
            await self._thread.stop(CLOSE_TIMEOUT_S)

    def _endpoints(self, peer_id: str, addresses: Sequence[str]) -> tuple[Endpoint, ...]:
        """Where to dial a peer: at those of `addresses` that are its own, or where it was found before."""
        found: dict[Endpoint, None] = {}
        for address in addresses:
            base, owner = split_address(address)
            endpoint = endpoint_of(base)
            if owner == peer_id and endpoint is not None:
                found[endpoint] = None
        return tuple(found) or self._known.get(peer_id, ())


async def _start_host(
    thread: TrioThread, private_key: bytes, endpoints: Sequence[Endpoint]
) -> tuple[Host, list[Endpoint]]:
    """In the trio thread: the first place that imports libp2p."""
    try:
        from petal_swarm.net.libp2p_host import Host
    except TypeError as error:
        # What protobuf raises for a duplicate symbol.
        raise ConfigError("py-libp2p cannot be loaded beside hivemind; use transport='p2pd' here") from error
    host = Host(thread, private_key[4:36])
    return host, await host.listen(endpoints)


async def _handle(protocol: str, handler: StreamHandler, stream: Libp2pStream) -> None:
    try:
        await handler(stream)
    except asyncio.CancelledError:
        stream.abort()
        raise
    except Exception:
        logger.exception("stream %s from %s failed", protocol, stream.peer_id)
        stream.abort()
    finally:
        await stream.close()


def _listen_endpoint(address: str) -> Endpoint:
    endpoint = endpoint_of(address)
    if endpoint is None:
        raise ConfigError(f"the libp2p transport listens on TCP only, not on {address!r:.200}")
    return endpoint


def _reset(channel: Channel) -> None:
    channel.reset()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
