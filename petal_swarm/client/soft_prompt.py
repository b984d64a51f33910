"""Rows of a soft prompt in front of the packed rows of every sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def prepend(prompt: Tensor, rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """`prompt [count, hidden]` before each sequence of `rows [tokens, hidden]`; and the new lengths."""
    prompt = prompt.to(rows)
    pieces = [piece for sequence in torch.split(rows, list(lengths)) for piece in (prompt, sequence)]
    return torch.cat(pieces), tuple(length + len(prompt) for length in lengths)


def strip(rows: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
    """The last `kept[i]` of the `lengths[i]` rows of each sequence."""
    if tuple(lengths) == tuple(kept):
        return rows
    sequences = torch.split(rows, list(lengths))
    return torch.cat([sequence[-count:] for sequence, count in zip(sequences, kept, strict=True)])
