"""The steps of a session, without I/O: how long its sequences are, and what is sent for what is appended.

Blocking and asynchronous sessions differ in how they wait, and share this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from petal_swarm.client.config import ClientConfig
from petal_swarm.client.packing import Chunk, chunk_slices
from petal_swarm.client.ring import Ring
from petal_swarm.errors import ConfigError, SessionTooLongError
from petal_swarm.routing.prefill import MIN_CHUNK_TOKENS, choose_chunk, stages_of
from petal_swarm.span import Slice
from petal_swarm.wire.messages.parts import MAX_POSITION, MAX_SEQUENCES
from petal_swarm.wire.messages.steps import Output, Rows, Step
from petal_swarm.wire.tensors import DTYPES, decode_tensor, encode_tensor

_SIXTEEN_BIT = ("bfloat16", "float16")


class Steps:
    """`lengths[i]` is how many tokens of sequence i the hops have, once they have all that was made here.

    Raises:
        ConfigError: `max_length` is none that a session can have.
    """

    def __init__(self, max_length: int) -> None:
        if not 1 <= max_length <= MAX_POSITION:
            raise ConfigError(f"max_length must be at least 1 and at most {MAX_POSITION}, got {max_length}")
        self.max_length = max_length
        self.lengths: list[int] = []
        self.wire_dtype = torch.float32
        self._next_step = 0
        self._forks: tuple[int, ...] | None = None

    def use(self, ring: Ring) -> None:
        """Send in the dtype that all hops of the ring compute in, if it is a short one."""
        first = ring.dtypes[0]
        same = all(name == first for name in ring.dtypes)
        self.wire_dtype = DTYPES[first] if same and first in _SIXTEEN_BIT else torch.float32

    def fork(self, sources: Sequence[int]) -> None:
        """Sequence i goes on as a copy of sequence `sources[i]`; takes effect with the next step."""
        earlier = self._forks
        self._forks = tuple(sources) if earlier is None else tuple(earlier[source] for source in sources)
        self.lengths = [self.lengths[source] for source in sources]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what follows the first `lengths[i]` tokens of sequence i.

        Raises:
            ConfigError: there are not so many tokens.
        """
        if len(lengths) != len(self.lengths) or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)
        ):
            raise ConfigError(f"cannot truncate sequences of {self.lengths} tokens to {list(lengths)}")
        self.lengths = list(lengths)

    def slices(self, lengths: Sequence[int], rows: Rows) -> list[Slice]:
        """Where `lengths[i]` more tokens of sequence i stand; the first call fixes how many sequences.

        Raises:
            ConfigError: there are more or fewer sequences, no token at all, or nothing is wanted back.
            SessionTooLongError: a sequence would pass `max_length`.
        """
        if not self.lengths:
            self.lengths = [0] * len(lengths)
        if len(lengths) != len(self.lengths):
            raise ConfigError(f"the session has {len(self.lengths)} sequences, the step {len(lengths)}")
        slices = [Slice(index, self.lengths[index], length) for index, length in enumerate(lengths) if length]
        if not slices or len(slices) > MAX_SEQUENCES or rows == "none":
            raise ConfigError(f"a step needs 1 to {MAX_SEQUENCES} sequences with tokens, and wants rows back")
        longest = max(piece.end for piece in slices)
        if longest > self.max_length:
            raise SessionTooLongError(
                f"{longest} tokens do not fit the session's max_length of {self.max_length};"
                " open the session with a larger one"
            )
        return slices

    def took(self, slices: Sequence[Slice]) -> None:
        """These tokens belong to the sequences now."""
        for piece in slices:
            self.lengths[piece.sequence] = piece.end

    def chunks(
        self, ring: Ring, config: ClientConfig, hidden: torch.Tensor, slices: Sequence[Slice], rows: Rows
    ) -> tuple[list[Chunk], float]:
        """Cut `hidden [tokens, hidden_size]` into what goes in one step each.

        Also returns for how many seconds their answers may be waited for. Not for each chunk: inner ones
        answer nothing, and a lost prompt would be noticed too late.
        """
        tokens = hidden.shape[0]
        row_bytes = hidden.shape[1] * self.wire_dtype.itemsize
        max_tokens = max(1, min(ring.max_batch_tokens, config.max_step_bytes // row_bytes))
        chunk = max_tokens
        if tokens > MIN_CHUNK_TOKENS:
            fixed = config.prefill_chunk_tokens
            if fixed is not None:
                chunk = min(fixed, max_tokens)
            else:
                stages = stages_of(ring.route.hops, row_bytes, answers_rows=rows == "all")
                chunk = choose_chunk(tokens, stages, limit=max_tokens)
        return chunk_slices(slices, chunk), config.step_timeout_s * -(-tokens // max_tokens)

    def made(self, chunks: Sequence[Chunk], hidden: torch.Tensor, rows: Rows) -> Iterator[Step]:
        """The chunks as steps, each made when its turn has come: a long prompt is not held twice."""
        for chunk in chunks:
            yield self.make(chunk, hidden[chunk.start : chunk.stop], rows)

    def make(self, chunk: Chunk, hidden: torch.Tensor, rows: Rows) -> Step:
        """The next step; `hidden` are the rows of this chunk alone."""
        meta, payload = encode_tensor(hidden.to(self.wire_dtype))
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


def one_token_each(lengths: Sequence[int]) -> Chunk:
    """The step that appends a token to each sequence."""
    slices = tuple(Slice(index, length, 1) for index, length in enumerate(lengths))
    return Chunk(0, len(slices), slices, tuple(range(len(slices))))


def rows_of(chunk: Chunk, output: Output, rows: Rows) -> torch.Tensor:
    """The answer's rows, less those of sequences that a later chunk continues."""
    tensor = decode_tensor(output.tensor, output.payload)
    return tensor[: len(chunk.ends)] if rows == "last" else tensor
