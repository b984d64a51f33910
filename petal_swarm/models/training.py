"""Whole sequences through blocks with gradients: packed rows, no KV cache, frozen weights.

The blocks are those of inference. Their projections and their attention are replaced by what is here, which
has the same results, and a backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.models import devices, differentiable
from petal_swarm.models.attention import Heads, MaskTable
from petal_swarm.models.linear import Projection
from petal_swarm.models.lora import LoraDelta, LoraMatrices, Part, Project
from petal_swarm.models.norms import RMSNorm

_QUERY_CHUNK = 256
# A mask is written out for all blocks if it has at most so many numbers; on CPU it else is a view, for which
# queries have to be copied.
_MASK_NUMBERS = 1 << 22


class TrainedProjection:
    """A frozen projection, and what LoRA adds to it, with gradients."""

    __slots__ = ("_base", "_delta")

    def __init__(self, base: Projection, delta: LoraDelta | None) -> None:
        self._base = base
        self._delta = delta

    def __call__(self, x: Tensor) -> Tensor:
        if self._delta is None:
            return differentiable.product(self._base, x)
        return differentiable.adapted_product(self._base, self._delta, x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        if self._delta is None:
            return differentiable.product(self._base, x, residual)
        return differentiable.adapted_product(self._base, self._delta, x, residual)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of `x`."""
        found = self._base.back(grad)
        return found if self._delta is None else found + self._delta.back(grad).to(grad.dtype)

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + (0 if self._delta is None else self._delta.nbytes)


def with_gradients(lora: Mapping[str, LoraMatrices]) -> Project:
    """For `Block.adapted`: projections with gradients, and with `lora` where it has something."""

    def project(parts: Sequence[Part], base: Projection) -> Projection:
        return TrainedProjection(base, LoraDelta.of(parts, lora))

    return project


class TrainingPlan:
    """Attention of whole sequences, packed one after the other, each to itself and to a prefix.

    `rotation [tokens, 1, head_dim / 2]` is what rotary families turn queries and keys by.
    """

    __slots__ = ("_alibi", "_heads", "_kept", "_masks", "_rotation", "_runs", "_window")

    def __init__(
        self,
        lengths: Sequence[int],
        heads: Heads,
        masks: MaskTable,
        window: int | None,
        alibi: bool,
        rotation: Tensor | None,
    ) -> None:
        # Neighbours of one length are attended to in one launch: [(length, how many), ...]
        self._runs = [(length, len(list(same))) for length, same in groupby(lengths)]
        self._heads = heads
        self._masks = masks
        self._window = window
        self._alibi = alibi
        self._rotation = rotation
        self._kept: dict[tuple[int, int], Tensor] = {}

    def rotate(self, qkv: Tensor, norm: RMSNorm | None) -> Tensor:
        """See `Attention`."""
        assert self._rotation is not None, "plans for this family carry rotations"
        heads, rotated = qkv.view(qkv.shape[0], -1, self._heads.size), self._heads.query + self._heads.kv
        if norm is not None:
            turned, values = torch.split(heads, [rotated, self._heads.kv], dim=1)
            heads = torch.cat([norm(turned), values], dim=1)
        return differentiable.rotate(heads, self._rotation, rotated).view(qkv.shape)

    def attend(self, qkv: Tensor, pair: Tensor) -> Tensor:
        """See `Attention`; `pair` is the prefix that all sequences see, maybe of no tokens."""
        if len(self._runs) == 1:
            return self._run(*self._runs[0], qkv, pair)
        parts = torch.split(qkv, [length * count for length, count in self._runs])
        outs = [self._run(*run, part, pair) for run, part in zip(self._runs, parts, strict=True)]
        return torch.cat(outs)

    def mask_addresses(self) -> set[int]:
        """Where masks lie that blocks and passes share."""
        masks = (self._masks.table, *self._kept.values())
        return {mask.untyped_storage().data_ptr() for mask in masks}

    @property
    def mask_bytes(self) -> int:
        """Of the masks that all passes of this plan through blocks share."""
        return sum(mask.untyped_storage().nbytes() for mask in self._kept.values())

    def drop_masks(self) -> None:
        """They are written again where they are needed."""
        self._kept.clear()

    def _run(self, length: int, count: int, qkv: Tensor, pair: Tensor) -> Tensor:
        heads = self._heads
        # Cut before they are transposed: so their gradients are joined as `qkv` lies in memory.
        kinds = torch.split(qkv.view(count, length, -1, heads.size), [heads.query, heads.kv, heads.kv], dim=2)
        query, keys, values = (kind.transpose(1, 2) for kind in kinds)
        prefix = pair.shape[2]
        if prefix:
            shape = (count, heads.kv, prefix, heads.size)
            keys, values = (
                torch.cat([own.expand(shape), new], dim=2)
                for own, new in zip(pair.to(qkv.dtype), (keys, values), strict=True)
            )
        limited = self._window is not None and prefix + length > self._window
        grouped = heads.group > 1
        if not (self._alibi or limited or prefix):
            out = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=heads.scale, enable_gqa=grouped
            )
        else:
            outs, stop = [], prefix
            for chunk in torch.split(query, _QUERY_CHUNK, dim=2):
                stop += chunk.shape[2]
                outs.append(self._masked(chunk, keys, values, stop))
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return out.transpose(1, 2).reshape(count * length, heads.query * heads.size)

    def _masked(self, query: Tensor, keys: Tensor, values: Tensor, stop: int) -> Tensor:
        """The last of the queries stands at the key `stop - 1`."""
        queries = query.shape[2]
        start = 0 if self._window is None else max(0, stop - queries + 1 - self._window)
        if (start, stop) != (0, keys.shape[2]):
            keys, values = keys[:, :, start:stop], values[:, :, start:stop]
        mask = self._written_mask(queries, stop - start)
        reverse = mask is None
        if mask is None:
            mask = self._masks.reversed_queries(self._heads, queries, stop - start)
            query = query.flip(2)
        out = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask.flatten(0, 1).unsqueeze(0),
            scale=self._heads.scale,
            enable_gqa=self._heads.group > 1,
        )
        return out.flip(2) if reverse else out

    def _written_mask(self, queries: int, keys: int) -> Tensor | None:
        """`[kv, group, queries, keys]`; None if a view is better."""
        mask = self._kept.get((queries, keys))
        if mask is None:
            small = self._masks.heads * queries * keys <= _MASK_NUMBERS
            if not small and devices.on_host(self._masks.table.device):
                return None
            mask = self._masks.written_out(self._heads, queries, keys)
            if small:
                self._kept[queries, keys] = mask
        return mask
