"""What `dht.py` does with hivemind's `DHTNode`: join, walk towards a key, store, fetch.

`DHTNode` keeps the routing table and the storage and answers other nodes; its own `get` and `store`
are not used, for reasons met here:

- They pass the whole value of a key from each of 20 nodes, even on the way to a store. With 1000
  servers refreshing every 4 s that is gigabytes a second. Here a walk asks for a key right beside the
  wanted one: the same nodes are the nearest, and nobody has a value for it.
- One record that the reader's clock finds expired makes `call_find` drop all others of that reply, and
  the reply itself decides when `get` stops searching. Here every record is judged alone.
- They wait for each node for as long as for the slowest. Here a walk goes on without those that stay
  silent, while their calls run out in the background and take them off the routing table.

Kademlia: Maymounkov, Mazieres, "Kademlia: A Peer-to-Peer Information System Based on the XOR Metric"
(2002). Only this module and `validator` import hivemind at once: import them on use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.traverse import traverse_dht
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from petal_swarm.directory.guard import GuardedP2P
from petal_swarm.directory.validator import FlatSerializer, SignedRecordValidator, node_id_of
from petal_swarm.errors import RemoteProtocolError
from petal_swarm.net.swarm_key import SwarmKey

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: k of the paper, and the width of a walk. All of a swarm of up to 20 servers know each other, and
#: 1000 servers fill about 6 buckets. 20 random peers do not all vanish within a refresh.
BUCKET_SIZE = 20
#: A call is lost after this. A first contact over the Internet takes 6 or 7 round trips (TCP, TLS,
#: two protocol negotiations), and more when the daemon has to find the address first.
CALL_TIMEOUT_S = 3.0
#: A walk in which somebody has answered goes on without those silent for longer than this.
QUIET_S = 1.0
WALK_TIMEOUT_S = 6.0
#: Calls that one walk keeps in flight; alpha of the paper is 3. More, so that several dead nodes cost
#: one `QUIET_S` together; their sum over all walks is bounded by `PARALLEL_CALLS`.
WALK_WORKERS = 6
PARALLEL_CALLS = 64
#: A node that did not answer is left alone for 5, 10, 20... s, whoever recommends it.
BLACKLIST_S = 5.0


@dataclass(slots=True)
class _Walk:
    peers: dict[DHTID, PeerID]
    stop: asyncio.Future[None]
    last_answer_s: float | None = None
    answered: list[DHTID] = field(default_factory=list)


class KademliaNode:
    """One member of the DHT; in client mode one that asks and is not asked."""

    def __init__(self, node: DHTNode, guard: GuardedP2P) -> None:
        self._node = node
        self._guard = guard
        self._tasks: set[asyncio.Task[Any]] = set()
        #: Peers with a call that a walk has given up waiting for, and which has not ended yet.
        self._silent: set[PeerID] = set()

    @classmethod
    async def create(
        cls, p2p: Any, *, client_mode: bool, now: Callable[[], float], key: SwarmKey | None = None
    ) -> KademliaNode:
        """Take part in the DHT of `key` by this daemon; it knows nobody until `join`."""
        guard = GuardedP2P(p2p, key, now=now)
        node = await DHTNode.create(
            p2p=guard,
            node_id=node_id_of(p2p.peer_id),
            bucket_size=BUCKET_SIZE,
            wait_timeout=CALL_TIMEOUT_S,
            parallel_rpc=PARALLEL_CALLS,
            refresh_timeout=None,  # in 1.1.12 this task fails at once; announcing walks often enough
            blacklist_time=BLACKLIST_S,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            client_mode=client_mode,
            record_validator=SignedRecordValidator(now=now, key=key),
        )
        # Others may still ask this node to cache, and a cached dictionary that expires later hides the
        # stored one from everybody who asks: one record of a stranger would hide all servers.
        node.protocol.cache.maxsize = 0
        node.protocol.serializer = FlatSerializer
        return cls(node, guard)

    @property
    def isolated(self) -> bool:
        """Whether no other node is known."""
        return not self._node.protocol.routing_table.uid_to_peer_id

    @property
    def clock_offsets_s(self) -> Mapping[str, float]:
        """By how many seconds the clocks of peers that were pinged are ahead of this machine's."""
        return self._guard.clock_offsets_s

    def refusal(self, peer_id: str) -> str | None:
        """Why a peer that is there has no part in this swarm's DHT, if that is known."""
        return self._guard.refusals.get(peer_id)

    async def ping(self, peer_id: str) -> bool:
        """Get to know a connected peer; False if it is no node of the DHT, or does not answer."""
        found = await self._node.protocol.call_ping(PeerID.from_base58(peer_id))
        await asyncio.sleep(0)  # call_ping updates the routing table in a task of its own
        return found is not None

    async def meet_neighbours(self) -> None:
        """Walk towards this node's own id, as the paper's joining does: who is met adds it to its table."""
        await self.nearest(self._node.node_id)

    async def nearest(self, key: DHTID) -> list[PeerID]:
        """The nodes nearest to `key` that answer, nearest first; this node is not among them."""
        probe = DHTID(key ^ 1)
        known = self._node.protocol.routing_table.get_nearest_neighbors(
            probe, BUCKET_SIZE, exclude=self._node.node_id
        )
        loop = asyncio.get_running_loop()
        walk = _Walk(dict(self._acceptable(known)), loop.create_future())
        search = self._spawn(
            traverse_dht(
                [probe],
                initial_nodes=list(walk.peers),
                beam_size=BUCKET_SIZE,
                num_workers=WALK_WORKERS,
                queries_per_call=1,
                get_neighbors=lambda node_id, queries: self._ask(walk, node_id, queries),
                visited_nodes={probe: {self._node.node_id}},
                await_all_tasks=False,
            )
        )
        start_s = loop.time()
        try:
            while not search.done():
                end_s = start_s + WALK_TIMEOUT_S
                if walk.last_answer_s is not None:
                    end_s = min(end_s, walk.last_answer_s + QUIET_S)
                if loop.time() >= end_s:
                    break
                # An answer meanwhile postpones the end, so look again before it.
                await asyncio.wait({search}, timeout=min(end_s - loop.time(), QUIET_S / 4))
        finally:
            walk.stop.set_result(None)
        nearest = sorted(walk.answered, key=probe.xor_distance)
        return [walk.peers[node_id] for node_id in nearest[:BUCKET_SIZE]]

    async def store(
        self, peer_id: PeerID, key: DHTID, record: bytes, subkey: str, expires_at: float
    ) -> bool | None:
        """Whether the node stored it; None if it did not answer."""
        protocol = self._node.protocol
        answer = await protocol.call_store(peer_id, [key], [record], [expires_at], subkeys=[subkey])
        self._note(peer_id, answered=answer is not None)
        return None if answer is None else all(answer)

    async def fetch(self, peer_id: PeerID, key: DHTID) -> list[bytes] | None:
        """The records that the node has under `key`, not verified; None if it did not answer."""
        protocol = self._node.protocol
        request = dht_pb2.FindRequest(keys=[key.to_bytes()], peer=protocol.node_info)
        try:
            async with protocol.rpc_semaphore:
                response = await protocol.get_stub(peer_id).rpc_find(request, timeout=CALL_TIMEOUT_S)
            records = _records_of(response)
        except Exception as error:
            # hivemind, protobuf and msgpack each raise their own for what a stranger may send.
            logger.debug("fetching from %s failed: %s", peer_id, error or type(error).__name__)
            self._note(peer_id, answered=False)
            return None
        self._note(peer_id, answered=True)
        return records

    def fetch_local(self, key: DHTID) -> list[bytes]:
        """The records that this node itself stores for others."""
        found = self._node.protocol.storage.get(key)
        if found is None or not isinstance(found.value, DictionaryDHTValue):
            return []
        return [entry.value for _, entry in found.value.items()]

    def store_local(self, key: DHTID, record: bytes, subkey: str, expires_at: float) -> None:
        self._node.protocol.storage.store(key, record, expires_at, subkey=subkey)

    async def close(self) -> None:
        """Stop answering, and end the calls in flight."""
        for task in self._tasks:
            task.cancel()
        await self._node.shutdown()

    async def _ask(
        self, walk: _Walk, node_id: DHTID, queries: Collection[DHTID]
    ) -> dict[DHTID, tuple[tuple[DHTID, ...], bool]]:
        """`traverse_dht`'s question to one node: whom do you know near the key? Ends early with the walk."""
        peer_id = walk.peers[node_id]
        if walk.stop.done():
            return dict.fromkeys(queries, ((), True))
        call = self._spawn(self._find(peer_id, queries))
        await asyncio.wait({call, walk.stop}, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            self._silent.add(peer_id)
            call.add_done_callback(lambda _: self._silent.discard(peer_id))
            return dict.fromkeys(queries, ((), True))
        reply = call.result()
        if reply is None:
            return dict.fromkeys(queries, ((), False))
        walk.answered.append(node_id)
        walk.last_answer_s = asyncio.get_running_loop().time()
        neighbours = {}
        for query, (_, nearest) in reply.items():
            accepted = dict(self._acceptable(list(nearest.items())[:BUCKET_SIZE]))
            walk.peers.update(accepted)
            neighbours[query] = (tuple(accepted), False)
        return neighbours

    async def _find(self, peer_id: PeerID, queries: Collection[DHTID]) -> Any:
        reply = await self._node.protocol.call_find(peer_id, queries)
        self._note(peer_id, answered=reply is not None)
        return reply

    def _acceptable(self, nodes: Iterable[tuple[DHTID, PeerID]]) -> list[tuple[DHTID, PeerID]]:
        """Those in the place that their peer id gives them, and neither dead nor silent."""
        return [
            (node_id, peer_id)
            for node_id, peer_id in nodes
            if peer_id not in self._silent
            and peer_id not in self._node.blacklist
            and node_id == node_id_of(peer_id)
        ]

    def _note(self, peer_id: PeerID, *, answered: bool) -> None:
        if answered:
            self._node.blacklist.register_success(peer_id)
        else:
            self._node.blacklist.register_failure(peer_id)

    def _spawn(self, work: Coroutine[Any, Any, T] | Awaitable[T]) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _records_of(response: Any) -> list[bytes]:
    """The values of the dictionary in a find reply."""
    [result] = response.results
    if result.type != dht_pb2.FOUND_DICTIONARY:
        return []
    found = FlatSerializer.loads(result.value)
    if not isinstance(found, DictionaryDHTValue):
        raise RemoteProtocolError("a found value is not a dictionary")
    return [entry.value for entry in found.data.values() if type(entry.value) is bytes]
