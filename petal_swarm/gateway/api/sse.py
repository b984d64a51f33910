"""Server-sent events: an open stream with heartbeats, and news of which only the latest matters."""

from __future__ import annotations

import asyncio
from types import TracebackType

from petal_swarm.gateway.api.connection import Connection

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


class EventStream:
    """Events over a connection, from `open` on. An async context manager, which ends the heartbeats.

    While nothing is written, a comment is, every `heartbeat_s`.
    """

    def __init__(self, connection: Connection, heartbeat_s: float) -> None:
        self._connection = connection
        self._heartbeat_s = heartbeat_s
        self._news: bytes | None = None
        self._told = asyncio.Event()
        self._written_s = 0.0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._connection.started

    async def open(self, headers: dict[str, str]) -> None:
        """Send the status line and the headers."""
        await self._connection.start(200, HEADERS | headers)
        self._written_s = asyncio.get_running_loop().time()
        self._keeper = asyncio.create_task(self._keep())

    async def write(self, events: bytes) -> None:
        """Send these events."""
        self._written_s = asyncio.get_running_loop().time()
        await self._connection.write(events)

    def offer(self, event: bytes) -> None:
        """Send this event soon; it takes the place of an earlier one that was not sent yet."""
        self._news = event
        self._told.set()

    def withdraw(self) -> None:
        """Forget an event that was offered and not sent."""
        self._news = None

    async def close(self, events: bytes = b"") -> None:
        """Send these last events and end the stream."""
        await self._stop()
        await self._connection.write(events, more=False)

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self._written_s + self._heartbeat_s):
                    await self._told.wait()
            except TimeoutError:
                if loop.time() >= self._written_s + self._heartbeat_s:
                    await self.write(PING)
                continue
            self._told.clear()
            news, self._news = self._news, None
            if news is not None:
                await self.write(news)
