"""A leader and its workers, each a thread of this process."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from typing import IO

import torch

from petal_swarm.engine.crew import Crew
from petal_swarm.engine.leading import LeadingStack
from petal_swarm.engine.worker import Worker
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.quantization import Quant
from petal_swarm.models.sharded_stack import ShardedStack
from petal_swarm.models.stack import read_blocks
from petal_swarm.span import Span
from tests.thread_group import Table, ThreadGroup


class ThreadRanks:
    """A checkpoint's blocks shared out: `stack` leads, and each of `workers` is in a thread of its own.

    Batches of `spread_from` rows and more are spread.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        ranks: int,
        *,
        quant: Quant = "none",
        dtype: torch.dtype = torch.float32,
        spread_from: int = 8,
    ) -> None:
        self.pipes: list[IO[bytes]] = []
        self.workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._settled = threading.Semaphore(0)
        self._table = Table(ranks)
        self.groups = [ThreadGroup(self._table, rank, spread_from) for rank in range(ranks)]
        for group in self.groups[1:]:
            source = BlockSource(checkpoint, dtype, quant=quant, shard=group.shard)
            blocks = read_blocks(source, span)
            stack = ShardedStack(checkpoint.config, span, blocks, dtype=dtype, group=group)
            self.workers.append(Worker(stack))
            self._start(self.workers[-1])
        own = read_blocks(BlockSource(checkpoint, dtype, quant=quant, shard=self.groups[0].shard), span)
        crew = Crew(self, self.groups[0])
        self.stack = LeadingStack(checkpoint.config, span, own, dtype=dtype, device="cpu", crew=crew)

    def settle(self) -> None:
        """Wait until everybody has done what they were told."""
        for pipe in self.pipes:
            pipe.write(pickle.dumps(None))
            pipe.flush()
        for _ in self.pipes:
            assert self._settled.acquire(timeout=30)

    def lose(self) -> None:
        """All others end when they have done what they were told; nobody meets them any more."""
        self.settle()
        self.end()

    def kill(self) -> None:
        self._table.barrier.abort()

    def end(self) -> None:
        self.kill()
        for pipe, thread in zip(self.pipes, self._threads, strict=True):
            pipe.close()
            thread.join(30)

    def _start(self, worker: Worker) -> None:
        reads, writes = os.pipe()
        self.pipes.append(os.fdopen(writes, "wb"))
        arguments = [worker, os.fdopen(reads, "rb")]
        thread = threading.Thread(target=self._follow, args=arguments, name="rank", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, worker: Worker, commands: IO[bytes]) -> None:
        with commands, contextlib.suppress(EOFError, threading.BrokenBarrierError):
            while True:
                command = pickle.load(commands)
                if command is None:
                    self._settled.release()
                else:
                    worker.carry_out(command)
