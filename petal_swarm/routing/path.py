"""The cheapest path over (server, block), each server at most once. Knows arrays, not peers.

A label is the cheapest way to have computed the blocks before x with the last of them on server u.
Plain labels may come back to a server they left: a slow server with a fast one nested in its span
invites that. Only servers with which that happens are remembered in the labels (decremental state
space relaxation: Righini and Salani, Networks 51, 2008), so the usual swarm needs a single pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_REMEMBERED = 5
"""At one block. Labels grow as 2 to this power, and others' announcements must not choose our run time."""

MAX_PASSES = 6
"""For the same reason."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Visit = tuple[int, int, int]
"""`(server, first block, end block)`"""


@dataclass(frozen=True, slots=True)
class Graph:
    """`servers` hosts of blocks `[0, blocks)`: `starts[u] <= block < ends[u]`, times in seconds.

    `enter_s[u]` is the cost of starting at u, `link_s[u, v]` of going from u to v (each with what v
    charges for a hop), `leave_s[u]` of ending at u, `block_s[u]` of a block there.
    """

    blocks: int
    starts: Ints
    ends: Ints
    enter_s: Floats
    link_s: Floats
    leave_s: Floats
    block_s: Floats

    def hosts(self, block: int) -> Ints:
        return np.flatnonzero((self.starts <= block) & (block < self.ends))

    def cost_s(self, visits: Sequence[Visit]) -> float:
        servers = [server for server, _, _ in visits]
        cost_s = float(self.enter_s[servers[0]]) + float(self.leave_s[servers[-1]])
        cost_s += sum(float(self.link_s[pair]) for pair in pairwise(servers))
        return cost_s + sum((end - start) * float(self.block_s[server]) for server, start, end in visits)


class _Labels:
    """The labels at one block: for each set of remembered servers already left, a cost by server."""

    def __init__(self, servers: int, bits: dict[int, int]) -> None:
        self._servers = servers
        self._bits = bits
        self.cost_s: dict[int, Floats] = {}
        self.came_from: dict[int, tuple[Ints, Ints]] = {}  # the left set and the server, a block earlier

    def offer(self, left: int, hosts: Ints, cost_s: Floats, from_left: int, from_server: Ints | int) -> None:
        """Keep what is strictly cheaper, so that of equal ways the first offered stays."""
        better = cost_s < (self.cost_s[left][hosts] if left in self.cost_s else math.inf)
        for server, bit in self._bits.items():
            if left & bit:
                better &= hosts != server
        chosen = hosts[better]
        if not len(chosen):
            return
        if left not in self.cost_s:
            self.cost_s[left] = np.full(self._servers, math.inf)
            self.came_from[left] = (np.zeros(self._servers, np.int64), np.zeros(self._servers, np.int64))
        self.cost_s[left][chosen] = cost_s[better]
        sets, servers = self.came_from[left]
        sets[chosen] = from_left
        servers[chosen] = from_server[better] if isinstance(from_server, np.ndarray) else from_server


def cheapest_path(graph: Graph) -> list[Visit]:
    """The cheapest visits that compute all blocks in order, no server twice.

    Every block must have a host. Exact while `MAX_PASSES` passes suffice and no block has more than
    `MAX_REMEMBERED` servers to remember. Past that, each pass's visits of one server are joined into
    one, and the cheapest of these is the answer: valid, perhaps not the cheapest of all.
    """
    remembered: list[int] = []
    joined: list[list[Visit]] = []
    for _ in range(MAX_PASSES):
        visits = _relaxed_path(graph, remembered)
        repeated = _repeated(visits)
        if not repeated:
            return visits
        joined.append(_joined(visits))
        before = len(remembered)
        for server in repeated:
            if _most_at_one_block(graph, [*remembered, server]) <= MAX_REMEMBERED:
                remembered.append(server)
        if len(remembered) == before:
            break
    return min(joined, key=graph.cost_s)


def _relaxed_path(graph: Graph, remembered: Sequence[int]) -> list[Visit]:
    """The cheapest visits among those in which no remembered server comes twice."""
    bits = {server: 1 << i for i, server in enumerate(remembered)}
    servers = len(graph.starts)
    hosts = graph.hosts(0)
    from_s = np.ascontiguousarray(graph.link_s.T)  # a row for each server entered, to search along rows
    labels = _Labels(servers, bits)
    labels.offer(0, hosts, (graph.enter_s + graph.block_s)[hosts], 0, hosts)
    history = [labels]
    for block in range(1, graph.blocks):
        before, hosts = hosts, graph.hosts(block)
        free = before[~np.isin(before, remembered)] if remembered else before
        if len(free) < servers or len(hosts) < servers:
            free_to_hosts_s = from_s[hosts[:, None], free]
        else:
            free_to_hosts_s = from_s
        live = sum(bit for server, bit in bits.items() if graph.ends[server] > block)
        following = _Labels(servers, bits)
        for left, cost_s in labels.cost_s.items():
            following.offer(left & live, hosts, cost_s[hosts] + graph.block_s[hosts], left, hosts)
            if len(free):
                ways_s = free_to_hosts_s + cost_s[free]
                best = ways_s.argmin(axis=1)
                way_s = ways_s[np.arange(len(hosts)), best] + graph.block_s[hosts]
                following.offer(left & live, hosts, way_s, left, free[best])
            for server, bit in bits.items():
                if cost_s[server] < math.inf:
                    way_s = cost_s[server] + graph.link_s[server, hosts] + graph.block_s[hosts]
                    following.offer((left | bit) & live, hosts, way_s, left, server)
        labels = following
        history.append(labels)
    return _walk_back(graph, history)


def _walk_back(graph: Graph, history: Sequence[_Labels]) -> list[Visit]:
    totals_s = {left: cost_s + graph.leave_s for left, cost_s in history[-1].cost_s.items()}
    left = min(totals_s, key=lambda key: float(totals_s[key].min()))
    server = int(totals_s[left].argmin())
    assert totals_s[left][server] < math.inf, "a block without a host"
    visits: list[Visit] = []
    end = graph.blocks
    for block in range(graph.blocks - 1, 0, -1):
        sets, servers = history[block].came_from[left]
        left, previous = int(sets[server]), int(servers[server])
        if previous != server:
            visits.append((server, block, end))
            server, end = previous, block
    visits.append((server, 0, end))
    return visits[::-1]


def _repeated(visits: Sequence[Visit]) -> list[int]:
    servers = [server for server, _, _ in visits]
    return sorted({server for server in servers if servers.count(server) > 1})


def _most_at_one_block(graph: Graph, servers: Sequence[int]) -> int:
    # Spans overlap most where one of them starts.
    starts, ends = graph.starts[servers], graph.ends[servers]
    return max(int(((starts <= start) & (start < ends)).sum()) for start in starts)


def _joined(visits: Sequence[Visit]) -> list[Visit]:
    """Between two visits a server hosts everything, so it can simply keep the blocks."""
    joined: list[Visit] = []
    for server, start, end in visits:
        earlier = [i for i, visit in enumerate(joined) if visit[0] == server]
        if earlier:
            start = joined[earlier[0]][1]
            del joined[earlier[0] :]
        joined.append((server, start, end))
    return joined
