"""Whether decoding by kernels and graphs is used: asked at a server's start, of the device itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.models.devices import release_cached
from petal_swarm.models.family import Block
from petal_swarm.models.kernels.cuda_graphs import CudaRecorder
from petal_swarm.models.kernels.decoding import SIZES, Decoder, SpanShape
from petal_swarm.models.kernels.trials import Clock, distance, wall_clock
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS

logger = logging.getLogger(__name__)

# So long are the sequences of the trial, if the pool has room for them.
_CONTEXT = 512
# Relative distance behind one block, which adds to what goes into it; and behind all of them, of a graph from
# the same kernels launched one by one.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_SAME = 1e-3

#: Hidden states of a batch through the blocks at places `first` to `last - 1`, in the plain way.
Plain = Callable[[Tensor, PackedBatch, int, int], Tensor]


@dataclass(frozen=True)
class Trial:
    """The blocks of a span, and the plain way through them."""

    blocks: Sequence[Block]
    plain: Plain
    width: int
    dtype: torch.dtype
    device: torch.device

    def batch(self, rows: int, pool_tokens: int) -> tuple[Tensor, PackedBatch] | None:
        """Hidden states and places of `rows` sequences, or None where the pool has no room for so many."""
        pages = min(_CONTEXT // PAGE_TOKENS, pool_tokens // PAGE_TOKENS // rows)
        if not pages:
            return None
        room = pages * PAGE_TOKENS
        ends = [row * room + room - row % PAGE_TOKENS for row in range(rows)]
        slices = [
            PackedSlice(row, 1, end - row * room - 1, ((row * room, end),)) for row, end in enumerate(ends)
        ]
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, self.width, generator=generator).to(self.dtype).to(self.device)
        return hidden, PackedBatch.build(slices, self.device)


def _fill(pool: KVPool, head_size: int, dtype: torch.dtype) -> None:
    """Random keys and values where the batches look for them; nobody else will before writing there."""
    rows = min(SIZES[-1] * _CONTEXT, pool.tokens)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, pool.pairs[0].shape[1], rows, head_size, generator=generator)
    numbers = numbers.to(dtype).to(pool.pairs[0].device)
    for place in range(len(pool.pairs)):
        pool.write(place, ((0, rows),), numbers)


def quick_decoder(shape: SpanShape, pool: KVPool, trial: Trial) -> Decoder | None:
    """A decoder for `pool`, of which no row is in use, where it is right and faster. Takes some seconds."""
    device = trial.device
    try:
        decoder = Decoder(shape, pool, device, CudaRecorder(device))
        return decoder if prove(decoder, trial, wall_clock(device)) else None
    except Exception as error:  # Triton, its compilers and CUDA raise errors of all kinds
        reason = (str(error) or "no reason given").splitlines()[0]
        logger.warning("no decoding by kernels on this device: %s: %s", type(error).__name__, reason)
        release_cached(device)
        return None


def prove(decoder: Decoder, trial: Trial, clock: Clock) -> bool:
    """Leaves `decoder` the sizes of batches that it is right and faster for; False if there are none.

    Right is what the plain way gives, block by block for each kind of window. The log has the figures.
    """
    sizes, pool = decoder.sizes, decoder.pool
    _fill(pool, decoder.shape.heads.size, trial.dtype)
    kept, told, unrecorded = [], [], False
    for size in sizes:
        made = trial.batch(size, pool.tokens)
        if made is None:
            break
        trouble = _trouble(decoder, trial, *made)
        if trouble is not None:
            logger.warning("no decoding by kernels on this device: %s", trouble)
            decoder.close()
            return False
        plain_s, recorded_s, launched_s = _times(decoder, trial, *made, clock)
        told.append(f"{size}: {plain_s * 1e3:.2f}, {recorded_s * 1e3:.2f}, {launched_s * 1e3:.2f}")
        if recorded_s < plain_s:
            kept.append(size)
        unrecorded = launched_s < plain_s
    decoder.sizes, decoder.unrecorded = tuple(kept), unrecorded
    logger.info("ms of a decode step by size: plain, by graph, by kernels alone: %s", "; ".join(told))
    return bool(kept) or unrecorded


def _times(
    decoder: Decoder, trial: Trial, hidden: Tensor, batch: PackedBatch, clock: Clock
) -> tuple[float, float, float]:
    """Seconds of a step in the plain way, as a graph, and by kernels that are launched one by one."""
    count = len(trial.blocks)

    def decode() -> Tensor | None:
        return decoder.run(trial.blocks, hidden, batch, 0, count)

    plain_s = clock(lambda: trial.plain(hidden, batch, 0, count))
    decoder.sizes = (len(hidden),)
    recorded_s = clock(decode)
    decoder.sizes = ()
    return plain_s, recorded_s, clock(decode)


def _trouble(decoder: Decoder, trial: Trial, hidden: Tensor, batch: PackedBatch) -> str | None:
    decoder.sizes = ()
    windows = decoder.shape.windows
    for place in sorted({windows.index(window) for window in windows}):
        expected = trial.plain(hidden, batch, place, place + 1)
        found = decoder.run(trial.blocks, hidden, batch, place, place + 1)
        assert found is not None, "a batch of the trial is one that kernels take"
        off = distance(found, expected)
        if not off <= _TOLERANCES[hidden.dtype]:
            return f"a block gives numbers that are {off:.2g} off for {len(hidden)} sequences"
    count = len(trial.blocks)
    launched = decoder.run(trial.blocks, hidden, batch, 0, count)
    decoder.sizes = (len(hidden),)
    replayed = [decoder.run(trial.blocks, hidden, batch, 0, count) for _ in range(2)]
    for again in replayed:
        assert launched is not None
        assert again is not None
        if not distance(again, launched) <= _SAME:
            return f"a graph gives other numbers than its kernels for {len(hidden)} sequences"
    return None
