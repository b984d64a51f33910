"""Adapters in packed batches: one product with the weight for all rows, small ones for each adapter's rows.

The blocks of a stack exist a second time, with the same weights and norms, for batches in which somebody
has an adapter; batches without pay nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from petal_swarm.models.adapters import BlockAdapter
from petal_swarm.models.family import Block
from petal_swarm.models.linear import Projection
from petal_swarm.models.lora import LoraDelta, Part


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class ServedAdapter:
    """An adapter made ready for a stack, by `BlockStack.serve_adapter`.

    `deltas` are what LoRA adds to each projection of the stack, in the order of `AdaptedBlocks`; None if the
    adapter is only a prefix. `prefix` are a block's keys and values `[2, kv_heads, prefix_tokens, head_dim]`
    in the order of `KVPool.pairs`, by the block's place in the stack.
    """

    deltas: tuple[LoraDelta | None, ...] | None
    prefix_tokens: int
    prefix: Mapping[int, Tensor]

    @property
    def nbytes(self) -> int:
        deltas = sum(delta.nbytes for delta in self.deltas or () if delta is not None)
        return deltas + sum(prefix.nbytes for prefix in self.prefix.values())


class Segment(NamedTuple):
    """The rows `start:stop` of a batch have an adapter with these `deltas`."""

    start: int
    stop: int
    deltas: Sequence[LoraDelta | None]


class AdaptedBlocks:
    """`blocks` that add what LoRA says to the rows of the `segments` of now."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.segments: Sequence[Segment] = ()
        self._parts: list[tuple[int, Sequence[Part]]] = []
        self.blocks = tuple(block.adapted(partial(self._wrap, place)) for place, block in enumerate(blocks))

    def deltas(self, adapters: Mapping[int, BlockAdapter]) -> tuple[LoraDelta | None, ...] | None:
        """For each projection what is added to it, by the adapters of blocks, named by their places."""
        none = BlockAdapter()
        found = tuple(LoraDelta.of(parts, adapters.get(place, none).lora) for place, parts in self._parts)
        return None if all(delta is None for delta in found) else found

    def _wrap(self, place: int, parts: Sequence[Part], base: Projection) -> Projection:
        self._parts.append((place, parts))
        return _SegmentedProjection(base, self, len(self._parts) - 1)


class _SegmentedProjection:
    """A projection, and what the adapters of the batch's segments add to it."""

    __slots__ = ("_base", "_now", "_number")

    def __init__(self, base: Projection, now: AdaptedBlocks, number: int) -> None:
        self._base = base
        self._now = now
        self._number = number

    def __call__(self, x: Tensor) -> Tensor:
        out = self._base(x)
        self._add(out, x)
        return out

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        out = self._base.plus(x, residual)
        self._add(out, x)
        return out

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of `x`, for the segments of now."""
        found = self._base.back(grad)
        for start, stop, deltas in self._now.segments:
            delta = deltas[self._number]
            if delta is not None:
                found[start:stop] += delta.back(grad[start:stop]).to(found.dtype)
        return found

    @property
    def nbytes(self) -> int:
        return self._base.nbytes

    def _add(self, out: Tensor, x: Tensor) -> None:
        for start, stop, deltas in self._now.segments:
            delta = deltas[self._number]
            if delta is None:
                continue
            if stop - start == x.shape[0]:
                delta.add_to(out, x)
            else:
                delta.add_to(out[start:stop], x[start:stop])
