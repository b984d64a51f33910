"""Packing: padding goes in and comes out, tokens are all there and in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.client.packing import Packing, chunk_slices, unique_rows
from petal_swarm.errors import ConfigError
from petal_swarm.span import Slice

same_every_time = settings(deadline=None, derandomize=True)

lengths_of_rows = st.lists(st.integers(1, 7), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right", "mixed", "none"])


def padded_mask(lengths: list[int], side: str) -> torch.Tensor:
    """`[batch, width]`: which places of a padded batch hold tokens."""
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        left = side == "left" or (side == "mixed" and row % 2)
        mask[row, width - length if left else 0 :][:length] = 1
    return mask


@same_every_time
@given(lengths=lengths_of_rows, side=sides, past=st.integers(0, 5), columns=st.integers(1, 3))
def test_there_and_back(lengths: list[int], side: str, past: int, columns: int) -> None:
    if side == "none":
        lengths = [lengths[0]] * len(lengths)
    mask = padded_mask(lengths, side)
    batch, width = mask.shape
    whole = torch.cat([torch.zeros(batch, past, dtype=torch.long), mask], dim=1)
    packing = Packing.of(batch, width, whole)
    assert packing.lengths == tuple(lengths)
    values = torch.randn(batch, width, columns)
    rows = packing.pack(values)
    one_by_one = [values[i, j] for i in range(batch) for j in range(width) if mask[i, j]]
    assert torch.equal(rows, torch.stack(one_by_one))
    assert torch.equal(packing.unpack(rows), values * mask[:, :, None])
    ids = torch.arange(batch * width).view(batch, width)
    assert torch.equal(packing.pack(ids), ids[mask.bool()])


def test_no_mask_is_no_padding() -> None:
    values = torch.randn(2, 3, 4)
    for mask in (None, torch.ones(2, 3), torch.ones(2, 9), torch.ones(2, 3, dtype=torch.bool)):
        packing = Packing.of(2, 3, mask)
        assert packing == Packing(2, 3, (3, 3), None)
        assert packing.pack(values).data_ptr() == values.data_ptr(), "no copy"
        assert torch.equal(packing.unpack(packing.pack(values)), values)


def test_only_the_last_columns_of_a_mask_count() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
    assert Packing.of(2, 2, mask).lengths == (2, 1)


def test_packing_is_differentiable() -> None:
    packing = Packing.of(2, 3, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    values = torch.randn(2, 3, 4, requires_grad=True)
    packing.unpack(packing.pack(values)).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad[:, :, 0], torch.tensor([[0.0, 1, 1], [1, 1, 1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_keeps_the_dtype(dtype: torch.dtype) -> None:
    packing = Packing.of(2, 2, torch.tensor([[0, 1], [1, 1]]))
    padded = packing.unpack(torch.ones(3, 4, dtype=dtype))
    assert padded.dtype is dtype
    assert padded[0, 0].abs().sum() == 0


@pytest.mark.parametrize("mask", [torch.ones(3, 3), torch.ones(2, 2), torch.ones(6), torch.ones(2, 3, 1)])
def test_masks_of_another_shape(mask: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"\[2, at least 3\]"):
        Packing.of(2, 3, mask)


def test_a_sequence_without_tokens() -> None:
    with pytest.raises(ConfigError, match="without any token"):
        Packing.of(2, 2, torch.tensor([[1, 1, 1], [1, 0, 0]]))


slice_lists = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda pieces: [Slice(index * 3, position, length) for index, (position, length) in enumerate(pieces)]
)


@same_every_time
@given(slices=slice_lists, limit=st.integers(1, 50))
def test_chunks_hold_every_token_once_and_in_order(slices: list[Slice], limit: int) -> None:
    chunks = chunk_slices(slices, limit)
    expected = [
        (piece.sequence, position) for piece in slices for position in range(piece.position, piece.end)
    ]
    found = [
        (piece.sequence, position)
        for chunk in chunks
        for piece in chunk.slices
        for position in range(piece.position, piece.end)
    ]
    assert found == expected
    row = 0
    for chunk in chunks:
        assert chunk.start == row
        assert chunk.stop - chunk.start == sum(piece.length for piece in chunk.slices)
        assert all(piece.length > 0 for piece in chunk.slices)
        assert len({piece.sequence for piece in chunk.slices}) == len(chunk.slices)
        row = chunk.stop
    assert row == len(expected)
    assert all(chunk.stop - chunk.start == limit for chunk in chunks[:-1]), "full but for the last"
    assert 0 < chunks[-1].stop - chunks[-1].start <= limit


@same_every_time
@given(slices=slice_lists, limit=st.integers(1, 50))
def test_chunks_know_which_sequences_they_finish(slices: list[Slice], limit: int) -> None:
    """Those stand first in the chunk: its answer's first rows are theirs."""
    chunks = chunk_slices(slices, limit)
    assert [end for chunk in chunks for end in chunk.ends] == list(range(len(slices)))
    for chunk in chunks:
        finished = [piece for piece in chunk.slices if piece.end == slices[piece.sequence // 3].end]
        assert finished == list(chunk.slices[: len(chunk.ends)])
        assert [piece.sequence // 3 for piece in finished] == list(chunk.ends)


def test_what_fits_is_one_chunk() -> None:
    slices = [Slice(0, 5, 3), Slice(1, 0, 2)]
    (chunk,) = chunk_slices(slices, 5)
    assert (chunk.start, chunk.stop, chunk.slices, chunk.ends) == (0, 5, tuple(slices), (0, 1))
    assert chunk_slices([], 5) == []


@same_every_time
@given(
    table=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=6
    ),
    masked=st.booleans(),
)
def test_unique_rows(table: list[tuple[int, int, int]], masked: bool) -> None:
    ids = torch.tensor([row[:2] for row in table])
    mask = torch.tensor([[row[2], 1] for row in table]) if masked else None
    keys = [row if masked else row[:2] for row in table]
    found = unique_rows(ids, mask)
    if len(set(keys)) == len(keys):
        assert found is None
        return
    assert found is not None
    firsts, sources = found
    assert [keys[firsts[source]] for source in sources] == keys
    assert len(firsts) == len(set(keys))
    assert firsts == sorted(firsts)
    assert [sources[first] for first in firsts] == list(range(len(firsts)))


def test_unique_rows_of_beams() -> None:
    ids = torch.tensor([[1, 2], [1, 2], [3, 4], [3, 4]])
    assert unique_rows(ids, None) == ([0, 2], [0, 0, 1, 1])
    assert unique_rows(ids, torch.ones(4, 7, dtype=torch.bool)) == ([0, 2], [0, 0, 1, 1])
    assert unique_rows(ids[:1], None) is None
