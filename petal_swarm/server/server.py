"""A server's life: load a span, announce it, serve it, move to another, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from random import Random

from petal_swarm.directory.announcer import Announcer
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.remote import Pinger
from petal_swarm.directory.service import DirectoryService
from petal_swarm.engine.adapters import AdapterLimits, AdapterStore
from petal_swarm.engine.compute import Compute, ComputeThread
from petal_swarm.engine.crew import LOST
from petal_swarm.engine.engine import Engine
from petal_swarm.errors import BusyError, ConfigError, PetalSwarmError, RemoteError
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.devices import release_cached
from petal_swarm.net.transport import Transport
from petal_swarm.routing.placement import choose_span
from petal_swarm.server.adapters import AdapterHost
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.entrance import Entrance
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.hardware import default_training_bytes
from petal_swarm.server.host import SessionHost
from petal_swarm.server.loader import Loader, Progress
from petal_swarm.server.memory_plan import MemoryPlan
from petal_swarm.server.offered import OfferedAdapter, read_offered
from petal_swarm.server.rebalancer import Rebalancer, Timing
from petal_swarm.server.training.host import TrainingHost
from petal_swarm.server.training.limits import TrainingLimits
from petal_swarm.server.uplink import Uplink
from petal_swarm.span import Span
from petal_swarm.version import __version__
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.connection import DIRECTORY_TABLE
from petal_swarm.wire.protocols import DIRECTORY
from petal_swarm.wire.tensors import dtype_name

logger = logging.getLogger(__name__)

NEIGHBOUR_PING_S = 15.0
UPDATE_FIGURES_S = 1.0
MAX_PINGED_NEIGHBOURS = 16
#: For clients to hear why their sessions end.
END_TIMEOUT_S = 2.0


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
        self._loop = asyncio.get_running_loop()
        self._loader = Loader(config, checkpoint, self._rank_lost)
        self._gate = StreamGate(config.session_limits())
        self._entrance = Entrance(self._gate, config.allow_peers)
        self._pinger = Pinger(transport)
        self._next_rtts_s: dict[str, float] = {}
        self._uplink = Uplink(transport, self.others, rng=Random(f"{transport.peer_id} uploads"))
        self._compute: Compute | None = None
        self._host: SessionHost | None = None
        self._training: TrainingHost | None = None
        self._announcer: Announcer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._rebalancing: asyncio.Task[None] | None = None
        self._moving_to: Span | None = None
        self._moved_at = -math.inf
        self._timing = Timing()
        self._leaving = False
        self._failed = asyncio.Event()
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
    def memory(self) -> MemoryPlan | None:
        """How the memory of its blocks was counted, once they are loaded."""
        return self._loader.memory

    @property
    def num_sessions(self) -> int:
        return self._host.num_sessions if self._host else 0

    def announcement(self) -> Announcement:
        """What this server says of itself now."""
        adapters = () if self._host is None else self._host.adapters.offered
        common = Announcement(
            peer_id=self._transport.peer_id,
            model=self.checkpoint.model_key,
            span=self.span,
            addresses=self.addresses,
            name=self.config.name,
            state="joining",
            dtype=dtype_name(self._loader.dtype),
            quant=self._loader.quant,
            kv_dtype=self.config.kv_dtype,
            max_batch_tokens=self.config.max_batch_tokens,
            next_rtts_s=self._next_rtts_s,
            bandwidth_bytes_per_s=self.config.upload_bytes_per_s or self._uplink.bytes_per_s,
            version=__version__,
            movable=self._movable,
            moving_to=self._moving_to,
            adapters=adapters,
            trains=self.config.trains,
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
        """Take no new sessions, tell the directory, and wait for the running ones, at most `timeout_s`.

        A move under way is given up.
        """
        await self._stop_rebalancing()
        if self._announcer is None:
            return
        hosts = self._hosts
        for host in hosts:
            host.draining = True
        await self._announcer.leave()
        await _drained(hosts, timeout_s)

    async def close(self) -> None:
        """Leave the directory, end all sessions and free everything. Idempotent."""
        await self._stop_rebalancing()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._announcer is not None:
            await self._announcer.leave()
            self._announcer = None
        await self._directory.close()
        await self._transport.close()
        if self._compute is not None:
            await asyncio.to_thread(_end, self._compute)

    async def wait_failed(self) -> None:
        """Return when the server is without blocks: it has left the swarm, and is to be closed.

        A move has failed, or a process that shares them is gone.
        """
        await self._failed.wait()

    async def others(self) -> list[Announcement]:
        """See `Movable`."""
        others = await self._directory.lookup(self.checkpoint.model_key)
        return [other for other in others if other.peer_id != self._transport.peer_id]

    async def alive(self, peers: Sequence[Announcement]) -> Collection[str]:
        """See `Movable`. Those that were alive a while ago are asked, too."""
        return await Pinger(self._transport).measure(peers)

    async def intend(self, target: Span | None) -> bool:
        """See `Movable`."""
        self._moving_to = target
        return await self._announce()

    async def move(self, target: Span) -> None:
        """Drain, then host `target` instead; if that cannot be loaded, what was hosted before.

        Cancelling leaves a server that can only be closed.

        Raises:
            Exception: that could not be loaded again either. The server has left the directory.
        """
        assert self._host is not None, "there is nothing to move from"
        source, frozen = self.span, gc.get_freeze_count()
        for host in self._hosts:
            host.draining = True
        self.span, self._moving_to = target, None
        await self._announce()
        await _drained(self._hosts, self.config.drain_timeout_s)
        await self._unload()
        try:
            await self._host_span(None)
        except Exception as error:
            # Whatever it is, and torch has its own errors for a lack of memory: what was there was fine.
            logger.warning("cannot load blocks %s, going back to %s: %s", target, source, error)
            self.span = source
            await self._announce()
            await self._host_again()
        if frozen:  # what the program did when it started
            gc.freeze()
        self._moved_at = self._loop.time()
        await self._announce()
        logger.info("serves blocks %s", self.span)

    async def _host_again(self) -> None:
        try:
            await self._host_span(None)
        except Exception as error:
            logger.error("cannot load blocks %s again, leaving the swarm: %s", self.span, error)
            assert self._announcer is not None
            await self._announcer.leave()
            self._failed.set()
            raise

    def _rank_lost(self) -> None:
        """In any thread: a process that computes a part of the blocks is gone."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody cares any more
            self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._give_up())))

    async def _give_up(self) -> None:
        logger.error("%s", LOST)
        for host in self._hosts:
            host.draining = True
            host.end_all(RemoteError(LOST))
        if self._announcer is not None:
            await self._announcer.leave()
        self._failed.set()

    async def _start(self, progress: Progress | None, make_compute: Callable[[Engine], Compute]) -> None:
        self._make_compute = make_compute
        self.span = await self._choose_span()
        self._announcer = Announcer(self._directory, self.announcement())
        await self._announcer.start()
        await self._host_span(progress)
        listing = DirectoryService(self._directory)
        await self._transport.serve(DIRECTORY, self._gate.guarded(DIRECTORY_TABLE, listing.handle))
        await self._entrance.open(self._transport, trains=self.config.trains)
        await self._announce()
        self._tasks.append(asyncio.create_task(self._update_figures(self._announcer)))
        self._tasks.append(asyncio.create_task(self._ping_neighbours()))
        if self.config.upload_mbit is None:
            self._tasks.append(asyncio.create_task(self._uplink.run()))
        num_blocks = self.checkpoint.config.num_blocks
        if self.config.rebalances and len(self.span) < num_blocks:
            rng = Random(f"{self._transport.peer_id} rebalances")
            rebalancer = Rebalancer(self, num_blocks, rng=rng, now=self._loop.time, timing=self._timing)
            self._rebalancing = asyncio.create_task(rebalancer.run(), name="rebalancer")
            self._rebalancing.add_done_callback(_log_failure)

    @property
    def _hosts(self) -> list[SessionHost | TrainingHost]:
        return [host for host in (self._host, self._training) if host is not None]

    @property
    def _movable(self) -> bool:
        """Whether others may count on this server to go where it is needed."""
        if self._rebalancing is None or self._rebalancing.done():
            return False
        return self._loop.time() - self._moved_at >= self._timing.stay_s

    async def _announce(self) -> bool:
        assert self._announcer is not None
        self._announcer.update(self.announcement())
        return await self._announcer.refresh_now()

    async def _stop_rebalancing(self) -> None:
        self._leaving = True
        if self._rebalancing is not None:
            self._rebalancing.cancel()
            await asyncio.gather(self._rebalancing, return_exceptions=True)

    async def _host_span(self, progress: Progress | None) -> None:
        """Load the span, and let sessions in."""

        def unless_leaving(done: int, total: int) -> None:
            if self._leaving:
                raise ConfigError("the server leaves while it loads blocks")
            if progress is not None:
                progress(done, total)

        offered = await asyncio.to_thread(read_offered, self.config.adapters, self.checkpoint)
        engine = await asyncio.to_thread(self._loader.load, self.span, unless_leaving)
        compute = self._make_compute(engine)
        compute.start()
        self._compute = compute
        self._host = self._entrance.host = SessionHost(
            compute,
            self._transport,
            model_key=self.checkpoint.model_key,
            limits=self.config.session_limits(),
            gate=self._gate,
            adapters=self._adapter_host(offered),
        )
        if self.config.trains:
            store = self._host.adapters.store
            self._training = self._entrance.training = self._training_host(compute, store)

    def _training_host(self, compute: Compute, store: AdapterStore) -> TrainingHost:
        told = self.config.training_mib
        room = default_training_bytes(self._loader.device) if told is None else told << 20
        training = TrainingLimits(room_bytes=room, max_pass_tokens=self.config.max_batch_tokens)
        return TrainingHost(
            compute,
            training.passes(compute, self._loop.time),
            self._transport,
            model_key=self.checkpoint.model_key,
            limits=self.config.session_limits(),
            training=training,
            gate=self._gate,
            adapter_of=store.numbers_for,
        )

    def _adapter_host(self, offered: Sequence[OfferedAdapter]) -> AdapterHost:
        room = self.config.adapter_mib << 20
        room_for = AdapterLimits(max_bytes=room, max_bytes_of_peer=room // 2)
        return AdapterHost(
            AdapterStore(self.checkpoint.config, self.span, room_for, self._loop.time),
            model_key=self.checkpoint.model_key,
            limits=self.config.session_limits(),
            gate=self._gate,
            offered=offered,
        )

    async def _unload(self) -> None:
        """End what is left of the sessions, and free the memory of the blocks."""
        assert self._host is not None
        assert self._compute is not None
        hosts = self._hosts
        for host in hosts:
            host.end_all(BusyError("this server moves to other blocks"))
        await _drained(hosts, END_TIMEOUT_S)
        del hosts, host  # they hold the blocks
        await self._entrance.clear()
        compute = self._compute
        self._host = self._training = self._compute = None
        await asyncio.to_thread(_end, compute)
        del compute
        gc.unfreeze()
        gc.collect()
        release_cached(self._loader.device)

    async def _choose_span(self) -> Span:
        num_blocks = self.checkpoint.config.num_blocks
        if self.config.blocks is not None:
            if self.config.blocks.end > num_blocks:
                raise ConfigError(
                    f"blocks {self.config.blocks} are outside the model, which has blocks 0:{num_blocks}"
                )
            return self.config.blocks
        capacity = self._loader.capacity()
        return choose_span(
            await self.others(), num_blocks, capacity, tie_break=Random(self._transport.peer_id)
        )

    async def _update_figures(self, announcer: Announcer) -> None:
        """Keep what the next refresh will announce true; announce at once when much else is free."""
        announced = announcer.announcement.kv_tokens_free
        while True:
            await asyncio.sleep(UPDATE_FIGURES_S)
            if self._host is not None:
                self._host.adapters.store.expire()
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


def _end(compute: Compute) -> None:
    compute.stop()
    compute.engine.close()


async def _drained(hosts: Sequence[SessionHost | TrainingHost], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(host.drained() for host in hosts))


def _log_failure(rebalancing: asyncio.Task[None]) -> None:
    if not rebalancing.cancelled() and (error := rebalancing.exception()) is not None:
        logger.error("this server does not rebalance any more", exc_info=error)
