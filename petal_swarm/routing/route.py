"""The route of lowest latency for one decode step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from petal_swarm.errors import ConfigError, MissingBlocksError
from petal_swarm.routing.blocks import as_span, format_blocks, latest, missing_blocks
from petal_swarm.routing.links import Measurements, link_costs_s, link_rate_bytes_per_s
from petal_swarm.routing.path import Graph, cheapest_path
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

FULL_PENALTY_S = 1e6
"""More than any usable route costs: a server without room, or about to move, is a last resort."""

MIN_TOKENS_PER_S = 1e-4
"""Lower claims count as this: their inverse must stay a number that can be calculated with."""

ASSUMED_TOKENS_OF_A_STEP = 16
"""Of a prompt; so many are taken to cost as much as a whole step does, where a server does not say."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a route: all of the server's span, or some of it.

    Its figures are what the server announced: `step_s` is what a step costs here whatever its tokens,
    `token_s` what each token of a prompt adds. `link_bytes_per_s` is the bandwidth of the link into
    this hop. Zero is unknown. `dtype`, `quant` and `kv_dtype` are what it
    computes in.
    """

    peer_id: str
    span: Span
    addresses: tuple[str, ...] = ()
    name: str = ""
    step_s: float = field(default=0.0, compare=False)
    token_s: float = field(default=0.0, compare=False)
    link_bytes_per_s: float = field(default=0.0, compare=False)
    dtype: str = field(default="", compare=False)
    quant: str = field(default="", compare=False)
    kv_dtype: str = field(default="auto", compare=False)

    def __str__(self) -> str:
        # Peer ids share their first characters, so the last ones tell them apart.
        label = self.name or (self.peer_id if len(self.peer_id) <= 12 else f"..{self.peer_id[-8:]}")
        # Names come from other people, and this goes to terminals and logs.
        return f"{''.join(c if c.isprintable() else '?' for c in label)} {self.span}"


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that compute consecutive blocks, no peer twice; `cost_s` is the estimated time of a step."""

    hops: tuple[Hop, ...]
    cost_s: float

    @property
    def span(self) -> Span:
        return Span(self.hops[0].span.start, self.hops[-1].span.end)

    def __str__(self) -> str:
        return " -> ".join(["you", *map(str, self.hops), "you"])


def find_route(
    announcements: Iterable[Announcement],
    blocks: int | Span,
    *,
    measurements: Measurements | None = None,
    step_bytes: int = 0,
    avoid: Collection[str] = (),
    kv_tokens: int = 0,
    before: str | None = None,
    after: str | None = None,
) -> Route:
    """The servers through which one decode step takes the least time.

    Args:
        announcements: of one model. Of several from one peer, the last counts.
        blocks: how many the model has, or the span to be computed.
        measurements: what the client measured; without them every link is an estimate.
        step_bytes: size of the hidden states that travel in one step.
        avoid: ids of peers that must not be used.
        kv_tokens: room the session needs. Servers announcing less, or that they are about to move, are
            used only where a block has no other server, and then as few of them as possible.
        before, after: ids of the peers that send to the first hop and take from the last, when a
            part of a route is replaced; `None` is the client. They are not used as hops.

    Equal routes are decided by peer ids, whatever the order of the announcements.

    Raises:
        MissingBlocksError: nobody who may be used serves some of the blocks; `blocks` are those.
        ConfigError: less than one block, or negative `step_bytes`.
    """
    wanted = as_span(blocks)
    if step_bytes < 0:
        raise ConfigError(f"step_bytes must be at least 0, got {step_bytes}")
    known = latest(announcements)
    barred = {*avoid, before, after}
    usable = [a for a in known if a.state == "serving" and a.peer_id not in barred]
    missing = missing_blocks(usable, wanted)
    if missing:
        is_joining = any(a.state == "joining" and any(block in a.span for block in missing) for a in known)
        raise MissingBlocksError(_explain(missing, known, usable), missing, is_joining=is_joining)
    servers = [a for a in usable if a.span.start < wanted.end and wanted.start < a.span.end]
    ends = [_endpoint(peer_id, known) for peer_id in (before, after)]
    known_links = measurements or Measurements()
    graph = _graph(servers, ends, wanted, known_links, step_bytes)
    unfit = np.array([not _has_room(a, kv_tokens) for a in servers])
    visits = cheapest_path(_penalised(graph, np.where(unfit, FULL_PENALTY_S, 0.0)))
    hops, previous = [], ends[0]
    for server, start, end in visits:
        span = Span(wanted.start + start, wanted.start + end)
        hops.append(
            _hop(servers[server], span, link_rate_bytes_per_s(previous, servers[server], known_links))
        )
        previous = servers[server]
    return Route(tuple(hops), graph.cost_s(visits))  # without penalties and their rounding


def price_route(
    hops: Sequence[Hop],
    announcements: Iterable[Announcement],
    *,
    measurements: Measurements | None = None,
    step_bytes: int = 0,
    kv_tokens: int = 0,
) -> Route | None:
    """The consecutive `hops` of an earlier route at today's figures, from the client and back to it.

    None if one of them serves its blocks no more, has no room for `kv_tokens`, or is about to move.
    """
    by_peer = {a.peer_id: a for a in latest(announcements)}
    servers = [by_peer[hop.peer_id] for hop in hops if hop.peer_id in by_peer]
    if len(servers) < len(hops) or not all(
        a.state == "serving" and a.span.covers(hop.span) and _has_room(a, kv_tokens)
        for a, hop in zip(servers, hops, strict=True)
    ):
        return None
    links = measurements or Measurements()
    first = hops[0].span.start
    graph = _graph(servers, [None, None], Span(first, hops[-1].span.end), links, step_bytes)
    senders = [None, *servers[:-1]]
    again = [
        _hop(server, hop.span, link_rate_bytes_per_s(sender, server, links))
        for sender, server, hop in zip(senders, servers, hops, strict=True)
    ]
    visits = [(i, hop.span.start - first, hop.span.end - first) for i, hop in enumerate(hops)]
    return Route(tuple(again), graph.cost_s(visits))


def _has_room(server: Announcement, kv_tokens: int) -> bool:
    return server.kv_tokens_free >= kv_tokens and server.moving_to is None


def _endpoint(peer_id: str | None, known: Sequence[Announcement]) -> Announcement | None:
    if peer_id is None:
        return None
    nobody = Announcement(peer_id=peer_id, model="", span=Span(0, 1))
    return next((a for a in known if a.peer_id == peer_id), nobody)


def _hop(server: Announcement, span: Span, link_bytes_per_s: float) -> Hop:
    step_s = server.step_time_s + len(span) * server.block_time_s
    if server.prefill_tokens_per_s > 0:  # through the server's whole span
        token_s = len(span) / len(server.span) / max(server.prefill_tokens_per_s, MIN_TOKENS_PER_S)
    else:
        token_s = step_s / ASSUMED_TOKENS_OF_A_STEP
    return Hop(
        server.peer_id,
        span,
        server.addresses,
        server.name,
        step_s=step_s,
        token_s=token_s,
        link_bytes_per_s=link_bytes_per_s,
        dtype=server.dtype,
        quant=server.quant,
        kv_dtype=server.kv_dtype,
    )


def _graph(
    servers: Sequence[Announcement],
    ends: Sequence[Announcement | None],
    wanted: Span,
    measurements: Measurements,
    step_bytes: int,
) -> Graph:
    links_s = link_costs_s([*servers, *ends], measurements, step_bytes)
    count = len(servers)
    load_s = measurements.client_load_s
    hop_s = np.array([a.queue_s + a.step_time_s + load_s.get(a.peer_id, 0.0) for a in servers])
    return Graph(
        blocks=len(wanted),
        starts=np.array([max(a.span.start, wanted.start) - wanted.start for a in servers]),
        ends=np.array([min(a.span.end, wanted.end) - wanted.start for a in servers]),
        enter_s=links_s[count, :count] + hop_s,
        link_s=links_s[:count, :count] + hop_s,
        leave_s=links_s[:count, count + 1],
        block_s=np.array([a.block_time_s for a in servers]),
    )


def _penalised(graph: Graph, penalty_s: NDArray[np.float64]) -> Graph:
    if not penalty_s.any():
        return graph
    return replace(graph, enter_s=graph.enter_s + penalty_s, link_s=graph.link_s + penalty_s)


def _explain(missing: Sequence[int], known: Sequence[Announcement], usable: Sequence[Announcement]) -> str:
    used = {a.peer_id for a in usable}
    there = [a for a in known if a.peer_id not in used and any(block in a.span for block in missing)]
    if any(a.state == "serving" for a in there):
        advice = "who does is being avoided; wait, then retry without avoiding them"
    elif any(a.state == "joining" for a in there):
        advice = "a server of some of them is still joining; retry in a minute"
    else:
        advice = f"start a server with --blocks {missing[0]}:{_run_end(missing)}"
    return f"nobody serves {format_blocks(missing)}: {advice}"


def _run_end(blocks: Sequence[int]) -> int:
    end = blocks[0] + 1
    while end in blocks:
        end += 1
    return end
