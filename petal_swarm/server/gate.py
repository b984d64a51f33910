"""Who may have how many streams open: of each peer, over all protocols."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from petal_swarm.errors import BusyError, PetalSwarmError
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, StreamHandler
from petal_swarm.server.config import SessionLimits
from petal_swarm.wire.connection import Role, Table
from petal_swarm.wire.messages.error import Error

logger = logging.getLogger(__name__)


class Shares:
    """Places, of which one holder alone may have `limit_of_one`, and all together `limit`.

    Once half of them are taken, who has an equal part of that half gets no more: there is always something
    left for a newcomer, whoever came first.
    """

    def __init__(self, limit: int, limit_of_one: int) -> None:
        self._limit = limit
        self._limit_of_one = limit_of_one
        self._held: dict[str, int] = {}
        self.total = 0

    def take(self, holder: str) -> bool:
        """One more place for the holder, to be given back; False if there is none for it."""
        mine, half = self._held.get(holder, 0), self._limit // 2
        if mine >= self._limit_of_one or self.total >= self._limit:
            return False
        if self.total >= half and mine * max(1, len(self._held)) >= half:
            return False
        self._held[holder] = mine + 1
        self.total += 1
        return True

    def give_back(self, holder: str) -> None:
        """The holder has one place less."""
        self.total -= 1
        self._held[holder] -= 1
        if not self._held[holder]:
            del self._held[holder]


class StreamGate:
    """All streams of one server, and those among them that have not shown yet what they are for."""

    def __init__(self, limits: SessionLimits) -> None:
        self._open_timeout_s = limits.open_timeout_s
        self._streams = Shares(limits.max_streams, limits.max_streams_of_peer)
        self._opening = Shares(limits.max_opening, limits.max_opening_of_peer)

    @property
    def num_streams(self) -> int:
        return self._streams.total

    @property
    def num_opening(self) -> int:
        return self._opening.total

    def guarded(self, table: Table, handler: StreamHandler) -> StreamHandler:
        """`handler`, less the streams that are too many: those are answered `busy` and ended."""

        async def handle(stream: Stream) -> None:
            if not self._streams.take(stream.peer_id):
                logger.info("too many streams of %s", stream.peer_id)
                with contextlib.suppress(PetalSwarmError):
                    refusal = Error(BusyError.code, "too many streams are open here; end some first")
                    Channel(stream, table, Role.LISTENER).send(refusal)
                return
            try:
                await handler(stream)
            finally:
                self._streams.give_back(stream.peer_id)

        return handle

    @contextlib.contextmanager
    def being_opened(self, peer_id: str) -> Iterator[None]:
        """A stream that costs something and has not shown yet what for.

        Raises:
            BusyError: there are too many, or too many of this peer.
        """
        if not self._opening.take(peer_id):
            raise BusyError(
                "too many streams are being opened here; try again later",
                retry_after_s=self._open_timeout_s,
            )
        try:
            yield
        finally:
            self._opening.give_back(peer_id)
