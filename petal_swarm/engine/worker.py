"""A rank other than the leader: a process that computes what it is told, until its pipe ends.

    python -m petal_swarm.engine.worker

Settings, then commands come on stdin, pickled: whoever starts it is trusted. On stdout goes one pickled
object, None once the blocks are there, or the error why not. It is for `server.ranks` to start.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from petal_swarm.engine.followed_passes import FollowedPasses
from petal_swarm.engine.ranks import (
    Adapt,
    Advance,
    Allocate,
    Begin,
    Command,
    CopyRows,
    Drop,
    Forget,
    RankSettings,
    TorchGroup,
    Vote,
    WritePrefix,
    take_numbers,
    take_rows,
)
from petal_swarm.errors import ModelError, PetalSwarmError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import Checkpoint, Progress, open_checkpoint
from petal_swarm.models.devices import there
from petal_swarm.models.family import Block
from petal_swarm.models.kernels import permit
from petal_swarm.models.packed_adapters import Segment, ServedAdapter
from petal_swarm.models.packing import KVPool, PackedBatch
from petal_swarm.models.sharded_stack import ShardedStack
from petal_swarm.models.stack import read_blocks


@dataclass(slots=True)
class _Batch:
    """A batch on its way, and how many blocks are left to it."""

    forward: Iterator[Tensor]
    left: int


class Worker:
    """Carries out commands on `stack`, whose hidden states and sums come by its meetings."""

    def __init__(self, stack: ShardedStack) -> None:
        self._stack = stack
        self._meetings = stack.meetings
        self._pool: KVPool | None = None
        self._batches: dict[int, _Batch] = {}
        self._adapters: dict[int, ServedAdapter | None] = {}  # None: there was no memory for it
        #: Those of training.
        self.passes = FollowedPasses(stack)

    @torch.inference_mode()
    def carry_out(self, command: Command) -> None:
        match command:
            case Begin():
                self._begin(command)
                self._advance(command.number, command.at_once)
            case Advance(number):
                self._advance(number, 1)
            case Drop(number):
                del self._batches[number]
            case Allocate(pool_tokens, kv_dtype):
                self._pool = self._stack.allocate(pool_tokens, kv_dtype)
            case CopyRows():
                self._own_pool.copy_rows(*command)
            case Vote():
                self._meetings.vote()
            case Adapt():
                self._adapters[command.number] = self._adapt(command)
            case WritePrefix(number, extents):
                self._meetings.attempt(lambda: self._write_prefix(number, extents))
            case Forget(number):
                del self._adapters[number]
            case _:
                self.passes.carry_out(command)

    @property
    def _own_pool(self) -> KVPool:
        assert self._pool is not None, "the leader allocates before it computes"
        return self._pool

    def _adapt(self, command: Adapt) -> ServedAdapter | None:
        stack, meetings = self._stack, self._meetings
        numbers = take_numbers(meetings, command.size, command.dtype)
        if numbers is None:
            return None
        return meetings.attempt(lambda: stack.serve_adapter(command.layout, numbers, command.blocks))

    def _write_prefix(self, number: int, extents: Sequence[tuple[int, int]]) -> None:
        self._own_pool.write_prefix(there(self._adapters[number]), extents)

    def _begin(self, command: Begin) -> None:
        stack = self._stack
        batch = PackedBatch.build(command.slices, stack.device)
        hidden: Tensor | None = take_rows(self._meetings, batch.tokens, stack.dtype)
        for start, stop, number in command.lora:
            adapter = self._adapters[number]
            if adapter is None:
                hidden = None
                continue
            assert adapter.deltas is not None, "rows with LoRA have an adapter that has some"
            batch.lora += (Segment(start, stop, adapter.deltas),)
        forward = stack.forward_by_block(hidden, batch, self._own_pool, command.blocks)
        self._batches[command.number] = _Batch(forward, len(command.blocks))

    def _advance(self, number: int, blocks: int) -> None:
        batch = self._batches[number]
        for _ in range(blocks):
            next(batch.forward)
        batch.left -= blocks
        if not batch.left:
            del self._batches[number]


def set_process(settings: RankSettings) -> None:
    """What a process whose only task is to be a rank has to have set, before it reads its part."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.kernels:
        permit()


def read_part(settings: RankSettings, checkpoint: Checkpoint, progress: Progress | None) -> list[Block]:
    """The blocks of a rank, leader or not.

    Raises:
        ConfigError, CheckpointError: as `stack.load_blocks`.
    """
    cache = None
    if settings.quantized is not None:
        cache = BlockCache.of(settings.quantized, checkpoint, settings.quant, settings.dtype, settings.shard)
    source = BlockSource(
        checkpoint, settings.dtype, settings.device, settings.quant, cache, shard=settings.shard
    )
    return read_blocks(source, settings.span, progress)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the leader, who may need this for a while
    commands = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        settings: RankSettings = pickle.load(commands)
        set_process(settings)
        try:
            checkpoint = open_checkpoint(settings.model)
            blocks = read_part(settings, checkpoint, _unless_alone(answer))
        except PetalSwarmError as error:
            pickle.dump(error, answer)
            return 1
        except (OSError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            pickle.dump(ModelError(f"a rank cannot load its part of the blocks: {reason}"), answer)
            return 1
        pickle.dump(None, answer)
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = TorchGroup(settings)
    stack = ShardedStack(
        checkpoint.config, settings.span, blocks, dtype=settings.dtype, device=device, group=group
    )
    worker = Worker(stack)
    while True:
        try:
            command: Command = pickle.load(commands)
        except EOFError:
            return 0
        worker.carry_out(command)


def _unless_alone(answer: IO[bytes]) -> Progress:
    """Blocks take minutes to load: whoever started this may be gone, and nobody reads the answer."""
    poll = select.poll()
    poll.register(answer, select.POLLERR)

    def look(done: int, total: int) -> None:
        if poll.poll(0):
            os._exit(1)

    return look


if __name__ == "__main__":
    sys.exit(main())
