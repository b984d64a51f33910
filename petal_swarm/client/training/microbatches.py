"""Cutting a batch into passes: between sequences, never inside one, since a pass knows no earlier tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from petal_swarm.errors import ConfigError
from petal_swarm.routing.route import Hop

#: More passes than so many for each hop gain little: S hops that take M of them are busy for M / (M + S - 1)
#: of the time.
PASSES_PER_HOP = 4
#: Forward and backward of a token, against what it costs in a prompt.
TOKEN_FACTOR = 3.0
#: Whatever its rows, a pass reads the weights twice, as two steps do,
STEP_FACTOR = 2.0
#: and spends this for each block on making a graph and going back through it. Measured: 0.6 ms.
BLOCK_S = 6e-4
#: What is on its way counts as a part of a stage.
WAY_STAGES = 0.25


class Microbatch(NamedTuple):
    """Rows `[start, stop)` of a packed matrix: whole sequences of these `lengths`."""

    start: int
    stop: int
    lengths: tuple[int, ...]


def choose_passes(tokens: int, hops: Sequence[Hop]) -> int:
    """In how many passes `tokens` are through the hops first, by what those announce of themselves.

    M passes through S hops take (M + S - 1) times as long as one at the slowest hop, which is a cost of its
    own and an M-th of what the tokens cost.
    """
    slowest = max(hops, key=lambda hop: hop.step_s + tokens * hop.token_s)
    whole_s = TOKEN_FACTOR * tokens * slowest.token_s
    each_s = STEP_FACTOR * slowest.step_s + BLOCK_S * len(slowest.span)
    best = math.sqrt(whole_s * (len(hops) - 1 + WAY_STAGES) / each_s)
    return max(1, min(round(best), PASSES_PER_HOP * len(hops)))


def cut_batch(
    lengths: Sequence[int], *, max_tokens: int, max_sequences: int, passes: int
) -> list[Microbatch]:
    """Passes of nearly equal size, in order; not many more than `passes`, unless the bounds ask for them.

    Raises:
        ConfigError: a sequence is longer than `max_tokens`, so that no pass can hold it.
    """
    longest, total = max(lengths), sum(lengths)
    if longest > max_tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens is longer than the {max_tokens} that these servers take at once"
            " in training; cut it, or start servers with a larger --max-batch-tokens"
        )
    parts = max(passes, math.ceil(total / max_tokens), math.ceil(len(lengths) / max_sequences))
    cut: list[Microbatch] = []
    current: list[int] = []
    start = row = 0
    for index, length in enumerate(lengths):
        full = row - start + length > max_tokens or len(current) == max_sequences
        if current and (full or _is_due(row, length, total * (len(cut) + 1) / parts)):
            cut.append(Microbatch(start, row, tuple(current)))
            current, start = [], row
        current.append(lengths[index])
        row += length
    cut.append(Microbatch(start, row, tuple(current)))
    return cut


def _is_due(row: int, length: int, end: float) -> bool:
    """Whether a cut here is nearer to where the pass should end than one after the next sequence."""
    return row + length - end > end - row
