"""A batch is cut between its sequences, into passes that fit and are nearly equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.client.training.microbatches import choose_passes, cut_batch
from petal_swarm.errors import ConfigError
from petal_swarm.routing.route import Hop
from petal_swarm.span import Span


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_tokens=st.integers(300, 5000),
    max_sequences=st.integers(1, 64),
    passes=st.integers(1, 40),
)
def test_every_sequence_is_in_one_pass_that_fits(
    lengths: list[int], max_tokens: int, max_sequences: int, passes: int
) -> None:
    cut = cut_batch(lengths, max_tokens=max_tokens, max_sequences=max_sequences, passes=passes)
    assert [length for each in cut for length in each.lengths] == lengths
    assert cut[0].start == 0
    assert cut[-1].stop == sum(lengths)
    for each, following in pairwise(cut):
        assert each.stop == following.start
    for each in cut:
        assert each.stop - each.start == sum(each.lengths) <= max_tokens
        assert len(each.lengths) <= max_sequences


def test_equal_sequences_make_equal_passes() -> None:
    cut = cut_batch([128] * 8, max_tokens=4096, max_sequences=1024, passes=8)
    assert [each.lengths for each in cut] == [(128,)] * 8
    cut = cut_batch([128] * 32, max_tokens=4096, max_sequences=1024, passes=8)
    assert [len(each.lengths) for each in cut] == [4] * 8
    assert len(cut_batch([7, 9, 12], max_tokens=4096, max_sequences=1024, passes=1)) == 1


def hops(count: int, blocks: int, step_s: float, token_s: float) -> list[Hop]:
    return [
        Hop(str(i), Span(i * blocks, (i + 1) * blocks), step_s=step_s, token_s=token_s) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("route", "passes"),
    [
        (hops(2, 4, 0.00015, 13e-6), 4),  # a tiny model: it is all overhead
        (hops(2, 12, 0.06, 6e-3), 8),  # bloom-560m on a CPU: hops want to be busy
        (hops(2, 16, 0.01, 40e-6), 2),  # 8 billion parameters on a GPU
        (hops(1, 24, 0.12, 12e-3), 4),  # a single hop
        (hops(1, 8, 0.0003, 13e-6), 1),
        (hops(3, 1, 1e-9, 0.0), 1),  # what says nothing of itself
    ],
)
def test_as_many_passes_as_pay(route: list[Hop], passes: int) -> None:
    assert choose_passes(1024, route) == passes


def test_a_batch_over_the_budget_is_cut_not_refused() -> None:
    cut = cut_batch([100] * 10, max_tokens=250, max_sequences=1024, passes=1)
    assert [len(each.lengths) for each in cut] == [2] * 5


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="a sequence of 251 tokens"):
        cut_batch([10, 251], max_tokens=250, max_sequences=1024, passes=1)
