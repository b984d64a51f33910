"""How a node of the DHT gets in, and back in after an outage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from petal_swarm.directory import clocks
from petal_swarm.errors import ConfigError, NetworkError, PeerUnreachableError
from petal_swarm.net.transport import Transport
from petal_swarm.wire.announcement import Announcement

if TYPE_CHECKING:
    from petal_swarm.directory.kademlia import KademliaNode

logger = logging.getLogger(__name__)

#: How long those peers that answer wait for the others.
STRAGGLER_S = 1.0
REJOIN_TIMEOUT_S = 3.0
#: Attempts are at least this far apart, however often somebody looks up.
REJOIN_INTERVAL_S = 2.0
MAX_REMEMBERED_PEERS = 32


class Membership:
    """The initial peers, servers seen since, and the joining by them.

    hivemind takes a node that fails to answer off the routing table. An outage of this machine empties
    the table, and then nobody is left to ask: so where they were is remembered here.
    """

    def __init__(self, transport: Transport, node: KademliaNode, initial_peers: Sequence[str]) -> None:
        self._transport = transport
        self._node = node
        self._initial_peers = tuple(initial_peers)
        self._remembered: dict[str, str] = {}
        self._rejoining: asyncio.Task[None] | None = None
        self._rejoined_at_s = float("-inf")
        self._warned = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """Whom to ask, initial peers first."""
        return tuple(dict.fromkeys((*self._initial_peers, *self._remembered.values())))

    def remember(self, announcements: Iterable[Announcement]) -> None:
        """Note servers to join by when the initial peers are gone."""
        for announcement in announcements:
            if announcement.addresses and announcement.peer_id != self._transport.peer_id:
                self._remembered.pop(announcement.peer_id, None)
                self._remembered[announcement.peer_id] = announcement.addresses[0]
        while len(self._remembered) > MAX_REMEMBERED_PEERS:
            del self._remembered[next(iter(self._remembered))]

    async def join(self, *, timeout_s: float) -> None:
        """Join by all that answer, waiting `STRAGGLER_S` for the others once one has.

        Raises:
            PeerUnreachableError: none does within `timeout_s`.
        """
        pending = {asyncio.create_task(self._contact(address, timeout_s)) for address in self.addresses}
        failures: list[str] = []
        joined = False
        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=STRAGGLER_S if joined else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                reasons = [task.result() for task in done]
                failures += [reason for reason in reasons if reason]
                joined = joined or None in reasons
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
        if not joined:
            raise PeerUnreachableError(f"cannot join the swarm: {'; '.join(failures)}{self._advice()}")
        for reason in failures:
            logger.warning("joined the DHT without one of the peers: %s", reason)
        if complaint := self.clock_complaint():
            logger.warning("%s", complaint)
        await self._node.meet_neighbours()

    def _advice(self) -> str:
        """What to look after, unless somebody was there and said no."""
        if any(self._node.refusal(address.rpartition("/p2p/")[2]) for address in self.addresses):
            return ""
        return "; is a server running there, and is this the address that it printed after `ready`?"

    def clock_complaint(self) -> str | None:
        """What to say about this machine's clock, after what the peers joined by said of theirs."""
        return clocks.about_offsets(self._node.clock_offsets_s)

    def start_rejoining(self) -> asyncio.Task[None] | None:
        """Join again by those known, one attempt at a time; None where there is nothing to wait for."""
        if not self.addresses:
            return None
        time_s = asyncio.get_running_loop().time()
        if self._rejoining is None or self._rejoining.done():
            if time_s - self._rejoined_at_s < REJOIN_INTERVAL_S:
                return None
            self._rejoined_at_s = time_s
            self._rejoining = asyncio.create_task(self._rejoin())
        return self._rejoining

    async def close(self) -> None:
        if self._rejoining is not None:
            self._rejoining.cancel()
            await asyncio.wait({self._rejoining})

    async def _rejoin(self) -> None:
        try:
            await self.join(timeout_s=REJOIN_TIMEOUT_S)
            self._warned = False
        except NetworkError as error:
            # A first server that nobody has joined since may be alone for days.
            logger.log(logging.DEBUG if self._warned else logging.WARNING, "alone in the DHT: %s", error)
            self._warned = True

    async def _contact(self, address: str, timeout_s: float) -> str | None:
        """Connect to a peer and meet its node; if that fails, why."""
        try:
            async with asyncio.timeout(timeout_s):
                peer_id = await self._transport.connect(address, timeout_s=timeout_s)
                if await self._node.ping(peer_id):
                    return None
        except TimeoutError:
            return f"no answer from {address} within {timeout_s:g} s"
        except (NetworkError, ConfigError) as error:
            return f"{error}" if address in str(error) else f"{address}: {error}"
        return self._node.refusal(peer_id) or (
            f"{address} accepts connections, but does not answer as a node of the DHT"
        )
