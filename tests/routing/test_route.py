"""Routes against a brute-force search, and the cases that a search over random swarms rarely meets."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError, MissingBlocksError
from petal_swarm.routing import Hop, Measurements, Route, find_route
from petal_swarm.routing.path import MAX_REMEMBERED
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

from .swarms import every_route, measurements, route_cost_s, rtts, server, swarms


def steps(route: Route) -> tuple[tuple[str, Span], ...]:
    return tuple((hop.peer_id, hop.span) for hop in route.hops)


def peers(route: Route) -> list[str]:
    return [hop.peer_id for hop in route.hops]


def check_is_whole(route: Route, wanted: Span, swarm: list[Announcement]) -> None:
    by_id = {a.peer_id: a for a in swarm}
    assert len(set(peers(route))) == len(route.hops)
    assert [b for hop in route.hops for b in hop.span.blocks()] == list(wanted.blocks())
    assert all(by_id[hop.peer_id].span.covers(hop.span) for hop in route.hops)


@settings(max_examples=400, deadline=None)
@given(swarms(), measurements(), st.sampled_from([0, 4096]), st.sampled_from([Span(0, 5), Span(1, 4)]))
def test_costs_what_the_best_of_all_routes_costs(
    swarm: list[Announcement], known: Measurements, step_bytes: int, wanted: Span
) -> None:
    possible = list(every_route(swarm, wanted))
    if not possible:
        with pytest.raises(MissingBlocksError):
            find_route(swarm, wanted, measurements=known, step_bytes=step_bytes)
        return
    route = find_route(swarm, wanted, measurements=known, step_bytes=step_bytes)
    check_is_whole(route, wanted, swarm)
    best_s = min(route_cost_s(way, swarm, known, step_bytes) for way in possible)
    assert route.cost_s == pytest.approx(best_s, abs=1e-9)
    assert route_cost_s(steps(route), swarm, known, step_bytes) == pytest.approx(route.cost_s, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), min_size=6, max_size=6),
    st.randoms(use_true_random=False),
)
def test_is_optimal_where_servers_tempt_to_return(block_times_s: list[float], rng: random.Random) -> None:
    swarm = [server("a", 0, 6, block_time_s=1.0), server("b", 0, 6, block_time_s=0.5)]
    for i, block_time_s in enumerate(block_times_s[:3]):
        start = rng.randrange(5)
        swarm.append(server(f"n{i}", start, rng.randint(start + 1, 6), block_time_s=block_time_s))
    known = rtts(**{a.peer_id: rng.choice([0.0, 0.1]) for a in swarm})
    route = find_route(swarm, 6, measurements=known)
    check_is_whole(route, Span(0, 6), swarm)
    best_s = min(route_cost_s(way, swarm, known) for way in every_route(swarm, Span(0, 6)))
    assert route.cost_s == pytest.approx(best_s, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(swarms(), measurements())
def test_uses_as_few_full_servers_as_possible_then_the_cheapest(
    swarm: list[Announcement], known: Measurements
) -> None:
    full = {a.peer_id for a in swarm if a.kv_tokens_free < 10}
    possible = list(every_route(swarm, Span(0, 5)))
    if not possible:
        return
    route = find_route(swarm, 5, measurements=known, kv_tokens=10)
    best = min((sum(p in full for p, _ in way), route_cost_s(way, swarm, known)) for way in possible)
    assert sum(p in full for p in peers(route)) == best[0]
    assert route.cost_s == pytest.approx(best[1], abs=1e-8)


@settings(max_examples=100, deadline=None)
@given(swarms(servers=5), measurements())
def test_replaces_a_part_between_two_peers(swarm: list[Announcement], known: Measurements) -> None:
    rest = [a for a in swarm if a.peer_id not in ("p0", "p1")]
    possible = list(every_route(rest, Span(1, 4)))
    if len(swarm) < 2 or not possible:
        return
    route = find_route(swarm, Span(1, 4), measurements=known, step_bytes=64, before="p0", after="p1")
    best_s = min(route_cost_s(way, swarm, known, 64, "p0", "p1") for way in possible)
    assert route.cost_s == pytest.approx(best_s, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(swarms(), measurements(), st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_announcements(
    swarm: list[Announcement], known: Measurements, rng: random.Random
) -> None:
    shuffled = swarm.copy()
    rng.shuffle(shuffled)
    try:
        route = find_route(swarm, 5, measurements=known)
    except MissingBlocksError:
        return
    assert find_route(shuffled, 5, measurements=known) == route


def test_one_server_is_the_whole_route() -> None:
    alice = server("alice", 0, 12, addresses=("/ip4/10.0.0.1/tcp/1",), block_time_s=0.002, queue_s=0.01)
    route = find_route([alice], 12, measurements=rtts(alice=0.04))
    assert route.hops == (Hop("alice", Span(0, 12), ("/ip4/10.0.0.1/tcp/1",), "alice"),)
    assert route.cost_s == pytest.approx(0.04 + 0.01 + 12 * 0.002)
    assert route.span == Span(0, 12)


def test_the_worked_example_of_the_documentation() -> None:
    swarm = [
        server("alice", 0, 12, block_time_s=0.004, next_rtts_s={"bob": 0.010}),
        server("bob", 8, 24, block_time_s=0.002),
        server("carol", 0, 24, block_time_s=0.006),
    ]
    route = find_route(swarm, 24, measurements=rtts(alice=0.020, bob=0.030, carol=0.002))
    assert str(route) == "you -> alice 0:8 -> bob 8:24 -> you"
    assert route.cost_s == pytest.approx(0.094)


def test_switches_inside_overlapping_spans_to_the_faster_server() -> None:
    swarm = [server("a", 0, 8, block_time_s=0.001), server("b", 4, 12, block_time_s=0.002)]
    assert str(find_route(swarm, 12)) == "you -> a 0:8 -> b 8:12 -> you"
    swarm[1] = server("b", 4, 12, block_time_s=0.0001)
    assert str(find_route(swarm, 12)) == "you -> a 0:4 -> b 4:12 -> you"


def test_a_relay_may_make_a_switch_where_no_span_ends() -> None:
    """Measured links need not obey the triangle inequality, so span ends alone are not enough."""
    swarm = [
        server("a", 0, 5, block_time_s=0.0, next_rtts_s={"b": 2.0, "c": 0.002}),
        server("b", 5, 10, block_time_s=0.0),
        server("c", 0, 10, block_time_s=0.3, next_rtts_s={"b": 0.002}),
    ]
    route = find_route(swarm, 10, measurements=rtts(a=0.0, b=0.0, c=1.0))
    assert [len(hop.span) for hop in route.hops if hop.peer_id == "c"] == [1]
    assert set(peers(route)) == {"a", "b", "c"}


def test_does_not_return_to_a_server_it_left() -> None:
    swarm = [server("slow", 0, 9, block_time_s=1.0), server("quick", 3, 6, block_time_s=0.001)]
    assert str(find_route(swarm, 9, measurements=rtts(slow=0.01, quick=0.01))) == "you -> slow 0:9 -> you"


def test_is_optimal_where_many_servers_tempt_to_return_in_different_places() -> None:
    count = 3 * MAX_REMEMBERED
    swarm = [server(f"s{i}", 4 * i, 4 * i + 4, block_time_s=1.0) for i in range(count)]
    swarm += [server(f"q{i}", 4 * i + 1, 4 * i + 3, block_time_s=0.9) for i in range(count)]
    route = find_route(swarm, 4 * count, measurements=Measurements(default_rtt_s=0.0))
    check_is_whole(route, Span(0, 4 * count), swarm)
    assert route.cost_s == pytest.approx(4 * count)


def test_stays_valid_where_too_many_servers_tempt_to_return_to_one_block() -> None:
    slow = [server(f"slow{i:02}", 0, 40, block_time_s=1.0) for i in range(2 * MAX_REMEMBERED)]
    quick = [server(f"quick{i:02}", i, i + 1, block_time_s=0.1) for i in range(1, 39, 2)]
    route = find_route(slow + quick, 40, measurements=Measurements(default_rtt_s=0.0))
    check_is_whole(route, Span(0, 40), slow + quick)
    assert 30 < route.cost_s <= 40


def test_the_first_of_equal_peers_and_the_fewest_hops_win() -> None:
    swarm = [server(p, 0, 4) for p in "cab"]
    assert peers(find_route(swarm, 4, measurements=Measurements(default_rtt_s=0.0))) == ["a"]


@pytest.mark.parametrize("state", ["joining", "left"])
def test_only_serving_servers_take_sessions(state: str) -> None:
    swarm = [server("a", 0, 4, state=state), server("b", 0, 4, block_time_s=1.0)]
    assert peers(find_route(swarm, 4)) == ["b"]
    with pytest.raises(MissingBlocksError):
        find_route(swarm[:1], 4)


def test_the_last_announcement_of_a_peer_counts() -> None:
    swarm = [server("a", 0, 4), server("b", 0, 4, block_time_s=1.0), server("a", 0, 4, state="left")]
    assert peers(find_route(swarm, 4)) == ["b"]


def test_avoided_peers_are_never_used() -> None:
    swarm = [server("a", 0, 4), server("b", 0, 4, block_time_s=1.0)]
    assert peers(find_route(swarm, 4, avoid={"a"})) == ["b"]
    with pytest.raises(MissingBlocksError, match="is being avoided"):
        find_route(swarm, 4, avoid=["a", "b"])


def test_a_full_server_is_the_last_resort() -> None:
    full = server("a", 0, 4, kv_tokens_free=99, kv_tokens=4096)
    roomy = server("b", 0, 4, kv_tokens_free=100, kv_tokens=4096, block_time_s=5.0)
    assert peers(find_route([full, roomy], 4, kv_tokens=100)) == ["b"]
    route = find_route([full], 4, kv_tokens=100)
    assert peers(route) == ["a"]
    assert route.cost_s < 1


def test_a_server_about_to_move_is_the_last_resort() -> None:
    moving = server("a", 0, 4, moving_to=Span(4, 8))
    assert peers(find_route([moving, server("b", 0, 4, block_time_s=5.0)], 4)) == ["b"]
    assert peers(find_route([moving], 4)) == ["a"]


def test_missing_blocks_are_named_and_the_advice_fits() -> None:
    swarm = [server("a", 0, 4), server("b", 8, 12), server("c", 13, 20, state="joining")]
    with pytest.raises(MissingBlocksError, match=r"nobody serves blocks 4-7 and 12-19: .*joining") as raised:
        find_route(swarm, 20)
    assert raised.value.blocks == (4, 5, 6, 7, *range(12, 20))
    assert raised.value.is_joining
    with pytest.raises(MissingBlocksError, match=r"start a server with --blocks 4:8") as raised:
        find_route(swarm, Span(0, 12))
    assert not raised.value.is_joining


def test_unmeasured_links_take_the_longer_way_to_the_client() -> None:
    swarm = [server("a", 0, 2, block_time_s=0.0), server("b", 2, 4, block_time_s=0.0)]
    route = find_route(swarm, 4, measurements=rtts(a=0.020, b=0.080))
    assert route.cost_s == pytest.approx(0.010 + 0.040 + 0.040)
    assert find_route(swarm, 4).cost_s == pytest.approx(0.150)


def test_a_link_measured_from_its_other_end_counts_for_both_ways() -> None:
    swarm = [
        server("a", 0, 2, block_time_s=0.0),
        server("b", 2, 4, block_time_s=0.0, next_rtts_s={"a": 0.004}),
    ]
    assert find_route(swarm, 4, measurements=rtts(a=0.0, b=0.0)).cost_s == pytest.approx(0.002)


def test_a_part_is_routed_between_peers_that_are_unknown_too() -> None:
    swarm = [
        server("a", 0, 4, block_time_s=0.0),
        server("b", 0, 4, block_time_s=0.0, next_rtts_s={"gone": 0.01}),
    ]
    route = find_route(swarm, Span(1, 3), before="gone", measurements=rtts(a=0.05, b=0.05))
    assert steps(route) == (("b", Span(1, 3)),)


def test_reads_well_and_lets_no_control_characters_through() -> None:
    hops = (
        Hop("12D3KooWCRscMgHgEo3ojm8ovzheydpvTEqsDtq7Vby38cMHrYjt", Span(0, 2)),
        Hop("x", Span(2, 4), (), "\x1b[2Jeve\n"),
        Hop("short", Span(4, 5)),
    )
    assert str(Route(hops, 0.1)) == "you -> ..8cMHrYjt 0:2 -> ?[2Jeve? 2:4 -> short 4:5 -> you"


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_impossible_measurements_are_refused(value: float) -> None:
    for make in (
        lambda: rtts(a=value),
        lambda: Measurements(default_rtt_s=value),
        lambda: Measurements(client_bandwidth_bytes_per_s=value),
        lambda: Measurements(default_bandwidth_bytes_per_s=value),
    ):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError):
        Measurements(default_bandwidth_bytes_per_s=0.0)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ConfigError):
        find_route([server("a", 0, 4)], 0)
    with pytest.raises(ConfigError):
        find_route([server("a", 0, 4)], 4, step_bytes=-1)


def test_a_route_of_many_servers_alternates_where_that_is_cheapest() -> None:
    swarm = [server(f"s{i:02}", i, i + 2, block_time_s=0.001 * (1 + i % 3)) for i in range(30)]
    known = Measurements(default_rtt_s=0.0)
    route = find_route(swarm, 31, measurements=known)
    check_is_whole(route, Span(0, 31), swarm)
    for hop, following in itertools.pairwise(route.hops):
        assert hop.span.end == following.span.start
