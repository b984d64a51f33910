"""The leader's blocks: as a `BlockStack` to the engine, and all other ranks do what it does.

Before it computes anything it tells them, so whatever the executor interrupts, all ranks meet at the same
sums. A rank that is lost takes the others with it: what they have computed together is of no use.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.engine.crew import Crew
from petal_swarm.engine.led_passes import PassLeader
from petal_swarm.engine.ranks import (
    Adapt,
    Advance,
    Allocate,
    Begin,
    CopyRows,
    Drop,
    Forget,
    LoraRows,
    WritePrefix,
    share_numbers,
)
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.family import Block
from petal_swarm.models.packed_adapters import ServedAdapter
from petal_swarm.models.packing import KVPool, PackedBatch
from petal_swarm.models.sharded_stack import ShardedStack
from petal_swarm.span import Span


@dataclass(frozen=True, slots=True)
class LeadingPool(KVPool):
    """The leader's KV pool: what is written to it from outside the blocks, others write to theirs."""

    leader: LeadingStack

    def copy_rows(self, source: int, target: int, count: int) -> None:
        """See `KVPool`."""
        with self.leader.crew.together():
            self.leader.crew.tell(CopyRows(source, target, count))
            KVPool.copy_rows(self, source, target, count)

    def write_prefix(self, adapter: ServedAdapter, extents: Sequence[tuple[int, int]]) -> None:
        """See `KVPool`."""
        with self.leader.crew.together():
            self.leader.tell_news()
            self.leader.crew.tell(WritePrefix(self.leader.numbers[adapter], tuple(extents)))
            self.leader.meetings.attempt(lambda: KVPool.write_prefix(self, adapter, extents))
        self.leader.crew.ask(self.leader.meetings)


class _New:
    """An adapter of which the others have not been told."""

    def __init__(self, number: int, layout: AdapterLayout, blocks: Span, numbers: Tensor) -> None:
        self.command = Adapt(number, layout, blocks, len(numbers), numbers.dtype)
        self.numbers = numbers


class LeadingStack(ShardedStack):
    """The stack of rank 0. Only `serve_adapter` is for any thread.

    What it raises when a rank is lost is a `RemoteError`; where one lacked memory, it is as if this one had.
    """

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        crew: Crew,
    ) -> None:
        super().__init__(config, span, blocks, dtype=dtype, device=device, group=crew.group)
        self.crew = crew
        #: What the others call an adapter.
        self.numbers: weakref.WeakKeyDictionary[ServedAdapter, int] = weakref.WeakKeyDictionary()
        self._of_deltas: dict[int, int] = {}
        self._news: deque[_New | Drop | Forget] = deque()
        self._counter = itertools.count()
        #: What the others do in training.
        self.passes = PassLeader(crew, self.meetings, self._counter)

    def allocate(self, pool_tokens: int, kv_dtype: str) -> KVPool:
        """See `BlockStack`."""
        pool = super().allocate(pool_tokens, kv_dtype)
        with self.crew.together():
            self.crew.tell(Allocate(pool_tokens, kv_dtype))
        return LeadingPool(pool.pairs, pool.int8, self)

    def close(self) -> None:
        """The other ranks end."""
        self.crew.dismiss()

    def serve_adapter(self, layout: AdapterLayout, numbers: Tensor, blocks: Span) -> ServedAdapter:
        """See `BlockStack`. The others are told before they need it, by the thread that computes."""
        served = super().serve_adapter(layout, numbers, blocks)
        number = next(self._counter)
        self.numbers[served] = number
        self._of_deltas[id(served.deltas)] = number
        self._news.append(_New(number, layout, blocks, numbers))
        gone = weakref.finalize(served, _forget, self._news, self._of_deltas, number, id(served.deltas))
        gone.atexit = False
        return served

    def forward(self, hidden: Tensor, batch: PackedBatch, pool: KVPool, blocks: Span) -> Tensor:
        """See `BlockStack`."""
        hidden = self._ready(hidden)
        with self.crew.together():
            self._begin(hidden, batch, blocks, len(blocks))
            for output in super().forward_by_block(hidden, batch, pool, blocks):  # noqa: B007
                pass
        self._check(output)
        return output

    def forward_by_block(
        self, hidden: Tensor | None, batch: PackedBatch, pool: KVPool, blocks: Span
    ) -> Iterator[Tensor]:
        """See `BlockStack`."""
        assert hidden is not None, "who leads has what is to be computed"
        hidden = self._ready(hidden)
        with self.crew.together():
            number = self._begin(hidden, batch, blocks, 0)
        forward = super().forward_by_block(hidden, batch, pool, blocks)
        del hidden
        left = len(blocks)
        try:
            while left:
                with self.crew.together():
                    self.crew.tell(Advance(number))
                    out = next(forward)
                left -= 1
                self._check(out)
                yield out
        finally:
            if left:
                self._news.append(Drop(number))

    def _check(self, out: Tensor) -> None:
        # A rank that could not put spread rows together in the end has brought NaN for its own rows.
        spread = len(out) >= self.group.spread_from
        self.crew.check(out[:, 0].sum() if spread else out[0, 0], self.meetings)

    def tell_news(self) -> None:
        """What happened since the last command, in threads that must not give any."""
        while self._news:
            new = self._news.popleft()
            if isinstance(new, _New):
                self.crew.tell(new.command)
                share_numbers(self.group, new.numbers, self.device)
            else:
                self.crew.tell(new)

    def _ready(self, hidden: Tensor) -> Tensor:
        """What could take memory is done before others are told of it."""
        self.meetings.set_aside(len(hidden), self.dtype)
        return hidden.contiguous()

    def _begin(self, hidden: Tensor, batch: PackedBatch, blocks: Span, at_once: int) -> int:
        self.tell_news()
        number = next(self._counter)
        lora = tuple(LoraRows(start, stop, self._of_deltas[id(own)]) for start, stop, own in batch.lora)
        self.crew.tell(Begin(number, blocks, at_once, batch.slices, lora))
        self.group.share(hidden)
        return number


def _forget(news: deque[_New | Drop | Forget], of_deltas: dict[int, int], number: int, deltas: int) -> None:
    if of_deltas.get(deltas) == number:
        del of_deltas[deltas]
    news.append(Forget(number))
