"""The same random blocks on the device and, in float32, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Span

POOL_TOKENS = 1536
Extents = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mode:
    """How blocks are computed, and how far from float32 on the CPU the result may be."""

    dtype: torch.dtype
    quant: str
    tolerance: float


#: Tolerances are relative distances after three blocks of random weights, which amplify what they are given.
MODES = {
    "float32": Mode(torch.float32, "none", 1e-3),
    "float16": Mode(torch.float16, "none", 0.01),
    "bfloat16": Mode(torch.bfloat16, "none", 0.06),
    "int8": Mode(torch.bfloat16, "int8", 0.2),
    "nf4": Mode(torch.bfloat16, "nf4", 0.6),
}
INT8_KV_TOLERANCE = 0.03


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected.float().cpu()).norm() / expected.float().norm())


class Stack:
    """Blocks with a pool of their own, in which what was never written is NaN."""

    def __init__(
        self, folder: Path, mode: Mode, device: torch.device | str, *, kv_dtype: str = "auto", blocks: int = 3
    ) -> None:
        checkpoint = open_checkpoint(str(folder))
        options: dict[str, Any] = {} if mode.quant == "none" else {"quant": mode.quant}
        self.blocks: BlockStack = load_blocks(
            checkpoint, Span(0, blocks), dtype=mode.dtype, device=device, **options
        )
        self.pool = KVPool.allocate(
            checkpoint.config, Span(0, blocks), POOL_TOKENS, mode.dtype, device, kv_dtype
        )
        for pair in self.pool.pairs:
            pair.fill_(torch.nan if kv_dtype == "auto" else -1)

    def run(self, pieces: Sequence[tuple[int, int, Extents]], hidden: Tensor) -> Tensor:
        """`hidden` of pieces of (position, length, extents)."""
        slices, row = [], 0
        for position, length, extents in pieces:
            slices.append(PackedSlice(row, length, position, extents))
            row += length
        own = hidden.to(self.blocks.dtype).to(self.blocks.device)
        batch = PackedBatch.build(slices, self.blocks.device)
        return self.blocks.forward(own, batch, self.pool, self.blocks.span)

    def sequence(self, hidden: Tensor, sizes: list[int], home: int = 3) -> Tensor:
        """A whole sequence in steps of these sizes, from row `home` of the pool on."""
        outs, position = [], 0
        for size in sizes:
            end = position + size
            outs.append(self.run([(position, size, ((home, home + end),))], hidden[position:end]))
            position = end
        return torch.cat(outs)


def random_rows(count: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
