"""The attention of a decode batch by Triton kernels; what it is about lies in tensors on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from petal_swarm.models.attention import Heads
from petal_swarm.models.kernels import processors
from petal_swarm.models.kernels import triton_attention as kernels
from petal_swarm.models.kernels.tables import Tables
from petal_swarm.models.norms import RMSNorm
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS

_BLOCK_KEYS = 64
# Tensor cores multiply tiles of so many rows; heads that share no keys do without.
_LEAST_TILE = 16
_MOST_PARTS = 32


class Positions(NamedTuple):
    """How a span's blocks know positions: ALiBi `slopes` float32 `[heads]`, or `rotation`, or neither.

    `rotation` is complex64 `[positions, head_dim / 2]`, for every position that there can be.
    """

    slopes: Tensor | None
    rotation: Tensor | None


class PagedPlan:
    """An `Attention` for one new token each of the sequences in `tables`, which may change between steps.

    `int8_width` is the number of bytes of a row in a pool that packs int8, else None. Nothing waits for the
    device, so a step may be recorded in a CUDA graph.
    """

    __slots__ = ("_heads", "_int8_width", "_norm", "_parts", "_positions", "_rotation", "_tables", "_window")

    def __init__(
        self,
        tables: Tables,
        heads: Heads,
        positions: Positions,
        window: int | None,
        pool_tokens: int,
        int8_width: int | None = None,
    ) -> None:
        self._tables = tables
        self._heads = heads
        self._positions = positions
        self._rotation = None if positions.rotation is None else torch.view_as_real(positions.rotation)
        self._window = 0 if window is None else window
        self._int8_width = int8_width
        self._norm: RMSNorm | None = None
        programs = len(tables.lengths) * heads.kv
        useful = -(-pool_tokens // _BLOCK_KEYS)
        self._parts = max(1, min(2 * processors(tables.lengths.device) // programs, _MOST_PARTS, useful))

    def rotate(self, qkv: Tensor, norm: RMSNorm | None) -> Tensor:
        """Left to `attend`, which does it in the kernel that stores keys and values."""
        self._norm = norm
        return qkv

    def attend(self, qkv: Tensor, pair: Tensor) -> Tensor:
        """See `Attention`; rows that are nobody's come out zero, and store nothing."""
        heads = self._heads
        scales = None if self._int8_width is None else pair.view(torch.float32)
        # Of the first number of a row, where its scale is: in numbers of four bytes.
        scale_place = 0 if self._int8_width is None else self._int8_width // 4 - 1
        self._place(qkv, pair, scales, scale_place)
        rows, parts = len(self._tables.lengths), self._parts
        out = qkv.new_empty(rows, heads.query * heads.size)
        sums = tops = totals = None
        if parts > 1:
            sums = torch.empty(rows, heads.query, parts, heads.size, device=qkv.device)
            tops, totals = torch.empty(2, rows, heads.query, parts, device=qkv.device)
        size_block = 1 << (heads.size - 1).bit_length()
        kernels.decode[(rows, heads.kv, parts)](
            qkv,
            pair,
            scales,
            self._tables.lengths,
            self._tables.starts,
            self._tables.pages,
            self._positions.slopes,
            out,
            sums,
            tops,
            totals,
            heads.scale,
            self._window,
            parts,
            heads.kv,
            heads.size,
            pair.stride(0),
            pair.stride(1),
            pair.stride(2),
            scale_place,
            group=heads.group,
            group_block=1 if heads.group == 1 else max(_LEAST_TILE, 1 << (heads.group - 1).bit_length()),
            size_block=max(_LEAST_TILE, size_block),
            page_tokens=PAGE_TOKENS,
            block_keys=_BLOCK_KEYS,
            num_warps=4,
            num_stages=2,
        )
        if parts > 1:
            kernels.combine[(rows, heads.query)](
                sums,
                tops,
                totals,
                out,
                parts,
                heads.query,
                heads.size,
                part_block=1 << (parts - 1).bit_length(),
                size_block=size_block,
                num_warps=1,
            )
        return out

    def _place(self, qkv: Tensor, pair: Tensor, scales: Tensor | None, scale_place: int) -> None:
        heads, norm = self._heads, self._norm
        untouched = heads.query if self._rotation is None and norm is None else 0
        kernels.place[(len(self._tables.lengths), heads.query + 2 * heads.kv - untouched)](
            qkv,
            pair,
            scales,
            self._tables.lengths,
            self._tables.slots,
            self._rotation,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps,
            untouched,
            heads.query,
            heads.kv,
            heads.size,
            pair.stride(0),
            pair.stride(1),
            pair.stride(2),
            scale_place,
            half_block=1 << (heads.size // 2 - 1).bit_length(),
            num_warps=1,
        )
