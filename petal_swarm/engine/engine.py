"""The engine: packed steps of many sessions through the blocks of one span.

A step names its session, its blocks and its slices, and brings `hidden [tokens, hidden_size]`. Steps
that use the same blocks run as one packed batch. One step's bad input fails that step alone. All
calls must come from one thread (`compute.ComputeThread` in a server).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from petal_swarm.engine.kv_cache import KVCache, Placement
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.errors import BadTensorError, PetalSwarmError, RemoteError
from petal_swarm.models.devices import release_cached, to_device, wait_for
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice, Span
from petal_swarm.wire.messages import PAGE_TOKENS, PageKeys

logger = logging.getLogger(__name__)


# Not frozen, though nobody changes them: that would cost a microsecond for every field of every step.
@dataclass(slots=True, eq=False)
class StepRequest:
    """One step of one session. `hidden` is `[tokens, hidden_size]`, its rows in the order of `slices`.

    `keys` are those of the pages that it completes, as far as the hop before this one knows them.
    """

    session: Hashable
    blocks: Span
    slices: tuple[Slice, ...]
    hidden: torch.Tensor
    forks: tuple[int, ...] | None = None
    rows: Literal["last", "all", "none"] = "all"
    keys: tuple[PageKeys, ...] = ()


@dataclass(slots=True, eq=False)
class StepResult:
    """`hidden [rows, hidden_size]` as asked for by the request, or why there is none.

    `keys` are this hop's own, of the pages that the step has completed.
    """

    hidden: torch.Tensor | None
    error: PetalSwarmError | None
    compute_s: float
    keys: tuple[PageKeys, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; times are running means of real decode steps, in seconds."""

    kv_tokens: int
    kv_tokens_free: int
    sessions: int
    block_time_s: float
    prefill_tokens_per_s: float


#: How much one new measurement moves a running mean.
_SMOOTHING = 0.1


class Engine:
    """Runs steps on the blocks of `stack`, with a KV cache of `kv_tokens` tokens, as `kv_dtype`."""

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
        self._pool = KVPool.allocate(
            stack.config, stack.span, self._cache.tokens, stack.dtype, stack.device, kv_dtype
        )
        #: Running mean of what one block takes in a decode step, in seconds; 0 before the first.
        self.block_time_s = 0.0
        self._prefill_tokens_per_s = 0.0

    def open_session(self, key: Hashable, *, max_length: int, scope: PrefixScope | None = None) -> None:
        """See `KVCache.open`."""
        self._cache.open(key, max_length, scope)

    def close_session(self, key: Hashable) -> None:
        """End a session and free its cache; unknown keys are ignored."""
        self._cache.close(key)

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

    def stats(self) -> EngineStats:
        return EngineStats(
            kv_tokens=self._cache.tokens,
            kv_tokens_free=self._cache.tokens_free,
            sessions=self._cache.num_sessions,
            block_time_s=self.block_time_s,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )

    @torch.inference_mode()
    def run(self, requests: Sequence[StepRequest]) -> list[StepResult]:
        """Run steps that all use the same blocks, at most one of each session, as one packed batch.

        A request that fails (wrong tensor, unknown session, no room) gets its error in its result;
        the others are not affected.
        """
        started = time.perf_counter()
        placed: list[tuple[int, list[Placement]]] = []
        errors: dict[int, PetalSwarmError] = {}
        for index, request in enumerate(requests):
            try:
                placed.append((index, self._place(request)))
            except PetalSwarmError as error:
                errors[index] = error
        outputs: dict[int, torch.Tensor] = {}
        fits = True
        if placed:
            try:
                self._compute(requests, placed, outputs)
            except torch.OutOfMemoryError:
                logger.warning("out of memory in a batch of %d steps", len(placed))
                fits = False
        if not fits:  # behind the clause: until then the traceback holds what the batch had allocated
            errors |= self._compute_alone(requests, placed, outputs)
        if not self._on_host:
            wait_for(self.stack.device)  # or only the launching would be timed
        keys = {index: self._file(requests[index]) for index in outputs}
        elapsed = time.perf_counter() - started
        if placed and fits:
            self._learn(requests, placed, elapsed)
        return [
            StepResult(outputs.get(index), errors.get(index), elapsed, keys.get(index, ()))
            for index in range(len(requests))
        ]

    def seed(self, block_time_s: float, prefill_tokens_per_s: float) -> None:
        """Set the running means to figures that were measured; real steps move them from there."""
        self.block_time_s = block_time_s
        self._prefill_tokens_per_s = prefill_tokens_per_s

    def _place(self, request: StepRequest) -> list[Placement]:
        """Check a request and give its tokens their places in the cache."""
        expected = (sum([piece.length for piece in request.slices]), self.stack.config.hidden_size)
        if request.hidden.shape != expected:
            raise BadTensorError(f"hidden has shape {list(request.hidden.shape)}, expected {list(expected)}")
        if expected[0] > self.max_batch_tokens:
            raise BadTensorError(
                f"a step of {expected[0]} tokens is over this server's limit of {self.max_batch_tokens}"
            )
        assert self.stack.span.covers(request.blocks)
        if request.forks is not None:
            self._cache.fork(request.session, request.forks)
        placements = []
        for piece in request.slices:
            placement = self._cache.extend(request.session, piece)
            for source, target, rows in placement.copies:
                self._pool.copy_rows(source, target, rows)
            placements.append(placement)
        return placements

    def _file(self, request: StepRequest) -> tuple[PageKeys, ...]:
        """Make the pages that a step has completed known to later sessions."""
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

    def _compute(
        self,
        requests: Sequence[StepRequest],
        placed: list[tuple[int, list[Placement]]],
        outputs: dict[int, torch.Tensor],
    ) -> None:
        hidden = self._forward(requests, placed)
        if len(placed) == 1:
            index = placed[0][0]
            outputs[index] = _select(hidden, requests[index])
            return
        sizes = [requests[index].hidden.shape[0] for index, _ in placed]
        for (index, _), part in zip(placed, torch.split(hidden, sizes), strict=True):
            outputs[index] = _select(part, requests[index])

    def _compute_alone(
        self,
        requests: Sequence[StepRequest],
        placed: list[tuple[int, list[Placement]]],
        outputs: dict[int, torch.Tensor],
    ) -> dict[int, PetalSwarmError]:
        """Each step alone, after memory ran out for all at once: errors of those that do not fit even so."""
        errors: dict[int, PetalSwarmError] = {}
        for entry in placed:  # their places in the cache are theirs already
            release_cached(self.stack.device)
            try:
                self._compute(requests, [entry], outputs)
            except torch.OutOfMemoryError:
                tokens = requests[entry[0]].hidden.shape[0]
                errors[entry[0]] = RemoteError(
                    f"the server has no memory left for a step of {tokens} tokens;"
                    " send fewer at once, or use another server"
                )
        release_cached(self.stack.device)
        return errors

    def _forward(
        self, requests: Sequence[StepRequest], placed: list[tuple[int, list[Placement]]]
    ) -> torch.Tensor:
        pieces, row = [], 0
        for index, placements in placed:
            for piece, placement in zip(requests[index].slices, placements, strict=True):
                pieces.append(PackedSlice(row, piece.length, piece.position, placement.extents))
                row += piece.length
        batch = PackedBatch.build(pieces, self.stack.device)
        inputs = [requests[index].hidden for index, _ in placed]
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        if hidden.dtype is not self.stack.dtype:
            hidden = hidden.to(self.stack.dtype)
        if not self._on_host:
            hidden = to_device(hidden, self.stack.device)
        return self.stack.forward(hidden, batch, self._pool, requests[placed[0][0]].blocks)

    def _learn(
        self, requests: Sequence[StepRequest], placed: list[tuple[int, list[Placement]]], elapsed: float
    ) -> None:
        tokens = sum(requests[index].hidden.shape[0] for index, _ in placed)
        blocks = len(requests[placed[0][0]].blocks)
        if tokens <= 4:
            self.block_time_s = _smooth(self.block_time_s, elapsed / blocks)
        elif tokens >= 32:
            rate = tokens / elapsed * blocks / len(self.stack.span)
            self._prefill_tokens_per_s = _smooth(self._prefill_tokens_per_s, rate)


def _smooth(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + _SMOOTHING * (value - mean)


def _select(hidden: torch.Tensor, request: StepRequest) -> torch.Tensor:
    """The rows that the request wants back."""
    if request.rows == "all" or (request.rows == "last" and hidden.shape[0] == len(request.slices)):
        return hidden
    if request.rows == "none":
        return hidden[:0]
    ends, row = [], 0
    for piece in request.slices:
        row += piece.length
        ends.append(row - 1)
    # Slices, not a list of numbers, which a GPU would have to be told and waited for.
    return torch.cat([hidden[end : end + 1] for end in ends])
