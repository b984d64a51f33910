"""The blocks of a span, run over packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
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
from petal_swarm.models.offload import Residence, house
from petal_swarm.models.packed_adapters import AdaptedBlocks, ServedAdapter
from petal_swarm.models.packing import KVPool, PackedBatch
from petal_swarm.models.quantization import Quant
from petal_swarm.models.rope import RotaryTable, interleave_keys
from petal_swarm.models.sharding import Shard
from petal_swarm.models.streaming import Pass, Streaming
from petal_swarm.models.training import TrainingPlan, with_gradients
from petal_swarm.span import Span

if TYPE_CHECKING:
    from petal_swarm.models.kernels.decoding import Decoder

#: Attention of whole sequences, for blocks of each window.
Sequences: TypeAlias = Mapping[int | None, TrainingPlan]


class BlockStack:
    """Blocks `span` of a model, without embeddings and head; with `shard`, the blocks are that part of them.

    `nbytes` is the device's memory that the weights take. With `streaming` some come there by turns, and
    there is no training: a gradient's way back would find others in their places. Not safe for several
    threads at a time: tables of positions grow.
    """

    def __init__(
        self,
        config: ModelConfig,
        span: Span,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        shard: Shard | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        assert len(blocks) == len(span), "one block for each number of the span"
        self.config = config
        self.span = span
        self.dtype = dtype
        self.device = torch.device(device)
        self._shard = shard
        streamed = () if streaming is None else streaming.places
        self.nbytes = sum(block.nbytes for place, block in enumerate(blocks) if place not in streamed)
        self.nbytes += 0 if streaming is None else streaming.nbytes
        self._blocks = tuple(blocks)
        #: Decode batches may go this way, after `quicken`.
        self.decoder: Decoder | None = None
        self._streaming = streaming
        self._own_config = config if shard is None else shard.config(config)
        own = self._own_config
        self._heads = Heads(own.num_heads, own.num_kv_heads, own.head_dim)
        slopes = family_of(config).slopes(config)
        self._alibi = slopes is not None
        if slopes is not None and shard is not None:
            slopes = slopes[shard.heads(config).of(config.num_heads)]
        slopes = torch.zeros(1) if slopes is None else slopes
        self._windows = [config.window(block) for block in span.blocks()]
        self._masks = {
            window: MaskTable(slopes.to(self.device), window, dtype) for window in set(self._windows)
        }
        self._rotary = RotaryTable(config.rope, config.head_dim, self.device) if config.rope else None

    @property
    def ranks(self) -> int:
        """How many share the blocks out."""
        return 1 if self._shard is None else self._shard.ranks

    @property
    def streamed_blocks(self) -> int:
        """How many blocks come to the device only when they are used."""
        return 0 if self._streaming is None else len(self._streaming.places)

    def allocate(self, pool_tokens: int, kv_dtype: str) -> KVPool:
        """The KV pool of an engine that runs these blocks; see `KVPool.allocate`."""
        own = self._own_config
        return KVPool.allocate(own, self.span, pool_tokens, self.dtype, self.device, kv_dtype)

    def close(self) -> None:
        """Nothing will be computed any more."""

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
        whole = self._blocks if adapted is None else adapted.blocks
        own: tuple[Block, ...] | Pass = whole
        if self._streaming is not None:
            own = self._streaming.begin(whole, blocks.start - self.span.start, blocks.end - self.span.start)
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

        Before any row of the pool is in use; takes some seconds on CUDA. A graph holds neither what ranks
        tell each other nor memory that is filled by turns: such stacks go on as they are.
        """
        self.decoder = None
        if self.ranks > 1 or self._streaming is not None or not ready(self.device):
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
        placed = {block - self.span.start: self.part_of(adapter) for block, adapter in own.items()}
        if self._shard is not None:
            placed = {place: adapter.copied() for place, adapter in placed.items()}
        prefix = {
            place: self.arrange_prefix(adapter.prefix).to(self.dtype)
            for place, adapter in placed.items()
            if adapter.prefix is not None
        }
        return ServedAdapter(self._adapted.deltas(placed), layout.prefix_tokens, prefix)

    def part_of(self, adapter: BlockAdapter) -> BlockAdapter:
        """What of an adapter is added by these blocks: all of it, or views of its tensors."""
        if self._shard is None:
            return adapter
        return self._shard.adapter(family_of(self.config), self.config, adapter)

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
        assert self._streaming is None, "blocks that are streamed are not trained through"
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
    residence: Residence | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> BlockStack:
    """Loads the blocks of `span`, one after the other: memory peaks one block above their size.

    Matrices are quantized as they are read, one in each of `threads`; `cache` keeps quantized blocks for the
    next time. `residence` says where blocks are that do not fit the device; without one all have to.
    `progress(done, total)` counts bytes of the span.

    Raises:
        ConfigError: the model has no such blocks, cannot be quantized so, or there is no room for them.
        CheckpointError: tensors are missing, misshapen or damaged.
    """
    source = BlockSource(checkpoint, dtype, device, quant, cache, threads)
    if residence is None:
        blocks, streaming = read_blocks(source, span, progress), None
    else:
        _check_span(checkpoint, span)
        blocks, streaming = house(source, span, residence, partial(_of_span, progress, len(span)))
    return BlockStack(checkpoint.config, span, blocks, dtype=dtype, device=device, streaming=streaming)


def read_blocks(source: BlockSource, span: Span, progress: Progress | None = None) -> list[Block]:
    """As `load_blocks`, for a stack of any kind: the blocks, or the part of them that `source` is for."""
    checkpoint = source.checkpoint
    config, family = checkpoint.config, checkpoint.family
    _check_span(checkpoint, span)
    own = config if source.shard is None else source.shard.config(config)
    report = partial(_of_span, progress, len(span))
    blocks: list[Block] = []
    for number in span.blocks():
        blocks.append(family.build_block(own, source.read(number, report(len(blocks)))))
    return blocks


def _check_span(checkpoint: Checkpoint, span: Span) -> None:
    count = checkpoint.config.num_blocks
    if span.end > count:
        raise ConfigError(f"{checkpoint.name} has blocks 0:{count}, so there is no span {span}")


def _of_span(progress: Progress | None, count: int, before: int) -> Progress | None:
    """Blocks of a model are of one size, so a block's share of the span is known before it is read."""
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        progress(before * total + done, count * total)

    return report
