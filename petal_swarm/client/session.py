"""A session as blocking code sees it: hidden states in, hidden states out, one KV cache in the swarm."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch

from petal_swarm.client.adapters import Adapter, NamedAdapter, upload_s
from petal_swarm.client.loop import LoopThread
from petal_swarm.client.packing import Chunk
from petal_swarm.client.ring import Ring
from petal_swarm.client.steps import Steps, one_token_each, rows_of
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import ConfigError, PetalSwarmError
from petal_swarm.routing.route import Route
from petal_swarm.span import Slice
from petal_swarm.wire.messages.steps import Output, Rows

CLOSE_TIMEOUT_S = 10.0


class _Ahead(NamedTuple):
    """A step that was sent before it was asked for."""

    tokens: torch.Tensor
    chunk: Chunk
    answer: asyncio.Future[Output]
    dtype: torch.dtype
    device: torch.device


class InferenceSession:
    """Many steps over one KV cache; also a context manager. Not for use by two threads at once.

    `max_length` bounds the tokens of each sequence. The route is chosen at the first step. Several
    calls of `generate` may share a session: each continues where the last one ended, and its inputs
    are the new tokens only.
    """

    def __init__(
        self,
        loop: LoopThread,
        swarm: Swarm,
        model: ModelRef,
        *,
        max_length: int,
        adapter: Adapter | NamedAdapter | None = None,
    ) -> None:
        self._steps = Steps(max_length)
        self.max_length = max_length
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self._loop = loop
        self._swarm = swarm
        self._model = model
        self._adapter = adapter
        self._ring: Ring | None = None
        self._closed = False
        self._ahead: _Ahead | None = None
        self.last_trace: tuple[float, ...] = ()

    @property
    def position(self) -> int:
        """Tokens in the KV cache of the longest sequence."""
        return max(self._steps.lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the KV cache of each sequence."""
        return tuple(self._steps.lengths)

    @property
    def route(self) -> Route | None:
        """The servers in use; None before the first step."""
        return self._ring.route if self._ring else None

    def fork(self, sources: Sequence[int]) -> None:
        """Sequence i goes on as a copy of sequence `sources[i]`; takes effect with the next step."""
        self._ahead = None
        self._steps.fork(sources)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what follows the first `lengths[i]` tokens of sequence i.

        Raises:
            ConfigError: there are not so many tokens.
        """
        self._steps.truncate(lengths)
        self._ahead = None

    def step(self, hidden: torch.Tensor, lengths: Sequence[int], *, rows: Rows = "last") -> torch.Tensor:
        """Append `lengths[i]` tokens to sequence i; `hidden [tokens, hidden_size]` holds them in order.

        Returns `[len(lengths), hidden_size]` for rows "last", `[tokens, hidden_size]` for "all". Long
        steps travel in chunks. The first step fixes how many sequences there are.

        Raises:
            SessionTooLongError: a sequence would pass `max_length`.
            MissingBlocksError, RemoteError, NetworkError: the swarm failed; the session is closed.
        """
        self._ahead = None
        slices = self._steps.slices(lengths, rows)
        try:
            output = self._exchange(hidden, slices, rows)
        except BaseException:
            self.close()
            raise
        self._steps.took(slices)
        return output

    def step_ahead(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Send the step that probably comes next, one token for each sequence, without waiting.

        `tokens [sequences, 1]` identify it for `take_ahead`. If something else comes instead, nothing is
        lost: positions are absolute, so the next step takes the place of this one.
        """
        if self._ring is None or self.position >= self.max_length or len(self.lengths) != hidden.shape[0]:
            return
        chunk = one_token_each(self._steps.lengths)
        ring, step = self._ring, self._steps.make(chunk, hidden, "last")
        answer = self._loop.call(lambda: ring.send(step))
        assert answer is not None
        self._ahead = _Ahead(tokens, chunk, answer, hidden.dtype, hidden.device)

    def take_ahead(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The last rows of the step sent by `step_ahead`, if it was for these tokens; else None."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not torch.equal(ahead.tokens, tokens):
            return None
        try:
            output = self._loop.wait(ahead.answer, timeout_s=self._swarm.config.step_timeout_s)
            rows = rows_of(ahead.chunk, output, "last")
        except BaseException:
            self.close()
            raise
        self.last_trace = output.trace
        self._steps.took(ahead.chunk.slices)
        return rows.to(device=ahead.device, dtype=ahead.dtype)

    def close(self) -> None:
        """Free the KV cache in the swarm. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._ring is not None:
            try:
                self._loop.run(self._ring.close(), timeout_s=CLOSE_TIMEOUT_S)
            except PetalSwarmError as error:
                warnings.warn(f"the session was not closed cleanly: {error}", ResourceWarning, stacklevel=2)

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connected(self) -> Ring:
        if self._closed:
            raise ConfigError("the session is closed; open a new one")
        if self._ring is None:
            config = self._swarm.config
            limit = config.wait_for_blocks_s + (config.open_attempts + 1) * (2 * config.open_timeout_s)
            limit += config.wait_for_room_s + upload_s(self._adapter)
            opening = self._swarm.open_ring(self._model, max_length=self.max_length, adapter=self._adapter)
            self._ring = self._loop.run(opening, timeout_s=limit)
            self._steps.use(self._ring)
        return self._ring

    def _exchange(self, hidden: torch.Tensor, slices: Sequence[Slice], rows: Rows) -> torch.Tensor:
        ring = self._connected()
        chunks, limit = self._steps.chunks(ring, self._swarm.config, hidden, slices, rows)
        outputs: list[Output | None]
        if len(chunks) == 1:
            # As the general case, without a task for it: this is what decoding does for every token.
            step = self._steps.make(chunks[0], hidden, rows)
            answer = self._loop.call(lambda: ring.send(step))
            outputs = [None if answer is None else self._loop.wait(answer, timeout_s=limit)]
        else:
            made = self._steps.made(chunks, hidden, rows)
            outputs = self._loop.run(ring.exchange(made), timeout_s=limit)
        parts = []
        for chunk, output in zip(chunks, outputs, strict=True):
            if output is not None:
                self.last_trace = output.trace
                parts.append(rows_of(chunk, output, rows))
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result.to(device=hidden.device, dtype=hidden.dtype)
