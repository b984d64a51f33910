"""A stream through the libp2p daemon: bytes over a Unix socket, with as few wake-ups as can be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import cast

from petal_swarm.errors import StreamClosedError
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Buffer, Receiver

#: Bytes that wait here for a reader before the peer has to wait too.
READ_AHEAD_BYTES = 8 << 20
CLOSE_TIMEOUT_S = 2.0


class P2pdStream(asyncio.Protocol):
    """A stream through the daemon: a Unix socket of its own.

    Writes go straight to the socket from the calling thread, and only what the kernel does not take at
    once goes through the event loop: a wake-up less for every message.
    """

    def __init__(self, peer_id: str, writer: asyncio.StreamWriter, arrived: bytes) -> None:
        self.peer_id = peer_id
        self.remote_address = ""
        self._writer = writer  # kept: it closes the transport when it is collected
        self._transport = cast(asyncio.Transport, writer.transport)
        self._loop = asyncio.get_running_loop()
        # A duplicate, so that its number stays ours whenever asyncio closes the original.
        self._socket: socket.socket | None = socket.socket(
            fileno=os.dup(writer.get_extra_info("socket").fileno())
        )
        self._lock = threading.Lock()
        self._scheduled_bytes = 0
        self._arrived = deque([arrived] if arrived else [])
        self._arrived_bytes = len(arrived)
        self._receiver: Receiver | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()
        self._ended = False
        self._failure: str | None = None

    @classmethod
    async def adopt(
        cls, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> P2pdStream:
        """Take over a connection that hivemind has opened, with the bytes that its reader holds."""
        transport = cast(asyncio.Transport, writer.transport)
        if transport.is_closing():
            raise StreamClosedError(f"the stream to {peer_id} broke while it was opened")
        transport.pause_reading()
        reader.feed_eof()
        stream = cls(peer_id, writer, await reader.read())
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        transport.set_protocol(stream)
        transport.resume_reading()
        return stream

    async def read(self) -> bytes:
        while not self._arrived:
            if self._failure is not None:
                raise StreamClosedError(f"the stream to {self.peer_id} {self._failure}")
            if self._ended:
                return b""
            self._readable.clear()
            await self._readable.wait()
        data = self._arrived.popleft() if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived.clear()
        self._arrived_bytes = 0
        self.resume()
        return data

    def subscribe(self, receiver: Receiver) -> None:
        self._receiver = receiver
        for data in self._arrived:
            receiver(data)
        self._arrived.clear()
        if self._arrived_bytes > READ_AHEAD_BYTES:
            self.resume()
        self._arrived_bytes = 0
        if self._ended:
            receiver(b"")

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def write(self, *buffers: Buffer) -> None:
        with self._lock:
            if self._socket is None:
                return
            sent = 0
            if self.unsent_bytes == 0:
                try:
                    sent = self._socket.sendmsg(buffers)
                except BlockingIOError:
                    pass
                except OSError:
                    return  # the reader learns why
            rest = _after(buffers, sent)
            if rest:
                self._scheduled_bytes += len(rest)
                self._loop.call_soon_threadsafe(self._write_scheduled, rest)

    @property
    def unsent_bytes(self) -> int:
        return self._scheduled_bytes + int(self._transport.get_write_buffer_size())

    async def drain(self) -> None:
        if self._scheduled_bytes:
            await asyncio.sleep(0)  # let the event loop take over what is scheduled
        await self._writable.wait()
        if self._failure is not None:
            raise StreamClosedError(f"the stream to {self.peer_id} {self._failure}")

    async def close(self) -> None:
        if self._scheduled_bytes:
            await asyncio.sleep(0)
        self._drop_socket()
        self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._gone.wait()
            return
        self._transport.abort()

    def abort(self) -> None:
        self._failure = "was aborted"
        self._drop_socket()
        self._transport.abort()
        self._end()

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        if self._receiver is not None:
            self._receiver(data)
            return
        self._arrived.append(data)
        self._arrived_bytes += len(data)
        self._readable.set()
        if self._arrived_bytes > READ_AHEAD_BYTES:
            self.pause()

    def eof_received(self) -> bool:
        self._end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and self._failure is None:
            self._failure = f"broke: {error}"
        self._gone.set()
        self._end()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _end(self) -> None:
        self._readable.set()
        self._writable.set()
        if not self._ended:
            self._ended = True
            if self._receiver is not None:
                self._receiver(b"")

    def _write_scheduled(self, data: bytes) -> None:
        with self._lock:
            self._scheduled_bytes -= len(data)
            if not self._transport.is_closing():
                self._transport.write(data)

    def _drop_socket(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _after(buffers: Sequence[Buffer], sent: int) -> bytes:
    """What of `buffers` follows the first `sent` bytes."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if sent < view.nbytes:
            rest.append(view[sent:])
        sent = max(0, sent - view.nbytes)
    return b"".join(rest)
