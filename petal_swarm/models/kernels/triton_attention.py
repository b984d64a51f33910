"""Triton kernels: attention of one new token each of many sequences, over the pages of the KV pool.

What sequences are in a batch is known on the device alone: `lengths` (the new token included; 0 for a row
that is nobody's), `slots` (the pool row of the new token), and `pages`, the pages of all sequences one after
the other, those of sequence b from `starts[b]` on. So a CUDA graph of these kernels serves every batch of a
size.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Stands for minus infinity: the difference of two of them is zero, not undefined.
_NOTHING: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def place(
    qkv,
    pair,
    pair_scales,
    lengths,
    slots,
    rotation,
    norm,
    eps,
    first_head,
    query,
    kv,
    size,
    plane,
    strip,
    step,
    scale_place,
    half_block: tl.constexpr,
):
    """Normalizes and rotates queries and keys, and puts keys and values into the pool.

    Grid (rows, heads from `first_head` on). `norm` `[query + kv, size]` and `rotation` `[positions, size / 2,
    2]` may be None. Strides of `pair` are in numbers; with `pair_scales`, the same memory as float32, rows
    are packed as `Int8Pool` does, their scale at the number `scale_place` of the row. Queries stay in `qkv`.
    """
    batch = tl.program_id(0)
    head = first_head + tl.program_id(1)
    number = tl.arange(0, half_block)
    inside = number < size // 2
    line = qkv + (batch.to(tl.int64) * (query + 2 * kv) + head) * size
    even = tl.load(line + 2 * number, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(line + 2 * number + 1, mask=inside, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    if head < query + kv:
        if norm is not None:
            inverse = tl.rsqrt(tl.sum(even * even + odd * odd, 0) / size + eps)
            weight = norm + head * size + 2 * number
            # Rounded where transformers rounds.
            even = (even * inverse).to(kind).to(tl.float32)
            odd = (odd * inverse).to(kind).to(tl.float32)
            even = (even * tl.load(weight, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
            odd = (odd * tl.load(weight + 1, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        if rotation is not None:
            position = tl.maximum(tl.load(lengths + batch) - 1, 0).to(tl.int64)
            turn = rotation + position * size + 2 * number
            real = tl.load(turn, mask=inside, other=0.0)
            imaginary = tl.load(turn + 1, mask=inside, other=0.0)
            turned = even * real - odd * imaginary
            odd = even * imaginary + odd * real
            even = turned
    even = even.to(kind)
    odd = odd.to(kind)
    slot = tl.load(slots + batch).to(tl.int64)
    if head < query:
        tl.store(line + 2 * number, even, mask=inside)
        tl.store(line + 2 * number + 1, odd, mask=inside)
    elif slot >= 0:
        is_value = (head >= query + kv).to(tl.int64)
        target = is_value * plane + (head - query - is_value * kv) * strip + slot * step
        if pair_scales is not None:
            wide_even = even.to(tl.float32)
            wide_odd = odd.to(tl.float32)
            largest = tl.max(tl.maximum(tl.abs(wide_even), tl.abs(wide_odd)), 0)
            scale = tl.maximum(largest, 1.4929e-36) / 127.0
            tl.store(pair_scales + target // 4 + scale_place, scale)
            # Adding 1.5 * 2^23 leaves no bits behind the point: the nearest integer, halves to the even one.
            packed_even = (wide_even / scale + 12582912.0) - 12582912.0
            packed_odd = (wide_odd / scale + 12582912.0) - 12582912.0
            tl.store(pair + target + 2 * number, packed_even.to(tl.int8), mask=inside)
            tl.store(pair + target + 2 * number + 1, packed_odd.to(tl.int8), mask=inside)
        else:
            tl.store(pair + target + 2 * number, even, mask=inside)
            tl.store(pair + target + 2 * number + 1, odd, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def decode(
    qkv,
    pair,
    pair_scales,
    lengths,
    starts,
    pages,
    slopes,
    out,
    sums,
    tops,
    totals,
    scale,
    window,
    parts,
    kv,
    size,
    plane,
    strip,
    step,
    scale_place,
    group: tl.constexpr,
    group_block: tl.constexpr,
    size_block: tl.constexpr,
    page_tokens: tl.constexpr,
    block_keys: tl.constexpr,
):
    """Attention over one of `parts` of a sequence's keys (flash-decoding): grid (rows, kv heads, parts).

    With `group_block > 1` query heads that share keys are multiplied on tensor cores. What `sums [rows,
    heads, parts, size]`, `tops` and `totals` `[rows, heads, parts]` are given, `combine` puts together; where
    they are None, there is one part. A `window` of 0 is none.
    """
    batch = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths + batch)
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    each = tl.cdiv(tl.cdiv(length - first, parts), block_keys) * block_keys
    begin = first + part * each
    end = tl.minimum(begin + each, length)
    number = tl.arange(0, size_block)
    member = tl.arange(0, group_block)
    head = kv_head * group + member
    heads = kv * group
    own = (member < group)[:, None] & (number < size)[None, :]
    width = (heads + 2 * kv) * size
    query = tl.load(
        qkv + batch.to(tl.int64) * width + head[:, None] * size + number[None, :], mask=own, other=0.0
    )
    kind = qkv.dtype.element_ty
    own_pages = pages + tl.load(starts + batch)
    strip_start = kv_head.to(tl.int64) * strip
    top = tl.full((group_block,), _NOTHING, tl.float32)
    total = tl.zeros((group_block,), tl.float32)
    found = tl.zeros((group_block, size_block), tl.float32)
    for start in range(begin, end, block_keys):
        key = start + tl.arange(0, block_keys)
        known = key < end
        page = tl.load(own_pages + key // page_tokens, mask=known, other=0).to(tl.int64)
        row = strip_start + (page * page_tokens + key % page_tokens) * step
        place = row[:, None] + number[None, :]
        inside = known[:, None] & (number < size)[None, :]
        keys = tl.load(pair + place, mask=inside, other=0)
        if group_block > 1:
            scores = tl.dot(query, tl.trans(keys.to(kind)), input_precision="ieee")
        else:
            scores = tl.sum(query.to(tl.float32) * keys.to(tl.float32), 1)[None, :]
        if pair_scales is not None:
            scores *= tl.load(pair_scales + row // 4 + scale_place, mask=known, other=0.0)[None, :]
        scores *= scale
        if slopes is not None:
            slope = tl.load(slopes + head, mask=member < group, other=0.0)
            scores += slope[:, None] * (key - (length - 1)).to(tl.float32)[None, :]
        scores = tl.where(known[None, :], scores, _NOTHING)
        highest = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp(top - highest)
        weights = tl.exp(scores - highest[:, None])
        total = total * decay + tl.sum(weights, 1)
        values = tl.load(pair + plane + place, mask=inside, other=0)
        if pair_scales is not None:
            value_scales = pair_scales + (plane + row) // 4 + scale_place
            weights *= tl.load(value_scales, mask=known, other=0.0)[None, :]
        if group_block > 1:
            found = found * decay[:, None] + tl.dot(weights.to(kind), values.to(kind), input_precision="ieee")
        else:
            more = tl.sum(tl.trans(weights) * values.to(tl.float32), 0)
            found = found * decay[:, None] + more[None, :]
        top = highest
    row_heads = batch.to(tl.int64) * heads + head
    if sums is None:
        found = found / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + row_heads[:, None] * size + number[None, :], found.to(out.dtype.element_ty), mask=own)
    else:
        place = row_heads * parts + part
        tl.store(sums + place[:, None] * size + number[None, :], found, mask=own)
        tl.store(tops + place, top, mask=member < group)
        tl.store(totals + place, total, mask=member < group)


@triton.jit(do_not_specialize=["parts"])
def combine(sums, tops, totals, out, parts, heads, size, part_block: tl.constexpr, size_block: tl.constexpr):
    """The result of all parts of `decode`; grid (rows, heads). A row that is nobody's is zero."""
    row_head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    part = tl.arange(0, part_block)
    number = tl.arange(0, size_block)
    top = tl.load(tops + row_head * parts + part, mask=part < parts, other=_NOTHING)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.load(totals + row_head * parts + part, mask=part < parts, other=0.0)
    inside = (part < parts)[:, None] & (number < size)[None, :]
    place = (row_head * parts + part)[:, None] * size + number[None, :]
    found = tl.sum(tl.load(sums + place, mask=inside, other=0.0) * weight[:, None], 0)
    found = found / tl.maximum(tl.sum(total * weight, 0), 1e-30)
    tl.store(out + row_head * size + number, found.to(out.dtype.element_ty), mask=number < size)


@triton.jit
def rms_norm(x, weight, out, size, eps, block: tl.constexpr):
    """RMS norm of the row `program_id`, rounded where transformers rounds."""
    line = tl.program_id(0).to(tl.int64) * size
    squares = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        number = tl.load(x + line + place, mask=place < size, other=0.0).to(tl.float32)
        squares += number * number
    inverse = tl.rsqrt(tl.sum(squares, 0) / size + eps)
    kind = out.dtype.element_ty
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        number = tl.load(x + line + place, mask=inside, other=0.0).to(tl.float32)
        number = (number * inverse).to(kind).to(tl.float32)
        number *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + line + place, number.to(kind), mask=inside)
