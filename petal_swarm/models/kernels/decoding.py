"""Decode steps of a span by paged kernels, recorded as CUDA graphs for the usual numbers of sequences.

A graph holds the launches of all blocks of a span for a fixed number of rows, and is replayed with other
numbers in the same places: hidden states, and the tables that say where each sequence lies. Rows that a batch
does not fill are nobody's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from petal_swarm.models.attention import Heads
from petal_swarm.models.devices import to_device
from petal_swarm.models.family import Block
from petal_swarm.models.kernels import on
from petal_swarm.models.kernels.paged import PagedPlan, Positions
from petal_swarm.models.kernels.tables import Tables, lay_out
from petal_swarm.models.packing import KVPool, PackedBatch

logger = logging.getLogger(__name__)

#: A batch is filled up to the next of these.
SIZES = (1, 2, 4, 8, 16, 32)
# Graphs of sub-spans count, too: what was not used for longest makes room.
_MOST_GRAPHS = 16
# Pages listed in a batch, of a million tokens: 256 KiB.
_LISTED_PAGES = 1 << 16

#: Hidden states through some blocks.
Compute: TypeAlias = Callable[[Tensor], Tensor]


class Recorded(NamedTuple):
    """`replay` computes from the numbers that are in `given` then what is in `found` after it."""

    given: Tensor
    found: Tensor
    replay: Callable[[], object]


class Recorder(Protocol):
    def __call__(self, compute: Compute, given: Tensor) -> Recorded | None:
        """Records what `compute` launches for `given`, or None where there is no room for that.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        ...


class SpanShape(NamedTuple):
    """What attention in the blocks of a span is like; `windows` has one entry a block."""

    heads: Heads
    windows: Sequence[int | None]
    positions: Positions


class Decoder:
    """Runs decode batches over `pool`. Without `recorder` every step is launched anew.

    `sizes` are the numbers of rows to record graphs for, `unrecorded` says whether to take other batches,
    too: those that are larger, or have adapters. Not safe for several threads at a time.
    """

    def __init__(
        self, shape: SpanShape, pool: KVPool, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        self.pool = pool
        self.sizes: tuple[int, ...] = SIZES
        self.unrecorded = True
        self.shape = shape
        self._recorder = recorder
        self._graphs: OrderedDict[tuple[int, int, int], Recorded] = OrderedDict()
        self._numbers = torch.zeros(3 * SIZES[-1] + _LISTED_PAGES, dtype=torch.int32, device=device)

    def run(
        self, blocks: Sequence[Block], hidden: Tensor, batch: PackedBatch, first: int, last: int
    ) -> Tensor | None:
        """Hidden states behind the blocks at places `first` to `last - 1`, or None if this is not for it.

        `blocks` are those of the whole span, or copies of them with the batch's adapters.
        """
        if batch.tokens > len(batch.slices):
            return None
        with on(hidden.device):
            return self._run(blocks, hidden, batch, first, last)

    def _run(
        self, blocks: Sequence[Block], hidden: Tensor, batch: PackedBatch, first: int, last: int
    ) -> Tensor | None:
        rows = batch.tokens
        recorder = self._recorder if not batch.lora else None
        size = next((size for size in self.sizes if size >= rows), None) if recorder else None
        if size is None and not self.unrecorded:
            return None
        numbers = lay_out(batch.slices, size or rows)
        if numbers is None or len(numbers) > len(self._numbers):
            return None
        if recorder is None or size is None:
            tables = Tables.of(to_device(numbers, hidden.device), rows)
            return self._through(blocks[first:last], first, tables, hidden)
        self._numbers[: len(numbers)].copy_(_pinned(numbers, hidden.device), non_blocking=True)
        graph = self._graphs.get((size, first, last))
        if graph is None:
            graph = self._record(recorder, blocks, hidden, (size, first, last))
        if graph is None:
            tables = Tables.of(self._numbers, size)
            tables = tables._replace(lengths=tables.lengths[:rows])
            return self._through(blocks[first:last], first, tables, hidden)
        self._graphs.move_to_end((size, first, last))
        graph.given[:rows].copy_(hidden)
        graph.replay()
        return graph.found[:rows].clone()  # the next step writes there again

    def close(self) -> None:
        """Give the memory of the graphs back."""
        self._graphs.clear()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _record(
        self, recorder: Recorder, blocks: Sequence[Block], hidden: Tensor, key: tuple[int, int, int]
    ) -> Recorded | None:
        size, first, last = key
        given = hidden.new_zeros(size, hidden.shape[1])
        given[: len(hidden)].copy_(hidden)
        tables = Tables.of(self._numbers, size)
        try:
            graph = recorder(lambda x: self._through(blocks[first:last], first, tables, x), given)
        except RuntimeError as error:
            logger.warning("decoding goes on without CUDA graphs: %s", str(error).splitlines()[0])
            self._recorder = None
            self._graphs.clear()
            return None
        if graph is not None:
            self._graphs[key] = graph
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        return graph

    def _through(self, blocks: Sequence[Block], first: int, tables: Tables, hidden: Tensor) -> Tensor:
        shape, pool = self.shape, self.pool
        width = None if pool.int8 is None else pool.int8.width
        plans: dict[int | None, PagedPlan] = {}
        for place, block in enumerate(blocks, first):
            window = shape.windows[place]
            if window not in plans:
                plans[window] = PagedPlan(tables, shape.heads, shape.positions, window, pool.tokens, width)
            hidden = block(hidden, plans[window], pool.pairs[place])
        return hidden


def _pinned(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.pin_memory() if device.type == "cuda" else numbers
