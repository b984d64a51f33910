"""Ranks as threads of one process: what they exchange they leave in a list for one another."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from petal_swarm.models.sharding import Shard


class Table:
    """Where the ranks meet."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.brought: list[Tensor | None] = [None] * ranks


class ThreadGroup:
    """A `rank_sums.Group`; `shares` and `sums` count."""

    def __init__(self, table: Table, rank: int, spread_from: int) -> None:
        self.shard = Shard(rank, len(table.brought))
        self.spread_from = spread_from
        self.shares = self.sums = 0
        self._table = table

    def share(self, tensor: Tensor) -> None:
        self.shares += 1
        found = self._all(tensor)[0]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(found)

    def sum(self, tensor: Tensor) -> None:
        self.sums += 1
        tensor.copy_(torch.stack(self._all(tensor)).sum(0))

    def sum_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        whole = torch.stack(self._all(tensor)).sum(0)
        own = whole.chunk(self.shard.ranks)[self.shard.rank].clone()
        return own if out is None else out.copy_(own)

    def join_rows(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        joined = torch.cat(self._all(tensor))
        return joined if out is None else out.copy_(joined)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        assert tensor.is_contiguous()
        self._table.brought[self.shard.rank] = tensor.detach().clone()
        self._table.barrier.wait()
        found = [brought for brought in self._table.brought if brought is not None]
        self._table.barrier.wait()
        return found
