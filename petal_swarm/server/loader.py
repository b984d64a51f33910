"""Makes the engine of a span: reads the blocks, sizes the KV cache, and measures how fast it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.ranks import RankSettings
from petal_swarm.errors import ConfigError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.chunk_files import free_for_chunks
from petal_swarm.models.kernels import permit
from petal_swarm.models.offload import Residence
from petal_swarm.models.sharding import Shard, check_ranks
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.server.capacity import CapacityFile, calibrate
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.hardware import (
    block_bytes,
    free_bytes,
    kv_bytes_per_token,
    rank_devices,
    resolve_device,
    resolve_dtype,
    resolve_offload,
    resolve_quant,
)
from petal_swarm.server.memory_plan import MemoryPlan, Needs, Room, plan_memory, working_bytes
from petal_swarm.server.ranks import load_ranks
from petal_swarm.span import Span

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
#: Of the host's free memory, for blocks that wait there.
_HOST_SHARE = 0.7


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
        self._offload = resolve_offload(config.offload)
        #: How the memory of the blocks that were loaded last was counted.
        self.memory: MemoryPlan | None = None
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
            ConfigError: more than the model has or than there is room for, or not one fits.
        """
        told, model = self._config.num_blocks, self._checkpoint.config
        if told is not None and told > model.num_blocks:
            raise ConfigError(f"--num-blocks {told} is more than the model's {model.num_blocks} blocks")
        return self.plan(told).num_blocks

    def plan(self, num_blocks: int | None) -> MemoryPlan:
        """Memory for `num_blocks`, or for as many as fit, of what is free now: of one device, where several
        share the blocks out.

        Raises:
            ConfigError: not one fits, or not as many.
        """
        config, model, device = self._config, self._checkpoint.config, self.device
        shares = (
            config.tensor_parallel if device.type == "cuda" else 1
        )  # on a CPU all parts are in one memory
        part = model if shares == 1 else Shard(0, shares).config(model)
        needs = Needs(
            block_bytes=-(-block_bytes(model, self.dtype, self.quant) // shares),
            kv_bytes_per_token=kv_bytes_per_token(part, self.dtype, config.kv_dtype),
            working_bytes=working_bytes(model, self.dtype, self.quant, device.type, config.max_batch_tokens),
            adapter_bytes=config.adapter_mib << 20,
            model_blocks=model.num_blocks,
        )
        told = config.device_memory_mib
        room = Room(
            device=device.type,
            free_bytes=free_bytes(device),
            told_bytes=None if told is None else told << 20,
            offload=self._offload,
            away_bytes=self._away_bytes(),
        )
        return plan_memory(needs, room, num_blocks=num_blocks, kv_tokens=config.kv_tokens)

    def load(self, span: Span, progress: Progress | None = None) -> Engine:
        """The engine of `span`. Takes a while: for a thread. What `progress` raises ends it.

        Raises:
            ConfigError: the span does not fit.
            CheckpointError: the weights cannot be read.
        """
        config = self._config
        plan = self.memory = self.plan(len(span))
        for line in plan.lines():
            logger.info("%s", line)
        if config.kernels:
            permit()
        stack = self._load_blocks(span, plan, progress)
        kv_tokens = plan.kv_tokens
        try:
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
        except BaseException:
            stack.close()
            raise
        return engine

    def _load_blocks(self, span: Span, plan: MemoryPlan, progress: Progress | None) -> BlockStack:
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
            residence=self._residence(plan),
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
            kernels=self._config.kernels,
        )
        return load_ranks(self._checkpoint, settings, self._devices[1:], progress, self._on_lost)

    @property
    def _quantized(self) -> Path | None:
        """Where quantized blocks are kept, if they are."""
        if self.quant == "none" or self._config.cache_dir is None:
            return None
        return Path(self._config.cache_dir).expanduser() / "quantized"

    def _residence(self, plan: MemoryPlan) -> Residence | None:
        """Where blocks are that do not fit; None if all do."""
        if plan.kept == plan.num_blocks:
            return None
        return Residence(self._offload, plan.kept + plan.slots, self._chunk_folder)

    @property
    def _chunk_folder(self) -> Path | None:
        folder = self._config.cache_dir
        return None if folder is None else Path(folder).expanduser() / "offloaded"

    def _away_bytes(self) -> int:
        """Room for blocks that do not fit the device."""
        if self._offload == "none":
            return 0
        folder = self._chunk_folder
        if self._offload == "cpu" or folder is None:
            return int(psutil.virtual_memory().available * _HOST_SHARE)
        return free_for_chunks(folder)
