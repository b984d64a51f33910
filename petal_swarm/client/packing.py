"""From a padded batch to packed rows and back. Padding exists here only: it never travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petal_swarm.errors import ConfigError
from petal_swarm.span import Slice


@dataclass(frozen=True, slots=True)
class Packing:
    """How the rows of a packed matrix stand in a padded batch `[batch, width]`.

    `kept` is a boolean mask `[batch, width]` of the real tokens, or None if all are; `lengths` counts
    them for each row of the batch.
    """

    batch: int
    width: int
    lengths: tuple[int, ...]
    kept: torch.Tensor | None

    @classmethod
    def of(cls, batch: int, width: int, attention_mask: torch.Tensor | None) -> Packing:
        """`attention_mask [batch, >= width]` covers past and new tokens; its last `width` columns count.

        Raises:
            ConfigError: a mask of another shape, or a sequence without any new token.
        """
        if attention_mask is None:
            return cls(batch, width, (width,) * batch, None)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < width:
            raise ConfigError(
                f"attention_mask must be [{batch}, at least {width}], got {list(attention_mask.shape)}"
            )
        kept = attention_mask[:, -width:].bool()
        lengths = tuple(kept.sum(1).tolist())
        if min(lengths) == width:
            return cls(batch, width, lengths, None)
        if min(lengths) == 0:
            raise ConfigError("attention_mask leaves a sequence of the batch without any token")
        return cls(batch, width, lengths, kept)

    def widened(self, columns: int) -> Packing:
        """As if there were so many more real tokens in front of each row of the batch."""
        if columns == 0:
            return self
        lengths = tuple(length + columns for length in self.lengths)
        kept = None if self.kept is None else torch.nn.functional.pad(self.kept, (columns, 0), value=True)
        return Packing(self.batch, self.width + columns, lengths, kept)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`[batch, width, ...]` -> `[tokens, ...]`."""
        return values.flatten(0, 1) if self.kept is None else values[self.kept]

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """`[tokens, columns]` -> `[batch, width, columns]`, zeros where there is padding."""
        if self.kept is None:
            return rows.view(self.batch, self.width, -1)
        padded = rows.new_zeros(self.batch, self.width, rows.shape[-1])
        padded[self.kept] = rows
        return padded


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `[start, stop)` of a long step's packed matrix; `ends` are the sequences they finish."""

    start: int
    stop: int
    slices: tuple[Slice, ...]
    ends: tuple[int, ...]


def chunk_slices(slices: Sequence[Slice], max_tokens: int) -> list[Chunk]:
    """Split slices into steps of at most `max_tokens` tokens each, in order."""
    chunks: list[Chunk] = []
    current: list[Slice] = []
    ends: list[int] = []
    start = row = 0
    for index, piece in enumerate(slices):
        done = 0
        while done < piece.length:
            taken = min(piece.length - done, max_tokens - (row - start))
            current.append(Slice(piece.sequence, piece.position + done, taken))
            done += taken
            row += taken
            if done == piece.length:
                ends.append(index)
            if row - start == max_tokens:
                chunks.append(Chunk(start, row, tuple(current), tuple(ends)))
                current, ends, start = [], [], row
    if current:
        chunks.append(Chunk(start, row, tuple(current), tuple(ends)))
    return chunks


def unique_rows(
    token_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[list[int], list[int]] | None:
    """Which rows of a batch are worth computing, and which of those each row equals; None if all differ.

    Beam search and `num_return_sequences` begin with every prompt repeated: one is enough.
    """
    if token_ids.shape[0] == 1:
        return None
    keys = token_ids if attention_mask is None else torch.cat([token_ids, attention_mask.long()], dim=1)
    seen: dict[tuple[int, ...], int] = {}
    firsts: list[int] = []
    sources: list[int] = []
    for index, row in enumerate(keys.tolist()):
        key = tuple(row)
        if key not in seen:
            seen[key] = len(firsts)
            firsts.append(index)
        sources.append(seen[key])
    return None if len(firsts) == token_ids.shape[0] else (firsts, sources)
