"""Announcements, a clock that the test moves, and a stream pair: what these tests share."""

from __future__ import annotations

import asyncio
from typing import Any

from petal_swarm.errors import StreamClosedError
from petal_swarm.net.identity import Identity
from petal_swarm.net.transport import Buffer
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

MODEL = "test/tiny"
START_S = 1_000_000.0


class Clock:
    """Seconds, moved by hand."""

    def __init__(self, time_s: float = START_S) -> None:
        self.time_s = time_s

    def __call__(self) -> float:
        return self.time_s

    def advance(self, seconds: float) -> None:
        self.time_s += seconds


def announcement(identity: Identity, **fields: Any) -> Announcement:
    """A small announcement of this peer."""
    values: dict[str, Any] = {
        "model": MODEL,
        "span": Span(0, 4),
        "addresses": (f"/ip4/127.0.0.1/tcp/4000/p2p/{identity.peer_id}",),
    }
    return Announcement(peer_id=identity.peer_id, **{**values, **fields})


class PairedStream:
    """One end of two byte queues."""

    def __init__(self, peer_id: str, inbox: asyncio.Queue[bytes], outbox: asyncio.Queue[bytes]) -> None:
        self.peer_id = peer_id
        self._inbox = inbox
        self._outbox = outbox
        self.closed = False

    async def read(self) -> bytes:
        if self.closed:
            raise StreamClosedError("closed")
        return await self._inbox.get()

    def write(self, *buffers: Buffer) -> None:
        if not self.closed:
            self._outbox.put_nowait(b"".join(bytes(buffer) for buffer in buffers))

    async def drain(self) -> None:
        if self.closed:
            raise StreamClosedError("closed")

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self._outbox.put_nowait(b"")


def stream_pair(dialer: str = "dialer", listener: str = "listener") -> tuple[PairedStream, PairedStream]:
    """The dialer's end, and the listener's."""
    forth: asyncio.Queue[bytes] = asyncio.Queue()
    back: asyncio.Queue[bytes] = asyncio.Queue()
    return PairedStream(listener, back, forth), PairedStream(dialer, forth, back)
