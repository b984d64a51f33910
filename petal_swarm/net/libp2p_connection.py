"""One authenticated connection of the py-libp2p transport, with the streams on it: the trio side.

Imported in the trio thread only, on use: it imports libp2p, which cannot share a process with hivemind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from petal_swarm.net.libp2p_thread import TrioThread
from petal_swarm.net.libp2p_yamux import Ended, Event, GoneAway, Opened, Received, Reset, Yamux, YamuxError
from petal_swarm.net.transport import Buffer

logger = logging.getLogger(__name__)

READ_BYTES = 128 << 10

#: The plaintext of one Noise message: what is encrypted and sent at once.
WRITE_BYTES = 65535 - 16

#: A connection this silent is asked for a sign of life; it is given up if none comes in as long again.
PING_INTERVAL_S = 15.0

#: How long a stream that we have ended may make no progress before it is reset.
LINGER_S = 5.0


class Socket(ReadWriteCloser):  # type: ignore[misc]
    """A TCP stream for py-libp2p: large reads from the kernel, whole answers to small ones.

    py-libp2p's own makes two system calls for each Noise message, and the `read_exactly` above it gives
    up on a message that comes in more than a hundred pieces.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self.last_heard_s = trio.current_time()

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or fewer when the peer has ended."""
        if n is None or n > READ_BYTES:
            raise ConnectionClosedError("a message of impossible size")
        buffer = self._buffer
        try:
            while len(buffer) < n:
                data = await self._stream.receive_some(READ_BYTES)
                if not data:
                    break
                self.last_heard_s = trio.current_time()
                buffer += data
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection broke") from error
        taken = bytes(buffer[:n])
        del buffer[:n]
        return taken

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the TCP connection broke") from error

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


class Sink(Protocol):
    """The asyncio side of a stream: `deliver`, `end`, `fail` and `drained` are called in the loop."""

    drain_below_bytes: int | None

    def deliver(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def fail(self, reason: str) -> None: ...
    def drained(self) -> None: ...


class Channel:
    """The trio side of a stream. It buffers what comes until it is attached to a sink, then passes it on.

    What may be buffered, here and in the sink, is bounded by yamux's window: a peer gets leave to send
    more when the sink's reader has taken what came.
    """

    def __init__(self, connection: Connection, stream_id: int, thread: TrioThread) -> None:
        self.peer_id = connection.peer_id
        self.stream_id = stream_id
        self.queued_bytes = 0
        self.sent_bytes = 0
        self.gone = trio.Event()
        self._connection = connection
        self._thread = thread
        self._buffer = bytearray()
        self._changed = trio.Event()
        self._sink: Sink | None = None
        self._discarding = False
        self._ended = False
        self._failure: str | None = None

    # -- for the negotiation, in trio: what py-libp2p calls a reader and a writer

    async def read(self, n: int) -> bytes:
        """Up to `n` bytes; `b""` once no more will come."""
        while not self._buffer and not self._ended and self._failure is None:
            self._changed = trio.Event()
            await self._changed.wait()
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        self.consumed(len(data))
        return data

    # -- for the asyncio side, posted to the trio thread

    def attach(self, sink: Sink) -> None:
        """From now on everything goes to `sink`, beginning with what has come already."""
        self._sink = sink
        if self._buffer:
            self._thread.reply(sink.deliver, bytes(self._buffer))
            self._buffer.clear()
        if self._failure is not None:
            self._thread.reply(sink.fail, self._failure)
        elif self._ended:
            self._thread.reply(sink.end)

    def write(self, *buffers: Buffer) -> None:
        self._connection.send(self, buffers)

    def consumed(self, count: int) -> None:
        self._connection.consumed(self, count)

    def finish(self) -> None:
        """End our direction after what is queued, and drop what still comes."""
        self._discarding = True
        self._connection.finish(self)

    def reset(self) -> None:
        self._discarding = True
        self._connection.reset(self)

    # -- for the connection

    def on_data(self, data: bytes) -> None:
        if self._discarding:
            self.consumed(len(data))
        elif self._sink is not None:
            self._thread.reply(self._sink.deliver, data)
        else:
            self._buffer += data
            self._changed.set()

    def on_end(self) -> None:
        self._ended = True
        self._changed.set()
        self.gone.set()
        if self._sink is not None:
            self._thread.reply(self._sink.end)

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._changed.set()
        self.gone.set()
        if self._sink is not None:
            self._thread.reply(self._sink.fail, reason)

    def on_sent(self, count: int) -> None:
        """`sent_bytes` is read by the other thread as it is: it only grows, and only here."""
        self.sent_bytes += count
        sink = self._sink
        if sink is not None and sink.drain_below_bytes is not None:
            self._thread.reply(sink.drained)


class Connection:
    """An authenticated connection to a peer; it lives as long as its `run`.

    `on_stream` is called for each stream that the peer opens, in a task of its own; `on_gone` when no
    more streams can be opened here.
    """

    def __init__(
        self,
        peer_id: str,
        thread: TrioThread,
        socket: Socket,
        secure: Any,
        *,
        initiator: bool,
        on_stream: Callable[[Channel], Any],
        on_gone: Callable[[Connection], object],
    ) -> None:
        self.peer_id = peer_id
        self._thread = thread
        self._socket = socket
        self._secure = secure
        self._on_stream = on_stream
        self._on_gone = on_gone
        self._yamux = Yamux(initiator=initiator)
        self._channels: dict[int, Channel] = {}
        self._nursery: trio.Nursery | None = None
        self._output = trio.Event()
        self._idle = trio.Event()
        self._failure = f"the connection to {peer_id} is gone"

    async def run(self) -> None:
        """Until the connection ends, for whatever reason; raises nothing but `trio.Cancelled`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._write_loop)
                nursery.start_soon(self._watch)
                await self._read_loop()
        except* ConnectionClosedError:
            pass
        except* YamuxError as group:
            self._failure = f"{self.peer_id} broke the rules of streams: {group.exceptions[0]}"
        except* Exception as group:
            # The session's boundary: a message that cannot be decrypted, or an error in py-libp2p.
            logger.debug("the connection to %s failed", self.peer_id, exc_info=group)
        finally:
            self._fail()
            with trio.CancelScope(shield=True):
                await self._socket.close()

    async def shut_down(self) -> None:
        """End the streams after what is queued, and wait until the peer has; the caller has a deadline.

        Without the wait, the peer's side of the connection would be torn down under what it has not
        yet passed on to its readers.
        """
        self._on_gone(self)
        channels = list(self._channels.values())
        for channel in channels:
            channel.finish()
        for channel in channels:
            await channel.gone.wait()
        self._yamux.go_away()
        self._idle = trio.Event()
        self._output.set()
        await self._idle.wait()

    # -- streams

    def open(self) -> Channel:
        return self._add(self._yamux.open())

    def send(self, channel: Channel, buffers: Sequence[Buffer]) -> None:
        self._yamux.send(channel.stream_id, *buffers)
        self._wake()

    def consumed(self, channel: Channel, count: int) -> None:
        self._yamux.consumed(channel.stream_id, count)
        self._wake()

    def finish(self, channel: Channel) -> None:
        self._yamux.finish(channel.stream_id)
        self._wake()
        if channel.stream_id in self._channels:
            self._thread.spawn(self._linger, channel)

    def reset(self, channel: Channel) -> None:
        self._channels.pop(channel.stream_id, None)
        self._yamux.reset(channel.stream_id)
        self._wake()
        channel.gone.set()

    async def _linger(self, channel: Channel) -> None:
        """Let go of a stream that we have ended when the peer ends it too, or when nothing moves any more."""
        sent = -1
        while not channel.gone.is_set() and channel.sent_bytes > sent:
            sent = channel.sent_bytes
            with trio.move_on_after(LINGER_S):
                await channel.gone.wait()
        if not channel.gone.is_set():
            self.reset(channel)
        self._channels.pop(channel.stream_id, None)

    def _add(self, stream_id: int) -> Channel:
        channel = Channel(self, stream_id, self._thread)
        self._channels[stream_id] = channel
        self._wake()
        return channel

    # -- the loops

    async def _read_loop(self) -> None:
        while True:
            for event in self._yamux.receive_data(await self._secure.read(None)):
                self._dispatch(event)
            self._wake()

    def _dispatch(self, event: Event) -> None:
        match event:
            case Received(stream_id, data):
                if (channel := self._channels.get(stream_id)) is not None:
                    channel.on_data(data)
            case Ended(stream_id):
                if (channel := self._channels.get(stream_id)) is not None:
                    channel.on_end()
            case Reset(stream_id):
                if (channel := self._channels.pop(stream_id, None)) is not None:
                    channel.fail(f"{self.peer_id} reset the stream")
            case Opened(stream_id):
                assert self._nursery is not None
                self._nursery.start_soon(self._on_stream, self._add(stream_id))
            case GoneAway():
                self._on_gone(self)

    async def _write_loop(self) -> None:
        while True:
            data, carried = self._yamux.data_to_send(WRITE_BYTES)
            if not data:
                self._idle.set()
                self._output = trio.Event()
                await self._output.wait()
                continue
            await self._secure.write(data)
            for stream_id, count in carried:
                if (channel := self._channels.get(stream_id)) is not None:
                    channel.on_sent(count)

    async def _watch(self) -> None:
        """Notice a peer that has vanished without closing: a cut cable, a suspended laptop."""
        while True:
            await trio.sleep(PING_INTERVAL_S)
            asked_s = trio.current_time()
            if asked_s - self._socket.last_heard_s < PING_INTERVAL_S:
                continue
            self._yamux.ping(0)
            self._wake()
            await trio.sleep(PING_INTERVAL_S)
            if self._socket.last_heard_s < asked_s:
                raise ConnectionClosedError("the peer is silent")

    def _wake(self) -> None:
        if self._yamux.has_output:
            self._output.set()

    def _fail(self) -> None:
        self._on_gone(self)
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.fail(self._failure)
