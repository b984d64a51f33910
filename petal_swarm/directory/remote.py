"""For peers that are not in the DHT: asking servers for their view, and measuring the way to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from petal_swarm.directory.book import Bookshelf
from petal_swarm.errors import (
    ConfigError,
    PeerUnreachableError,
    PetalSwarmError,
    PrivateSwarmError,
    StrangerError,
)
from petal_swarm.net.addresses import split_address
from petal_swarm.net.channel import Channel
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.net.transport import Transport
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import Listing, ListRequest, Ping, Pong
from petal_swarm.wire.protocols import DIRECTORY

logger = logging.getLogger(__name__)
V = TypeVar("V")

#: One answer is enough for a view of the swarm; the second covers a server that is late or lies.
ANSWERS = 2
PARALLEL = 3
ASK_TIMEOUT_S = 4.0
#: How long the first answer waits for the second.
GRACE_S = 0.5
MAX_CONTACTS = 128
PING_TIMEOUT_S = 2.0
#: Who did not answer a ping is not waited for again so soon.
SILENT_S = 5.0


@dataclass(slots=True)
class _Contact:
    peer_id: str
    addresses: tuple[str, ...]
    initial: bool
    failures: int = 0
    refusal: PetalSwarmError | None = None


class RemoteDirectory:
    """A directory that asks the initial peers, and servers learnt of, by the `directory` protocol.

    Nothing that they say is believed unsigned. What one of them leaves out, another may know.
    """

    def __init__(
        self,
        transport: Transport,
        initial_peers: Sequence[str],
        *,
        now: Callable[[], float] = time.time,
        key: SwarmKey | None = None,
    ) -> None:
        """`initial_peers` are multiaddrs, each ending in `/p2p/PEER_ID`; `key` is that of a private swarm.

        Raises:
            ConfigError: there are none, or one is not such an address.
        """
        if not initial_peers:
            raise ConfigError("name at least one initial peer")
        self._transport = transport
        self._initial_peers = tuple(initial_peers)
        self._contacts: dict[str, _Contact] = {}
        for address in initial_peers:
            peer_id = split_address(address)[1]
            known = self._contacts.get(peer_id)
            addresses = (*known.addresses, address) if known else (address,)
            self._contacts[peer_id] = _Contact(peer_id, addresses, initial=True)
        self._shelf = Bookshelf(now=now, key=key)

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        raise ConfigError("only a member of the DHT can announce; use the p2pd transport")

    async def lookup(self, model: str) -> list[Announcement]:
        await self._ask_around(model)
        announcements = self._shelf.book(model).announcements()
        self._remember(announcements)
        return announcements

    async def records(self, model: str) -> list[bytes]:
        await self._ask_around(model)
        return self._shelf.book(model).records()

    async def close(self) -> None:
        pass

    async def _ask_around(self, model: str) -> None:
        """Ask `PARALLEL` contacts at a time, those that failed least first, until `ANSWERS` have answered."""
        queue = sorted(self._contacts.values(), key=lambda contact: (contact.failures, not contact.initial))
        queue.reverse()
        pending: set[asyncio.Task[bool]] = set()
        answers = 0
        try:
            while answers < ANSWERS and (queue or pending):
                while queue and len(pending) < PARALLEL:
                    pending.add(asyncio.create_task(self._ask(queue.pop(), model)))
                done, pending = await asyncio.wait(
                    pending, timeout=GRACE_S if answers else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                answers += sum(task.result() for task in done)
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
        if not answers:
            for contact in self._contacts.values():
                if contact.refusal is not None:
                    raise contact.refusal
            raise PeerUnreachableError(
                f"none of {len(self._contacts)} known peers answers; "
                f"is one of these still up? {', '.join(self._initial_peers)}"
            )

    async def _ask(self, contact: _Contact, model: str) -> bool:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                listing = await self._request_listing(contact, model)
        except (PetalSwarmError, TimeoutError) as error:
            contact.failures += 1
            contact.refusal = error if isinstance(error, (PrivateSwarmError, StrangerError)) else None
            logger.info("directory: peer %s did not answer: %s", contact.peer_id, error or "timeout")
            return False
        contact.failures = 0
        contact.refusal = None
        await self._shelf.book(model).merge(listing.records, source=contact.peer_id)
        return True

    async def _request_listing(self, contact: _Contact, model: str) -> Listing:
        stream = await self._transport.open_stream(
            contact.peer_id, DIRECTORY, addresses=contact.addresses, timeout_s=ASK_TIMEOUT_S
        )
        channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
        try:
            channel.send(ListRequest(model))
            return await channel.expect(Listing, timeout_s=ASK_TIMEOUT_S)
        finally:
            channel.abort()

    def _remember(self, announcements: Iterable[Announcement]) -> None:
        """Ask these, too, from now on; initial peers are kept, others make room for newer ones."""
        for announcement in announcements:
            known = self._contacts.pop(announcement.peer_id, None)
            if known is None:
                contact = _Contact(announcement.peer_id, announcement.addresses, initial=False)
            else:
                addresses = (*(known.addresses if known.initial else ()), *announcement.addresses)
                contact = _Contact(
                    known.peer_id, tuple(dict.fromkeys(addresses)), known.initial, known.failures
                )
            self._contacts[contact.peer_id] = contact
        learnt = [contact.peer_id for contact in self._contacts.values() if not contact.initial]
        for peer_id in learnt[: max(0, len(learnt) - MAX_CONTACTS)]:
            del self._contacts[peer_id]


async def measure_rtt(
    transport: Transport, peer_id: str, addresses: Sequence[str], *, timeout_s: float
) -> float:
    """Seconds of a round trip to the peer: the smaller of two pings on one stream.

    Raises:
        NetworkError: the peer does not answer within `timeout_s`, or does not speak the protocol.
        RemoteError, RemoteProtocolError: it answers something else.
    """
    stream = await transport.open_stream(peer_id, DIRECTORY, addresses=addresses, timeout_s=timeout_s)
    channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
    try:
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            channel.send(Ping())
            await channel.expect(Pong, timeout_s=timeout_s)
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        channel.abort()


class Pinger:
    """Round trips to many peers, measured in parallel and remembered for a while.

    `max_age_s` is how long a measurement is used again; at most `limit` are kept, the newest.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        max_age_s: float = 30.0,
        limit: int = 1024,
        parallel: int = 16,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._max_age_s = max_age_s
        self._limit = limit
        self._now = now
        self._results: dict[str, tuple[float, float]] = {}
        self._silent: dict[str, float] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(parallel)

    async def measure(
        self,
        announcements: Iterable[Announcement],
        *,
        timeout_s: float = PING_TIMEOUT_S,
        max_age_s: float | None = None,
    ) -> dict[str, float]:
        """Seconds of a round trip by peer id, for those that answer within `timeout_s` in all.

        This peer itself is left out. Those who measure the same peers at the same time share the pings; what
        comes too late for one counts for the next. A `max_age_s` of 0 asks all of them, whatever is
        remembered. Never raises for the network's sake.
        """
        now = self._now()
        oldest = now - (self._max_age_s if max_age_s is None else max_age_s)
        wanted = {
            announcement.peer_id: announcement.addresses
            for announcement in announcements
            if announcement.peer_id != self._transport.peer_id
        }
        fresh = self._measured_since(oldest, wanted)
        spared_since = now - (SILENT_S if max_age_s is None else max_age_s)
        probes = [
            self._probes.get(peer_id) or self._probe(peer_id, addresses, timeout_s)
            for peer_id, addresses in wanted.items()
            if peer_id not in fresh and self._silent.get(peer_id, spared_since) <= spared_since
        ]
        if probes:
            await asyncio.wait(probes, timeout=timeout_s)
        return self._measured_since(oldest, wanted)

    def known(self, peer_ids: Iterable[str]) -> dict[str, float]:
        """What was measured for these peers and is not too old, in seconds."""
        return self._measured_since(self._now() - self._max_age_s, peer_ids)

    def _measured_since(self, oldest: float, peer_ids: Iterable[str]) -> dict[str, float]:
        found = {peer_id: self._results.get(peer_id) for peer_id in peer_ids}
        return {peer_id: entry[0] for peer_id, entry in found.items() if entry and entry[1] >= oldest}

    def _probe(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> asyncio.Task[None]:
        probe = asyncio.create_task(self._ping(peer_id, addresses, timeout_s))
        self._probes[peer_id] = probe
        probe.add_done_callback(lambda _: self._probes.pop(peer_id, None))
        return probe

    async def _ping(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        async with self._slots:
            try:
                async with asyncio.timeout(timeout_s):
                    rtt_s = await measure_rtt(self._transport, peer_id, addresses, timeout_s=timeout_s)
            except (PetalSwarmError, TimeoutError):
                _put_last(self._silent, peer_id, self._now(), self._limit)
            else:
                self._silent.pop(peer_id, None)
                _put_last(self._results, peer_id, (rtt_s, self._now()), self._limit)


def _put_last(table: dict[str, V], key: str, value: V, limit: int) -> None:
    """The newest `limit` entries are kept."""
    table.pop(key, None)
    table[key] = value
    if len(table) > limit:
        del table[next(iter(table))]
