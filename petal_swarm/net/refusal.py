"""Ending a stream before its protocol has begun, so that the dialler reads why."""

from __future__ import annotations

import asyncio
import contextlib

from petal_swarm.errors import NetworkError, RemoteError
from petal_swarm.net.transport import Stream
from petal_swarm.wire.messages import encode
from petal_swarm.wire.messages.error import Error

#: How long the dialler may take to end its side. Ended here at once, with bytes of it unread, the stream
#: would be reset, and a reset may overtake the reason.
LINGER_S = 2.0


async def refuse(stream: Stream, kind: type[RemoteError], message: str) -> None:
    """Answer with an error of this kind, and drop what comes until the dialler ends; the caller closes."""
    stream.write(*encode(Error(kind.code, message)))
    with contextlib.suppress(TimeoutError, NetworkError):
        async with asyncio.timeout(LINGER_S):
            while await stream.read():
                pass
