"""How large the chunks of a long prompt should be, so that all servers of a route work at once.

A prompt goes through the stages of a route (links and hops) in chunks, as through a pipeline. Small
chunks fill it sooner; but each chunk costs every hop a fixed time, in which it reads its weights.
Latency is no stage: it delays every chunk alike, and keeps nobody from working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from petal_swarm.errors import ConfigError
from petal_swarm.routing.route import Hop

MIN_CHUNK_TOKENS = 32
"""Shorter steps are not split: they cost a server hardly more than a single token."""

CHUNK_MULTIPLE = 16
"""Chunks end where pages of a KV cache do."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Stage(NamedTuple):
    """What one chunk of n tokens keeps busy for `step_s + n * token_s` seconds: a hop, or a link."""

    step_s: float
    token_s: float


def stages_of(hops: Sequence[Hop], row_bytes: int, *, answers_rows: bool = False) -> list[Stage]:
    """The stages through which a prompt passes, from the figures of a route.

    `row_bytes` is the size of one token's hidden state on the wire; `answers_rows`, whether the last
    hop sends a row for every token, and not just for the last one.
    """
    stages = []
    for hop in hops:
        stages.append(_link(hop.link_bytes_per_s, row_bytes))
        stages.append(Stage(hop.step_s, hop.token_s))
    if answers_rows:
        stages.append(_link(hops[-1].link_bytes_per_s, row_bytes))
    return stages


def choose_chunk(tokens: int, stages: Sequence[Stage], *, limit: int) -> int:
    """Tokens in each chunk of a prompt of `tokens` tokens, so that the last leaves soonest.

    At least `MIN_CHUNK_TOKENS` and a multiple of `CHUNK_MULTIPLE` where `limit` (the most tokens that
    one step may have) allows that; all chunks but the last are equal, and that is not much smaller.
    Of equally good sizes it is the largest; `tokens` or more if splitting does not pay.

    Raises:
        ConfigError: `tokens` or `limit` is less than one.
    """
    if tokens < 1 or limit < 1:
        raise ConfigError(f"a chunk needs at least one token, got {tokens} tokens and a limit of {limit}")
    if min(tokens, limit) <= MIN_CHUNK_TOKENS:
        return limit
    most = min(limit, _rounded_up(tokens))
    sizes = np.arange(most // CHUNK_MULTIPLE, 1, -1) * CHUNK_MULTIPLE
    counts = -(-tokens // sizes)
    sizes = np.minimum(sizes, -(-tokens // (counts * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE)
    times_s = _pipeline_s(sizes, counts, tokens - (counts - 1) * sizes, stages)
    return int(sizes[np.argmin(times_s)])


def _pipeline_s(sizes: Ints, counts: Ints, rest: Ints, stages: Sequence[Stage]) -> Floats:
    """Seconds until the last chunk leaves: `counts` chunks of `sizes` tokens, but `rest` in the last.

    A stage begins with a chunk when it is through with the one before and the chunk is through the
    stage before. So the time is that of the longest chain of such waits: up to some stage the equal
    chunks pass, all of them through the slowest one, and from there on the last chunk does.
    """
    step_s, token_s = (np.array(column)[:, None] for column in zip(*stages, strict=True))
    chunk_s, last_s = step_s + token_s * sizes, step_s + token_s * rest
    chains_s = np.cumsum(chunk_s, 0) + (counts - 2) * np.maximum.accumulate(chunk_s, 0)
    chains_s += np.cumsum(last_s[::-1], 0)[::-1]
    return np.asarray(np.where(counts == 1, last_s.sum(0), chains_s.max(0)))


def _link(bytes_per_s: float, row_bytes: int) -> Stage:
    return Stage(0.0, row_bytes / bytes_per_s if bytes_per_s > 0 else 0.0)


def _rounded_up(tokens: int) -> int:
    return -(-tokens // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
