"""Rows of the KV pool in int8: about half the memory of 16 bits, a good quarter of float32's.

A row is one head's key (or value) of one token: `size` bytes, padding to a multiple of four, and behind it
the float32 scale that undoes the rounding (number = byte * scale, the largest magnitude is 127). A scale for
each row, since tokens differ much more in magnitude than the numbers of one head.

Decoding multiplies by the bytes, converted but not scaled, and scales scores and weights instead: one number
for each row rather than `size`. Rows are converted in strips that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]

_LARGEST = 127
# float32 and bfloat16, 16 heads of 64, 2000 to 8000 rows: strips of 1024 were the fastest or near [measured].
# A GPU has bandwidth enough for the copy, and each strip costs it launches.
_STRIP_ROWS_CPU = 1024
_STRIP_ROWS = 16_384


class Int8Pool:
    """Packs rows of `[..., size]` numbers into `[..., width]` bytes, and multiplies by them.

    Numbers go in and come out in `dtype`. Not safe for several threads at a time: strips share a buffer.
    """

    __slots__ = ("_buffer", "_dtype", "_size", "_strip_rows", "width")

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._size = size
        self._dtype = dtype
        self._strip_rows = _STRIP_ROWS_CPU if torch.device(device).type == "cpu" else _STRIP_ROWS
        self._buffer = torch.empty(0, dtype=dtype, device=device)
        self.width = row_bytes(size)

    def pack(self, rows: Tensor) -> Tensor:
        """`[..., size]` -> int8 `[..., width]`."""
        scale = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True, dtype=torch.float32)
        scale.clamp_min_(torch.finfo(torch.float32).tiny * _LARGEST).div_(_LARGEST)
        packed = rows.new_empty((*rows.shape[:-1], self.width), dtype=torch.int8)
        packed[..., : self._size] = (rows / scale).round_()
        packed[..., -4:].view(torch.float32).copy_(scale)
        return packed

    def unpack(self, pair: Tensor, ranges: Ranges) -> Tensor:
        """The rows `ranges` of `pair [2, kv, pool_tokens, width]` as numbers `[2, kv, rows, size]`."""
        count = sum(stop - start for start, stop in ranges)
        rows = torch.empty((*pair.shape[:2], count, self._size), dtype=self._dtype, device=pair.device)
        return self._convert(pair, ranges, rows).mul_(self.scales(pair, ranges).mT)

    def scales(self, pair: Tensor, ranges: Ranges) -> Tensor:
        """Scales of the rows `ranges`: float32 `[2, kv, 1, rows]`; a view if they are one range."""
        parts = [pair[:, :, start:stop, -4:].view(torch.float32) for start, stop in ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).mT

    def times_keys(self, query: Tensor, keys: Tensor, strips: Sequence[Ranges]) -> Tensor:
        """`query [kv, group, size]` by the bytes of `keys [kv, pool_tokens, width]`: `[kv, group, rows]`."""
        parts = [torch.bmm(query, self._strip(keys, strip).mT) for strip in strips]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def times_values(self, weights: Tensor, values: Tensor, strips: Sequence[Ranges]) -> Tensor:
        """`weights [kv, group, rows]` by the bytes of `values`: `[kv, group, size]`."""
        if len(strips) == 1:
            return torch.bmm(weights, self._strip(values, strips[0]))
        total, first = None, 0
        for strip in strips:
            numbers = self._strip(values, strip)
            part = torch.bmm(weights[:, :, first : first + numbers.shape[1]], numbers)
            first += numbers.shape[1]
            total = part if total is None else total.add_(part)
        assert total is not None, "a sequence has at least one row"
        return total

    def strips(self, ranges: Ranges) -> list[Ranges]:
        """`ranges` cut and gathered into strips of rows, in order: what is converted at once."""
        return list(_strips(ranges, self._strip_rows))

    def _strip(self, half: Tensor, strip: Ranges) -> Tensor:
        """The rows `strip` of `half [kv, pool_tokens, width]` as unscaled numbers; lasts until the next."""
        count = sum(stop - start for start, stop in strip)
        needed = half.shape[0] * count * self._size
        if needed > self._buffer.numel():
            with torch.inference_mode(False):  # it outlives the step
                self._buffer = self._buffer.new_empty(max(needed, 2 * self._buffer.numel()))
        return self._convert(half, strip, self._buffer[:needed].view(half.shape[0], count, self._size))

    def _convert(self, source: Tensor, ranges: Ranges, target: Tensor) -> Tensor:
        """Copies bytes of the rows `ranges` (dimension -2) to `target`, as numbers."""
        first = 0
        for start, stop in ranges:
            target[..., first : first + stop - start, :].copy_(source[..., start:stop, : self._size])
            first += stop - start
        return target


def row_bytes(size: int) -> int:
    """Bytes of a row of `size` numbers, its scale included; float32 scales are read in place, so aligned."""
    return -(-size // 4) * 4 + 4


def _strips(ranges: Ranges, rows: int) -> Iterator[Ranges]:
    strip: list[tuple[int, int]] = []
    free = rows
    for start, stop in ranges:
        cuts = [start, *range(start + free, stop, rows), stop]
        for begin, end in pairwise(cuts):
            strip.append((begin, end))
            free -= end - begin
            if not free:
                yield tuple(strip)
                strip, free = [], rows
    if strip:
        yield tuple(strip)
