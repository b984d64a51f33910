"""The engine: packed steps of many sessions through the blocks of one span.

A step names its session, its blocks and its slices, and brings `hidden [tokens, hidden_size]`. It is
placed in the KV cache whole, and computed in one or more chunks of its rows; chunks that use the same
blocks run as one packed batch. One step's bad input fails that step alone. All calls must come from one
thread at a time (`compute.ComputeThread` in a server).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from petal_swarm.engine.kv_cache import KVCache
from petal_swarm.engine.pace import smooth
from petal_swarm.engine.steps import PlacedStep, StepRequest, StepResult, check_finite, count_rows
from petal_swarm.errors import BadTensorError, PetalSwarmError
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice, Span


class Chunk(NamedTuple):
    """The next `rows` rows of a placed step."""

    step: PlacedStep
    rows: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; times are running means of real decode steps, in seconds."""

    kv_tokens: int
    kv_tokens_free: int
    sessions: int
    block_time_s: float
    prefill_tokens_per_s: float


_MEASURED_STEPS = 7

#: A batch of at most so many rows tells what one token takes, one of at least so many how fast prefill is.
_FEW_ROWS = 4
_MANY_ROWS = 32


class Engine:
    """Runs steps on the blocks of `stack`, with a KV cache of `kv_tokens` tokens."""

    def __init__(self, stack: BlockStack, *, kv_tokens: int, max_batch_tokens: int) -> None:
        self.stack = stack
        self.max_batch_tokens = max_batch_tokens
        self._cache = KVCache(kv_tokens)
        self._pool = KVPool.allocate(
            stack.config, stack.span, self._cache.tokens, dtype=stack.dtype, device=stack.device
        )
        #: Running mean of what one block takes in a decode step, in seconds; 0 before the first.
        self.block_time_s = 0.0
        #: Running mean of how fast prefill passes the whole span; 0 before the first.
        self.prefill_tokens_per_s = 0.0

    @property
    def kv_tokens_free(self) -> int:
        return self._cache.tokens_free

    def open_session(self, key: Hashable, *, max_length: int) -> None:
        """See `KVCache.open`."""
        self._cache.open(key, max_length)

    def close_session(self, key: Hashable) -> None:
        """End a session and free its cache; unknown keys are ignored."""
        self._cache.close(key)

    def retire_session(self, key: Hashable) -> Hashable:
        """End a session of which rows are still in a batch: close it by the returned key after that."""
        retired = object()
        self._cache.rename(key, retired)
        return retired

    def stats(self) -> EngineStats:
        return EngineStats(
            kv_tokens=self._cache.tokens,
            kv_tokens_free=self._cache.tokens_free,
            sessions=self._cache.num_sessions,
            block_time_s=self.block_time_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )

    def run(self, requests: Sequence[StepRequest]) -> list[StepResult]:
        """Run steps that all use the same blocks, at most one of each session, as one packed batch.

        A request that fails (wrong tensor, unknown session, no room) gets its error in its result;
        the others are not affected.
        """
        results: list[StepResult] = []
        chunks: list[Chunk] = []
        placed: list[StepResult] = []
        for request in requests:
            result = StepResult(None, None, 0.0)
            results.append(result)
            try:
                step = self.place(request)
            except PetalSwarmError as error:
                result.error = error
            else:
                chunks.append(Chunk(step, step.rows))
                placed.append(result)
        if chunks:
            elapsed = self.compute(chunks)
            for chunk, result in zip(chunks, placed, strict=True):
                result.hidden = chunk.step.result()
                result.compute_s = elapsed
        return results

    def place(self, request: StepRequest) -> PlacedStep:
        """Check a request, and give all its tokens their places in the cache.

        Raises:
            BadTensorError: hidden states that do not fit the slices, are too many, or are not finite.
            As `KVCache.place`; nothing has changed.
        """
        rows = count_rows(request)
        width = self.stack.config.hidden_size
        if request.hidden.shape != (rows, width):
            raise BadTensorError(f"hidden has shape {list(request.hidden.shape)}, expected {[rows, width]}")
        if rows > self.max_batch_tokens:
            raise BadTensorError(
                f"a step of {rows} tokens is over this server's limit of {self.max_batch_tokens}"
            )
        check_finite(request)
        assert self.stack.span.covers(request.blocks)
        placements = self._cache.place(request.session, request.slices, request.forks)
        for placement in placements:
            for source, target, count in placement.copies:
                self._pool.copy_rows(source, target, count)
        return PlacedStep(request, rows, placements)

    def could_place(self, request: StepRequest) -> bool:
        """Whether a step for which there is no room now might have it when other sessions end."""
        return self._cache.could_place(request.session, request.slices, request.forks)

    @torch.inference_mode()
    def compute(self, chunks: Sequence[Chunk]) -> float:
        """Run chunks of the same blocks, at most one of each session, as one packed batch.

        Gives the steps their rows, and returns the seconds it took.
        """
        started = time.perf_counter()
        blocks = chunks[0].step.request.blocks
        hidden, packed = self._pack(chunks)
        _hand_out(chunks, self.stack.forward(hidden, packed, self._pool, blocks))
        self.synchronize()
        elapsed = time.perf_counter() - started
        self.learn(packed.tokens, blocks, elapsed)
        return elapsed

    @torch.inference_mode()
    def begin(self, chunks: Sequence[Chunk]) -> Batch:
        """As `compute`, block by block. Until it is done nobody may write to the rows of its sessions."""
        blocks = chunks[0].step.request.blocks
        hidden, packed = self._pack(chunks)
        forward = self.stack.forward_by_block(hidden, packed, self._pool, blocks)
        return Batch(self, chunks, blocks, packed.tokens, forward)

    def synchronize(self) -> None:
        """Wait for the device, or only the launching would be timed."""
        if self.stack.device.type == "cuda":
            torch.cuda.synchronize(self.stack.device)

    def learn(self, rows: int, blocks: Span, elapsed_s: float) -> None:
        """A batch of so many rows took so long in so many blocks.

        Neither figure is learned from batches in between, which tell little about either.
        """
        if rows <= _FEW_ROWS:
            self.block_time_s = smooth(self.block_time_s, elapsed_s / len(blocks))
        elif rows >= _MANY_ROWS:
            rate = rows / elapsed_s * len(blocks) / len(self.stack.span)
            self.prefill_tokens_per_s = smooth(self.prefill_tokens_per_s, rate)

    def measure(self) -> None:
        """Time some prefill and decode steps, so that the first announcement tells measured figures.

        The medians count: the first steps of a process are slow in a way that no later one is.
        """
        key = object()
        hidden = torch.zeros(64, self.stack.config.hidden_size, dtype=self.stack.dtype)
        length = min(64, self.max_batch_tokens, self._cache.tokens_free - 1)
        if length < 1:
            return
        self._cache.open(key, length + 1)

        def median_s(piece: Slice) -> float:
            step = StepRequest(key, self.stack.span, (piece,), hidden[: piece.length])
            return statistics.median(self.run([step])[0].compute_s for _ in range(_MEASURED_STEPS))

        try:
            self.prefill_tokens_per_s = length / median_s(Slice(0, 0, length))
            self.block_time_s = median_s(Slice(0, length, 1)) / len(self.stack.span)
        finally:
            self._cache.close(key)

    def _pack(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, PackedBatch]:
        pieces: list[PackedSlice] = []
        inputs, row = [], 0
        for step, rows in chunks:
            inputs.append(step.take(rows, pieces, row))
            row += rows
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        if hidden.dtype is not self.stack.dtype or hidden.device != self.stack.device:
            hidden = hidden.to(device=self.stack.device, dtype=self.stack.dtype)
        return hidden, PackedBatch.build(pieces, self.stack.device)


class Batch:
    """Chunks on their way through the blocks; made by `Engine.begin`, `advance` it until it is `done`."""

    def __init__(
        self,
        engine: Engine,
        chunks: Sequence[Chunk],
        blocks: Span,
        rows: int,
        forward: Iterator[torch.Tensor],
    ) -> None:
        self.rows = rows
        self.compute_s = 0.0
        self.done = False
        self._engine = engine
        self._chunks = chunks
        self._blocks = blocks
        self._blocks_left = len(blocks)
        self._forward = forward

    @torch.inference_mode()
    def advance(self) -> float:
        """Run the next block, and return the seconds it took. After the last the steps have their rows."""
        started = time.perf_counter()
        hidden = next(self._forward)
        self._blocks_left -= 1
        self.done = self._blocks_left == 0
        if self.done:
            _hand_out(self._chunks, hidden)
        self._engine.synchronize()
        elapsed = time.perf_counter() - started
        self.compute_s += elapsed
        if self.done:
            self._engine.learn(self.rows, self._blocks, self.compute_s)
        return elapsed


def _hand_out(chunks: Sequence[Chunk], hidden: torch.Tensor) -> None:
    """Each step gets its rows of a batch's output."""
    parts = (hidden,) if len(chunks) == 1 else torch.split(hidden, [rows for _, rows in chunks])
    for (step, _), part in zip(chunks, parts, strict=True):
        step.give(part)
