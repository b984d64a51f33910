"""One stream of py-libp2p: pumps in the trio thread, buffers with bounds, and the asyncio side of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.stream.exceptions import StreamEOF

from petal_swarm.errors import (
    StreamClosedError,
)
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Buffer

if TYPE_CHECKING:
    from petal_swarm.net.libp2p_host import Host

logger = logging.getLogger(__name__)

READ_BYTES = 256 << 10

#: What has come and nobody has read. Beyond it, yamux keeps the peer from sending more.
READ_BUFFER_BYTES = 8 << 20

#: What is written at once: a yamux frame that fits in one Noise message.
FRAME_BYTES = 65535 - 16 - 12

#: How often it is looked at what cannot be waited for, such as whether a peer reads again.
POLL_S = 0.002

#: How long a peer may take to end a stream that was ended here.
LINGER_S = 60.0

#: How long closing a stream waits for its queue, and closing the host for all streams.
CLOSE_TIMEOUT_S = 1.0


class Libp2pStream:
    """See `petal_swarm.net.transport.Stream`."""

    def __init__(self, host: Host, stream: Any) -> None:
        self.peer_id = str(stream.muxed_conn.peer_id)
        self.remote_address = ""  # nobody serves what needs it over this transport
        self._host = host
        self._stream = stream
        self._failure: str | None = None
        self._closing = False
        # Read in the loop, filled by trio.
        self._chunks: deque[bytes] = deque()
        self._receiver: Callable[[bytes], None] | None = None
        self._paused = False
        self._readable = asyncio.Event()
        self._ended = False
        self._delivered_bytes = 0
        self._taken_bytes = 0
        self._reader_waits = False
        # Filled by any thread, sent by trio.
        self._queue: deque[memoryview] = deque()
        self._counting = threading.Lock()
        self._queued_bytes = 0
        self._sent_bytes = 0
        self._drained = asyncio.Event()
        self._drain_below_bytes = 0
        # In trio.
        self._changed = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def unsent_bytes(self) -> int:
        return self._queued_bytes - self._sent_bytes

    async def read(self) -> bytes:
        while not self._chunks:
            if self._failure is not None:
                raise StreamClosedError(self._failure)
            if self._ended:
                return b""
            self._readable.clear()
            await self._readable.wait()
        return self._take()

    def subscribe(self, receiver: Callable[[bytes], None]) -> None:
        self._receiver = receiver
        self._hand_over()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._hand_over()

    def write(self, *buffers: Buffer) -> None:
        if self._failure is None and not self._closing:
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            with self._counting:
                self._queued_bytes += sum(view.nbytes for view in views)
            self._queue.extend(views)
            self._host.post(self._wake)

    async def drain(self) -> None:
        await self._wait_below(WRITE_HIGH_WATER_BYTES)

    async def close(self) -> None:
        if self._closing:
            return
        # The end follows what is queued; trio sees to it even if this is cancelled or out of patience.
        self.finish()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._wait_below(1)
        except (TimeoutError, StreamClosedError):
            pass
        finally:
            self._drop("closed here")

    def abort(self) -> None:
        self._closing = True
        self._host.post(self._scope.cancel)
        self._drop("aborted here")

    async def _wait_below(self, limit: int) -> None:
        while self._failure is None and self.unsent_bytes >= limit:
            # First say what is waited for, then look: the trio thread counts, then looks.
            self._drained.clear()
            self._drain_below_bytes = max(limit, self._drain_below_bytes)
            if self.unsent_bytes >= limit:
                await self._drained.wait()
        if self._failure is not None:
            raise StreamClosedError(self._failure)

    def _drop(self, how: str) -> None:
        self._chunks.clear()
        self._fail(f"the stream to {self.peer_id} was {how}")

    def finish(self) -> None:
        self._closing = True
        self._host.post(self._wake)

    # -- in the loop, called by trio

    def _deliver(self, data: bytes) -> None:
        if data and self._failure is None:
            self._chunks.append(data)
        self._ended = not data
        self._hand_over()

    def _fail(self, failure: str) -> None:
        """No more can come. What came before stays readable."""
        self._failure = self._failure or failure
        self._drained.set()
        self._hand_over()

    def _hand_over(self) -> None:
        """Wake whoever reads, or give a subscriber what has come, and the end if that has."""
        self._readable.set()
        while self._receiver is not None and not self._paused and self._chunks:
            self._receiver(self._take())
        if self._receiver is not None and not self._chunks and (self._ended or self._failure is not None):
            receiver, self._receiver = self._receiver, None
            receiver(b"")

    def _take(self) -> bytes:
        data = self._chunks.popleft()
        self._taken_bytes += len(data)
        if self._reader_waits:
            self._host.post(self._wake)
        return data

    # -- in trio

    async def carry(self) -> None:
        """Until both directions have ended, or either has failed."""
        ended = False
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    await self._send()
                    nursery.cancel_scope.deadline = trio.current_time() + LINGER_S
                ended = not nursery.cancel_scope.cancelled_caught
        finally:
            with trio.CancelScope(shield=True), suppress(Exception):
                await (self._stream.close() if ended else self._stream.reset())
            self._host.reply(self._fail, "the transport is closed")

    async def _send(self) -> None:
        try:
            while self._queue or not self._closing:
                window = self._stream.muxed_stream.send_window
                if not self._queue:
                    await self._changed.wait()
                elif window > 0:
                    data = self._next(min(window, FRAME_BYTES))
                    await self._stream.write(data)
                    self._sent_bytes += len(data)
                    if self.unsent_bytes < self._drain_below_bytes:
                        self._drain_below_bytes = 0
                        self._host.reply(self._drained.set)
                # Waited for here, since `write` would fail for good after 5 s.
                elif not self._stream.muxed_stream.closed:
                    await trio.sleep(POLL_S)
                else:
                    raise ConnectionClosedError("the connection is gone")
            await self._stream.close_write()
        except Exception as error:
            self._give_up(f"cannot send to {self.peer_id}: {reason(error)}")

    def _next(self, limit: int) -> bytes:
        parts: list[memoryview] = []
        while limit and self._queue:
            view = self._queue.popleft()
            if view.nbytes > limit:
                self._queue.appendleft(view[limit:])
            parts.append(view[:limit])
            limit -= parts[-1].nbytes
        return b"".join(parts)

    async def _receive(self) -> None:
        try:
            while True:
                data = await self._stream.read(READ_BYTES)
                if not self._closing:
                    self._delivered_bytes += len(data)
                    self._host.reply(self._deliver, data)
                # First say that this waits, then look: the other side counts, then looks.
                self._reader_waits = True
                while self._delivered_bytes - self._taken_bytes >= READ_BUFFER_BYTES and not self._closing:
                    await self._changed.wait()
                self._reader_waits = False
        except Exception as error:
            muxed = self._stream.muxed_stream
            # What came before a reset is kept by py-libp2p, but not given out.
            if (rest := muxed.conn.stream_buffers.pop(muxed.stream_id, None)) and not self._closing:
                self._delivered_bytes += len(rest)
                self._host.reply(self._deliver, bytes(rest))
            # A stream that was reset, or whose connection is gone, mostly raises StreamEOF, too.
            lost = muxed.reset_received or muxed.conn.event_shutting_down.is_set()
            if lost or not isinstance(error, StreamEOF):
                self._give_up(f"{self.peer_id} reset the stream, or the connection is gone")
            else:
                self._host.reply(self._deliver, b"")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _give_up(self, failure: str) -> None:
        self._host.reply(self._fail, failure)
        self._scope.cancel()


def reason(error: BaseException) -> str:
    """One line: what the kernel said, if that is at the bottom of it, or else the first words there are."""
    while error.__cause__ is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return reason(error.exceptions[0])
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
