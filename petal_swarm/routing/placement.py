"""Which blocks a joining server should host: those through which the swarm is slowest."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from petal_swarm.errors import ConfigError
from petal_swarm.routing.blocks import as_span, latest, overlap
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def block_throughputs(announcements: Iterable[Announcement], blocks: int | Span) -> tuple[float, ...]:
    """For each block, the decode steps a second that its servers can take together.

    A server's part is `1 / (step_time_s + len(span) * block_time_s)`: its time is shared by its
    blocks. "joining" servers count as well, so that two joiners do not fill the same hole.

    Raises:
        ConfigError: for less than one block.
    """
    wanted = as_span(blocks)
    there = [(speed_of(a), a.span) for a in latest(announcements) if a.state != "left"]
    totals = [0.0] * len(wanted)
    # From slow to fast: blocks with equal servers get equal sums, to the last bit.
    for speed, span in sorted(there, key=lambda entry: entry[0]):
        for block in overlap(span, wanted):
            totals[block - wanted.start] += speed
    return tuple(totals)


def choose_span(
    announcements: Iterable[Announcement],
    num_blocks: int,
    capacity: int,
    *,
    tie_break: random.Random | None = None,
) -> Span:
    """The span that a server with room for `capacity` blocks should host.

    It raises the throughput of the weakest block, then of the next weakest, and so on (blocks that
    nobody hosts are the weakest): Petals' rule (arXiv 2209.01188, 2312.08361).
    Among equal spans the lowest is chosen, or any that leaves no gap too small for a server of the
    same capacity, drawn from `tie_break` (for example `random.Random(peer_id)`), so that servers
    joining at the same moment spread. A server that is announced already leaves its own record out.

    Raises:
        ConfigError: `num_blocks` or `capacity` is less than one.
    """
    if capacity < 1:
        raise ConfigError(f"a server needs room for at least one block, got {capacity}")
    throughputs = block_throughputs(announcements, num_blocks)
    length = min(capacity, num_blocks)
    windows = [sorted(throughputs[start : start + length]) for start in range(num_blocks - length + 1)]
    weakest = min(windows)
    starts = [start for start, window in enumerate(windows) if window == weakest]
    start = starts[0] if tie_break is None else tie_break.choice(_side_by_side(starts, length))
    return Span(start, start + length)


def speed_of(announcement: Announcement) -> float:
    """Decode steps a second of a server that is busy with nothing else, through its whole span."""
    step_s = announcement.step_time_s + len(announcement.span) * announcement.block_time_s
    return 1.0 / max(step_s, 1e-9)


def _side_by_side(starts: Sequence[int], length: int) -> list[int]:
    """Of each run of consecutive starts, those `length` apart from the run's first on."""
    chosen: list[int] = []
    first = previous = -1
    for start in starts:
        if not chosen or start != previous + 1:
            first = start
        if (start - first) % length == 0:
            chosen.append(start)
        previous = start
    return chosen
