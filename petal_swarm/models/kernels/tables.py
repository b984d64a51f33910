"""Which pages hold the sequences of a decode batch, as the numbers that kernels read on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from petal_swarm.models.packing import PackedSlice
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS


class Tables(NamedTuple):
    """Parts of one int32 tensor, for a batch of `rows` sequences with one new token each.

    `lengths [rows]` count the new token, `slots [rows]` are its pool rows, -1 where a row is nobody's;
    `pages` are the numbers of pages, those of a sequence from its `starts [rows]` on.
    """

    lengths: Tensor
    slots: Tensor
    starts: Tensor
    pages: Tensor

    @classmethod
    def of(cls, numbers: Tensor, rows: int) -> Tables:
        """The parts of what `lay_out` gave, or of where that was copied to."""
        lengths, slots, starts = numbers[: _head_size(rows)].view(3, -1)[:, :rows]
        return cls(lengths, slots, starts, numbers[_head_size(rows) :])


def _head_size(rows: int) -> int:
    """Each part begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not."""
    return 3 * (-(-rows // 4) * 4)


def lay_out(slices: Sequence[PackedSlice], rows: int) -> Tensor | None:
    """Tables for `slices`, and for rows up to `rows` that are nobody's, as int32 on the host.

    None if a slice has more than one token, or not whole pages: those that an adapter's prefix ends in the
    middle of are not.
    """
    begins: list[int] = []
    counts: list[int] = []
    head = np.zeros((3, _head_size(rows) // 3), np.int32)
    head[1] = -1
    listed = 0
    for row, piece in enumerate(slices):
        if piece.length != 1:
            return None
        head[0, row] = piece.position + 1
        head[1, row] = piece.extents[-1][1] - 1
        head[2, row] = listed
        final = len(piece.extents) - 1
        for place, (start, stop) in enumerate(piece.extents):
            if start % PAGE_TOKENS or (place < final and stop % PAGE_TOKENS):
                return None
            begins.append(start // PAGE_TOKENS)
            counts.append(-(-(stop - start) // PAGE_TOKENS))
            listed += counts[-1]
    every = np.array(counts)
    before = np.cumsum(every) - every
    pages = np.repeat(np.array(begins) - before, every) + np.arange(listed)
    return torch.from_numpy(np.concatenate([head.ravel(), pages.astype(np.int32)]))
