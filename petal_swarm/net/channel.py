"""A stream that speaks messages: bytes of a `Stream` through the state machine of `wire.connection`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from petal_swarm.errors import DeadlineError, RemoteProtocolError, StreamClosedError, remote_error
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Stream
from petal_swarm.wire.connection import Connection, Role, StreamEnded, Table
from petal_swarm.wire.frames import FrameDecoder
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.error import Error

T = TypeVar("T")


class Channel:
    """One end of a protocol over one stream."""

    def __init__(self, stream: Stream, table: Table, role: Role) -> None:
        self._stream = stream
        self._connection = Connection(table, role)

    @property
    def peer_id(self) -> str:
        return self._stream.peer_id

    @property
    def remote_address(self) -> str:
        """See `Stream.remote_address`."""
        return self._stream.remote_address

    @property
    def receiving(self) -> bool:
        """Whether a part of a message has arrived, and its rest has not."""
        return self._connection.mid_frame

    @property
    def incoming(self) -> FrameDecoder:
        """How far the peer's bytes have been read, and how large a payload it may send."""
        return self._connection.decoder

    @property
    def unsent_bytes(self) -> int:
        """See `Stream.unsent_bytes`."""
        return self._stream.unsent_bytes

    async def receive(self) -> Message | None:
        """The next message; None once the peer has ended its side. Cancelling loses nothing.

        Raises:
            StreamClosedError: the connection is gone.
            RemoteProtocolError: the peer broke the protocol; the channel is unusable.
        """
        while (event := self._connection.next_event()) is None:
            self._connection.receive_data(await self._stream.read())
        return None if isinstance(event, StreamEnded) else event

    def subscribe(
        self,
        on_message: Callable[[Message], None],
        on_end: Callable[[Exception | None], None],
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """Instead of `receive`: call `on_message` in the event loop with each message as it comes.

        `on_end` is called once: with None when the peer has ended its side or the connection is gone,
        else with the error, if the peer broke the protocol or `on_message` raised. `on_part` is called
        while only a part of a message has come, with the size in bytes that its payload will have; not
        before that is known.
        """
        ended = False
        decoder = self._connection.decoder

        def on_data(data: bytes | None) -> None:
            nonlocal ended
            if ended:
                return
            broken: Exception | None = None
            try:
                if data is not None:
                    self._connection.receive_data(data)
            except Exception as error:
                broken = error  # what came before it is still good
            try:
                while (event := self._connection.next_event()) is not None:
                    if isinstance(event, StreamEnded):
                        ended = True
                        on_end(None)
                        return
                    on_message(event)
            except Exception as error:
                broken = error
            if broken is not None:
                ended = True
                on_end(broken)
            elif on_part is not None and (size := decoder.payload_under_way):
                on_part(size)

        on_data(None)  # what came together with an earlier message
        self._stream.subscribe(on_data)

    def pause(self) -> None:
        """See `Stream.pause`."""
        self._stream.pause()

    def resume(self) -> None:
        """See `Stream.resume`."""
        self._stream.resume()

    async def expect(self, kind: type[T], *, timeout_s: float) -> T:
        """The next message, which must be a `kind`.

        Raises:
            RemoteError: the peer answered with an error.
            DeadlineError: nothing came within `timeout_s`.
            StreamClosedError: the stream ended instead.
            RemoteProtocolError: something else came.
        """
        try:
            async with asyncio.timeout(timeout_s):
                message = await self.receive()
        except TimeoutError:
            raise DeadlineError(f"peer {self.peer_id} did not answer within {timeout_s:g} s") from None
        if isinstance(message, kind):
            return message
        if message is None:
            raise StreamClosedError(f"peer {self.peer_id} ended the stream before it answered")
        if isinstance(message, Error):
            raise remote_error(
                message.code,
                message.message,
                peer_id=self.peer_id,
                retry_after_s=message.retry_after_s,
            )
        raise RemoteProtocolError(f"peer {self.peer_id} sent {message.type!r} instead of an answer")

    def send(self, message: Message) -> None:
        """Queue a message; see `Stream.write`.

        Raises:
            LocalProtocolError: it may not be sent now.
        """
        self._stream.write(*self._connection.send(message))

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that `drain` would wait."""
        return self._stream.unsent_bytes >= WRITE_HIGH_WATER_BYTES

    async def drain(self) -> None:
        await self._stream.drain()

    async def close(self) -> None:
        await self._stream.close()

    def abort(self) -> None:
        self._stream.abort()
