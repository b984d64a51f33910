"""The blocks of a span, run over packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout, BlockAdapter
from petal_swarm.models.attention import AttentionPlan, Heads, MaskTable
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import Checkpoint, Progress
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.family import Block
from petal_swarm.models.kernels import ready
from petal_swarm.models.packed_adapters import AdaptedBlocks, ServedAdapter
from petal_swarm.models.packing import KVPool, PackedBatch
from petal_swarm.models.quantization import Quant
from petal_swarm.models.rope import RotaryTable, interleave_keys
from petal_swarm.models.training import TrainingPlan, with_gradients
from petal_swarm.span import Span

if TYPE_CHECKING:
    from petal_swarm.models.kernels.decoding import Decoder

#: Attention of whole sequences, for blocks of each window.
Sequences: TypeAlias = Mapping[int | None, TrainingPlan]


class BlockStack:
    """Blocks `span` of a model, without embeddings and head.

    `nbytes` is the memory of the weights. Not safe for several threads at a time: tables of positions grow.
    """

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        assert len(blocks) == len(span), "one block for each number of the span"
        self.config = config
        self.span = span
        self.dtype = dtype
        self.device = torch.device(device)
        self.nbytes = sum(block.nbytes for block in blocks)
        self._blocks = tuple(blocks)
        #: Decode batches may go this way, after `quicken`.
        self.decoder: Decoder | None = None
        self._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        slopes = family_of(config).slopes(config)
        self._alibi = slopes is not None
        slopes = torch.zeros(1) if slopes is None else slopes
        self._windows = [config.window(block) for block in span.blocks()]
        self._masks = {
            window: MaskTable(slopes.to(self.device), window, dtype) for window in set(self._windows)
        }
        self._rotary = RotaryTable(config.rope, config.head_dim, self.device) if config.rope else None

    def forward(self, hidden: Tensor, batch: PackedBatch, pool: KVPool, blocks: Span) -> Tensor:
        """Runs the sub-span `blocks` (absolute numbers) over `hidden [tokens, hidden_size]`.

        Writes the new keys and values into `pool`, which has one entry for each block of the whole span.
        `hidden` is not changed. The caller sets `torch.inference_mode`.
        """
        if self.decoder is not None and self.decoder.pool is pool:
            found = self._decode(self.decoder, hidden, batch, blocks)
            if found is not None:
                return found
        output = hidden
        for output in self.forward_by_block(hidden, batch, pool, blocks):  # noqa: B007 - the last one counts
            pass
        return output

    def forward_by_block(
        self, hidden: Tensor, batch: PackedBatch, pool: KVPool, blocks: Span
    ) -> Iterator[Tensor]:
        """As `forward`, one block for each `next`: yields what comes out of each.

        In between others may run, as long as they leave the batch's rows of the pool alone.
        """
        assert self.span.covers(blocks), f"blocks {blocks} are not all in {self.span}"
        adapted = self._adapted if batch.lora else None
        own = self._blocks if adapted is None else adapted.blocks
        plans: dict[int | None, AttentionPlan] = {}
        for index in range(blocks.start - self.span.start, blocks.end - self.span.start):
            window = self._windows[index]
            plan = plans.get(window)
            if plan is None:
                plan = plans[window] = self._plan(batch, window, pool)
            if adapted is not None:
                adapted.segments = batch.lora  # each time: another batch may have run in between
            hidden = own[index](hidden, plan, pool.pairs[index])
            yield hidden

    def quicken(self, pool: KVPool) -> None:
        """Decode over `pool` by kernels and graphs from now on, if those are right and faster on this device.

        Before any row of the pool is in use; takes some seconds on CUDA.
        """
        self.decoder = None
        if not ready(self.device):
            return
        from petal_swarm.models.kernels.decoding import SpanShape  # imports Triton
        from petal_swarm.models.kernels.paged import Positions
        from petal_swarm.models.kernels.start import Trial, quick_decoder

        def plain(hidden: Tensor, batch: PackedBatch, first: int, last: int) -> Tensor:
            start = self.span.start
            return self.forward(hidden, batch, pool, Span(start + first, start + last))

        slopes = family_of(self.config).slopes(self.config)
        rotation = None if self._rotary is None else self._rotary.run(0, pool.tokens).squeeze(1)
        positions = Positions(None if slopes is None else slopes.to(self.device), rotation)
        trial = Trial(self._blocks, plain, self.config.hidden_size, self.dtype, self.device)
        self.decoder = quick_decoder(SpanShape(self._heads, self._windows, positions), pool, trial)

    def _decode(self, decoder: Decoder, hidden: Tensor, batch: PackedBatch, blocks: Span) -> Tensor | None:
        assert self.span.covers(blocks), f"blocks {blocks} are not all in {self.span}"
        own = self._blocks
        if batch.lora:
            self._adapted.segments = batch.lora
            own = self._adapted.blocks
        start = self.span.start
        return decoder.run(own, hidden, batch, blocks.start - start, blocks.end - start)

    def serve_adapter(self, layout: AdapterLayout, numbers: Tensor, blocks: Span) -> ServedAdapter:
        """Makes an adapter ready for sessions: `numbers` is the flat vector of `blocks`, some of the span's.

        Takes memory of about the same size; LoRA is computed in the dtype of the numbers. Any thread may
        call it.

        Raises:
            ConfigError: the vector has another length than the layout says.
        """
        assert self.span.covers(blocks), f"blocks {blocks} are not all in {self.span}"
        own = layout.split(self.config, numbers.to(self.device), blocks)
        placed = {block - self.span.start: adapter for block, adapter in own.items()}
        prefix = {
            place: self.arrange_prefix(adapter.prefix).to(self.dtype)
            for place, adapter in placed.items()
            if adapter.prefix is not None
        }
        return ServedAdapter(self._adapted.deltas(placed), layout.prefix_tokens, prefix)

    @cached_property
    def _adapted(self) -> AdaptedBlocks:
        return AdaptedBlocks(self._blocks)

    def arrange_prefix(self, prefix: Tensor) -> Tensor:
        """A `BlockAdapter`'s `[2, kv_heads, tokens, head_dim]` in the order of `KVPool.pairs`.

        Gradients flow through it.
        """
        if self._rotary is None:
            return prefix
        return torch.stack([interleave_keys(prefix[0]), prefix[1]])

    def sequences(self, lengths: Sequence[int], prefix_tokens: int = 0) -> Sequences:
        """Whole sequences for `forward_trained`; their first tokens stand at position `prefix_tokens`."""
        rotation = None
        if self._rotary is not None:
            longest = self._rotary.run(prefix_tokens, prefix_tokens + max(lengths))
            rotation = torch.cat([longest[:length] for length in lengths])
        return {
            window: TrainingPlan(lengths, self._heads, masks, window, self._alibi, rotation)
            for window, masks in self._masks.items()
        }

    def forward_trained(
        self, block: int, hidden: Tensor, sequences: Sequences, adapter: BlockAdapter
    ) -> Tensor:
        """Runs `block` over `hidden [tokens, hidden_size]`, whole `sequences`, without a KV cache.

        Under autograd gradients flow to `hidden` and `adapter`, not to the weights. Not in inference mode.
        """
        index = block - self.span.start
        shape = (2, self._heads.kv, 0, self._heads.size)
        prefix = hidden.new_empty(shape) if adapter.prefix is None else self.arrange_prefix(adapter.prefix)
        trained = self._blocks[index].adapted(with_gradients(adapter.lora))
        return trained(hidden, sequences[self._windows[index]], prefix)

    def _plan(self, batch: PackedBatch, window: int | None, pool: KVPool) -> AttentionPlan:
        plan = AttentionPlan(batch, self._heads, self._masks[window], window, self._alibi, pool.int8)
        if self._rotary is not None:
            if len(batch.slices) == 1:
                piece = batch.slices[0]
                plan.rotation = self._rotary.run(piece.position, piece.position + piece.length)
            else:
                stop = max(piece.position + piece.length for piece in batch.slices)
                plan.rotation = self._rotary.rows(batch.positions, stop)
        return plan


def load_blocks(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quant: Quant = "none",
    cache: BlockCache | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> BlockStack:
    """Loads the blocks of `span`, one after the other: memory peaks one block above their size.

    Matrices are quantized as they are read, one in each of `threads`; `cache` keeps quantized blocks for the
    next time. `progress(done, total)` counts bytes of the span.

    Raises:
        ConfigError: the model has no such blocks, or cannot be quantized so.
        CheckpointError: tensors are missing, misshapen or damaged.
    """
    config, family = checkpoint.config, checkpoint.family
    if span.end > config.num_blocks:
        raise ConfigError(f"{checkpoint.name} has blocks 0:{config.num_blocks}, so there is no span {span}")
    source = BlockSource(checkpoint, dtype, device, quant, cache, threads)
    blocks: list[Block] = []
    for number in span.blocks():
        report = None if progress is None else _of_span(progress, len(blocks), len(span))
        blocks.append(family.build_block(config, source.read(number, report)))
    return BlockStack(config, span, blocks, dtype=dtype, device=device)


def _of_span(progress: Progress, before: int, count: int) -> Progress:
    """Blocks of a model are of one size, so a block's share of the span is known before it is read."""

    def report(done: int, total: int) -> None:
        progress(before * total + done, count * total)

    return report
