"""Where what a hop computes comes from: the client, or a hop that may be lost and replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from petal_swarm.errors import NetworkError
from petal_swarm.net.channel import Channel
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.quotas import Usage
from petal_swarm.server.slow_peers import SlowWriter
from petal_swarm.wire.messages import Message


class Output(Protocol):
    """Where results go: a `Channel`, or several."""

    @property
    def congested(self) -> bool: ...

    async def drain(self) -> None: ...


class Upstream:
    """Who may send steps (or rows, or gradients, of training), and who does. Lets the sender wait while too
    much is being computed, or while results do not get away through `output`; `on_stuck` is told if they
    never do. Lives in the event loop.
    """

    def __init__(
        self,
        peer_id: str | None,
        epoch: int,
        limits: SessionLimits,
        usage: Usage,
        *,
        output: Output,
        on_stuck: Callable[[NetworkError | TimeoutError], None],
    ) -> None:
        #: Who may push steps into this session now, and as which epoch; None is the client.
        self.peer_id = peer_id
        self.epoch = epoch
        #: Whom steps come from now.
        self.source: Channel | None = None
        #: Steps that came and are not done yet.
        self.in_flight = 0
        self._limits = limits
        self._usage = usage
        self._output = output
        self._on_stuck = on_stuck
        self._slow_source = SlowWriter(limits)
        self._wanted_bytes = 0  # of a step of which a part has come, and which has to wait
        self._loop = asyncio.get_running_loop()
        self._source_ended: asyncio.Future[None] | None = None
        self._throttled: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._closed = False

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

        source.subscribe(hear, on_end, self.part_came)
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
        """Take nothing more from the present source; of a step that it had begun, nothing will come."""
        if self._usage.reserved_bytes:
            self._usage.reserve(0)
        self._wanted_bytes = 0
        if self.source is not None:
            self.source.abort()
            self.source = None
        self._stop_throttling()
        if self._source_ended is not None and not self._source_ended.done():
            self._source_ended.set_result(None)

    def close(self) -> None:
        """The session has ended. Idempotent."""
        self._closed = True
        self._stop_throttling()
        if self._source_ended is not None and not self._source_ended.done():
            self._source_ended.set_result(None)

    def begun(self, rows: int, nbytes: int) -> None:
        """A step has come."""
        self.in_flight += 1
        self._usage.take(rows, nbytes)

    def part_came(self, nbytes: int) -> None:
        """Of a step whose payload has so many bytes."""
        if nbytes != self._usage.reserved_bytes:
            self._wanted_bytes = nbytes
            self.throttle()

    def done(self, rows: int, nbytes: int, *, sent_bytes: int = 0) -> None:
        """A step is computed, with so many bytes of result, or need not be."""
        self.in_flight -= 1
        self._usage.give_back(rows, nbytes, sent_bytes=sent_bytes)
        self._room.set()

    def shrunk(self, rows: int, nbytes: int) -> None:
        """So many rows in flight need not be computed."""
        self._usage.give_back(rows, nbytes)
        self._room.set()

    def throttle(self) -> None:
        """Let the sender wait if it has to. To be called for each message, and each late result."""
        if self._throttled is not None:
            return
        if self._full or self._output.congested:
            if self.source is not None:
                self.source.pause()
            self._throttled = self._loop.create_task(self._resume_when_free(self.source))
        elif self._wanted_bytes:
            self._reserve()

    @property
    def is_throttled(self) -> bool:
        """Whether the sender has to wait now."""
        return self._throttled is not None

    def is_too_slow(self, now: float) -> bool:
        """Whether the source has begun a step, and does not send its rest."""
        source = self.source
        if source is None:
            return False
        return self._slow_source.is_too_slow(now, source.incoming, excused=self._throttled is not None)

    async def _resume_when_free(self, source: Channel | None) -> None:
        while self._full:
            await self._wait_for_room()
        self._reserve()
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await self._output.drain()
        except (NetworkError, TimeoutError) as error:
            self._on_stuck(error)
            if self._closed:
                return
        self._throttled = None  # before what has come meanwhile may make it necessary again
        if source is not None and source is self.source:
            source.resume()

    async def _wait_for_room(self) -> None:
        """Until a step is done here, the peer has less under way elsewhere, or may move bytes again."""
        self._room.clear()
        self._usage.wake_when_free(self._room.set)
        debt_s = self._usage.debt_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(debt_s or None):
                await self._room.wait()

    def _reserve(self) -> None:
        """The rest of a step of which a part has come may come."""
        if self._wanted_bytes:
            self._usage.reserve(self._wanted_bytes)
            self._wanted_bytes = 0

    def _stop_throttling(self) -> None:
        if self._throttled is not None:
            self._throttled.cancel()
            self._throttled = None

    @property
    def _full(self) -> bool:
        limits = self._limits
        return (
            self.in_flight >= limits.max_steps_in_flight
            or self._usage.nbytes >= limits.max_bytes_in_flight
            or self._usage.must_wait
        )
