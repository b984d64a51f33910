"""A server's eye on its reachability: it asks others, goes to relays when it has to, and tells changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from petal_swarm.directory.reachability import Reachability, Sighting, advice, judge, sentence, survey
from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.addresses import is_circuit
from petal_swarm.net.relay import Candidate, RelayKeeper
from petal_swarm.net.transport import Transport

logger = logging.getLogger(__name__)

#: A router may take its time to open a port, and the first peers to be there.
SOON_S = 10.0
SOON = 3
#: Within `settle`.
ATTEMPTS, PAUSE_S = 3, 3.0
#: A place at a relay is renewed as often; who cannot be reached looks again as often.
RENEW_S = 60.0
#: Between surveys of a server that is reached directly.
AGAIN_S = 600.0


class RelayedTransport(Transport, Protocol):
    """A transport that can be reached through relays."""

    relayed: tuple[str, ...]

    async def refresh_addresses(self) -> None: ...


class ReachabilityWatch:
    """`helpers` finds peers to ask and to be relayed by, the best first. They are asked by `peer`: in a
    private swarm the `transport` with its key.

    `private`: relays are needed, whatever others say. `on_change` is told the first verdict, and others.
    """

    def __init__(
        self,
        transport: RelayedTransport,
        helpers: Callable[[], Awaitable[Sequence[Candidate]]],
        *,
        peer: Transport | None = None,
        private: bool = False,
        on_change: Callable[[Reachability], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._transport = transport
        self._peer = peer or transport
        self._helpers = helpers
        self._private = private
        self._on_change = on_change or log_change
        self._sleep = sleep
        self._keeper = RelayKeeper(transport)
        self.verdict: Reachability | None = None
        #: What others said the last time.
        self.sightings: Sequence[Sighting] = ()

    @property
    def refusals(self) -> str:
        """Why peers would not relay, the last time it mattered."""
        return "; ".join(self._keeper.refusals)

    async def check(self) -> Reachability:
        """Find out now, and take or give up places at relays accordingly.

        Never raises for the network's sake.
        """
        try:
            await self._transport.refresh_addresses()
            helpers = await self._helpers()
        except PetalSwarmError as error:
            logger.info("could not look for peers to ask about reachability: %s", error)
            helpers = []
        sightings = self.sightings = await survey(self._peer, helpers)
        own = [address for address in self._transport.addresses() if not is_circuit(address)]
        alone = judge(sightings, own, private=self._private)
        if alone.kind == "direct":
            self._keeper.release()
        elif alone.kind == "none" or self._keeper.relays:
            await self._keeper.keep(helpers)
        self._transport.relayed = self._keeper.addresses
        verdict = judge(sightings, self._transport.addresses(), private=self._private)
        before, self.verdict = self.verdict, verdict
        if before is None or _essence(before) != _essence(verdict):
            self._on_change(verdict)
        return verdict

    async def settle(self) -> Reachability:
        """The verdict after a few checks if need be: a router may be opening a port, a relay be busy."""
        verdict = await self.check()
        for _ in range(ATTEMPTS - 1):
            if verdict.kind in ("direct", "unknown") or (verdict.reachable and self._private):
                break
            await self._sleep(PAUSE_S)
            verdict = await self.check()
        return verdict

    async def run(self) -> None:
        """Check from time to time, for ever."""
        checks = 0
        while True:
            verdict = await self.check()
            checks += 1
            settled = verdict.kind == "direct" and verdict.scope == "internet"
            await self._sleep(AGAIN_S if settled else SOON_S if checks <= SOON else RENEW_S)


def _essence(verdict: Reachability) -> tuple[str, frozenset[str]]:
    return verdict.kind, frozenset(verdict.addresses)


def log_change(verdict: Reachability) -> None:
    """Say it in the log: a warning where something could be better."""
    next_step = advice(verdict)
    level = logging.WARNING if verdict.kind in ("relay", "none") else logging.INFO
    logger.log(level, "%s%s", sentence(verdict), f"; {next_step}" if next_step else "")
