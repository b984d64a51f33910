"""The answering side of the `directory` protocol: pings, listings, dialling back, timing uploads."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from petal_swarm.directory.dial_back import DialBackService
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.upload import UploadService
from petal_swarm.errors import (
    BadMessageError,
    BusyError,
    LocalProtocolError,
    PetalSwarmError,
    RemoteError,
    RemoteProtocolError,
    StreamClosedError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.directory import (
    MAX_ANNOUNCEMENTS,
    DialBack,
    Listing,
    ListRequest,
    Ping,
    Pong,
    Upload,
    UploadPart,
)
from petal_swarm.wire.messages.error import Error

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 60.0
LOOKUP_TIMEOUT_S = 10.0
#: Anybody may ask, and each question can cost a walk through the DHT.
MAX_LOOKUPS = 8
#: Of one peer, over all its streams: the lookups of others must not wait behind those of one.
MAX_LOOKUPS_OF_PEER = 3
#: No request has a payload, and the parts of an upload have less; what comes is read and forgotten.
MAX_PAYLOAD_BYTES = 64 << 10


class DirectoryService:
    """Serves `protocols.DIRECTORY`: `await transport.serve(DIRECTORY, service.handle)`.

    A listing holds at most `MAX_ANNOUNCEMENTS` records, 4 MiB in all. Of a larger swarm it holds the
    first by peer id: peer ids are random, so any part of the list covers all blocks alike.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        dial_back: DialBackService | None = None,
        uploads: UploadService | None = None,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self._directory = directory
        self._dial_back = dial_back or DialBackService()
        self._uploads = uploads or UploadService()
        self._idle_timeout_s = idle_timeout_s
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._asking: dict[str, int] = {}

    async def handle(self, stream: Stream) -> None:
        """Answer requests until the peer ends the stream, breaks the protocol or is idle for too long."""
        channel = Channel(stream, DIRECTORY_TABLE, Role.LISTENER)
        channel.incoming.max_payload_bytes = MAX_PAYLOAD_BYTES
        try:
            while (request := await self._next_request(channel)) is not None:
                answer = await self._answer(request, channel)
                channel.send(answer)
                async with asyncio.timeout(self._idle_timeout_s):
                    await channel.drain()
                if isinstance(answer, Error):
                    break
        except (StreamClosedError, TimeoutError) as error:
            logger.debug("directory stream from %s ended: %s", channel.peer_id, error or "idle")
        except RemoteProtocolError as error:
            logger.info("directory stream from %s broke the protocol: %s", channel.peer_id, error)
            # The table may not allow an answer any more; then ending the stream says enough.
            with contextlib.suppress(LocalProtocolError):
                channel.send(Error(BadMessageError.code, str(error)))
        finally:
            await channel.close()

    async def _next_request(self, channel: Channel) -> Message | None:
        async with asyncio.timeout(self._idle_timeout_s):
            return await channel.receive()

    async def _answer(self, request: Message, channel: Channel) -> Message:
        if isinstance(request, Ping):
            return Pong()
        if isinstance(request, DialBack):
            return await self._dial_back.answer(request, channel.peer_id, channel.remote_address)
        if isinstance(request, Upload):
            return await self._uploads.answer(request, channel)
        if isinstance(request, UploadPart):  # it came together with the last one that was announced
            raise RemoteProtocolError("more parts of an upload than it said")
        assert isinstance(request, ListRequest), "the table lets nothing else through"
        peer_id = channel.peer_id
        asking = self._asking.get(peer_id, 0)
        if asking >= MAX_LOOKUPS_OF_PEER:
            return _busy("you are asking too much at once; wait for the answers first")
        self._asking[peer_id] = asking + 1
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S), self._lookups:
                records = await self._directory.records(request.model)
        except TimeoutError:
            return _busy("too many are asking; try again later or elsewhere")
        except PetalSwarmError as error:
            return Error(RemoteError.code, str(error))
        finally:
            self._asking[peer_id] -= 1
            if not self._asking[peer_id]:
                del self._asking[peer_id]
        return Listing(tuple(records[:MAX_ANNOUNCEMENTS]))


def _busy(reason: str) -> Error:
    """By then the lookups that are under way have ended, one way or the other."""
    return Error(BusyError.code, reason, retry_after_s=LOOKUP_TIMEOUT_S)
