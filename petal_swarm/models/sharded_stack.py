"""Blocks whose heads and MLP several ranks share out, in lockstep: two sums over the ranks a block.

What is not shared out, norms and residuals, every rank has whole in small batches. In large ones each has it
for a share of the rows ("spread": Megatron-LM's sequence parallelism, arXiv:2205.05198): a sum then comes as
each rank's rows of it, and rows are put together again in front of the next product. As much travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from petal_swarm.models.adapters import BlockAdapter
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.family import Block
from petal_swarm.models.linear import Projection
from petal_swarm.models.lora import Part, Project
from petal_swarm.models.meetings import SPREAD, SPREAD_LAST, WHOLE, Meetings
from petal_swarm.models.packing import KVPool, PackedBatch
from petal_swarm.models.rank_sums import Group, entered, summed
from petal_swarm.models.stack import BlockStack, Sequences
from petal_swarm.span import Span


class _Rows:
    """How the rows of a batch lie at present: `spread` is their number when each rank has a share, else 0."""

    __slots__ = ("group", "spread")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.spread = 0

    def own(self, hidden: Tensor) -> Tensor:
        """This rank's rows. All ranks have the same number: the last of all may be of no use."""
        rank, ranks = self.group.shard.rank, self.group.shard.ranks
        each = -(-len(hidden) // ranks)
        own = hidden[rank * each : (rank + 1) * each]
        return own if len(own) == each else _padded(own, each)

    def joined(self, own: Tensor) -> Tensor:
        return self.group.join_rows(own.contiguous())[: self.spread]

    def summed(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum of what all ranks have of `whole`."""
        ranks = self.group.shard.ranks
        each = -(-len(whole) // ranks)
        return self.group.sum_rows(whole if len(whole) == each * ranks else _padded(whole, each * ranks))


def _padded(rows: Tensor, count: int) -> Tensor:
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


class _Joining:
    """A projection of whole rows, of which this rank computes a part of the columns of the result."""

    __slots__ = ("_inner", "_rows")

    def __init__(self, inner: Projection, rows: _Rows) -> None:
        self._inner = inner
        self._rows = rows

    def adapted(self, project: Project, parts: Sequence[Part]) -> _Joining:
        return _Joining(project(parts, self._inner), self._rows)

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return self._inner(entered(x, self._rows.group))
        return self._inner(self._rows.joined(x) if self._rows.spread else x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`."""
        return self(x).add_(residual)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of `x`, which all ranks have whole."""
        found = self._inner.back(grad)
        self._rows.group.sum(found)
        return found

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes


class _Summing:
    """A projection of a part of the columns at each rank: what they give is added up."""

    __slots__ = ("_inner", "_rows")

    def __init__(self, inner: Projection, rows: _Rows) -> None:
        self._inner = inner
        self._rows = rows

    def adapted(self, project: Project, parts: Sequence[Part]) -> _Summing:
        return _Summing(project(parts, self._inner), self._rows)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._inner(x)
        if x.requires_grad:
            return summed(out, None, self._rows.group)
        if self._rows.spread:
            return self._rows.summed(out)
        self._rows.group.sum(out)
        return out

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + self(x)`; the first rank's summand holds the residual."""
        rows = self._rows
        if x.requires_grad:
            return summed(self._inner(x), residual, rows.group)
        if rows.spread:
            return rows.summed(self._inner(x)).add_(residual)
        out = self._inner(x) if rows.group.shard.rank else self._inner.plus(x, residual)
        rows.group.sum(out)
        return out

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's columns of `x`."""
        return self._inner.back(grad)

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes


class ShardedStack(BlockStack):
    """A `BlockStack` of this rank's part of the blocks of `span`; all ranks run the same batches in order.

    Hidden states go in and come out whole at every rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        group: Group,
    ) -> None:
        splits = family_of(config).splits
        #: The `group`, in blocks.
        self.meetings = Meetings(group, config.hidden_size, dtype, torch.device(device))
        rows = self._rows = _Rows(self.meetings)
        self.group = group

        def surround(parts: Sequence[Part], base: Projection) -> Projection:
            by = splits[parts[0].stem].by
            return _Joining(base, rows) if by == "rows" else _Summing(base, rows)

        surrounded = [block.adapted(surround) for block in blocks]
        super().__init__(config, span, surrounded, dtype=dtype, device=device, shard=group.shard)

    def forward_by_block(
        self, hidden: Tensor | None, batch: PackedBatch, pool: KVPool, blocks: Span
    ) -> Iterator[Tensor]:
        """As there; before the last block, what comes out may be this rank's rows only.

        From a block on for which a rank has no memory, all that comes out is NaN. Without `hidden` this is
        such a rank from the first on.
        """
        tokens = batch.tokens
        spread = tokens if tokens >= self.group.spread_from else 0
        forward = iter(()) if hidden is None else self._by_block(hidden, batch, pool, blocks, spread)
        del hidden  # who has no memory should not keep it
        compute = partial(next, forward, None)
        for last in range(len(blocks) - 1, -1, -1):
            self._rows.spread = spread  # each time: another batch may have run in between
            owed = WHOLE if not spread else SPREAD if last else SPREAD_LAST
            yield self.meetings.block(compute, tokens, owed)

    def _by_block(
        self, hidden: Tensor, batch: PackedBatch, pool: KVPool, blocks: Span, spread: int
    ) -> Iterator[Tensor]:
        if spread:
            hidden = self._rows.own(hidden)
        forward = super().forward_by_block(hidden, batch, pool, blocks)
        del hidden
        for last in range(len(blocks) - 1, -1, -1):
            out = next(forward)
            yield self._rows.joined(out) if spread and not last else out

    def forward_trained(
        self, block: int, hidden: Tensor, sequences: Sequences, adapter: BlockAdapter
    ) -> Tensor:
        """As there. Rows are never spread: the way back would have to put them together once more."""
        self._rows.spread = 0
        return super().forward_trained(block, hidden, sequences, adapter)
