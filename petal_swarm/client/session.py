"""A session as blocking code sees it: hidden states in, hidden states out, one KV cache in the swarm."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import torch

from petal_swarm.client.adapters import Adapter, NamedAdapter, upload_s
from petal_swarm.client.loop import LoopThread
from petal_swarm.client.packing import Chunk, chunk_slices
from petal_swarm.client.ring import Ring
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import ConfigError, PetalSwarmError, SessionTooLongError
from petal_swarm.routing.prefill import MIN_CHUNK_TOKENS, choose_chunk, stages_of
from petal_swarm.routing.route import Route
from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import MAX_POSITION, MAX_SEQUENCES
from petal_swarm.wire.messages.steps import Output, Rows, Step
from petal_swarm.wire.tensors import DTYPES, decode_tensor, encode_tensor

CLOSE_TIMEOUT_S = 10.0
_SIXTEEN_BIT = ("bfloat16", "float16")


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
        if not 1 <= max_length <= MAX_POSITION:
            raise ConfigError(f"max_length must be at least 1 and at most {MAX_POSITION}, got {max_length}")
        self.max_length = max_length
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self._loop = loop
        self._swarm = swarm
        self._model = model
        self._adapter = adapter
        self._ring: Ring | None = None
        self._closed = False
        self._next_step = 0
        self._forks: tuple[int, ...] | None = None
        self._lengths: list[int] = []
        self._wire_dtype = torch.float32
        self._ahead: _Ahead | None = None
        self.last_trace: tuple[float, ...] = ()

    @property
    def position(self) -> int:
        """Tokens in the KV cache of the longest sequence."""
        return max(self._lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the KV cache of each sequence."""
        return tuple(self._lengths)

    @property
    def route(self) -> Route | None:
        """The servers in use; None before the first step."""
        return self._ring.route if self._ring else None

    def fork(self, sources: Sequence[int]) -> None:
        """Sequence i goes on as a copy of sequence `sources[i]`; takes effect with the next step."""
        self._ahead = None
        earlier = self._forks
        self._forks = tuple(sources) if earlier is None else tuple(earlier[source] for source in sources)
        self._lengths = [self._lengths[source] for source in sources]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what follows the first `lengths[i]` tokens of sequence i.

        Raises:
            ConfigError: there are not so many tokens.
        """
        if len(lengths) != len(self._lengths) or any(
            not 0 <= new <= old for new, old in zip(lengths, self._lengths, strict=True)
        ):
            raise ConfigError(f"cannot truncate sequences of {self._lengths} tokens to {list(lengths)}")
        self._ahead = None
        self._lengths = list(lengths)

    def step(self, hidden: torch.Tensor, lengths: Sequence[int], *, rows: Rows = "last") -> torch.Tensor:
        """Append `lengths[i]` tokens to sequence i; `hidden [tokens, hidden_size]` holds them in order.

        Returns `[len(lengths), hidden_size]` for rows "last", `[tokens, hidden_size]` for "all". Long
        steps travel in chunks. The first step fixes how many sequences there are.

        Raises:
            SessionTooLongError: a sequence would pass `max_length`.
            MissingBlocksError, RemoteError, NetworkError: the swarm failed; the session is closed.
        """
        self._ahead = None
        if not self._lengths:
            self._lengths = [0] * len(lengths)
        if len(lengths) != len(self._lengths):
            raise ConfigError(f"the session has {len(self._lengths)} sequences, the step {len(lengths)}")
        slices = [
            Slice(index, self._lengths[index], length) for index, length in enumerate(lengths) if length
        ]
        if not slices or len(slices) > MAX_SEQUENCES or rows == "none":
            raise ConfigError(f"a step needs 1 to {MAX_SEQUENCES} sequences with tokens, and wants rows back")
        longest = max(piece.end for piece in slices)
        if longest > self.max_length:
            raise SessionTooLongError(
                f"{longest} tokens do not fit the session's max_length of {self.max_length};"
                " open the session with a larger one"
            )
        try:
            output = self._exchange(hidden, slices, rows)
        except BaseException:
            self.close()
            raise
        for piece in slices:
            self._lengths[piece.sequence] = piece.end
        return output

    def step_ahead(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Send the step that probably comes next, one token for each sequence, without waiting.

        `tokens [sequences, 1]` identify it for `take_ahead`. If something else comes instead, nothing is
        lost: positions are absolute, so the next step takes the place of this one.
        """
        slices = [Slice(index, length, 1) for index, length in enumerate(self._lengths)]
        if self._ring is None or self.position >= self.max_length or len(slices) != hidden.shape[0]:
            return
        chunk = Chunk(0, len(slices), tuple(slices), tuple(range(len(slices))))
        ring, step = self._ring, self._step(chunk, hidden.to(self._wire_dtype), "last")
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
            rows = self._rows_of(ahead.chunk, output, "last")
        except BaseException:
            self.close()
            raise
        self.last_trace = output.trace
        self._lengths = [length + 1 for length in self._lengths]
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
            first = self._ring.dtypes[0]
            same = all(name == first for name in self._ring.dtypes)
            self._wire_dtype = DTYPES[first] if same and first in _SIXTEEN_BIT else torch.float32
        return self._ring

    def _exchange(self, hidden: torch.Tensor, slices: Sequence[Slice], rows: Rows) -> torch.Tensor:
        ring = self._connected()
        row_bytes = hidden.shape[1] * self._wire_dtype.itemsize
        max_tokens = max(1, min(ring.max_batch_tokens, self._swarm.config.max_step_bytes // row_bytes))
        tokens = hidden.shape[0]
        short = tokens <= MIN_CHUNK_TOKENS
        chunks = chunk_slices(slices, max_tokens if short else self._chunk(ring, hidden, rows, max_tokens))
        # Not for each chunk: inner ones answer nothing, and a lost prompt would be noticed too late.
        limit = self._swarm.config.step_timeout_s * -(-tokens // max_tokens)
        outputs: list[Output | None]
        if len(chunks) == 1:
            # As the general case, without a task for it: this is what decoding does for every token.
            step = self._step(chunks[0], hidden.to(self._wire_dtype), rows)
            answer = self._loop.call(lambda: ring.send(step))
            outputs = [None if answer is None else self._loop.wait(answer, timeout_s=limit)]
        else:
            outputs = self._loop.run(ring.exchange(self._steps(chunks, hidden, rows)), timeout_s=limit)
        parts = []
        for chunk, output in zip(chunks, outputs, strict=True):
            if output is not None:
                self.last_trace = output.trace
                parts.append(self._rows_of(chunk, output, rows))
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result.to(device=hidden.device, dtype=hidden.dtype)

    def _chunk(self, ring: Ring, hidden: torch.Tensor, rows: Rows, max_tokens: int) -> int:
        """How many tokens of a long prompt go in one step."""
        fixed = self._swarm.config.prefill_chunk_tokens
        if fixed is not None:
            return min(fixed, max_tokens)
        row_bytes = hidden.shape[1] * self._wire_dtype.itemsize
        stages = stages_of(ring.route.hops, row_bytes, answers_rows=rows == "all")
        return choose_chunk(hidden.shape[0], stages, limit=max_tokens)

    def _steps(self, chunks: Sequence[Chunk], hidden: torch.Tensor, rows: Rows) -> Iterator[Step]:
        """The chunks as steps, each made when its turn has come: a long prompt is not held twice."""
        for chunk in chunks:
            yield self._step(chunk, hidden[chunk.start : chunk.stop].to(self._wire_dtype), rows)

    def _step(self, chunk: Chunk, hidden: torch.Tensor, rows: Rows) -> Step:
        meta, payload = encode_tensor(hidden)
        step = Step(
            step=self._next_step,
            epoch=0,
            slices=chunk.slices,
            tensor=meta,
            payload=payload,
            rows=rows if rows != "last" or chunk.ends else "none",
            forks=self._forks,
        )
        self._next_step += 1
        self._forks = None
        return step

    def _rows_of(self, chunk: Chunk, output: Output, rows: Rows) -> torch.Tensor:
        """The answer's rows, less those of sequences that a later chunk continues."""
        tensor = decode_tensor(output.tensor, output.payload)
        return tensor[: len(chunk.ends)] if rows == "last" else tensor
