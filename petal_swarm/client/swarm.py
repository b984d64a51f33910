"""A client's part in a swarm: joining it, and opening sessions along routes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace

from petal_swarm.client.adapters import Adapter, NamedAdapter
from petal_swarm.client.audit_ledger import AuditLedger
from petal_swarm.client.auditor import Auditor
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.conversations import Conversations
from petal_swarm.client.dialling import OpenFailedError
from petal_swarm.client.openings import Openings
from petal_swarm.client.repair import Repairer
from petal_swarm.client.ring import Ring
from petal_swarm.client.view import ModelRef, View
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.remote import RemoteDirectory
from petal_swarm.errors import (
    AdapterMissingError,
    ConfigError,
    MissingBlocksError,
    NetworkError,
    PeerUnreachableError,
    PetalSwarmError,
    SilentBlocksError,
    StrangerError,
    UnsupportedProtocolError,
)
from petal_swarm.net.identity import Identity
from petal_swarm.net.private import PrivateTransport
from petal_swarm.net.swarm_key import SwarmKey, load_swarm_key
from petal_swarm.net.transport import Transport
from petal_swarm.routing.affinity import Held
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.routing.route import Route
from petal_swarm.wire.messages.opening import SESSION_ID_BYTES
from petal_swarm.wire.step_log import LogBudget

logger = logging.getLogger(__name__)

RETRY_S = 0.5
#: A session that can never fit is refused at once: who waits for less than this is not told of it.
SAY_WAITING_AFTER_S = 0.5


class Swarm:
    """Made by `connect`, or around a transport and directory of your own; lives in one event loop."""

    def __init__(self, config: ClientConfig, transport: Transport, directory: Directory) -> None:
        self.config = config
        self.transport = transport
        self.directory = directory
        self.view = View(config, transport, directory)
        #: What audits of servers have found, in all sessions.
        self.audits = AuditLedger()
        #: Where prompts went, for those who know their tokens: see `open_ring`.
        self.conversations = Conversations(now=time.monotonic)
        self._logs = LogBudget(config.max_log_bytes)

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

    async def find_adapter(self, model: ModelRef, name: str) -> NamedAdapter:
        """An adapter that servers of the model offer to everybody, by its name or its id.

        Raises:
            ConfigError: after `wait_for_blocks_s` none does, or several are called so.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.wait_for_blocks_s
        while True:
            known = await self.view.announcements(model.key)
            offered = {adapter for announcement in known for adapter in announcement.adapters}
            found = {adapter for called, adapter in offered if name in (called, adapter)}
            if len(found) == 1:
                return NamedAdapter(found.pop())
            if found:
                raise ConfigError(
                    f"several adapters are called {name!r}; give one's id: {', '.join(sorted(found))}"
                )
            if loop.time() >= deadline:
                others = ", ".join(sorted({called for called, _ in offered}))
                such = f"such an adapter, only: {others}" if others else "any adapter"
                raise ConfigError(f"{name!r} is no folder, and no server offers {such}")
            await asyncio.sleep(RETRY_S)

    async def open_ring(
        self,
        model: ModelRef,
        *,
        max_length: int,
        adapter: Adapter | NamedAdapter | None = None,
        held: Held | None = None,
    ) -> Ring:
        """Open a session along the fastest route, around servers that fail or refuse.

        Servers that have computed the beginning of its prompt already, as `held` says, are taken instead
        where that pays.

        After `open_attempts` it gives up if some are full, and waits once, `wait_for_room_s` at most. Where
        servers cannot be reached, it tries again, those that failed too, until `wait_for_blocks_s` are over.

        Raises:
            MissingBlocksError: nobody serves some blocks.
            SilentBlocksError: who serves some blocks cannot be reached.
            CacheFullError, BusyError: still full.
            PetalSwarmError: what the last attempt failed with.
        """
        if self.config.audit_rate or not self.config.share_prefixes:
            held = None
        if isinstance(adapter, NamedAdapter):
            model = replace(model, offered=adapter.id)
        failed: set[str] = set()
        full: set[str] = set()
        last: OpenFailedError | None = None
        missing: MissingBlocksError | None = None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.wait_for_blocks_s
        attempts = 0
        while attempts < self.config.open_attempts or (
            last is not None and last.is_unreachable and loop.time() < deadline
        ):
            attempts += 1
            try:
                route = await self.view.find_route(
                    model, kv_tokens=max_length, avoid=frozenset(failed | full), held=held
                )
            except MissingBlocksError as error:
                if last is None:
                    raise
                missing = error
                if full or not last.is_unreachable or loop.time() >= deadline:
                    break
                failed.clear()  # it may have been the connection; and others may come
                await asyncio.sleep(RETRY_S)
                continue
            try:
                return await self._open_along(route, model, max_length, adapter)
            except OpenFailedError as error:
                logger.info("attempt %d: avoiding %s: %s", attempts, error.peer_id, error)
                last = error
                if isinstance(error.error, AdapterMissingError):
                    continue  # somebody else's took its place since it was uploaded
                (full if error.is_full else failed).add(error.peer_id)
                self.view.blame(error.peer_id, error.error)
        assert last is not None
        if last.is_full and self.config.wait_for_room_s:
            return await self._open_when_free(model, max_length, last, failed, adapter)
        raise _given_up(last, missing) from None

    async def _open_when_free(
        self,
        model: ModelRef,
        max_length: int,
        last: OpenFailedError,
        failed: set[str],
        adapter: Adapter | NamedAdapter | None,
    ) -> Ring:
        """Wait in the queues of the fastest route, since every route has a full server."""
        wait_s = self.config.wait_for_room_s
        blocks = format_blocks(last.span.blocks())
        try:
            route = await self.view.find_route(model, kv_tokens=max_length, avoid=frozenset(failed))
        except MissingBlocksError:
            raise last.error from None
        said = asyncio.get_running_loop().call_later(
            SAY_WAITING_AFTER_S,
            lambda: logger.warning("every server of %s is full; waiting up to %g s", blocks, wait_s),
        )
        try:
            return await self._open_along(route, model, max_length, adapter, wait_s=wait_s)
        except OpenFailedError as error:
            raise error.error from None
        finally:
            said.cancel()

    async def _open_along(
        self,
        route: Route,
        model: ModelRef,
        max_length: int,
        adapter: Adapter | NamedAdapter | None,
        *,
        wait_s: float = 0.0,
    ) -> Ring:
        session = secrets.token_bytes(SESSION_ID_BYTES)
        openings = Openings(self.view, self.transport, model, max_length=max_length, adapter=adapter)
        opening = openings.of_session(session, route.hops, wait_s=wait_s)
        with self.view.traffic.opening(route):
            members = await openings.open_all(route.hops, opening, self.config.open_timeout_s)
        auditor = None
        if self.config.audit_rate:
            auditor = Auditor(
                self.view,
                self.transport,
                model,
                self.audits,
                max_length=max_length,
                rate=self.config.audit_rate,
                adapter=adapter,
            )
        log = self._logs.new_log()
        ring = Ring(session, route, members, log, keeper=Repairer(openings).keep, observer=auditor)
        self.view.traffic.add(ring)
        return ring

    async def close(self) -> None:
        """Leave the swarm. Idempotent."""
        await self.directory.close()
        await self.transport.close()


def _given_up(last: OpenFailedError, missing: MissingBlocksError | None) -> PetalSwarmError:
    """What to say after the last attempt, and of the blocks that nobody was left for."""
    if not last.is_unreachable or isinstance(last.error, (StrangerError, UnsupportedProtocolError)):
        return last.error
    blocks = missing.blocks if missing is not None else last.span.blocks()
    return SilentBlocksError(
        f"who serves {format_blocks(blocks)} does not answer: {last.error}",
        blocks,
        is_joining=missing is not None and missing.is_joining,
    )


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
    raise PeerUnreachableError(
        f"none of the initial peers can be reached: {'; '.join(failures)}; is a server running there, and is"
        " this the address that it printed after `ready`?"
    )
