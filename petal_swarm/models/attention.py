"""Attention of a packed batch over the KV pool: per sequence, without padding, copying as little as possible.

An `AttentionPlan` is made once a step and used by every block of the step. It knows two cases:
one new token (decode: two batched products over views of the pool), and several (prefill:
`scaled_dot_product_attention` over bounded chunks of queries). Query heads share key heads in groups
(GQA, arXiv:2305.13245); positions may be biased linearly (ALiBi, arXiv:2108.12409); a window may limit
how far back a token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.models import devices
from petal_swarm.models.int8_kv import Int8Pool, Ranges
from petal_swarm.models.norms import RMSNorm
from petal_swarm.models.packing import PackedBatch, PackedSlice
from petal_swarm.models.ragged import Decoding, Group, in_groups
from petal_swarm.models.rope import rotate_

_QUERY_CHUNK = 256
# On a device a mask is written out: at most this many numbers at a time, and so many kept for other blocks.
_MASK_NUMBERS = 1 << 25
_KEPT_MASK_NUMBERS = 1 << 26
# Rows of a mask begin at multiples of this, or the kernels of a GPU would copy it for each block.
_MASK_ALIGNMENT = 16


# Ranges copied together, then multiplied, or each multiplied where it is; 16 heads of 64, float32: 1000
# and 24 rows 330 and 160 us, 128 and 40 rows 62 and 40 us; four of 16 rows 29 and 37 us [measured].
_LONG_RANGE = 64


class Heads:
    """Shape of the attention: `query` heads of `size`, in groups over `kv` heads, scores times `scale`."""

    __slots__ = ("group", "kv", "query", "scale", "size", "width")

    def __init__(self, query: int, kv: int, size: int) -> None:
        self.query = query
        self.kv = kv
        self.size = size
        self.group = query // kv
        self.width = (query + 2 * kv) * size
        self.scale = size**-0.5


class MaskTable:
    """Masks and ALiBi biases of every query as windows into one row of numbers for each head.

    What is added to a score depends on the distance d = key position - query position only:
    `slope * d` for `-window < d <= 0`, minus infinity elsewhere. So the whole mask of a chunk is a view with
    overlapping rows of `table[head, capacity + d]`, at the price of taking the queries last to first.
    """

    __slots__ = ("_capacity", "_slopes", "_table", "_window")

    def __init__(self, slopes: Tensor, window: int | None, dtype: torch.dtype) -> None:
        self._slopes = slopes
        self._window = window
        self._capacity = 0
        self._table = torch.empty(slopes.shape[0], 0, dtype=dtype, device=slopes.device)

    def _reach(self, keys: int) -> Tensor:
        if keys > self._capacity:
            self._grow(max(keys, 2 * self._capacity, 512))
        return self._table

    def _grow(self, capacity: int) -> None:
        with torch.inference_mode(False):  # the table serves training steps too
            distance = torch.arange(-capacity, _QUERY_CHUNK, device=self._slopes.device)
            bias = self._slopes[:, None] * distance
            hidden = distance > 0
            if self._window is not None:
                hidden |= distance <= -self._window
            self._table = bias.masked_fill_(hidden, -torch.inf).to(self._table.dtype)
        self._capacity = capacity

    def decode(self, heads: Heads, keys: int) -> Tensor:
        """Bias of one query at the last of `keys` positions: `[kv, group, keys]`."""
        table = self._reach(keys)
        row = table.stride(0) if table.shape[0] > 1 else 0
        start = self._capacity + 1 - keys
        return table.as_strided((heads.kv, heads.group, keys), (heads.group * row, row, 1), start)

    def reversed_queries(self, heads: Heads, queries: int, keys: int) -> Tensor:
        """Mask `[kv, group, queries, keys]`; query 0 is the last one, and stands at the last key."""
        table = self._reach(keys)
        row = table.stride(0) if table.shape[0] > 1 else 0
        shape = (heads.kv, heads.group, queries, keys)
        return table.as_strided(shape, (heads.group * row, row, 1, 1), self._capacity + 1 - keys)

    def written_out(self, heads: Heads, queries: int, keys: int) -> Tensor:
        """The same for queries first to last, as numbers of its own: other devices' kernels want that.

        Without ALiBi it is the same for all heads, and written once.
        """
        view = self.reversed_queries(heads, queries, keys)
        if self._table.shape[0] == 1:
            view = view[:1, :1]
        width = -(-keys // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        mask = view.new_empty((*view.shape[:3], width))[..., :keys]
        return mask.copy_(view.flip(2)).expand(heads.kv, heads.group, -1, -1)

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    @property
    def table(self) -> Tensor:
        """What all masks are views of; grows."""
        return self._table

    @property
    def heads(self) -> int:
        """How many heads a mask is written out for."""
        return self._table.shape[0]


class _Piece:
    """One slice of the batch: which pool rows it reads, and how."""

    __slots__ = ("bias", "keys", "length", "masks", "ranges", "row", "scattered", "start", "strips")

    def __init__(self, piece: PackedSlice, window: int | None) -> None:
        self.row = piece.row
        self.length = piece.length
        self.bias: Tensor | None = None
        self.masks: dict[int, Tensor] | None = None
        self.strips: Sequence[Ranges] = ()
        self.ranges = piece.extents
        self.keys = piece.position + piece.length
        if window is not None and piece.position >= window:
            self.ranges = _drop_first(piece.extents, piece.position + 1 - window)
            self.keys = piece.length + window - 1
        self.start = self.ranges[0][0] if len(self.ranges) == 1 else -1
        #: Several ranges so long that multiplying by each is cheaper than copying them together.
        self.scattered = self.start < 0 and self.keys >= _LONG_RANGE * len(self.ranges)

    def read(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, transposed, `[kv, size, keys]` and values `[kv, keys, size]`; views when in one range."""
        if self.start < 0:
            # Measured for 2 to 64 ranges of 16 to 128 rows: faster than a gather of rows in every case.
            both = torch.cat([pair[:, :, a:b] for a, b in self.ranges], dim=2)
            return both[0].mT, both[1]
        _, kv, _, size = pair.shape
        plane, strip, row, _ = pair.stride()
        first = pair.storage_offset() + self.start * row
        # One call each: slicing, unbinding and transposing cost a microsecond more.
        keys = pair.as_strided((kv, size, self.keys), (strip, 1, row), first)
        return keys, pair.as_strided((kv, self.keys, size), (strip, row, 1), first + plane)


def _drop_first(extents: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[int, int], ...]:
    kept = []
    for start, stop in extents:
        drop = min(count, stop - start)
        count -= drop
        if start + drop < stop:
            kept.append((start + drop, stop))
    return tuple(kept)


class Attention(Protocol):
    """What blocks know of the attention of a step: the same for all of them."""

    def rotate(self, qkv: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalizes the heads of queries and keys, if `norm`, and turns them by position.

        `qkv` as in `attend`, heads interleaved; it may be overwritten.
        """
        ...

    def attend(self, qkv: Tensor, pair: Tensor) -> Tensor:
        """`qkv [tokens, (query + 2 kv) * size]`, contiguous, ordered query heads, key heads, value heads.

        `pair [2, kv, tokens, size]` are keys and values to attend to besides; returns
        `[tokens, query * size]`.
        """
        ...


class AttentionPlan:
    """Stores a block's new keys and values, and attends; made once for all blocks of a step.

    `rotation` is what rotary families turn queries and keys by: complex64 `[tokens, 1, head_dim / 2]`.
    `int8` packs and reads the rows of a pool in int8. New tokens, too, are attended to as they were rounded:
    what a token sees must not depend on how its prompt was cut up.
    """

    __slots__ = (
        "_alibi",
        "_batch",
        "_groups",
        "_heads",
        "_int8",
        "_masks",
        "_pieces",
        "_widened",
        "_window",
        "rotation",
    )

    def __init__(
        self,
        batch: PackedBatch,
        heads: Heads,
        masks: MaskTable,
        window: int | None,
        alibi: bool,
        int8: Int8Pool | None = None,
    ) -> None:
        self._batch = batch
        self._heads = heads
        self._masks = masks
        self._window = window
        self._alibi = alibi
        self._int8 = int8
        # A CPU multiplies few rows of 16 bits slowly: one query by 100 and 1000 keys and values takes 83
        # and 722 us in bfloat16, 35 and 269 us if they are made float32 first [measured], and more exact.
        self._widened = masks.dtype.itemsize == 2 and int8 is None and devices.on_host(batch.device)
        self.rotation: Tensor | None = None
        self._pieces = [_Piece(s, window) for s in batch.slices]
        self._groups: Sequence[Group] = ()
        if len(self._pieces) > 1 and not devices.on_host(batch.device):
            self._groups = self._grouped()
        if alibi:
            for piece in self._pieces:
                if piece.length == 1:
                    bias = masks.decode(heads, piece.keys)
                    piece.bias = bias.float() if self._widened else bias
        if int8 is not None:
            for piece in self._pieces:
                if piece.length == 1:
                    piece.strips = int8.strips(piece.ranges)

    def _grouped(self) -> list[Group]:
        """The sequences that decode, but for those so long that they are better read in place."""
        heads = self._heads
        decoding = [
            Decoding(place, piece.row, piece.ranges, piece.keys)
            for place, piece in enumerate(self._pieces)
            if piece.length == 1
        ]
        return [
            Group(members, self._masks.decode(heads, members[0].keys), self._batch.device)
            for members in in_groups(decoding, 2 * heads.kv * heads.size)
        ]

    def rotate(self, qkv: Tensor, norm: RMSNorm | None) -> Tensor:
        """In place; see `Attention`."""
        assert self.rotation is not None, "plans for this family carry rotations"
        shape = self._heads
        heads = qkv.view(qkv.shape[0], -1, shape.size)[:, : shape.query + shape.kv]
        if norm is not None:
            heads.copy_(norm(heads))
        rotate_(heads, self.rotation)
        return qkv

    def attend(self, qkv: Tensor, pair: Tensor) -> Tensor:
        """See `Attention`. Writes keys and values into `pair`, as in `KVPool.pairs`."""
        self._store(qkv, pair)
        pieces = self._pieces
        if len(pieces) == 1:
            return self._one(pieces[0], qkv, pair)
        if self._groups:
            return self._by_groups(qkv, pair)
        return torch.cat([self._one(piece, qkv, pair) for piece in pieces])

    def _by_groups(self, qkv: Tensor, pair: Tensor) -> Tensor:
        heads = self._heads
        query = qkv[:, : heads.query * heads.size].view(-1, heads.kv, heads.group, heads.size)
        found: dict[int, Tensor] = {}
        for group in self._groups:
            out = group.attend(query, heads.scale, pair, self._int8)
            if len(group.places) == len(self._pieces):
                return out
            found.update({place: out[line : line + 1] for line, place in enumerate(group.places)})
        for place, piece in enumerate(self._pieces):
            if place not in found:
                found[place] = self._one(piece, qkv, pair)
        return torch.cat([found[place] for place in range(len(self._pieces))])

    def _store(self, qkv: Tensor, pair: Tensor) -> None:
        heads, batch = self._heads, self._batch
        new = qkv.as_strided(
            (2, heads.kv, batch.tokens, heads.size),
            (heads.kv * heads.size, heads.size, heads.width, 1),
            qkv.storage_offset() + heads.query * heads.size,
        )
        if self._int8 is not None:
            new = self._int8.pack(new)
        if batch.run is not None:
            pair.narrow(2, batch.run, batch.tokens).copy_(new)
        else:
            pair.index_copy_(2, batch.slots, new)

    def _one(self, piece: _Piece, qkv: Tensor, pair: Tensor) -> Tensor:
        if self._int8 is not None:
            return self._one_int8(piece, qkv, pair, self._int8)
        if piece.length > 1:
            keys, values = piece.read(pair)
            return self._prefill(piece, qkv, keys, values)
        heads = self._heads
        query = qkv.as_strided(
            (heads.kv, heads.group, heads.size),
            (heads.group * heads.size, heads.size, 1),
            qkv.storage_offset() + piece.row * heads.width,
        )
        if self._widened:
            return self._decode_widened(piece, query, pair).to(qkv.dtype)
        if piece.scattered:
            return self._decode_by_ranges(piece, query, pair)
        keys, values = piece.read(pair)
        return self._decode(piece, query, keys, values)

    def _decode_widened(self, piece: _Piece, query: Tensor, pair: Tensor) -> Tensor:
        if piece.scattered:
            return self._decode_by_ranges(piece, query.float(), pair)
        keys, values = piece.read(pair)
        return self._decode(piece, query.float(), keys.float(), values.float())

    def _decode(self, piece: _Piece, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if piece.bias is None:
            scores = torch.bmm(query, keys).mul_(self._heads.scale)
        else:
            scores = torch.baddbmm(piece.bias, query, keys, alpha=self._heads.scale)
        return torch.bmm(scores.softmax(-1), values).view(1, -1)

    def _decode_by_ranges(self, piece: _Piece, query: Tensor, pair: Tensor) -> Tensor:
        """As `_decode`, of keys and values in several ranges, each multiplied where it is."""
        dtype = query.dtype
        parts = [torch.bmm(query, pair[0, :, a:b].to(dtype).mT) for a, b in piece.ranges]
        scores = torch.cat(parts, dim=2).mul_(self._heads.scale)
        if piece.bias is not None:
            scores += piece.bias
        weights, first = scores.softmax(-1), 0
        total = torch.zeros_like(query)
        for start, stop in piece.ranges:
            part = weights[:, :, first : first + stop - start]
            total.baddbmm_(part, pair[1, :, start:stop].to(dtype))
            first += stop - start
        return total.view(1, -1)

    def _one_int8(self, piece: _Piece, qkv: Tensor, pair: Tensor, int8: Int8Pool) -> Tensor:
        heads = self._heads
        if piece.length > 1:
            numbers = int8.unpack(pair, piece.ranges)
            return self._prefill(piece, qkv, numbers[0].mT, numbers[1])
        query = qkv[piece.row, : heads.query * heads.size].view(heads.kv, heads.group, heads.size)
        key_scales, value_scales = int8.scales(pair, piece.ranges)
        scores = int8.times_keys(query, pair[0], piece.strips)
        # Scores and weights are float32 from here on: the scales are.
        if piece.bias is None:
            scores = (scores * key_scales).mul_(heads.scale)
        else:
            scores = torch.addcmul(piece.bias, scores, key_scales, value=heads.scale)
        weights = scores.softmax(-1).mul_(value_scales).to(qkv.dtype)
        return int8.times_values(weights, pair[1], piece.strips).view(1, -1)

    def _prefill(self, piece: _Piece, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, length = self._heads, piece.length
        query = qkv[piece.row : piece.row + length, : heads.query * heads.size]
        query = query.view(length, heads.kv, heads.group, heads.size).permute(1, 2, 0, 3)
        keys = keys.mT.unsqueeze(1).expand(-1, heads.group, -1, -1)
        values = values.unsqueeze(1).expand(-1, heads.group, -1, -1)
        limited = self._window is not None and length > self._window
        if length == piece.keys and not self._alibi and not limited:
            out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=heads.scale)
        else:
            out = self._in_chunks(piece, query, keys, values)
        return out.permute(2, 0, 1, 3).reshape(length, heads.query * heads.size)

    def _in_chunks(self, piece: _Piece, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Masked attention `[kv, group, length, size]`; each chunk of queries sees no key it need not."""
        heads, length, total = self._heads, query.shape[2], keys.shape[2]
        viewed = devices.on_host(query.device)
        chunk = _QUERY_CHUNK
        if not viewed:
            chunk = max(1, min(chunk, _MASK_NUMBERS // (self._masks.heads * total)))
        outs = []
        for first in range(0, length, chunk):
            queries = min(chunk, length - first)
            stop = total - length + first + queries
            start = 0 if self._window is None else max(0, stop - queries + 1 - self._window)
            part = query[:, :, first : first + queries]
            if viewed:
                mask = self._masks.reversed_queries(heads, queries, stop - start)
                part = part.flip(2)
            else:
                mask = self._kept_mask(piece, queries, stop - start)
            out = F.scaled_dot_product_attention(
                part, keys[:, :, start:stop], values[:, :, start:stop], attn_mask=mask, scale=heads.scale
            )
            outs.append(out.flip(2) if viewed else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _kept_mask(self, piece: _Piece, queries: int, keys: int) -> Tensor:
        """A mask that is written out, once for all blocks unless that were too much to keep."""
        if self._masks.heads * piece.length * piece.keys > _KEPT_MASK_NUMBERS:
            return self._masks.written_out(self._heads, queries, keys)
        if piece.masks is None:
            piece.masks = {}
        # Within a piece, the numbers of queries and keys name the chunk, or one whose mask is the same.
        name = queries << 32 | keys
        if name not in piece.masks:
            piece.masks[name] = self._masks.written_out(self._heads, queries, keys)
        return piece.masks[name]
