"""Products with quantized weights by Triton kernels: `residual + x @ weight.T + bias`.

All take contiguous `x [rows, inner]`, and give `[rows, outer]` in its dtype. What is None is not added. None
of them waits for the device, and all may be recorded in a CUDA graph. Importing this needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from petal_swarm.models.int8 import Int8Rows
from petal_swarm.models.kernels import processors
from petal_swarm.models.kernels import triton_products as kernels
from petal_swarm.models.nf4 import Nf4Rows

#: Up to so many rows may be multiplied and summed without tensor cores.
SUMMED_ROWS = 4
#: torch's product of int8 matrices wants more rows than 16.
TENSOR_CORE_ROWS = 32
#: So many columns of largest magnitude stay in floating point in `int8_by_tensor_cores`.
OUTLIER_COLUMNS = 64

# Numbers that a program of 128 threads multiplies at a time: 64 for each thread.
_SUMMED_NUMBERS = 8192
_SUMMED_OUTER = 16
_FINISHED_COLUMNS = 1024
_MOST_PARTS = 16


class _Tile(NamedTuple):
    """Rows, columns and inner numbers of a program's tile, and how many warps and stages it gets."""

    rows: int
    outer: int
    inner: int
    warps: int
    stages: int


# Each for up to `rows` rows, the last one for more, too.
_TILES = (
    _Tile(16, 32, 256, 4, 4),
    _Tile(32, 64, 128, 4, 4),
    _Tile(64, 64, 128, 4, 3),
    _Tile(128, 128, 64, 8, 3),
)


class _Parts(NamedTuple):
    """The inner dimension in `number` parts of `size`, the last one shorter; sums of each, if several."""

    number: int
    size: int
    sums: Tensor | None


def _parts(x: Tensor, outer: int, tiles: int, inner: int, block: int) -> _Parts:
    """In how many parts to sum, so that few tiles still use the whole device: two programs each, or more."""
    count = min(2 * processors(x.device) // tiles, inner // (2 * block), _MOST_PARTS)
    if count < 2:
        return _Parts(1, inner, None)
    size = -(-inner // (count * block)) * block
    count = -(-inner // size)
    return _Parts(count, size, torch.empty(count, x.shape[0], outer, device=x.device))


def _finish(
    parts: _Parts, scales: Tensor | None, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    if parts.sums is not None:
        rows, outer = out.shape
        grid = (-(-outer // _FINISHED_COLUMNS), rows)
        kernels.finish[grid](
            parts.sums, scales, bias, residual, out, rows, outer, parts.number, block_outer=_FINISHED_COLUMNS
        )


def int8_by_sums(x: Tensor, weight: Int8Rows, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """For up to `SUMMED_ROWS` rows; sums are float32."""
    (rows, inner), outer = x.shape, weight.values.shape[0]
    block_rows = 1 << (rows - 1).bit_length()
    block_inner = _SUMMED_NUMBERS // (_SUMMED_OUTER * block_rows)
    tiles = -(-outer // _SUMMED_OUTER)
    parts = _parts(x, outer, tiles, inner, block_inner)
    out = x.new_empty(rows, outer)
    kernels.int8_few[(tiles, parts.number)](
        x,
        weight.values,
        weight.scales,
        bias,
        residual,
        out,
        parts.sums,
        rows,
        outer,
        inner,
        parts.size,
        block_rows=block_rows,
        block_outer=_SUMMED_OUTER,
        block_inner=block_inner,
        num_warps=4,
    )
    _finish(parts, weight.scales, bias, residual, out)
    return out


def int8_by_tiles(x: Tensor, weight: Int8Rows, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """For any number of rows; activations keep their dtype, sums are float32."""
    (rows, inner), outer = x.shape, weight.values.shape[0]
    tile = next((tile for tile in _TILES if rows <= tile.rows), _TILES[-1])
    across, down = -(-outer // tile.outer), -(-rows // tile.rows)
    parts = _parts(x, outer, across * down, inner, tile.inner)
    out = x.new_empty(rows, outer)
    kernels.int8_tiles[(across, parts.number, down)](
        x,
        weight.values,
        weight.scales,
        bias,
        residual,
        out,
        parts.sums,
        rows,
        outer,
        inner,
        parts.size,
        block_rows=tile.rows,
        block_outer=tile.outer,
        block_inner=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages if x.dtype.itemsize == 2 else 2,
    )
    _finish(parts, weight.scales, bias, residual, out)
    return out


def int8_by_tensor_cores(x: Tensor, weight: Int8Rows, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """For `TENSOR_CORE_ROWS` rows and more: activations are rounded to int8, a scale for each row.

    As in LLM.int8() (arXiv:2208.07339), but for a fixed number of columns, those in which the largest
    magnitudes of the batch are: so shapes are known, and the host need not wait to hear them.
    """
    (rows, inner), outer = x.shape, weight.values.shape[0]
    picked = x.abs().amax(0).topk(min(OUTLIER_COLUMNS, inner)).indices
    dropped = torch.zeros(inner, dtype=torch.uint8, device=x.device).index_fill_(0, picked, 1)
    quantized = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, device=x.device)
    kernels.quantize_rows[(rows,)](x, dropped, quantized, steps, inner, block=_FINISHED_COLUMNS)
    sums = torch._int_mm(quantized, weight.values.t())
    exact = weight.values.index_select(1, picked).to(x.dtype)
    outliers = torch.mm(x.index_select(1, picked), exact.t())
    out = x.new_empty(rows, outer)
    kernels.finish_int8[(-(-outer // _FINISHED_COLUMNS), rows)](
        sums, steps, outliers, weight.scales, bias, residual, out, outer, block=_FINISHED_COLUMNS
    )
    return out


def nf4_by_sums(
    x: Tensor, weight: Nf4Rows, levels: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """For up to `SUMMED_ROWS` rows; `levels` float32 `[16]` is what the codes stand for."""
    (rows, inner), outer = x.shape, weight.codes.shape[0]
    block_rows = 1 << (rows - 1).bit_length()
    block_inner = _SUMMED_NUMBERS // (2 * _SUMMED_OUTER * block_rows)
    tiles = -(-outer // _SUMMED_OUTER)
    parts = _parts(x, outer, tiles, inner // 2, block_inner)
    out = x.new_empty(rows, outer)
    kernels.nf4_few[(tiles, parts.number)](
        x,
        weight.codes,
        levels,
        weight.scales,
        bias,
        residual,
        out,
        parts.sums,
        rows,
        outer,
        inner,
        parts.size,
        group_bytes=weight.block_size // 2,
        block_rows=block_rows,
        block_outer=_SUMMED_OUTER,
        block_inner=block_inner,
        num_warps=4,
    )
    _finish(parts, None, bias, residual, out)
    return out
