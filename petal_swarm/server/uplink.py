"""How fast this server's line sends: measured against others, for clients to find routes by."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from petal_swarm.directory.upload import measure_upload, shown
from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.transport import Transport
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

#: How many are asked: the middle one of three counts, so that one that is slow itself, or lies, does not.
ASKED = 3
#: Asked at most, until so many have answered.
TRIED = 8
AGAIN_S = 3600.0
#: Nobody was there to ask, or nobody answered.
SOON_S = 15.0


class Uplink:
    """`others` finds the servers that could be asked; `bytes_per_s` is 0 until one has answered."""

    def __init__(
        self,
        transport: Transport,
        others: Callable[[], Awaitable[Sequence[Announcement]]],
        *,
        rng: Random,
        measure: Callable[..., Awaitable[float]] = measure_upload,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._transport = transport
        self._others = others
        self._rng = rng
        self._measure = measure
        self._sleep = sleep
        self.bytes_per_s = 0.0

    async def run(self) -> None:
        """Measure from time to time, for ever."""
        while True:
            await self._sleep(AGAIN_S if await self.survey() else SOON_S)

    async def survey(self) -> bool:
        """Ask a few others, one after the other; whether any of them answered.

        Never raises for the network's sake.
        """
        try:
            others = [other for other in await self._others() if other.state == "serving"]
        except PetalSwarmError as error:
            logger.info("could not look for peers to measure the line against: %s", error)
            return False
        self._rng.shuffle(others)
        rates: list[float] = []
        for other in others[:TRIED]:
            try:
                rates.append(await self._measure(self._transport, other.peer_id, other.addresses))
            except PetalSwarmError as error:
                logger.debug("the line to %s was not measured: %s", other.peer_id, error)
            if len(rates) == ASKED:
                break
        if not rates:
            return False
        self.bytes_per_s = statistics.median_high(rates)
        logger.info("the line sends %s (measured against %d)", shown(self.bytes_per_s), len(rates))
        return True
