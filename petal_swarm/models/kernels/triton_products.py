"""Triton kernels: products with int8 and nf4 weights, which are converted in registers as they are read.

Activations stay as they are, so outliers need nothing. Matrices are contiguous; offsets into weights are
64-bit, since a projection of BLOOM-176B has 822 million numbers. Names of sizes: `rows` of activations
`[rows, inner]`, weights `[outer, inner]`.

Numbers that differ from step to step are not specialized on: a kernel is not compiled anew in mid-service.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _finished(total, scales, bias, residual, row, outer, columns, inside):
    """`total [rows, columns]` in float32, times scales, plus bias and residual, where they are not None."""
    if scales is not None:
        total *= tl.load(scales + columns, mask=columns < outer, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < outer, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        offsets = row[:, None] * outer + columns[None, :]
        total += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rows"])
def int8_few(
    x,
    values,
    scales,
    bias,
    residual,
    out,
    partial,
    rows,
    outer,
    inner,
    part,
    block_rows: tl.constexpr,
    block_outer: tl.constexpr,
    block_inner: tl.constexpr,
):
    """For `rows <= block_rows`, multiplies and sums.

    Where `partial [parts, rows, outer]` is not None, program (i, j) sums the j-th `part` of the inner
    dimension into it, and `finish` does the rest.
    """
    columns = tl.program_id(0) * block_outer + tl.arange(0, block_outer)
    row = tl.arange(0, block_rows)
    first = tl.program_id(1) * part
    stop = tl.minimum(first + part, inner)
    line = values + columns.to(tl.int64)[:, None] * inner
    total = tl.zeros((block_rows, block_outer, block_inner), tl.float32)
    for start in range(first, stop, block_inner):
        place = start + tl.arange(0, block_inner)
        weight = tl.load(
            line + place[None, :], mask=(columns < outer)[:, None] & (place < stop)[None, :], other=0
        )
        given = tl.load(
            x + row[:, None] * inner + place[None, :],
            mask=(row < rows)[:, None] & (place < stop)[None, :],
            other=0.0,
        )
        total += given.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    found = tl.sum(total, 2)
    inside = (row < rows)[:, None] & (columns < outer)[None, :]
    target = row[:, None] * outer + columns[None, :]
    if partial is not None:
        tl.store(partial + tl.program_id(1) * rows * outer + target, found, mask=inside)
    else:
        found = _finished(found, scales, bias, residual, row, outer, columns, inside)
        tl.store(out + target, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def int8_tiles(
    x,
    values,
    scales,
    bias,
    residual,
    out,
    partial,
    rows,
    outer,
    inner,
    part,
    block_rows: tl.constexpr,
    block_outer: tl.constexpr,
    block_inner: tl.constexpr,
):
    """For any number of rows, by tiles on tensor cores; `partial` as in `int8_few`, grid (outer, part, rows).

    int8 numbers are exact in every 16-bit type, so that only the scales are rounded.
    """
    columns = tl.program_id(0) * block_outer + tl.arange(0, block_outer)
    row = tl.program_id(2) * block_rows + tl.arange(0, block_rows)
    first = tl.program_id(1) * part
    stop = tl.minimum(first + part, inner)
    line = values + columns.to(tl.int64)[None, :] * inner
    given_line = x + row.to(tl.int64)[:, None] * inner
    total = tl.zeros((block_rows, block_outer), tl.float32)
    for start in range(first, stop, block_inner):
        place = start + tl.arange(0, block_inner)
        weight = tl.load(
            line + place[:, None], mask=(columns < outer)[None, :] & (place < stop)[:, None], other=0
        )
        given = tl.load(
            given_line + place[None, :], mask=(row < rows)[:, None] & (place < stop)[None, :], other=0.0
        )
        total = tl.dot(given, weight.to(x.dtype.element_ty), total, input_precision="ieee")
    inside = (row < rows)[:, None] & (columns < outer)[None, :]
    target = row.to(tl.int64)[:, None] * outer + columns[None, :]
    if partial is not None:
        tl.store(partial + tl.program_id(1).to(tl.int64) * rows * outer + target, total, mask=inside)
    else:
        total = _finished(total, scales, bias, residual, row.to(tl.int64), outer, columns, inside)
        tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def nf4_few(
    x,
    codes,
    levels,
    scales,
    bias,
    residual,
    out,
    partial,
    rows,
    outer,
    inner,
    part,
    group_bytes: tl.constexpr,
    block_rows: tl.constexpr,
    block_outer: tl.constexpr,
    block_inner: tl.constexpr,
):
    """As `int8_few`. A byte holds two neighbours, the first in its upper half; `part` and `block_inner` count
    bytes, of which `group_bytes` share a scale. `levels [16]` is what the codes stand for.
    """
    columns = tl.program_id(0) * block_outer + tl.arange(0, block_outer)
    row = tl.arange(0, block_rows)
    halves = inner // 2
    first = tl.program_id(1) * part
    stop = tl.minimum(first + part, halves)
    line = columns.to(tl.int64)[:, None] * halves
    scale_line = scales + columns.to(tl.int64)[:, None] * (halves // group_bytes)
    total = tl.zeros((block_rows, block_outer, block_inner), tl.float32)
    for start in range(first, stop, block_inner):
        place = start + tl.arange(0, block_inner)
        within = (columns < outer)[:, None] & (place < stop)[None, :]
        code = tl.load(codes + line + place[None, :], mask=within, other=0).to(tl.int32)
        scale = tl.load(scale_line + (place // group_bytes)[None, :], mask=within, other=0.0)
        upper = tl.load(levels + (code >> 4)) * scale
        lower = tl.load(levels + (code & 15)) * scale
        given = x + row[:, None] * inner + 2 * place[None, :]
        known = (row < rows)[:, None] & (place < stop)[None, :]
        total += tl.load(given, mask=known, other=0.0).to(tl.float32)[:, None, :] * upper[None, :, :]
        total += tl.load(given + 1, mask=known, other=0.0).to(tl.float32)[:, None, :] * lower[None, :, :]
    found = tl.sum(total, 2)
    inside = (row < rows)[:, None] & (columns < outer)[None, :]
    target = row[:, None] * outer + columns[None, :]
    if partial is not None:
        tl.store(partial + tl.program_id(1) * rows * outer + target, found, mask=inside)
    else:
        found = _finished(found, None, bias, residual, row, outer, columns, inside)
        tl.store(out + target, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def finish(
    partial,
    scales,
    bias,
    residual,
    out,
    rows,
    outer,
    parts,
    block_outer: tl.constexpr,
):
    """Sums `partial [parts, rows, outer]` in their order, so that the same comes out each time.

    Grid (outer, rows).
    """
    row = tl.program_id(1) + tl.arange(0, 1)
    columns = tl.program_id(0) * block_outer + tl.arange(0, block_outer)
    inside = (row < rows)[:, None] & (columns < outer)[None, :]
    target = row.to(tl.int64)[:, None] * outer + columns[None, :]
    total = tl.zeros((1, block_outer), tl.float32)
    for number in range(parts):
        total += tl.load(partial + number * rows.to(tl.int64) * outer + target, mask=inside, other=0.0)
    total = _finished(total, scales, bias, residual, row, outer, columns, inside)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows(x, dropped, quantized, steps, inner, block: tl.constexpr):
    """Rounds the row `program_id` of `x` to int8 with its absmax, but for the `dropped` columns: zero."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((block,), tl.float32)
    for start in range(0, inner, block):
        place = start + tl.arange(0, block)
        kept = (place < inner) & (tl.load(dropped + place, mask=place < inner, other=1) == 0)
        largest = tl.maximum(
            largest, tl.abs(tl.load(x + row * inner + place, mask=kept, other=0.0)).to(tl.float32)
        )
    step = tl.maximum(tl.max(largest, 0), 1e-30) / 127.0
    tl.store(steps + row, step)
    for start in range(0, inner, block):
        place = start + tl.arange(0, block)
        kept = (place < inner) & (tl.load(dropped + place, mask=place < inner, other=1) == 0)
        number = tl.load(x + row * inner + place, mask=kept, other=0.0).to(tl.float32) / step
        # Adding 1.5 * 2^23 leaves no bits behind the point: the nearest integer, halves to the even one.
        number = (number + 12582912.0) - 12582912.0
        tl.store(quantized + row * inner + place, number.to(tl.int8), mask=place < inner)


@triton.jit
def finish_int8(sums, steps, outliers, scales, bias, residual, out, outer, block: tl.constexpr):
    """`(sums * steps + outliers) * scales + bias + residual` of `[rows, outer]`; grid (outer, rows)."""
    row = tl.program_id(1) + tl.arange(0, 1)
    columns = tl.program_id(0) * block + tl.arange(0, block)
    inside = (columns < outer)[None, :]
    target = row.to(tl.int64)[:, None] * outer + columns[None, :]
    total = tl.load(sums + target, mask=inside, other=0).to(tl.float32) * tl.load(steps + row)[:, None]
    total += tl.load(outliers + target, mask=inside, other=0.0).to(tl.float32)
    total = _finished(total, scales, bias, residual, row.to(tl.int64), outer, columns, inside)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)
