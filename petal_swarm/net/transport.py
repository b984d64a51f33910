"""What the layers above may ask of a network: authenticated peers and streams of bytes between them.

There are three implementations: `p2pd` (the Go libp2p daemon), `libp2p` (py-libp2p in a trio thread)
and `memory` (one process, seeded faults). All are used from one asyncio loop. A stream protocol is
named by a string such as `/petal-swarm/1/session`; the name carries the version.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

Receiver: TypeAlias = Callable[[bytes], None]

#: A stream that holds more unsent bytes than this makes `drain` wait.
WRITE_HIGH_WATER_BYTES = 4 << 20


class Stream(Protocol):
    """A reliable, ordered, two-way stream of bytes to one peer."""

    @property
    def peer_id(self) -> str:
        """The remote peer, as authenticated by the transport (base58)."""
        ...

    @property
    def remote_address(self) -> str:
        """Of a stream that the peer opened: the multiaddr that its connection comes from, without a peer id.

        It ends in `/p2p-circuit` if that is a relay. Empty where it is not known.
        """
        ...

    async def read(self) -> bytes:
        """The next bytes, as soon as there are any; `b""` once the peer has ended its side.

        Cancelling loses nothing: bytes that have arrived stay for the next call.

        Raises:
            StreamClosedError: the stream was reset, the connection is gone, or `abort` was called.
        """
        ...

    def subscribe(self, receiver: Receiver) -> None:
        """Instead of `read`: call `receiver` in the event loop with bytes as they come.

        It gets `b""` once, when no more will come, for whatever reason. It must not raise.
        """
        ...

    def pause(self) -> None:
        """Read no more from the network until `resume`, so that the peer has to wait. Idempotent."""
        ...

    def resume(self) -> None:
        """Undo `pause`. Idempotent."""
        ...

    def write(self, *buffers: Buffer) -> None:
        """Send bytes, or queue what does not go at once, and return. After a failure, a no-op.

        May be called from any thread, though not from two at once if their order matters. The buffers
        must not change afterwards.
        """
        ...

    @property
    def unsent_bytes(self) -> int:
        """How much `write` has queued that is not yet handed to the network."""
        ...

    async def drain(self) -> None:
        """Wait until fewer than `WRITE_HIGH_WATER_BYTES` are unsent.

        Raises:
            StreamClosedError: the stream is gone.
        """
        ...

    async def close(self) -> None:
        """Send what is queued, then end the stream in both directions. Idempotent; never raises."""
        ...

    def abort(self) -> None:
        """End the stream now and drop what is queued; pending reads and drains raise `StreamClosedError`."""
        ...


StreamHandler: TypeAlias = Callable[[Stream], Awaitable[None]]


async def run_handler(protocol: str, handler: StreamHandler, stream: Stream, log: logging.Logger) -> None:
    """What `serve` promises: the stream ends with its handler, and is reset, and logged, if that fails."""
    try:
        await handler(stream)
    except asyncio.CancelledError:
        stream.abort()
        raise
    except Exception:
        log.exception("stream %s from %s failed", protocol, stream.peer_id)
        stream.abort()
    finally:
        await stream.close()


class Transport(Protocol):
    """A peer's end of the network. Made by an async factory, closed explicitly."""

    @property
    def peer_id(self) -> str:
        """This peer's id (base58), the hash of its public key."""
        ...

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs, each ending in `/p2p/PEER_ID`, at which others can dial this peer."""
        ...

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Dial a multiaddr that ends in `/p2p/PEER_ID` and return that peer id.

        Raises:
            ConfigError: not such an address.
            PeerUnreachableError: no authenticated connection within `timeout_s`.
        """
        ...

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> Stream:
        """Open a stream, dialling the peer at `addresses` first if there is no connection yet.

        Raises:
            PeerUnreachableError: no connection within `timeout_s`.
            UnsupportedProtocolError: the peer does not speak `protocol`.
        """
        ...

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Call `handler` in a task of its own for every stream that a peer opens.

        The stream is closed when the handler returns.
        An exception from the handler is logged and resets the stream. Not every transport can accept
        streams: one that cannot raises `ConfigError`.
        """
        ...

    async def close(self) -> None:
        """Close every stream and leave the network. Idempotent."""
        ...
