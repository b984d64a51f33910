"""The directory of the members of the swarm's Kademlia DHT, run by hivemind in this event loop.

The records of a model are one DHT key, each under its peer id as subkey, on the nodes nearest to the
key. Only the peer named in a record can write it: every node checks that before it stores, and every
reader again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from petal_swarm.directory.book import Bookshelf, RecordBook
from petal_swarm.directory.membership import Membership
from petal_swarm.directory.records import RecordSigner
from petal_swarm.errors import ConfigError, NetworkError, PeerUnreachableError
from petal_swarm.net.addresses import split_address
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.wire.announcement import Announcement

if TYPE_CHECKING:
    from petal_swarm.directory.kademlia import KademliaNode

logger = logging.getLogger(__name__)

#: Nodes that keep each record, besides its own peer: all five would have to die within one refresh.
REPLICAS = 5
#: Nodes that a lookup fetches from. Fewer than store, since each sends the whole list (about 1 KB for
#: each server); more than one, since any may have joined just now, or leave out what it likes.
READS = 3
#: How long an announcer goes on storing at the same nodes. A walk for every refresh would be most of
#: the traffic of a large swarm; a node that comes nearer to the key is handed the records when it joins.
REPLICAS_AGE_S = 30.0
STORE_TIMEOUT_S = 1.5
JOIN_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0


class DhtDirectory:
    """A `Directory` as a member of the DHT: a server by a full node, a client by one in client mode."""

    def __init__(
        self,
        transport: P2pdTransport,
        node: KademliaNode,
        *,
        identity: Identity | None,
        initial_peers: Sequence[str],
        client_mode: bool,
        now: Callable[[], float],
        key: SwarmKey | None,
    ) -> None:
        self._transport = transport
        self._node = node
        self._signer = RecordSigner(identity, now=now, key=key) if identity else None
        self._membership = Membership(transport, node, initial_peers)
        self._client_mode = client_mode
        self._shelf = Bookshelf(now=now, key=key)
        self._replicas: dict[str, tuple[float, list[Any]]] = {}
        self._stores: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def create(
        cls,
        transport: P2pdTransport,
        *,
        identity: Identity | None,
        initial_peers: Sequence[str],
        client_mode: bool,
        join_timeout_s: float = JOIN_TIMEOUT_S,
        now: Callable[[], float] = time.time,
        key: SwarmKey | None = None,
    ) -> DhtDirectory:
        """Join the DHT at `initial_peers` (multiaddrs); a first server has none, and starts one.

        With a `key` it is that of a private swarm, which strangers can neither read nor write.

        `identity` must be the transport's, and may be None for a client, which then cannot announce.
        Some initial peers may be down; that is logged.

        Raises:
            ConfigError: an address that is none, a client without initial peers, another's identity.
            PeerUnreachableError: no initial peer is in this DHT and answers within `join_timeout_s`.
        """
        if identity is not None and identity.peer_id != transport.peer_id:
            raise ConfigError(f"the identity is of {identity.peer_id}, the transport of {transport.peer_id}")
        if client_mode and not initial_peers:
            raise ConfigError("name at least one initial peer")
        for address in initial_peers:
            split_address(address)
        from petal_swarm.directory.kademlia import KademliaNode

        node = await KademliaNode.create(transport.p2p, client_mode=client_mode, now=now, key=key)
        self = cls(
            transport,
            node,
            identity=identity,
            initial_peers=initial_peers,
            client_mode=client_mode,
            now=now,
            key=key,
        )
        try:
            if initial_peers:
                await self._membership.join(timeout_s=join_timeout_s)
        except BaseException:
            await self.close()
            raise
        return self

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        if self._signer is None:
            raise ConfigError("a directory without an identity cannot announce")
        from petal_swarm.directory.validator import key_of

        record, expires_at = self._signer.sign(announcement, ttl_s=ttl_s)
        key = key_of(announcement.model)
        self._shelf.book(announcement.model).add(record, own=True)
        if not self._client_mode:
            self._node.store_local(key, record, announcement.peer_id, expires_at)
        if self._node.isolated:
            self._membership.start_rejoining()
        answers: list[bool | None] = []
        for attempt in range(2):
            replicas = await self._replicas_of(announcement.model, fresh=attempt > 0)
            answers = await self._store(replicas, key, record, announcement.peer_id, expires_at)
            if None in answers:
                self._replicas.pop(announcement.model, None)
            if True in answers or not replicas:
                break
        if True not in answers and (answers or self._client_mode):
            if False not in answers:
                raise NetworkError(f"the DHT's nodes do not answer ({len(answers)} asked)")
            clock = self._membership.clock_complaint() or "is this machine's clock right?"
            raise NetworkError(f"the DHT's nodes refused the announcement ({len(answers)} asked); {clock}")

    async def lookup(self, model: str) -> list[Announcement]:
        announcements = (await self._read(model)).announcements()
        self._membership.remember(announcements)
        return announcements

    async def records(self, model: str) -> list[bytes]:
        return (await self._read(model)).records()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._membership.close()
        for task in self._stores:
            task.cancel()
        if self._stores:
            await asyncio.wait(self._stores)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._node.close()
        except Exception as error:
            # The daemon may be gone: then hivemind waits for it, or any of its layers raises its own error.
            logger.debug("leaving the DHT: %s", error or type(error).__name__)

    async def _read(self, model: str) -> RecordBook:
        """Bring the model's book up to date from the nodes nearest to its key."""
        from petal_swarm.directory.validator import key_of

        if self._node.isolated and (rejoining := self._membership.start_rejoining()) and self._client_mode:
            await asyncio.wait({rejoining})
        key = key_of(model)
        book = self._shelf.book(model)
        await book.merge(self._node.fetch_local(key), source="this node")
        queue = (await self._node.nearest(key))[::-1]
        answers = 0
        while queue and answers < READS:
            batch = [queue.pop() for _ in range(min(len(queue), READS - answers))]
            replies = await asyncio.gather(*(self._node.fetch(peer_id, key) for peer_id in batch))
            for peer_id, records in zip(batch, replies, strict=True):
                if records is not None:
                    answers += 1
                    await book.merge(records, source=str(peer_id))
        if not answers and self._client_mode:
            raise PeerUnreachableError(
                f"no node of the DHT answers; is one still up? {', '.join(self._membership.addresses)}"
            )
        return book

    async def _replicas_of(self, model: str, *, fresh: bool) -> list[Any]:
        from petal_swarm.directory.validator import key_of

        found_at, replicas = self._replicas.get(model, (0.0, []))
        time_s = asyncio.get_running_loop().time()
        # A swarm that is still smaller than that may have grown.
        if fresh or len(replicas) < REPLICAS or time_s - found_at > REPLICAS_AGE_S:
            replicas = (await self._node.nearest(key_of(model)))[:REPLICAS]
            self._replicas[model] = (time_s, replicas)
        return replicas

    async def _store(
        self, replicas: Sequence[Any], key: Any, record: bytes, subkey: str, expires_at: float
    ) -> list[bool | None]:
        """What each node said: stored, refused, or None for no answer. The slow go on in the background."""
        tasks = [
            asyncio.create_task(self._node.store(peer_id, key, record, subkey, expires_at))
            for peer_id in replicas
        ]
        for task in tasks:
            self._stores.add(task)
            task.add_done_callback(self._stores.discard)
        if tasks:
            await asyncio.wait(tasks, timeout=STORE_TIMEOUT_S)
        return [task.result() if task.done() else None for task in tasks]
