"""Where the steps of one session come from: the client, or a hop that may be lost and replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from petal_swarm.errors import NetworkError
from petal_swarm.net.channel import Channel
from petal_swarm.net.outbox import Outbox
from petal_swarm.server.config import SessionLimits
from petal_swarm.wire.messages import Message, Open


class Upstream:
    """Who may send steps, and who does. Lets the sender wait while too much is being computed, or while
    results do not get away through `output`; `fail` is told if they never do. Lives in the event loop.
    """

    def __init__(
        self,
        opening: Open,
        limits: SessionLimits,
        *,
        output: Channel | Outbox,
        fail: Callable[[Exception], None],
    ) -> None:
        #: Who may push steps into this session now, and as which epoch; None is the client.
        self.peer_id = opening.upstream
        self.epoch = opening.epoch
        #: Whom steps come from now.
        self.source: Channel | None = None
        #: Steps that came and are not done yet.
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._limits = limits
        self._output = output
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._source_ended: asyncio.Future[None] | None = None
        self._throttled: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    async def take_from(self, source: Channel, on_message: Callable[[Message], None]) -> bool:
        """Call `on_message` with what `source` sends until it ends, or until `leave` or the next call.

        Returns whether it was the source's end, between two messages or by the loss of the connection.

        Raises:
            RemoteProtocolError, RemoteError: a message that is not valid, or what `on_message` raised.
        """
        self.leave()
        self.source = source
        ended = self._source_ended = self._loop.create_future()

        def hear(message: Message) -> None:
            if self.source is source:  # else it has come after that
                on_message(message)

        def on_end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is None or isinstance(error, NetworkError):
                ended.set_result(None)
            else:
                ended.set_exception(error)

        source.subscribe(hear, on_end)
        try:
            await ended
            return self.source is source
        finally:
            if self.source is source:
                self.source = self._source_ended = None

    def reroute(self, peer_id: str, epoch: int) -> None:
        """Steps come from this peer from now on, as steps of `epoch`."""
        self.leave()
        self.peer_id, self.epoch = peer_id, epoch

    def leave(self) -> None:
        """Take nothing more from the present source."""
        if self.source is not None:
            self.source.abort()
            self.source = None
        self._stop_throttling()
        if self._source_ended is not None and not self._source_ended.done():
            self._source_ended.set_result(None)

    def close(self) -> None:
        """The session has ended. Idempotent."""
        self._stop_throttling()
        if self._source_ended is not None and not self._source_ended.done():
            self._source_ended.set_result(None)

    def begun(self, nbytes: int) -> None:
        """A step has come."""
        self.in_flight += 1
        self._bytes_in_flight += nbytes

    def done(self, nbytes: int) -> None:
        """A step is computed, or need not be."""
        self.in_flight -= 1
        self.shrunk(nbytes)

    def shrunk(self, nbytes: int) -> None:
        """So many bytes in flight need not be computed."""
        self._bytes_in_flight -= nbytes
        self._room.set()

    def throttle(self) -> None:
        """Let the sender wait if it has to. To be called for each message."""
        if self._throttled is None and (self._full or self._output.congested) and self.source is not None:
            self.source.pause()
            self._throttled = self._loop.create_task(self._resume_when_free(self.source))

    async def _resume_when_free(self, source: Channel) -> None:
        try:
            while self._full:
                self._room.clear()
                await self._room.wait()
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._output.drain()
        except (NetworkError, TimeoutError) as error:
            self._fail(error)
            return
        self._throttled = None  # before what has come meanwhile may make it necessary again
        source.resume()

    def _stop_throttling(self) -> None:
        if self._throttled is not None:
            self._throttled.cancel()
            self._throttled = None

    @property
    def _full(self) -> bool:
        limits = self._limits
        return (
            self.in_flight >= limits.max_steps_in_flight
            or self._bytes_in_flight >= limits.max_bytes_in_flight
        )
