"""Which blocks are served, and how to name blocks in a sentence."""

from __future__ import annotations

from collections.abc import Iterable

from petal_swarm.errors import ConfigError
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def as_span(blocks: int | Span) -> Span:
    """A number of blocks as the span of a whole model; a span as it is.

    Raises:
        ConfigError: for less than one block.
    """
    if isinstance(blocks, Span):
        return blocks
    if blocks < 1:
        raise ConfigError(f"a model has at least one block, got {blocks}")
    return Span(0, blocks)


def latest(announcements: Iterable[Announcement]) -> list[Announcement]:
    """One announcement for each peer, the last given, ordered by peer id.

    The order makes every choice in this package independent of the order in which a DHT answers.
    """
    by_peer = {announcement.peer_id: announcement for announcement in announcements}
    return [by_peer[peer_id] for peer_id in sorted(by_peer)]


def overlap(a: Span, b: Span) -> range:
    """The blocks in both spans, possibly none."""
    return range(max(a.start, b.start), min(a.end, b.end))


def coverage(announcements: Iterable[Announcement], blocks: int | Span) -> tuple[int, ...]:
    """For each block, how many peers serve it now ("joining" and "left" do not).

    Raises:
        ConfigError: for less than one block.
    """
    wanted = as_span(blocks)
    counts = [0] * len(wanted)
    for announcement in latest(announcements):
        if announcement.state == "serving":
            for block in overlap(announcement.span, wanted):
                counts[block - wanted.start] += 1
    return tuple(counts)


def missing_blocks(announcements: Iterable[Announcement], blocks: int | Span) -> tuple[int, ...]:
    """The blocks that no peer serves now, in order.

    Raises:
        ConfigError: for less than one block.
    """
    wanted = as_span(blocks)
    counts = coverage(announcements, wanted)
    return tuple(block for block, count in zip(wanted.blocks(), counts, strict=True) if count == 0)


def format_blocks(blocks: Iterable[int]) -> str:
    """Blocks as words: `"block 12"`, `"blocks 4-7 and 12"`, `"no blocks"`. The ends are inclusive."""
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    if not runs:
        return "no blocks"
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(words) == 1:
        return f"block{'' if runs[0][0] == runs[0][1] else 's'} {words[0]}"
    return f"blocks {', '.join(words[:-1])} and {words[-1]}"
