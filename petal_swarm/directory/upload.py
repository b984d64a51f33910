"""How fast bytes get from one peer to another: a train of parts, timed where it arrives.

The sender's clock would only tell how fast its own buffers fill, so the receiver times what lies between the
ends of the first part and of the last, and answers that. Trains grow until one takes long enough to say
something; through a fast line that is 5.3 MB in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from petal_swarm.errors import BusyError, DeadlineError, LocalProtocolError, RemoteProtocolError
from petal_swarm.net.addresses import ip_address
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import (
    MAX_UPLOAD_PARTS,
    UPLOAD_PART_BYTES,
    Ping,
    Pong,
    Upload,
    Uploaded,
    UploadPart,
)
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.protocols import DIRECTORY

#: Parts after the first one: 128 KiB, 1 MiB, 4 MiB.
TRAINS = (4, 32, MAX_UPLOAD_PARTS - 1)
#: A train that took so long, and so many round trips, is the last: TCP has found its pace by then, which it
#: doubles once a round trip. Or one that took the longest of these: the next would take eight times that.
LONG_ENOUGH_S, LONG_ENOUGH_RTTS, LONGEST_S = 0.25, 6, 2.0
#: What is not through by then, slower than 35 kbit/s, is no line for this.
TIMEOUT_S = 30.0
#: At once at one listener: more would measure each other.
MAX_UPLOADS = 2
#: Nothing real is faster; times near 0 mean that all of it came in one read.
MAX_BYTES_PER_S = 12.5e9


class UploadService:
    """The listener's side, for all its peers. What arrives is forgotten at once."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S, now: Callable[[], float] = time.perf_counter) -> None:
        self._timeout_s = timeout_s
        self._now = now
        self._measured: set[str] = set()

    async def answer(self, request: Upload, channel: Channel) -> Uploaded | Error:
        """Read the parts, and say how long they took.

        One of an IP address at a time: peer ids cost nothing, and a place can be held by sending nothing.

        Raises:
            RemoteProtocolError: something else came.
            StreamClosedError: the stream ended before.
            TimeoutError: they did not come in time.
        """
        whose = ip_address(channel.remote_address) or channel.peer_id
        if len(self._measured) >= MAX_UPLOADS or whose in self._measured:
            return Error(BusyError.code, "others are being measured; try again later or elsewhere")
        self._measured.add(whose)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read_part(channel)
                started_s = self._now()
                for _ in range(request.parts - 1):
                    await self._read_part(channel)
                return Uploaded(self._now() - started_s)
        finally:
            self._measured.discard(whose)

    async def _read_part(self, channel: Channel) -> None:
        message = await channel.receive()
        if not isinstance(message, UploadPart):
            sent = "nothing" if message is None else repr(message.type)
            raise RemoteProtocolError(f"peer {channel.peer_id} sent {sent} instead of an upload's part")


async def measure_upload(
    transport: Transport, peer_id: str, addresses: Sequence[str], *, timeout_s: float = TIMEOUT_S
) -> float:
    """Bytes a second from here to the peer.

    Raises:
        NetworkError: it does not answer within `timeout_s`, or does not speak the protocol.
        RemoteError, RemoteProtocolError: it answers something else; busy, or of an older version.
    """
    stream = await transport.open_stream(peer_id, DIRECTORY, addresses=addresses, timeout_s=timeout_s)
    channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
    try:
        async with asyncio.timeout(timeout_s):
            enough_s = min(max(LONG_ENOUGH_S, LONG_ENOUGH_RTTS * await _rtt_s(channel, timeout_s)), LONGEST_S)
            for parts in TRAINS:
                took_s = await _send_train(channel, parts + 1, timeout_s)
                if took_s >= enough_s:
                    break
    except TimeoutError:
        raise DeadlineError(
            f"an upload to peer {peer_id} did not get through within {timeout_s:g} s"
        ) from None
    finally:
        channel.abort()
    sent_bytes = parts * UPLOAD_PART_BYTES
    return sent_bytes / max(took_s, sent_bytes / MAX_BYTES_PER_S)


def shown(bytes_per_s: float) -> str:
    """For people: `38 Mbit/s`."""
    mbit = bytes_per_s / 125e3
    if mbit >= 999.5:
        return f"{mbit / 1e3:,.1f}".removesuffix(".0") + " Gbit/s"
    return f"{mbit:.3g} Mbit/s" if mbit >= 0.001 else "0 Mbit/s"


async def _rtt_s(channel: Channel, timeout_s: float) -> float:
    now = asyncio.get_running_loop().time
    sent_s = now()
    channel.send(Ping())
    await channel.expect(Pong, timeout_s=timeout_s)
    return now() - sent_s


async def _send_train(channel: Channel, parts: int, timeout_s: float) -> float:
    """Seconds that the peer says it took, which are no more than have passed here."""
    now = asyncio.get_running_loop().time
    sent_s = now()
    with contextlib.suppress(LocalProtocolError):  # it has just ended the stream: what it said then is why
        channel.send(Upload(parts))
        for _ in range(parts):
            channel.send(UploadPart())
            if channel.congested:
                await channel.drain()
    answer = await channel.expect(Uploaded, timeout_s=timeout_s)
    return min(answer.took_s, now() - sent_s)
