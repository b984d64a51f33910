"""Cutting a batch into passes: between sequences, never inside one, since a pass knows no earlier tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from petal_swarm.errors import ConfigError

#: Smaller passes spend more on their way than in the blocks.
MIN_PASS_TOKENS = 64
#: A pipeline of S hops that takes M passes is busy for M / (M + S - 1) of the time.
PASSES_PER_HOP = 4


class Microbatch(NamedTuple):
    """Rows `[start, stop)` of a packed matrix: whole sequences of these `lengths`."""

    start: int
    stop: int
    lengths: tuple[int, ...]


def cut_batch(lengths: Sequence[int], *, max_tokens: int, max_sequences: int, hops: int) -> list[Microbatch]:
    """Passes of nearly equal size, in order, enough to keep `hops` servers busy at once.

    `hops` counts those of all lanes.

    Raises:
        ConfigError: a sequence is longer than `max_tokens`, so that no pass can hold it.
    """
    longest, total = max(lengths), sum(lengths)
    if longest > max_tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens is longer than the {max_tokens} that these servers take at once"
            " in training; cut it, or start servers with a larger --max-batch-tokens"
        )
    busy = PASSES_PER_HOP * hops if hops > 1 else 2  # one is computed while the other travels
    wanted = min(busy, total // MIN_PASS_TOKENS, len(lengths))
    parts = max(1, wanted, math.ceil(total / max_tokens), math.ceil(len(lengths) / max_sequences))
    passes: list[Microbatch] = []
    current: list[int] = []
    start = row = 0
    for index, length in enumerate(lengths):
        full = row - start + length > max_tokens or len(current) == max_sequences
        if current and (full or _is_due(row, length, total * (len(passes) + 1) / parts)):
            passes.append(Microbatch(start, row, tuple(current)))
            current, start = [], row
        current.append(lengths[index])
        row += length
    passes.append(Microbatch(start, row, tuple(current)))
    return passes


def _is_due(row: int, length: int, end: float) -> bool:
    """Whether a cut here is nearer to where the pass should end than one after the next sequence."""
    return row + length - end > end - row
