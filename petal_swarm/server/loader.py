"""Makes the engine of a span: reads the blocks, sizes the KV cache, and measures how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.ranks import RankSettings
from petal_swarm.errors import ConfigError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.sharding import Shard, check_ranks
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.server.capacity import CapacityFile, calibrate
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.hardware import (
    block_capacity,
    default_kv_tokens,
    rank_devices,
    resolve_device,
    resolve_dtype,
    resolve_quant,
)
from petal_swarm.server.ranks import load_ranks
from petal_swarm.span import Span

Progress = Callable[[int, int], None]


class Loader:
    """Knows the checkpoint and the settings that are the same for every span of it.

    Raises:
        ConfigError: a device, dtype or quantization that this machine or model does not have.
    """

    def __init__(
        self, config: ServerConfig, checkpoint: Checkpoint, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, checkpoint.config, self.device)
        self.quant = resolve_quant(config.quant, checkpoint.config)
        self._config = config
        self._checkpoint = checkpoint
        self._on_lost = on_lost
        ranks = config.tensor_parallel
        if ranks > 1:
            check_ranks(ranks, checkpoint.family, checkpoint.config, self.quant)
            self._devices = rank_devices(self.device, ranks)
            self.device = torch.device(self._devices[0])
            self._threads = max(1, torch.get_num_threads() // ranks)

    def capacity(self) -> int:
        """How many blocks to host: as told, or as many as fit.

        Raises:
            ConfigError: more than the model has, or not one fits.
        """
        model = self._checkpoint.config
        told = self._config.num_blocks
        if told is not None and told > model.num_blocks:
            raise ConfigError(f"--num-blocks {told} is more than the model's {model.num_blocks} blocks")
        devices = self._config.tensor_parallel if self.device.type == "cuda" else 1
        return told or block_capacity(model, self.dtype, self.quant, self.device, devices)

    def load(self, span: Span, progress: Progress | None = None) -> Engine:
        """The engine of `span`. Takes a while: for a thread. What `progress` raises ends it.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        config = self._config
        stack = self._load_blocks(span, progress)
        model = self._checkpoint.config
        if self.device.type == "cuda" and stack.ranks > 1:
            model = Shard(0, stack.ranks).config(model)
        kv_tokens = config.kv_tokens or default_kv_tokens(
            model, len(span), self.dtype, self.device, config.kv_dtype
        )
        try:
            engine = Engine(
                stack,
                kv_tokens=kv_tokens,
                max_batch_tokens=config.max_batch_tokens,
                prefix_tokens=kv_tokens // 2 if config.prefix_tokens is None else config.prefix_tokens,
                kv_dtype=config.kv_dtype,
            )
            kept = CapacityFile(config.cache_dir) if config.cache_dir else None
            calibrate(engine, quant=self.quant, kv_dtype=config.kv_dtype, kept=kept)
        except BaseException:
            stack.close()
            raise
        return engine

    def _load_blocks(self, span: Span, progress: Progress | None) -> BlockStack:
        if self._config.tensor_parallel > 1:
            return self._load_ranks(span, progress)
        cache = None
        if self._quantized is not None:
            cache = BlockCache.of(self._quantized, self._checkpoint, self.quant, self.dtype)
        return load_blocks(
            self._checkpoint,
            span,
            dtype=self.dtype,
            device=self.device,
            quant=self.quant,
            cache=cache,
            progress=progress,
        )

    def _load_ranks(self, span: Span, progress: Progress | None) -> BlockStack:
        threads = self._threads if self.device.type == "cpu" else None
        if threads is not None:
            torch.set_num_threads(threads)
        settings = RankSettings(
            model=self._checkpoint.source,
            span=span,
            shard=Shard(0, self._config.tensor_parallel),
            dtype=self.dtype,
            device=self._devices[0],
            quant=self.quant,
            quantized=self._quantized,
            threads=threads,
        )
        return load_ranks(self._checkpoint, settings, self._devices[1:], progress, self._on_lost)

    @property
    def _quantized(self) -> Path | None:
        """Where quantized blocks are kept, if they are."""
        if self.quant == "none" or self._config.cache_dir is None:
            return None
        return Path(self._config.cache_dir).expanduser() / "quantized"
