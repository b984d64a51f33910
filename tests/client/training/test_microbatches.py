"""A batch is cut between its sequences, into passes that fit and are nearly equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.client.training.microbatches import PASSES_PER_HOP, cut_batch
from petal_swarm.errors import ConfigError


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_tokens=st.integers(300, 5000),
    max_sequences=st.integers(1, 64),
    hops=st.integers(1, 8),
)
def test_every_sequence_is_in_one_pass_that_fits(
    lengths: list[int], max_tokens: int, max_sequences: int, hops: int
) -> None:
    passes = cut_batch(lengths, max_tokens=max_tokens, max_sequences=max_sequences, hops=hops)
    assert [length for each in passes for length in each.lengths] == lengths
    assert passes[0].start == 0
    assert passes[-1].stop == sum(lengths)
    for each, following in pairwise(passes):
        assert each.stop == following.start
    for each in passes:
        assert each.stop - each.start == sum(each.lengths) <= max_tokens
        assert len(each.lengths) <= max_sequences


def test_equal_sequences_make_equal_passes() -> None:
    passes = cut_batch([128] * 8, max_tokens=4096, max_sequences=1024, hops=2)
    assert [each.lengths for each in passes] == [(128,)] * PASSES_PER_HOP * 2
    passes = cut_batch([128] * 32, max_tokens=4096, max_sequences=1024, hops=2)
    assert [len(each.lengths) for each in passes] == [4] * 8


def test_a_small_batch_is_not_cut() -> None:
    assert len(cut_batch([7, 9, 12], max_tokens=4096, max_sequences=1024, hops=4)) == 1


def test_a_batch_over_the_budget_is_cut_not_refused() -> None:
    passes = cut_batch([100] * 10, max_tokens=250, max_sequences=1024, hops=1)
    assert [len(each.lengths) for each in passes] == [2] * 5


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="a sequence of 251 tokens"):
        cut_batch([10, 251], max_tokens=250, max_sequences=1024, hops=1)
