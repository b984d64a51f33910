"""What the engine hands to the blocks: the tokens of one step, and the KV pool they attend over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from petal_swarm.models import devices
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.int8_kv import Int8Pool
from petal_swarm.span import Span

if TYPE_CHECKING:
    from petal_swarm.models.packed_adapters import Segment, ServedAdapter


class PackedSlice(NamedTuple):
    """Rows `[row, row + length)` of a packed matrix: new tokens of one sequence.

    They stand at the absolute positions `[position, position + length)`. `extents` are ranges
    `[start, stop)` of KV pool rows which hold, in order, the positions `0 .. position + length`,
    the new tokens included.
    """

    row: int
    length: int
    position: int
    extents: tuple[tuple[int, int], ...]


@dataclass
class PackedBatch:
    """The slices of one step; made by `build`.

    `run` is the first pool row when the rows of all new tokens are consecutive, else None. `lora` names the
    rows that have an adapter with LoRA.
    """

    slices: tuple[PackedSlice, ...]
    tokens: int
    run: int | None
    device: torch.device | str
    _ranges: tuple[tuple[int, int], ...]
    lora: tuple[Segment, ...] = ()

    @classmethod
    def build(cls, slices: Sequence[PackedSlice], device: torch.device | str = "cpu") -> PackedBatch:
        """Finds the pool rows of the new tokens; the slices must cover the packed rows in order."""
        ranges: list[tuple[int, int]] = []
        row = 0
        for piece in slices:
            assert piece.length > 0, "a slice holds at least one token"
            assert piece.row == row, "slices must cover the packed rows in order"
            row += piece.length
            _append_new_rows(ranges, piece)
        run = ranges[0][0] if len(ranges) == 1 else None
        return cls(tuple(slices), row, run, device, tuple(ranges))

    # Made when first asked for: decoding one sequence, where every microsecond counts, needs neither.

    @cached_property
    def slots(self) -> Tensor:
        """The pool row of every new token: int64 `[tokens]`."""
        return self._host_slots if devices.on_host(self.device) else self._on_device[0]

    @cached_property
    def positions(self) -> Tensor:
        """The absolute position of every new token: int64 `[tokens]`."""
        return self._host_positions if devices.on_host(self.device) else self._on_device[1]

    @property
    def _host_slots(self) -> Tensor:
        return torch.cat([torch.arange(start, stop) for start, stop in self._ranges])

    @property
    def _host_positions(self) -> Tensor:
        return torch.cat([torch.arange(s.position, s.position + s.length) for s in self.slices])

    @cached_property
    def _on_device(self) -> Tensor:
        """Slots and positions `[2, tokens]`: one copy, for which nobody waits."""
        return devices.to_device(torch.stack([self._host_slots, self._host_positions]), self.device)


def _append_new_rows(ranges: list[tuple[int, int]], piece: PackedSlice) -> None:
    """Appends the pool rows of the slice's new tokens, joining ranges that touch."""
    skip = piece.position
    found = 0
    for start, stop in piece.extents:
        size = stop - start
        if skip >= size:
            skip -= size
            continue
        start += skip
        skip = 0
        found += stop - start
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    assert found == piece.length, "extents must hold the sequence's positions and the new tokens, no more"


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values of all sequences, for each block of a span.

    `pairs[i]` is `[2, kv_heads, pool_tokens, head_dim]`, keys before values, so that a block writes both at
    once. Heads come before tokens because reading a head's keys as one range is what decoding does most
    [measured on CPU]. Where `int8` is not None, it packs rows into int8 `[..., int8.width]`.
    """

    pairs: list[Tensor]
    int8: Int8Pool | None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        span: Span,
        pool_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: str = "auto",
    ) -> KVPool:
        """Room for `pool_tokens` rows a block. On CPU the system commits memory as rows are first written.

        `dtype` is what the blocks compute in, and what is kept with `kv_dtype` "auto"; "int8" keeps int8.
        """
        assert kv_dtype in ("auto", "int8"), f"unknown kv_dtype {kv_dtype!r}"
        int8 = Int8Pool(config.head_dim, dtype, device) if kv_dtype == "int8" else None
        width, kept = (config.head_dim, dtype) if int8 is None else (int8.width, torch.int8)
        shape = (2, config.num_kv_heads, pool_tokens, width)
        return cls([torch.empty(shape, dtype=kept, device=device) for _ in span.blocks()], int8)

    def write(self, place: int, extents: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """Puts `rows [2, kv_heads, n, head_dim]` of the block at `place` into the ranges `extents`."""
        if self.int8 is not None:
            rows = self.int8.pack(rows)
        first = 0
        for start, stop in extents:
            self.pairs[place][:, :, start:stop] = rows[:, :, first : first + stop - start]
            first += stop - start

    def write_prefix(self, adapter: ServedAdapter, extents: Sequence[tuple[int, int]]) -> None:
        """Puts the prefix of an adapter into the ranges `extents`, in each block that has one."""
        for place, prefix in adapter.prefix.items():
            self.write(place, extents, prefix)

    def copy_rows(self, source: int, target: int, count: int) -> None:
        """Copies rows of every block: `count` of them, from `source` on to `target` on; no overlap."""
        for pair in self.pairs:
            pair[:, :, target : target + count] = pair[:, :, source : source + count]

    @property
    def tokens(self) -> int:
        return self.pairs[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of address space; on CPU less is committed until rows are written."""
        return sum(pair.nbytes for pair in self.pairs)
