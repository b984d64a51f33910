"""A server's life: load a span, announce it, serve it, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from petal_swarm.directory.announcer import Announcer
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.remote import Pinger
from petal_swarm.directory.service import DirectoryService
from petal_swarm.engine.compute import Compute, ComputeThread
from petal_swarm.engine.engine import Engine
from petal_swarm.errors import ConfigError, PetalSwarmError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.net.transport import StreamHandler, Transport
from petal_swarm.routing.placement import choose_span
from petal_swarm.server.allowed import only_for
from petal_swarm.server.capacity import CapacityFile, calibrate
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.hardware import (
    block_capacity,
    default_kv_tokens,
    resolve_device,
    resolve_dtype,
    resolve_quant,
)
from petal_swarm.server.host import SessionHost
from petal_swarm.span import Span
from petal_swarm.version import __version__
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.connection import DIRECTORY_TABLE, PUSH_TABLE, SESSION_TABLE
from petal_swarm.wire.protocols import DIRECTORY, PUSH, SESSION
from petal_swarm.wire.tensors import dtype_name

logger = logging.getLogger(__name__)

NEIGHBOUR_PING_S = 15.0
UPDATE_FIGURES_S = 1.0
MAX_PINGED_NEIGHBOURS = 16
Progress = Callable[[int, int], None]


class Server:
    """One running server. Made by `start`, ended by `close` (at once) or `drain` and then `close`.

    The server owns the transport and the directory it was given, and closes them.
    """

    def __init__(
        self, config: ServerConfig, checkpoint: Checkpoint, transport: Transport, directory: Directory
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self._transport = transport
        self._directory = directory
        self._device = resolve_device(config.device)
        self._dtype = resolve_dtype(config.dtype, checkpoint.config, self._device)
        self._quant = resolve_quant(config.quant, checkpoint.config)
        self._pinger = Pinger(transport)
        self._next_rtts_s: dict[str, float] = {}
        self._compute: Compute | None = None
        self._host: SessionHost | None = None
        self._announcer: Announcer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.span = config.blocks or Span(0, checkpoint.config.num_blocks)

    @classmethod
    async def start(
        cls,
        config: ServerConfig,
        checkpoint: Checkpoint,
        transport: Transport,
        directory: Directory,
        *,
        progress: Progress | None = None,
        compute: Callable[[Engine], Compute] = ComputeThread,
    ) -> Server:
        """Load the span, then serve and announce it. On failure everything it was given is closed.

        `compute` makes what runs the engine's steps.

        Raises:
            ConfigError: the span is outside the model, or does not fit this machine.
            CheckpointError: the weights cannot be read.
        """
        try:
            server = cls(config, checkpoint, transport, directory)
        except BaseException:
            await directory.close()
            await transport.close()
            raise
        try:
            await server._start(progress, compute)
        except BaseException:
            await server.close()
            raise
        return server

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses()

    @property
    def num_sessions(self) -> int:
        return self._host.num_sessions if self._host else 0

    def announcement(self) -> Announcement:
        """What this server says of itself now."""
        common = Announcement(
            peer_id=self._transport.peer_id,
            model=self.checkpoint.model_key,
            span=self.span,
            addresses=self.addresses,
            name=self.config.name,
            state="joining",
            dtype=dtype_name(self._dtype),
            quant=self._quant,
            kv_dtype=self.config.kv_dtype,
            max_batch_tokens=self.config.max_batch_tokens,
            next_rtts_s=self._next_rtts_s,
            version=__version__,
        )
        if self._compute is None or self._host is None:
            return common
        stats = self._compute.engine.stats()
        return replace(
            common,
            state="joining" if self._host.draining else "serving",
            block_time_s=max(stats.block_time_s, 1e-9),
            step_time_s=self._host.overhead.mean_s,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            queue_s=self._compute.queue_s(),
            kv_tokens=stats.kv_tokens,
            kv_tokens_free=self._host.tokens_available,
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions, tell the directory, and wait for the running ones, at most `timeout_s`."""
        if self._host is None or self._announcer is None:
            return
        self._host.draining = True
        await self._announcer.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._host.drained()

    async def close(self) -> None:
        """Leave the directory, end all sessions and free everything. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._announcer is not None:
            await self._announcer.leave()
            self._announcer = None
        await self._directory.close()
        await self._transport.close()
        if self._compute is not None:
            await asyncio.to_thread(self._compute.stop)

    async def _start(self, progress: Progress | None, make_compute: Callable[[Engine], Compute]) -> None:
        self.span = await self._choose_span()
        self._announcer = Announcer(self._directory, self.announcement())
        await self._announcer.start()
        stack = await asyncio.to_thread(self._load, progress)
        engine = await asyncio.to_thread(self._make_engine, stack)
        compute = make_compute(engine)
        compute.start()
        self._compute = compute
        self._host = SessionHost(
            compute, self._transport, model_key=self.checkpoint.model_key, limits=self.config.session_limits()
        )
        gate, listing = self._host.gate, DirectoryService(self._directory)
        sessions: StreamHandler = self._host.handle_session
        if self.config.allow_peers:
            sessions = only_for(self.config.allow_peers, sessions)
        await self._transport.serve(DIRECTORY, gate.guarded(DIRECTORY_TABLE, listing.handle))
        await self._transport.serve(PUSH, gate.guarded(PUSH_TABLE, self._host.handle_push))
        await self._transport.serve(SESSION, gate.guarded(SESSION_TABLE, sessions))
        self._announcer.update(self.announcement())
        await self._announcer.refresh_now()
        self._tasks.append(asyncio.create_task(self._update_figures(self._announcer)))
        self._tasks.append(asyncio.create_task(self._ping_neighbours()))

    async def _choose_span(self) -> Span:
        num_blocks = self.checkpoint.config.num_blocks
        if self.config.blocks is not None:
            if self.config.blocks.end > num_blocks:
                raise ConfigError(
                    f"blocks {self.config.blocks} are outside the model, which has blocks 0:{num_blocks}"
                )
            return self.config.blocks
        capacity = self.config.num_blocks or block_capacity(
            self.checkpoint.config, self._dtype, self._quant, self._device
        )
        if capacity > num_blocks and self.config.num_blocks:
            raise ConfigError(f"--num-blocks {capacity} is more than the model's {num_blocks} blocks")
        others = await self._directory.lookup(self.checkpoint.model_key)
        others = [other for other in others if other.peer_id != self._transport.peer_id]
        return choose_span(others, num_blocks, capacity, tie_break=Random(self._transport.peer_id))

    def _load(self, progress: Progress | None) -> BlockStack:
        return load_blocks(
            self.checkpoint,
            self.span,
            dtype=self._dtype,
            device=self._device,
            quant=self._quant,
            cache=self._block_cache(),
            progress=progress,
        )

    def _block_cache(self) -> BlockCache | None:
        if self._quant == "none" or self.config.cache_dir is None:
            return None
        folder = Path(self.config.cache_dir).expanduser() / "quantized"
        return BlockCache.of(folder, self.checkpoint, self._quant, self._dtype)

    def _make_engine(self, stack: BlockStack) -> Engine:
        kv_tokens = self.config.kv_tokens or default_kv_tokens(
            self.checkpoint.config, len(self.span), self._dtype, self._device, self.config.kv_dtype
        )
        prefix_tokens = self.config.prefix_tokens
        engine = Engine(
            stack,
            kv_tokens=kv_tokens,
            max_batch_tokens=self.config.max_batch_tokens,
            prefix_tokens=kv_tokens // 2 if prefix_tokens is None else prefix_tokens,
            kv_dtype=self.config.kv_dtype,
        )
        kept = CapacityFile(self.config.cache_dir) if self.config.cache_dir else None
        calibrate(engine, quant=self._quant, kv_dtype=self.config.kv_dtype, kept=kept)
        return engine

    async def _update_figures(self, announcer: Announcer) -> None:
        """Keep what the next refresh will announce true; announce at once when much else is free."""
        announced = announcer.announcement.kv_tokens_free
        while True:
            await asyncio.sleep(UPDATE_FIGURES_S)
            announcement = self.announcement()
            announcer.update(announcement)
            if not announced / 2 <= announcement.kv_tokens_free <= announced * 2:
                await announcer.refresh_now()
                announced = announcement.kv_tokens_free

    async def _ping_neighbours(self) -> None:
        """Measure round trips to servers that may follow this one on a route."""
        while True:
            try:
                others = await self._directory.lookup(self.checkpoint.model_key)
                followers = [
                    other
                    for other in others
                    if other.peer_id != self._transport.peer_id
                    and other.span.start <= self.span.end < other.span.end
                ]
                followers = followers[:MAX_PINGED_NEIGHBOURS]
                self._next_rtts_s = dict(await self._pinger.measure(followers))
            except PetalSwarmError as error:
                logger.info("could not measure round trips: %s", error)
            await asyncio.sleep(NEIGHBOUR_PING_S)
