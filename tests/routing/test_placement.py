"""Spans for joining servers against a search over all spans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.routing import block_throughputs, choose_span, coverage, missing_blocks
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

from .swarms import server, swarms

BLOCKS = 6
TIE_BREAKS = st.none() | st.integers(0, 9).map(random.Random)


@st.composite
def hosted(draw: st.DrawFn) -> list[Announcement]:
    states = st.sampled_from(["serving", "joining", "left"])
    return [replace(a, state=draw(states), block_time_s=0.01) for a in draw(swarms(blocks=BLOCKS))]


def after_joining(swarm: list[Announcement], span: Span, speed: float) -> list[float]:
    """The blocks' throughputs, weakest first, if a server of `speed` took `span`."""
    before = block_throughputs(swarm, BLOCKS)
    return sorted(round(t + (speed if b in span else 0), 6) for b, t in enumerate(before))


@given(hosted(), st.integers(1, BLOCKS + 1), st.sampled_from([1e-3, 1.0, 1e6]), TIE_BREAKS)
def test_no_other_span_leaves_weaker_blocks_stronger(
    swarm: list[Announcement], capacity: int, speed: float, tie_break: random.Random | None
) -> None:
    span = choose_span(swarm, BLOCKS, capacity, tie_break=tie_break)
    length = min(capacity, BLOCKS)
    assert len(span) == length
    assert span.end <= BLOCKS
    others = [Span(start, start + length) for start in range(BLOCKS - length + 1)]
    assert after_joining(swarm, span, speed) == max(after_joining(swarm, other, speed) for other in others)


@given(hosted(), st.integers(1, BLOCKS), TIE_BREAKS)
def test_blocks_nobody_hosts_come_first(
    swarm: list[Announcement], capacity: int, tie_break: random.Random | None
) -> None:
    holes = {b for b, throughput in enumerate(block_throughputs(swarm, BLOCKS)) if throughput == 0}
    span = choose_span(swarm, BLOCKS, capacity, tie_break=tie_break)
    filled = [len(holes & set(range(start, start + capacity))) for start in range(BLOCKS - capacity + 1)]
    assert len(holes & set(span.blocks())) == max(filled)


@given(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_joiners_with_enough_room_cover_every_block(blocks: int, capacities: list[int]) -> None:
    swarm: list[Announcement] = []
    for i, capacity in enumerate(capacities):
        span = choose_span(swarm, blocks, capacity)
        swarm.append(server(f"p{i}", span.start, span.end))
    assert len(missing_blocks(swarm, blocks)) == max(0, blocks - sum(capacities))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_equal_joiners_cover_every_block_in_any_order(blocks: int, capacity: int, seed: int) -> None:
    swarm: list[Announcement] = []
    rng = random.Random(seed)
    for i in range(-(-blocks // capacity)):
        span = choose_span(swarm, blocks, capacity, tie_break=rng)
        swarm.append(server(f"p{i}", span.start, span.end, state="joining"))
    assert missing_blocks([replace(a, state="serving") for a in swarm], blocks) == ()


@given(hosted(), st.integers(1, BLOCKS), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_same_swarm_and_seed_give_the_same_span(
    swarm: list[Announcement], capacity: int, seed: int, rng: random.Random
) -> None:
    shuffled = swarm.copy()
    rng.shuffle(shuffled)
    spans = [choose_span(s, BLOCKS, capacity, tie_break=random.Random(seed)) for s in (swarm, shuffled)]
    assert spans[0] == spans[1]
    assert choose_span(swarm, BLOCKS, capacity) == choose_span(shuffled, BLOCKS, capacity)


def test_a_large_server_takes_the_whole_model() -> None:
    assert choose_span([server("a", 0, 4)], 8, 8) == choose_span([], 8, 99) == Span(0, 8)


def test_two_joiners_do_not_pick_the_same_hole() -> None:
    assert choose_span([], 8, 4) == Span(0, 4)
    assert choose_span([server("a", 0, 4, state="joining")], 8, 4) == Span(4, 8)
    assert choose_span([server("a", 0, 4, state="left")], 8, 4) == Span(0, 4)


def test_simultaneous_joiners_spread_without_small_gaps() -> None:
    spans = {choose_span([], 12, 4, tie_break=random.Random(f"peer {i}")) for i in range(30)}
    assert spans == {Span(0, 4), Span(4, 8), Span(8, 12)}


def test_slow_blocks_are_helped_before_fast_ones() -> None:
    swarm = [server("a", 0, 4, block_time_s=0.001), server("b", 4, 8, block_time_s=0.1)]
    assert choose_span(swarm, 8, 4) == Span(4, 8)


def test_a_servers_speed_is_shared_by_its_blocks() -> None:
    swarm = [server("a", 0, 4, block_time_s=0.25), server("b", 2, 12, block_time_s=0.05, step_time_s=0.5)]
    assert block_throughputs(swarm, 6) == (1.0, 1.0, 2.0, 2.0, 1.0, 1.0)
    assert block_throughputs([server("a", 0, 1, block_time_s=0.0)], 1)[0] > 1e6
    assert coverage(swarm, 6) == (1, 1, 2, 2, 1, 1)


@pytest.mark.parametrize(("blocks", "capacity"), [(0, 4), (4, 0), (-1, 1)])
def test_impossible_sizes_are_refused(blocks: int, capacity: int) -> None:
    with pytest.raises(ConfigError):
        choose_span([], blocks, capacity)
