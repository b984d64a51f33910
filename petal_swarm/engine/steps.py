"""What an engine is asked for and what it answers: steps, computed whole or in chunks of their rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from petal_swarm.engine.adapted import PrefixRows
from petal_swarm.engine.kv_cache import Placement
from petal_swarm.errors import BadTensorError, PetalSwarmError
from petal_swarm.models.packing import PackedSlice
from petal_swarm.span import Slice, Span
from petal_swarm.wire.messages.prefixes import PageKeys

#: A step of few new tokens for each of its sequences, and few in all, decodes: a token, a beam, some drafts.
DECODE_TOKENS = 8
DECODE_ROWS = 64


# Not frozen, though nobody changes them: that would cost a microsecond for every field of every step.
@dataclass(slots=True, eq=False)
class StepRequest:
    """One step of one session. `hidden` is `[tokens, hidden_size]`, its rows in the order of `slices`.

    `peer` is whom the step is for: peers share the engine evenly, whatever sessions they have. `keys` are
    those of the pages that it completes, as far as the hop before this one knows them.
    """

    session: Hashable
    blocks: Span
    slices: tuple[Slice, ...]
    hidden: torch.Tensor
    forks: tuple[int, ...] | None = None
    rows: Literal["last", "all", "none"] = "all"
    peer: str = ""
    keys: tuple[PageKeys, ...] = ()


@dataclass(slots=True, eq=False)
class StepResult:
    """`hidden [rows, hidden_size]` as asked for by the request, or why there is none.

    `compute_s` is what its batches took, `queued_s` how long it waited while others were computed. `keys`
    are this hop's own, of the pages that the step has completed.
    """

    hidden: torch.Tensor | None
    error: PetalSwarmError | None
    compute_s: float
    queued_s: float = 0.0
    keys: tuple[PageKeys, ...] = ()


def count_rows(request: StepRequest) -> int:
    """Rows by the request's slices; its tensor has as many if it is valid."""
    return sum([piece.length for piece in request.slices])


def is_decode(request: StepRequest) -> bool:
    """Whether a step goes before prefill, and is computed without a pause."""
    return count_rows(request) <= DECODE_ROWS and all(
        piece.length <= DECODE_TOKENS for piece in request.slices
    )


def check_finite(request: StepRequest) -> None:
    """A number that is none would spread to every later token of the session, at every hop.

    Raises:
        BadTensorError: names the first row that holds one.
    """
    total = request.hidden.sum().item()
    if total - total == 0.0:
        return
    # Not finite, or finite numbers whose sum is not.
    bad = request.hidden.isfinite().all(dim=1).logical_not_().nonzero()
    if not len(bad):
        return
    row = int(bad[0])
    for piece in request.slices:
        if row < piece.length:
            raise BadTensorError(
                f"hidden state of sequence {piece.sequence} at position {piece.position + row} is not finite"
            )
        row -= piece.length


class PlacedStep:
    """A step whose tokens have their places in the KV cache; `take` and `give` turn by turn until `done`."""

    __slots__ = (
        "_ends",
        "_index",
        "_offset",
        "_outputs",
        "_placements",
        "_prefix",
        "_taken",
        "error",
        "request",
        "rows",
    )

    def __init__(
        self,
        request: StepRequest,
        rows: int,
        placements: Sequence[Placement],
        prefix: PrefixRows | None = None,
    ) -> None:
        self.request = request
        self.rows = rows
        #: Why some of its rows could not be computed.
        self.error: PetalSwarmError | None = None
        self._placements = placements
        self._prefix = prefix
        self._taken = 0
        self._index = 0
        self._offset = 0
        self._ends: list[int] = []
        self._outputs: list[torch.Tensor] = []

    @property
    def rows_left(self) -> int:
        """Rows that were not taken yet."""
        return self.rows - self._taken

    @property
    def wants_all(self) -> bool:
        """Whether the request wants every row back."""
        request = self.request
        return request.rows == "all" or (request.rows == "last" and self.rows == len(request.slices))

    def take(self, rows: int, pieces: list[PackedSlice], first: int) -> torch.Tensor:
        """The next `rows` rows of the step's hidden states; their slices are appended to `pieces`.

        `first` is the packed row that they begin at.
        """
        hidden = self.request.hidden
        if rows < self.rows:
            hidden = hidden[self._taken : self._taken + rows]
        self._taken += rows
        self._ends = []
        row = first
        while rows:
            piece = self.request.slices[self._index]
            position = piece.position + self._offset
            length = min(rows, piece.length - self._offset)
            extents = self._placements[self._index].extents
            if self._offset + length < piece.length:
                self._offset += length
                extents = _first_rows(extents, position + length)
            else:
                self._index += 1
                self._offset = 0
                self._ends.append(row + length - 1 - first)
            if self._prefix is not None:
                position += self._prefix.tokens
                extents = self._prefix.extents + extents
            pieces.append(PackedSlice(row, length, position, extents))
            row += length
            rows -= length
        return hidden

    def give(self, hidden: torch.Tensor) -> None:
        """What came out for the rows taken last; keeps those that the request wants back."""
        wanted = self.request.rows
        if wanted == "last" and hidden.shape[0] != len(self._ends):
            # Slices, not a list of numbers, which a GPU would have to be told and waited for.
            ends = [hidden[end : end + 1] for end in self._ends]
            hidden = torch.cat(ends) if ends else hidden[:0]
        elif wanted == "none":
            hidden = hidden[:0]
        self._outputs.append(hidden)

    def result(self) -> torch.Tensor:
        """All rows that the request wants back; every row has been given."""
        outputs = self._outputs
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cut_slices(pieces: Sequence[PackedSlice], start: int, stop: int) -> list[PackedSlice]:
    """The slices of the rows `start:stop` of a packed matrix, as a matrix of their own."""
    found = []
    for piece in pieces:
        first, last = max(start, piece.row), min(stop, piece.row + piece.length)
        if first < last:
            position = piece.position + first - piece.row
            extents = _first_rows(piece.extents, position + last - first)
            found.append(PackedSlice(first - start, last - first, position, extents))
    return found


def _first_rows(extents: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[int, int], ...]:
    """The extents of the first `count` positions."""
    kept = []
    for start, stop in extents:
        kept.append((start, min(stop, start + count)))
        count -= stop - start
        if count <= 0:
            break
    return tuple(kept)
