"""A conversation goes back to those who hold its beginning, if that pays; a price is that of the search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from petal_swarm.errors import ConfigError, MissingBlocksError
from petal_swarm.routing import Hop, Measurements, Route, find_route, goes_back, price_route
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement
from tests.routing.swarms import measurements, server, swarms


@settings(max_examples=100, deadline=None)
@given(swarms(), measurements())
def test_a_route_found_costs_the_same_when_it_is_priced(
    swarm: list[Announcement], known: Measurements
) -> None:
    roomy = [replace(one, kv_tokens_free=10) for one in swarm]
    try:
        found = find_route(roomy, 5, measurements=known, step_bytes=100, kv_tokens=10)
    except MissingBlocksError:
        return
    again = price_route(found.hops, roomy, measurements=known, step_bytes=100, kv_tokens=10)
    assert again is not None
    assert again.hops == found.hops
    assert again.cost_s == pytest.approx(found.cost_s)
    assert [hop.link_bytes_per_s for hop in again.hops] == [hop.link_bytes_per_s for hop in found.hops]


def test_a_route_whose_servers_changed_is_none_any_more() -> None:
    swarm = [server("a", 0, 4, kv_tokens_free=10), server("b", 2, 8, kv_tokens_free=10)]
    hops = find_route(swarm, 8, kv_tokens=10).hops
    assert price_route(hops, swarm, kv_tokens=10) is not None
    for changed in (
        replace(swarm[1], kv_tokens_free=9),
        replace(swarm[1], state="left"),
        replace(swarm[1], span=Span(5, 8)),
        replace(swarm[1], moving_to=Span(0, 4)),
        replace(swarm[1], peer_id="c"),
    ):
        assert price_route(hops, [swarm[0], changed], kv_tokens=10) is None


def test_what_is_held_weighs_as_much_as_computing_it_would_take() -> None:
    hop = Hop("a", Span(0, 8), token_s=0.001)
    fastest, again = Route((Hop("b", Span(0, 8)),), 0.010), Route((hop, replace(hop, peer_id="c")), 0.012)
    # 2 ms a step, in 100 steps, are 100 tokens through two hops of a millisecond each.
    assert goes_back(101, again, fastest, steps=100)
    assert not goes_back(99, again, fastest, steps=100)
    assert goes_back(0, replace(again, cost_s=0.009), fastest, steps=100)


def test_own_sessions_at_a_server_let_its_twin_go_first() -> None:
    swarm = [server(name, 0, 8, block_time_s=0.001, prefill_tokens_per_s=1000.0) for name in ("a", "b")]
    assert find_route(swarm, 8).hops[0].peer_id == "a"
    loaded = Measurements(client_load_s={"a": 0.001})
    assert find_route(swarm, 8, measurements=loaded).hops[0].peer_id == "b"
    both = Measurements(client_load_s={"a": 0.001, "b": 0.002})
    assert find_route(swarm, 8, measurements=both).hops[0].peer_id == "a"
    near = Measurements(client_load_s={"a": 0.001}, client_rtts_s={"a": 0.01, "b": 0.02})
    assert find_route(swarm, 8, measurements=near).hops[0].peer_id == "a"
    with pytest.raises(ConfigError, match="load of a"):
        Measurements(client_load_s={"a": float("nan")})
