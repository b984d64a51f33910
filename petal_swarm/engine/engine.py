"""The engine: packed steps of many sessions through the blocks of one span.

A step names its session, its blocks and its slices, and brings `hidden [tokens, hidden_size]`. It is
placed in the KV cache whole, and computed in one or more chunks of its rows; chunks that use the same
blocks run as one packed batch. One step's bad input fails that step alone. All calls must come from one
thread at a time (`compute.ComputeThread` in a server).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from petal_swarm.engine.adapted import AdaptedSessions
from petal_swarm.engine.kv_cache import KVCache
from petal_swarm.engine.pace import smooth
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.engine.steps import (
    PlacedStep,
    StepRequest,
    StepResult,
    check_finite,
    count_rows,
    cut_slices,
)
from petal_swarm.errors import BadTensorError, PetalSwarmError, RemoteError
from petal_swarm.models.devices import is_out_of_memory, release_cached, to_device, wait_for
from petal_swarm.models.packed_adapters import ServedAdapter
from petal_swarm.models.packing import PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, PageKeys

logger = logging.getLogger(__name__)


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


#: With memory for no more rows than this a step fails,
_LEAST_ROWS = 16
#: and so many prefill batches after one that did not fit, twice as large ones are tried again.
_BATCHES_UNTIL_DOUBLED = 32

#: A batch of at most so many rows tells what one token takes, one of at least so many how fast prefill is.
_FEW_ROWS = 4
_MANY_ROWS = 32


class Engine:
    """Runs steps on the blocks of `stack`, with a KV cache of `kv_tokens` tokens, as `kv_dtype`.

    At most `prefix_tokens` of them are kept of prefixes that no session uses; 0 shares nothing.
    """

    def __init__(
        self,
        stack: BlockStack,
        *,
        kv_tokens: int,
        max_batch_tokens: int,
        prefix_tokens: int = 0,
        kv_dtype: str = "auto",
    ) -> None:
        self.stack = stack
        self.max_batch_tokens = max_batch_tokens
        self._on_host = stack.device.type == "cpu"
        self._cache = KVCache(kv_tokens, prefix_tokens)
        self._pool = stack.allocate(self._cache.tokens, kv_dtype)
        self._adapted = AdaptedSessions(self._cache, self._pool)
        self._adapters = self._adapted.adapters
        self._prefixes = self._adapted.prefixes
        #: Running mean of what one block takes in a decode step, in seconds; 0 before the first.
        self.block_time_s = 0.0
        #: Running mean of how fast prefill passes the whole span; 0 before the first.
        self.prefill_tokens_per_s = 0.0
        #: How many rows of prefill to compute at once: fewer for a while after memory ran out.
        self.fitting_rows = max_batch_tokens
        self._fitted = 0

    @property
    def kv_tokens_free(self) -> int:
        return self._cache.tokens_free

    def close(self) -> None:
        """Nothing will be asked for any more."""
        self.stack.close()

    def open_session(
        self,
        key: Hashable,
        *,
        max_length: int,
        scope: PrefixScope | None = None,
        adapter: ServedAdapter | None = None,
    ) -> None:
        """See `KVCache.open`. Its tokens go through the blocks with `adapter`, behind the prefix of that."""
        self._cache.open(key, max_length, scope)
        if adapter is not None:
            try:
                self._adapted.open(key, adapter)
            except BaseException:
                self._cache.close(key)
                raise

    @torch.inference_mode()
    def quicken(self) -> None:
        """Before the first session: see `BlockStack.quicken`."""
        self.stack.quicken(self._pool)

    def close_session(self, key: Hashable) -> None:
        """End a session and free its cache; unknown keys are ignored."""
        self._cache.close(key)
        self._adapted.close(key)

    def retire_session(self, key: Hashable) -> Hashable:
        """End a session of which rows are still in a batch: close it by the returned key after that."""
        retired = object()
        self._cache.rename(key, retired)
        self._adapted.rename(key, retired)
        return retired

    def find_prefixes(self, request: StepRequest, *, spare_last: bool) -> list[PageKeys]:
        """For each slice, the leading full pages that are in the cache already; for the first hop.

        With `spare_last` its last token is not one of them: somebody wants it computed.

        Raises:
            UnknownSessionError: no such session.
        """
        found, row = [], 0
        for piece in request.slices:
            rows = request.hidden[row : row + piece.length - spare_last]
            row += piece.length
            keys = self._cache.lookup(request.session, piece, rows)
            found.append(PageKeys(piece.sequence, piece.position // PAGE_TOKENS, keys))
        return found

    def scoped_keys(self, session: Hashable, given: Sequence[PageKeys]) -> list[PageKeys]:
        """This hop's own keys for those that the hop before it gave.

        Raises:
            UnknownSessionError: no such session.
        """
        return [pages._replace(keys=self._cache.scoped(session, pages.keys)) for pages in given]

    def attach(self, session: Hashable, known: Sequence[PageKeys]) -> list[PageKeys]:
        """Let sequences go on with pages that are in the cache already; returns as many keys as there are.

        Raises:
            UnknownSessionError: no such session.
        """
        return [pages._replace(keys=pages.keys[: self._cache.attach(session, pages)]) for pages in known]

    def file(self, request: StepRequest) -> tuple[PageKeys, ...]:
        """Make the pages that a step, now computed, has completed known to later sessions: their keys."""
        if self._cache.hashes_inputs(request.session):
            filed, row = [], 0
            for piece in request.slices:
                whole = len(request.slices) == 1
                rows = request.hidden if whole else request.hidden[row : row + piece.length]
                row += piece.length
                filed.append(self._cache.file_inputs(request.session, piece, rows))
        elif request.keys:
            filed = [self._cache.file_keys(request.session, given) for given in request.keys]
        else:
            return ()
        return tuple(pages for pages in filed if pages is not None)

    def seed(self, block_time_s: float, prefill_tokens_per_s: float) -> None:
        """Set the running means to figures that were measured; real steps move them from there."""
        self.block_time_s = block_time_s
        self.prefill_tokens_per_s = prefill_tokens_per_s

    def stats(self) -> EngineStats:
        return EngineStats(
            kv_tokens=self._cache.tokens,
            kv_tokens_free=self._cache.tokens_free,
            sessions=self._cache.num_sessions - self._adapted.num_prefixes,
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
            for (step, _), result in zip(chunks, placed, strict=True):
                result.compute_s = elapsed
                result.error = step.error
                if step.error is None:
                    result.hidden = step.result()
                    result.keys = self.file(step.request)
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
        return PlacedStep(request, rows, placements, self._prefixes.get(request.session))

    def could_place(self, request: StepRequest) -> bool:
        """Whether a step for which there is no room now might have it when other sessions end."""
        return self._cache.could_place(request.session, request.slices, request.forks)

    @torch.inference_mode()
    def compute(self, chunks: Sequence[Chunk]) -> float:
        """Run chunks of the same blocks, at most one of each session, as one packed batch.

        Gives the steps their rows, or an error where a chunk does not even fit the device's memory alone,
        and returns the seconds it took.
        """
        started = time.perf_counter()
        blocks = chunks[0].step.request.blocks
        if self._adapters:
            chunks = self._adapted.sorted(chunks)
        hidden, packed = self._pack(chunks)
        fits = True
        try:
            out = self.stack.forward(hidden, packed, self._pool, blocks)
            _hand_out(chunks, out if self._on_host else _fetched(chunks, out))
        except BaseException as error:
            if not is_out_of_memory(error):
                self.distrust(chunks)
                raise
            fits = False
        if not fits:  # behind the clause: until then the traceback holds what the batch had allocated
            self.compute_alone(chunks, hidden, packed)
        self.synchronize()
        elapsed = time.perf_counter() - started
        if fits:
            self.learn(packed.tokens, blocks, elapsed)
        return elapsed

    def compute_alone(self, chunks: Sequence[Chunk], hidden: torch.Tensor, packed: PackedBatch) -> None:
        """Each chunk of a batch by itself, in parts if it must be, after memory ran out for all at once."""
        logger.warning("out of memory in a batch of %d rows of %d steps", packed.tokens, len(chunks))
        row, pieces = 0, iter(packed.slices)
        for step, rows in chunks:
            own = [piece._replace(row=piece.row - row) for piece in _leading(pieces, rows)]
            found = self._in_parts(step, hidden[row : row + rows], own)
            if found is not None:
                step.give(found)
            else:
                self.distrust([Chunk(step, rows)])
                step.error = RemoteError(
                    f"the server has no memory left for a step of {rows} tokens;"
                    " send fewer at once, or use another server"
                )
            row += rows
        release_cached(self.stack.device)

    def _in_parts(
        self, step: PlacedStep, hidden: torch.Tensor, pieces: Sequence[PackedSlice]
    ) -> torch.Tensor | None:
        """Rows of one step, in parts half as large each time that memory runs out; None if none is left."""
        found: list[torch.Tensor] = []
        row, rows = 0, len(hidden)
        while row < len(hidden):
            release_cached(self.stack.device)
            part = hidden[row : row + rows]
            packed = PackedBatch.build(cut_slices(pieces, row, row + len(part)), self.stack.device)
            packed.lora = self._adapted.segments([Chunk(step, len(part))])
            fits = True
            try:
                found.append(self.stack.forward(part, packed, self._pool, step.request.blocks))
            except BaseException as error:
                if not is_out_of_memory(error):
                    self.distrust([Chunk(step, len(hidden))])
                    raise
                fits = False
            if fits:
                row += len(part)
            elif len(part) <= _LEAST_ROWS:
                return None
            else:
                rows = max(_LEAST_ROWS, len(part) // 2)
                self.fitted(len(part), False)
        return found[0] if len(found) == 1 else torch.cat(found)

    def distrust(self, chunks: Sequence[Chunk]) -> None:
        """Rows of these steps have their places, and will never be computed: share nothing of them."""
        for step, _ in chunks:
            self._cache.stop_sharing(step.request.session)

    @torch.inference_mode()
    def begin(self, chunks: Sequence[Chunk]) -> Batch:
        """As `compute`, block by block. Until it is done nobody may write to the rows of its sessions."""
        blocks = chunks[0].step.request.blocks
        if self._adapters:
            chunks = self._adapted.sorted(chunks)
        hidden, packed = self._pack(chunks)
        forward = self.stack.forward_by_block(hidden, packed, self._pool, blocks)
        return Batch(self, chunks, hidden, packed, forward)

    def synchronize(self) -> None:
        """Wait for the device, or only the launching would be timed."""
        if not self._on_host:
            wait_for(self.stack.device)

    def fitted(self, rows: int, fits: bool) -> None:
        """Whether a prefill batch of so many rows had the memory that it needs."""
        if not fits:
            self.fitting_rows = max(_LEAST_ROWS, min(self.fitting_rows, rows // 2))
            self._fitted = 0
        elif self.fitting_rows < self.max_batch_tokens:
            self._fitted += 1
            if self._fitted >= _BATCHES_UNTIL_DOUBLED:
                self._fitted = 0
                self.fitting_rows = min(2 * self.fitting_rows, self.max_batch_tokens)

    def learn(self, rows: int, blocks: Span, elapsed_s: float) -> None:
        """A batch of so many rows took so long in so many blocks.

        Neither figure is learned from batches in between, which tell little about either.
        """
        if rows <= _FEW_ROWS:
            self.block_time_s = smooth(self.block_time_s, elapsed_s / len(blocks))
        elif rows >= _MANY_ROWS:
            rate = rows / elapsed_s * len(blocks) / len(self.stack.span)
            self.prefill_tokens_per_s = smooth(self.prefill_tokens_per_s, rate)

    def _pack(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, PackedBatch]:
        pieces: list[PackedSlice] = []
        inputs, row = [], 0
        for step, rows in chunks:
            inputs.append(step.take(rows, pieces, row))
            row += rows
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        if hidden.dtype is not self.stack.dtype:
            hidden = hidden.to(self.stack.dtype)
        if not self._on_host:
            hidden = to_device(hidden, self.stack.device)
        packed = PackedBatch.build(pieces, self.stack.device)
        if self._adapters:
            packed.lora = self._adapted.segments(chunks)
        return hidden, packed


class Batch:
    """Chunks on their way through the blocks; made by `Engine.begin`, `advance` it until it is `done`."""

    def __init__(
        self,
        engine: Engine,
        chunks: Sequence[Chunk],
        hidden: torch.Tensor,
        packed: PackedBatch,
        forward: Iterator[torch.Tensor],
    ) -> None:
        self.rows = packed.tokens
        self.compute_s = 0.0
        self.done = False
        self._engine = engine
        self._chunks = chunks
        self._hidden = hidden
        self._packed = packed
        self._blocks = chunks[0].step.request.blocks
        self._blocks_left = len(self._blocks)
        self._forward = forward

    @torch.inference_mode()
    def advance(self) -> float:
        """Run the next block, and return the seconds it took. After the last the steps have their rows."""
        started = time.perf_counter()
        try:
            hidden = next(self._forward)
        except BaseException as error:
            if not is_out_of_memory(error):
                self._engine.distrust(self._chunks)
                raise
            self._blocks_left = 0
            self._engine.fitted(self.rows, False)
        else:
            self._blocks_left -= 1
            if not self._blocks_left:
                self.done = True
                _hand_out(self._chunks, hidden)
        if not self._blocks_left and not self.done:
            self._engine.compute_alone(self._chunks, self._hidden, self._packed)
        self._engine.synchronize()
        elapsed = time.perf_counter() - started
        self.compute_s += elapsed
        if self.done:
            self._engine.fitted(self.rows, True)
            self._engine.learn(self.rows, self._blocks, self.compute_s)
        self.done = not self._blocks_left
        return elapsed


def _fetched(chunks: Sequence[Chunk], hidden: torch.Tensor) -> torch.Tensor:
    """A batch's output on the host, if all of it is to go there: one copy, rather than one for each step."""
    wanted = len(chunks) > 1 and all(rows == step.rows and step.wants_all for step, rows in chunks)
    return hidden.cpu() if wanted else hidden


def _hand_out(chunks: Sequence[Chunk], hidden: torch.Tensor) -> None:
    """Each step gets its rows of a batch's output."""
    parts = (hidden,) if len(chunks) == 1 else torch.split(hidden, [rows for _, rows in chunks])
    for (step, _), part in zip(chunks, parts, strict=True):
        step.give(part)


def _leading(pieces: Iterator[PackedSlice], rows: int) -> Iterator[PackedSlice]:
    """The next of `pieces`, as many as have `rows` rows together."""
    while rows:
        piece = next(pieces)
        rows -= piece.length
        yield piece
