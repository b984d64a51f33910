"""Makes the engine of a span: reads the blocks, sizes the KV cache, and measures how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from petal_swarm.engine.engine import Engine
from petal_swarm.errors import ConfigError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.server.capacity import CapacityFile, calibrate
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.hardware import (
    block_capacity,
    default_kv_tokens,
    resolve_device,
    resolve_dtype,
    resolve_quant,
)
from petal_swarm.span import Span

Progress = Callable[[int, int], None]


class Loader:
    """Knows the checkpoint and the settings that are the same for every span of it.

    Raises:
        ConfigError: a device, dtype or quantization that this machine or model does not have.
    """

    def __init__(self, config: ServerConfig, checkpoint: Checkpoint) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, checkpoint.config, self.device)
        self.quant = resolve_quant(config.quant, checkpoint.config)
        self._config = config
        self._checkpoint = checkpoint

    def capacity(self) -> int:
        """How many blocks to host: as told, or as many as fit.

        Raises:
            ConfigError: more than the model has, or not one fits.
        """
        model = self._checkpoint.config
        told = self._config.num_blocks
        if told is not None and told > model.num_blocks:
            raise ConfigError(f"--num-blocks {told} is more than the model's {model.num_blocks} blocks")
        return told or block_capacity(model, self.dtype, self.quant, self.device)

    def load(self, span: Span, progress: Progress | None = None) -> Engine:
        """The engine of `span`. Takes a while: for a thread. What `progress` raises ends it.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        config = self._config
        stack = load_blocks(
            self._checkpoint,
            span,
            dtype=self.dtype,
            device=self.device,
            quant=self.quant,
            cache=self._block_cache(),
            progress=progress,
        )
        kv_tokens = config.kv_tokens or default_kv_tokens(
            self._checkpoint.config, len(span), self.dtype, self.device, config.kv_dtype
        )
        engine = Engine(
            stack,
            kv_tokens=kv_tokens,
            max_batch_tokens=config.max_batch_tokens,
            prefix_tokens=kv_tokens // 2 if config.prefix_tokens is None else config.prefix_tokens,
            kv_dtype=config.kv_dtype,
        )
        engine.quicken()
        kept = CapacityFile(config.cache_dir) if config.cache_dir else None
        calibrate(engine, quant=self.quant, kv_dtype=config.kv_dtype, kept=kept)
        return engine

    def _block_cache(self) -> BlockCache | None:
        if self.quant == "none" or self._config.cache_dir is None:
            return None
        folder = Path(self._config.cache_dir).expanduser() / "quantized"
        return BlockCache.of(folder, self._checkpoint, self.quant, self.dtype)
