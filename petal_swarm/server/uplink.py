"""How fast this server's line sends: measured against others, for clients to find routes by."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Awaitable, Callable, Sequence, Set
from random import Random

from petal_swarm.directory.upload import measure_upload, shown
from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.addresses import ip_address, is_circuit
from petal_swarm.net.transport import Transport
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

#: How many are asked: the middle one of three counts, so that one that is slow itself, or lies, does not.
ASKED = 3
#: Asked at most, until so many have answered.
TRIED = 8
AGAIN_S = 3600.0
#: Fewer than three have answered, so that one of them may have decided.
FEW_AGAIN_S = 600.0
#: Nobody was there to ask, or nobody answered: then twice as long each time, since a swarm of older versions
#: never will, and each question costs the line 160 KB and those who are asked a line in their logs.
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
        self._soon_s = SOON_S
        self.bytes_per_s = 0.0

    async def run(self) -> None:
        """Measure from time to time, for ever."""
        while True:
            await self._sleep(await self.survey())

    async def survey(self) -> float:
        """Ask a few others, one after the other; in how many seconds to do so again.

        Never raises for the network's sake.
        """
        try:
            others = [other for other in await self._others() if other.state == "serving"]
        except PetalSwarmError as error:
            logger.info("could not look for peers to measure the line against: %s", error)
            return SOON_S
        if not others:
            return SOON_S
        rates = await self._rates(others)
        if not rates:
            pause_s, self._soon_s = self._soon_s, min(2 * self._soon_s, AGAIN_S)
            return pause_s
        self._soon_s = SOON_S
        self.bytes_per_s = statistics.median_high(rates)
        logger.info("the line sends %s (measured against %d)", shown(self.bytes_per_s), len(rates))
        return AGAIN_S if len(rates) == ASKED else FEW_AGAIN_S

    async def _rates(self, others: list[Announcement]) -> list[float]:
        """What those say that see the line: others only if none of them answers."""
        self._rng.shuffle(others)
        own = _ips(self._transport.addresses())
        others.sort(key=lambda other: _is_beyond_line(other.addresses, own), reverse=True)
        rates: list[float] = []
        for other in others[:TRIED]:
            if len(rates) == ASKED or (rates and not _is_beyond_line(other.addresses, own)):
                break
            try:
                rates.append(await self._measure(self._transport, other.peer_id, other.addresses))
            except PetalSwarmError as error:
                logger.debug("the line to %s was not measured: %s", other.peer_id, error)
        return rates


def _is_beyond_line(addresses: Sequence[str], own: Set[str]) -> bool:
    """Whether bytes to there go through this server's line alone: not to another server of this machine, and
    not through a relay, whose line would be measured and used for it.
    """
    return not own & _ips(addresses) and not all(map(is_circuit, addresses))


def _ips(addresses: Sequence[str]) -> Set[str]:
    return {ip for ip in map(ip_address, addresses) if ip is not None}
