"""A client's view of the swarm: transport, directory, round trips, and sessions opened along routes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from petal_swarm.client.config import ClientConfig
from petal_swarm.client.ring import OpenFailedError, Ring
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.remote import Pinger, RemoteDirectory
from petal_swarm.errors import (
    MissingBlocksError,
    NetworkError,
    PeerUnreachableError,
)
from petal_swarm.net.identity import Identity
from petal_swarm.net.private import PrivateTransport
from petal_swarm.net.swarm_key import SwarmKey, load_swarm_key
from petal_swarm.net.transport import Transport
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.routing.links import Measurements
from petal_swarm.routing.route import Route, find_route
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

RETRY_LOOKUP_S = 0.5
#: A session that can never fit is refused at once: who waits for less than this is not told of it.
SAY_WAITING_AFTER_S = 0.5
#: Nobody measures bandwidth yet. At 100 Mbit/s a token of BLOOM-176B takes 5 ms, less than most round trips.
ASSUMED_BANDWIDTH_BYTES_PER_S = 12.5e6


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What routing must know of a model."""

    key: str
    num_blocks: int
    hidden_size: int


class Swarm:
    """Made by `connect`, or around a transport and directory of your own; lives in one event loop."""

    def __init__(self, config: ClientConfig, transport: Transport, directory: Directory) -> None:
        self.config = config
        self.transport = transport
        self.directory = directory
        self._pinger = Pinger(transport)

    @classmethod
    async def connect(cls, config: ClientConfig) -> Swarm:
        """Join as a client.

        Raises:
            ConfigError: an address, the transport, the swarm key or the identity cannot be used.
            PeerUnreachableError: none of the initial peers answers.
        """
        key = load_swarm_key(config.swarm_key)
        identity = Identity.load_or_create(config.identity) if config.identity else None
        if config.choose_transport() == "libp2p":
            return await cls._connect_libp2p(config, identity, key)
        from petal_swarm.directory.dht import DhtDirectory
        from petal_swarm.net.p2pd import P2pdTransport

        transport = await P2pdTransport.create(identity=identity, listen=())
        try:
            directory = await DhtDirectory.create(
                transport,
                identity=None,
                initial_peers=config.initial_peers,
                client_mode=True,
                join_timeout_s=config.connect_timeout_s,
                key=key,
            )
        except BaseException:
            await transport.close()
            raise
        return cls(config, PrivateTransport(transport, key) if key else transport, directory)

    @classmethod
    async def _connect_libp2p(
        cls, config: ClientConfig, identity: Identity | None, key: SwarmKey | None
    ) -> Swarm:
        from petal_swarm.net.libp2p import Libp2pTransport

        peer = await Libp2pTransport.create(identity=identity)
        transport = PrivateTransport(peer, key) if key else peer
        try:
            directory = RemoteDirectory(transport, config.initial_peers, key=key)
            await _reach_any(transport, config)
        except BaseException:
            await transport.close()
            raise
        return cls(config, transport, directory)

    async def announcements(self, model: str) -> list[Announcement]:
        """Who serves the model now."""
        return await self.directory.lookup(model)

    async def measure(self, announcements: list[Announcement]) -> dict[str, float]:
        """Round trips to these peers in seconds, by peer id; those that do not answer are left out."""
        return dict(await self._pinger.measure(announcements))

    async def find_route(self, model: ModelRef, *, kv_tokens: int, avoid: frozenset[str]) -> Route:
        """The fastest route; waits up to `wait_for_blocks_s` for blocks that nobody serves yet.

        Raises:
            MissingBlocksError: still nobody does.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.wait_for_blocks_s
        waiting = False
        while True:
            announcements = await self.announcements(model.key)
            usable = [a for a in announcements if a.peer_id not in avoid]
            rtts = await self.measure(usable)
            try:
                return find_route(
                    usable,
                    model.num_blocks,
                    measurements=Measurements(
                        client_rtts_s=rtts, default_bandwidth_bytes_per_s=ASSUMED_BANDWIDTH_BYTES_PER_S
                    ),
                    step_bytes=4 * model.hidden_size,
                    kv_tokens=kv_tokens,
                )
            except MissingBlocksError as error:
                if avoid or loop.time() >= deadline:
                    raise MissingBlocksError(
                        f"{error} (waited {self.config.wait_for_blocks_s:g} s)", error.blocks
                    ) from None
                if not waiting:
                    logger.warning("%s; waiting up to %g s", error, self.config.wait_for_blocks_s)
                waiting = True
            await asyncio.sleep(RETRY_LOOKUP_S)

    async def open_ring(self, model: ModelRef, *, max_length: int) -> Ring:
        """Open a session along the fastest route, around servers that fail or refuse; finite attempts.

        If all that could serve some blocks are full, it waits once, `wait_for_room_s` at most.

        Raises:
            MissingBlocksError: nobody serves some blocks.
            CacheFullError, BusyError: still full.
            PetalSwarmError: what the last attempt failed with.
        """
        failed: set[str] = set()
        full: set[str] = set()
        last: OpenFailedError | None = None
        for attempt in range(self.config.open_attempts):
            try:
                route = await self.find_route(model, kv_tokens=max_length, avoid=frozenset(failed | full))
            except MissingBlocksError:
                if last is None:
                    raise
                break
            try:
                return await self._open_along(route, model, max_length)
            except OpenFailedError as error:
                logger.info("attempt %d: avoiding %s: %s", attempt + 1, error.peer_id, error)
                last = error
                (full if error.is_full else failed).add(error.peer_id)
        assert last is not None
        if last.is_full and self.config.wait_for_room_s:
            return await self._open_when_free(model, max_length, last, failed)
        raise last.error from None

    async def _open_when_free(
        self, model: ModelRef, max_length: int, last: OpenFailedError, failed: set[str]
    ) -> Ring:
        """Wait in the queues of the fastest route, since every route has a full server."""
        wait_s = self.config.wait_for_room_s
        blocks = format_blocks(last.span.blocks())
        try:
            route = await self.find_route(model, kv_tokens=max_length, avoid=frozenset(failed))
        except MissingBlocksError:
            raise last.error from None
        said = asyncio.get_running_loop().call_later(
            SAY_WAITING_AFTER_S,
            lambda: logger.warning("every server of %s is full; waiting up to %g s", blocks, wait_s),
        )
        try:
            return await self._open_along(route, model, max_length, wait_s=wait_s)
        except OpenFailedError as error:
            raise error.error from None
        finally:
            said.cancel()

    async def _open_along(
        self, route: Route, model: ModelRef, max_length: int, *, wait_s: float = 0.0
    ) -> Ring:
        return await Ring.open(
            self.transport,
            route,
            model=model.key,
            max_length=max_length,
            timeout_s=self.config.open_timeout_s,
            wait_s=wait_s,
            share_prefixes=self.config.share_prefixes,
        )

    async def close(self) -> None:
        """Leave the swarm. Idempotent."""
        await self.directory.close()
        await self.transport.close()


async def _reach_any(transport: Transport, config: ClientConfig) -> None:
    """Connect to one of the initial peers.

    Raises:
        PeerUnreachableError: none answers.
    """
    failures = []
    for address in config.initial_peers:
        try:
            await transport.connect(address, timeout_s=config.connect_timeout_s)
            return
        except NetworkError as error:
            failures.append(str(error))
    raise PeerUnreachableError("none of the initial peers can be reached: " + "; ".join(failures))
