"""Swarms for the routing tests, and the slow, obvious answers to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from petal_swarm.routing import Measurements
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

Steps = tuple[tuple[str, Span], ...]


def server(peer_id: str, start: int, end: int, **fields: Any) -> Announcement:
    fields.setdefault("name", peer_id)
    return Announcement(peer_id=peer_id, model="tiny", span=Span(start, end), **fields)


def rtts(**by_peer: float) -> Measurements:
    return Measurements(client_rtts_s=by_peer)


TIMES_S = st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2, 1.0]) | st.floats(0, 1)
BANDWIDTHS = st.sampled_from([0.0, 1e4, 1e6])


@st.composite
def swarms(draw: st.DrawFn, *, blocks: int = 5, servers: int = 4) -> list[Announcement]:
    """A few servers with spans that may leave gaps, and measurements of some of the links."""
    ids = [f"p{i}" for i in range(draw(st.integers(1, servers)))]
    found = []
    for peer_id in ids:
        start = draw(st.integers(0, blocks - 1))
        found.append(
            server(
                peer_id,
                start,
                draw(st.integers(start + 1, blocks + 1)),
                block_time_s=draw(TIMES_S),
                step_time_s=draw(TIMES_S),
                queue_s=draw(TIMES_S),
                bandwidth_bytes_per_s=draw(BANDWIDTHS),
                kv_tokens_free=draw(st.sampled_from([0, 10])),
                next_rtts_s=draw(st.dictionaries(st.sampled_from(ids), TIMES_S)),
            )
        )
    return found


@st.composite
def measurements(draw: st.DrawFn) -> Measurements:
    return Measurements(
        client_rtts_s=draw(st.dictionaries(st.sampled_from([f"p{i}" for i in range(6)]), TIMES_S)),
        client_bandwidth_bytes_per_s=draw(BANDWIDTHS),
    )


def every_route(
    swarm: Sequence[Announcement], wanted: Span, used: frozenset[str] = frozenset()
) -> Iterator[Steps]:
    """All ways to cut `wanted` into hops over servers that differ."""
    for a in swarm:
        if a.peer_id in used or wanted.start not in a.span:
            continue
        for end in range(wanted.start + 1, min(a.span.end, wanted.end) + 1):
            first = (a.peer_id, Span(wanted.start, end))
            if end == wanted.end:
                yield (first,)
            else:
                for rest in every_route(swarm, Span(end, wanted.end), used | {a.peer_id}):
                    yield (first, *rest)


def route_cost_s(
    steps: Steps,
    swarm: Sequence[Announcement],
    known: Measurements,
    step_bytes: int = 0,
    before: str | None = None,
    after: str | None = None,
) -> float:
    """The cost model of docs/routing.md, a term at a time."""
    by_id = {a.peer_id: a for a in swarm}
    ring = [before, *(peer_id for peer_id, _ in steps), after]
    total = sum(_link_s(a, b, by_id, known, step_bytes) for a, b in pairwise(ring))
    for peer_id, span in steps:
        a = by_id[peer_id]
        total += a.queue_s + a.step_time_s + len(span) * a.block_time_s
    return total


def _link_s(
    a: str | None, b: str | None, by_id: Mapping[str, Announcement], known: Measurements, step_bytes: int
) -> float:
    def to_client_s(peer: str | None) -> float:
        return 0.0 if peer is None else known.client_rtts_s.get(peer, known.default_rtt_s)

    def rate(peer: str | None) -> float:
        announced = known.client_bandwidth_bytes_per_s if peer is None else by_id[peer].bandwidth_bytes_per_s
        return announced or known.default_bandwidth_bytes_per_s

    rtt_s = max(to_client_s(a), to_client_s(b))
    if a is not None and b is not None:
        rtt_s = by_id[b].next_rtts_s.get(a, rtt_s)
        rtt_s = by_id[a].next_rtts_s.get(b, rtt_s)
    return rtt_s / 2 + step_bytes / min(rate(a), rate(b))
