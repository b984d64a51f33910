"""The chunk size against a simulation of the pipeline, for every size there could be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.routing import Measurements, Stage, choose_chunk, find_route, stages_of
from petal_swarm.routing.prefill import CHUNK_MULTIPLE, MIN_CHUNK_TOKENS
from petal_swarm.span import Span
from tests.routing.swarms import server

same_every_time = settings(deadline=None, derandomize=True)

times_s = st.sampled_from([0.0, 0.001, 0.02, 0.3]) | st.floats(0, 1)
stage_lists = st.lists(st.builds(Stage, times_s, times_s.map(lambda t: t / 100)), min_size=1, max_size=6)


def simulated_s(tokens: int, chunk: int, stages: list[Stage]) -> float:
    """Chunk after chunk through stage after stage, each one at a time."""
    free_at_s = [0.0] * len(stages)
    now_s = 0.0
    for start in range(0, tokens, chunk):
        size = min(chunk, tokens - start)
        now_s = 0.0
        for index, stage in enumerate(stages):
            now_s = max(now_s, free_at_s[index]) + stage.step_s + size * stage.token_s
            free_at_s[index] = now_s
    return now_s


@same_every_time
@given(tokens=st.integers(MIN_CHUNK_TOKENS + 1, 700), stages=stage_lists, limit=st.integers(33, 900))
def test_no_chunk_size_is_better(tokens: int, stages: list[Stage], limit: int) -> None:
    chunk = choose_chunk(tokens, stages, limit=limit)
    assert chunk % CHUNK_MULTIPLE == 0
    assert MIN_CHUNK_TOKENS <= chunk <= limit
    count = math.ceil(tokens / chunk)
    assert chunk == math.ceil(tokens / count / CHUNK_MULTIPLE) * CHUNK_MULTIPLE, "as equal as can be"
    sizes = range(MIN_CHUNK_TOKENS, min(limit, tokens + CHUNK_MULTIPLE) + 1, CHUNK_MULTIPLE)
    equal = {math.ceil(tokens / math.ceil(tokens / size) / CHUNK_MULTIPLE) * CHUNK_MULTIPLE for size in sizes}
    best_s = min(simulated_s(tokens, size, stages) for size in equal)
    assert simulated_s(tokens, chunk, stages) == pytest.approx(best_s)


def test_the_closed_form_of_equal_hops() -> None:
    """N tokens, S hops, a + b c each: the best chunk is sqrt(N a / ((S - 1) b)), where rounding allows."""
    tokens = 1 << 20
    for hops in (2, 3, 5):
        chunk = choose_chunk(tokens, [Stage(0.02, 0.001)] * hops, limit=1 << 15)
        assert chunk == pytest.approx(math.sqrt(tokens * 20 / (hops - 1)), rel=0.03)


def test_one_hop_is_not_split_unless_sending_takes_its_time() -> None:
    hop = Stage(0.02, 0.001)
    assert choose_chunk(2048, [hop], limit=4096) == 2048
    assert choose_chunk(2048, [Stage(0.0, 0.0), hop], limit=4096) == 2048
    assert choose_chunk(2048, [Stage(0.0, 0.001), hop], limit=4096) < 512


def test_hops_that_cost_little_for_a_step_get_small_chunks() -> None:
    assert choose_chunk(2048, [Stage(0.0, 0.001)] * 2, limit=4096) == MIN_CHUNK_TOKENS
    assert choose_chunk(2048, [Stage(10.0, 0.001)] * 2, limit=4096) == 2048


@pytest.mark.parametrize(("tokens", "limit", "expected"), [(1, 100, 100), (32, 64, 64), (5000, 20, 20)])
def test_what_cannot_be_split(tokens: int, limit: int, expected: int) -> None:
    assert choose_chunk(tokens, [Stage(0.0, 1.0)] * 2, limit=limit) == expected


@pytest.mark.parametrize(("tokens", "limit"), [(0, 10), (10, 0)])
def test_no_tokens(tokens: int, limit: int) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        choose_chunk(tokens, [Stage(0.0, 1.0)], limit=limit)


def test_the_figures_come_from_announcements() -> None:
    swarm = [
        server("a", 0, 8, block_time_s=0.002, step_time_s=0.001, prefill_tokens_per_s=500.0),
        server("b", 4, 10, block_time_s=0.003, bandwidth_bytes_per_s=1e6),
    ]
    route = find_route(
        swarm, Span(0, 10), measurements=Measurements(default_bandwidth_bytes_per_s=4e6), kv_tokens=0
    )
    first, second = route.hops
    assert (first.span, second.span) == (Span(0, 8), Span(8, 10))
    assert first.step_s == pytest.approx(0.017)
    assert first.token_s == pytest.approx(1 / 500)
    assert second.step_s == pytest.approx(0.006)
    assert second.token_s == pytest.approx(0.006 / 16), "it does not say how fast it is"
    into_a, a, into_b, b = stages_of(route.hops, 2000)
    assert into_a == Stage(0.0, pytest.approx(2000 / 4e6))
    assert into_b == Stage(0.0, pytest.approx(2000 / 1e6))
    assert (a, b) == (Stage(first.step_s, first.token_s), Stage(second.step_s, second.token_s))
    assert stages_of(route.hops, 2000, answers_rows=True)[4:] == [into_b]


def test_a_part_of_a_span_takes_a_part_of_the_time() -> None:
    swarm = [
        server("a", 0, 8, block_time_s=0.5, prefill_tokens_per_s=100.0),
        server("b", 4, 8, block_time_s=0.001, prefill_tokens_per_s=100.0),
    ]
    first, second = find_route(swarm, 8).hops
    assert (first.span, second.span) == (Span(0, 4), Span(4, 8))
    assert first.token_s == pytest.approx(0.005)
    assert second.token_s == pytest.approx(0.01)
