"""Packed batches: which pool rows and positions belong to the new tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.models.config import ModelConfig
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.span import Span


@st.composite
def slices(draw):
    """A few sequences, each over ranges of pool rows that overlap nobody's."""
    made, row, base = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        extents = []
        for size in draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)):
            base += draw(st.integers(0, 2))
            extents.append((base, base + size))
            base += size
        end = sum(stop - start for start, stop in extents)
        length = draw(st.integers(1, end))
        made.append(PackedSlice(row, length, end - length, tuple(extents)))
        row += length
    return made


@given(slices())
def test_slots_and_positions(pieces):
    batch = PackedBatch.build(pieces)
    slots, positions = [], []
    for piece in pieces:
        rows = [row for start, stop in piece.extents for row in range(start, stop)]
        slots += rows[piece.position :]
        positions += range(piece.position, piece.position + piece.length)
    assert batch.slots.tolist() == slots
    assert batch.positions.tolist() == positions
    assert batch.tokens == len(slots)
    joined = slots == list(range(slots[0], slots[0] + len(slots)))
    assert batch.run == (slots[0] if joined else None)
    assert batch.slots.dtype == batch.positions.dtype == torch.int64


@pytest.mark.parametrize(
    "piece",
    [
        PackedSlice(1, 1, 0, ((0, 1),)),
        PackedSlice(0, 0, 0, ((0, 1),)),
        PackedSlice(0, 2, 3, ((0, 4),)),
        PackedSlice(0, 1, 0, ((0, 4),)),
    ],
)
def test_what_does_not_fit_together_is_our_own_bug(piece):
    with pytest.raises(AssertionError):
        PackedBatch.build([piece])


def test_rows_are_copied_in_every_block():
    config = ModelConfig.from_hf(
        {"architectures": ["BloomForCausalLM"], "n_layer": 9, "hidden_size": 12, "n_head": 3, "vocab_size": 5}
    )
    pool = KVPool.allocate(config, Span(2, 5), 7, torch.bfloat16, "cpu")
    assert [pair.shape for pair in pool.pairs] == [(2, 3, 7, 4)] * 3
    assert pool.tokens == 7
    assert pool.nbytes == 3 * 2 * 3 * 7 * 4 * 2
    pool.pairs[1].zero_()
    pool.pairs[1][1, :, 0] = 5
    pool.copy_rows(0, 4, 2)
    assert pool.pairs[1][1, :, 4].eq(5).all()
    assert pool.pairs[1][0].eq(0).all()
